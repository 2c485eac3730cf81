"""Progress of long work: a bar on a terminal, elsewhere a plain line every ten seconds."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_INTERVAL_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Reporter:
    """Counts the work that is done; `progress` makes it."""

    def __init__(
        self, total: int, unit: str, done: int, bar: Progress | None, *, quiet: bool = False
    ) -> None:
        self._bar = bar
        self._quiet = quiet
        self._task: TaskID | None = bar.add_task("", total=total, completed=done) if bar else None
        self._total, self._unit, self._done, self._at_start = total, unit, done, done
        self._start = self._last_line = time.monotonic()

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Count ``amount`` more units as done and show ``text`` beside the count."""
        self._done += amount
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=amount, description=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            rate = (self._done - self._at_start) / (now - self._start)
            left = time_text((self._total - self._done) / rate) if rate else "?"
            self.say(f"{self._unit} {self._done}/{self._total}  {text}  {left} left")

    def say(self, line: str) -> None:
        """Print a line that stays on the screen, and log it."""
        if self._quiet:
            return
        logger.info("%s", line)
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:
            # The reader of the output is gone (`| head`). The work goes on.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextmanager
def progress(total: int, unit: str, *, done: int = 0, quiet: bool = False) -> Iterator[Reporter]:
    """Report the progress of long work.

    Args:
        total: number of units of work.
        unit: name of the unit.
        done: number of units that are done already.
        quiet: whether to print nothing.
    """
    console = Console()
    if quiet or not console.is_terminal:
        yield Reporter(total, unit, done, None, quiet=quiet)
        return
    columns = (
        TextColumn(unit),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Reporter(total, unit, done, bar)


def time_text(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
