"""Lines for people on a terminal: broken between words, and never on the line of a progress bar."""

import os
import shutil
import sys
import textwrap
from typing import TextIO

# Clear the cursor's line, and go to the line above it.
_CLEAR, _UP = "\r\x1b[2K", "\x1b[1A"

# Lines of the progress bar that is on the terminal now; the cursor is in its last one.
bar_lines = 0


def wrapped(text: str, stream: TextIO | None) -> str:
    """The text as it is or, for a terminal, broken between words at the terminal's width."""
    if not _is_terminal(stream):
        return text
    columns = shutil.get_terminal_size().columns
    lines = (
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )
    return "\n".join(lines)


def _is_terminal(stream: TextIO | None) -> bool:
    """A stream may be missing, or closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def say(text: str) -> None:
    """Print a line for people."""
    print(wrapped(text, sys.stdout), flush=True)


def say_at_once(line: str) -> None:
    """Write a line to stderr from a signal's handler, which may have interrupted any other writer."""
    text = f"{line}\n"
    if bar_lines:
        # Take the bar away. It comes back below the line, and first clears as many lines as it had.
        away = _UP.join([_CLEAR] * bar_lines)
        text = f"{away}{text}" + "\n" * (bar_lines - 1)
    os.write(2, text.encode(errors="backslashreplace"))
