"""The places of log records: warnings go to the main rank's terminal, all records to a file of each rank."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from peerlearn.runs.files import open_no_link
from peerlearn.runs.terminal import wrapped


def log_to_terminal(*, main: bool) -> None:
    """Show warnings on the main rank's terminal, without tracebacks."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    # The loaders of libraries tell of what they try, and of what they do without.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    terminal = _Terminal() if main else logging.NullHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(lambda record: not record.exc_info)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.handlers = [terminal]
    logging.captureWarnings(True)


def log_to(file: Path) -> TextIO:
    """Write every log record to the rank's file too, and the stacks of a crash in a library's own code.

    Returns:
        The open file, for the stacks of a process that hangs.
    """
    try:
        to_file = _LogFile(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logging.getLogger(__name__).warning("%s cannot be written (%s)", file, error.strerror)
        to_file = _LogFile(os.devnull)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(to_file)
    assert to_file.stream is not None
    faulthandler.enable(to_file.stream)
    threading.excepthook = _log_thread_failure
    return to_file.stream


class _Terminal(logging.Handler):
    """Whatever stderr is now: a progress bar takes its place, to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        # What only tells must not end the run.
        with contextlib.suppress(OSError, ValueError):
            print(wrapped(self.format(record), sys.stderr), file=sys.stderr, flush=True)


class _LogFile(logging.FileHandler):
    """A log file that loses lines without a message if it cannot be written, because the run itself goes on."""

    def _open(self) -> TextIOWrapper:
        file = open(self.baseFilename, f"{self.mode}b", opener=open_no_link)  # noqa: SIM115
        return TextIOWrapper(file, encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        # A library that configures logging closes every file, which is then opened again for the next line.
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        return


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log the traceback of a library's thread that died (TensorBoard's, on a full disk)."""
    if failure.exc_value is not None:
        logging.getLogger(__name__).error("a thread failed", exc_info=failure.exc_value)
