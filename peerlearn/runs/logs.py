"""Where log records go: warnings to the main rank's terminal, all of them to a file of each rank."""

import faulthandler
import logging
import threading
from pathlib import Path
from typing import TextIO


def log_to_terminal(*, main: bool) -> None:
    """Show warnings on the main rank's terminal, where no traceback belongs."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler() if main else logging.NullHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(lambda record: not record.exc_info)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.handlers = [terminal]
    logging.captureWarnings(True)


def log_to(file: Path) -> TextIO:
    """Send every log record to the rank's file too, and the stacks of a crash in a library's own code.

    Returns the open file, for stacks at a standstill.
    """
    to_file = _LogFile(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(to_file)
    assert to_file.stream is not None
    faulthandler.enable(to_file.stream)
    threading.excepthook = _log_thread_failure
    return to_file.stream


class _LogFile(logging.FileHandler):
    """A log whose disk is full loses lines, and says nothing of it: the run itself goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        return


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """A thread of a library died (TensorBoard's, on a full disk): its traceback belongs to the log."""
    if failure.exc_value is not None:
        logging.getLogger(__name__).error("a thread failed", exc_info=failure.exc_value)
