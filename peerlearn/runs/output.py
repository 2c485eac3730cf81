"""What is printed: it may be lost, and nothing else is lost with it."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from peerlearn.errors import DONE

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)
_STANDARD_OUTPUTS = (1, 2)
# Columns enough for any table.
_ANY_WIDTH = 10_000

logger = logging.getLogger(__name__)
_told: set[tuple[str, object]] = set()


class _NobodyReadsError(BaseException):
    """Ends work that is done to be read. Not an Exception: rich and others would take it for theirs."""


class _LossyStream:
    """A text stream that drops what cannot be written: a closed pipe, a full disk or a terminal that is gone."""

    def __init__(self, stream: IO[str], *, read: bool) -> None:
        self._stream = stream
        self._read = read

    def write(self, text: str) -> int:
        """Write the text, or lose it."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            return self._stream.write(escaped)
        except (OSError, ValueError) as error:
            self._lost(error)
            return len(text)

    def flush(self, *, last: bool = False) -> None:
        """Write what is held back, or lose it; the ``last`` time for good."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error, last=last)

    def _lost(self, error: Exception, *, last: bool = False) -> None:
        # A full disk may have room again.
        if last or getattr(error, "errno", None) not in _MAY_PASS:
            self._send_nowhere()
        if self._read and isinstance(error, BrokenPipeError):
            raise _NobodyReadsError

    def _send_nowhere(self) -> None:
        """Send all that follows nowhere, also what the process writes when it ends."""
        with suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            # Others are files of those who call us from Python.
            if descriptor in _STANDARD_OUTPUTS:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_output(*, read: bool = False) -> Iterator[None]:
    """Within it, output that cannot be written is lost without an error, and signs that a terminal lacks are escaped.

    Args:
        read: whether being read is all that the work is for, so that it ends where nobody does any more.
    """
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    # A process without standard output has None.
    lossy: Any = [stream and _LossyStream(stream, read=read) for stream in before]
    sys.stdout, sys.stderr = lossy
    try:
        with suppress(_NobodyReadsError):
            try:
                yield
            finally:
                # What is left would fail when the process ends, and change its exit code.
                for stream in filter(None, lossy):
                    stream.flush(last=True)
    finally:
        sys.stdout, sys.stderr = before


def _occupy_standard_descriptors() -> None:
    """Where a process began without standard streams, keep their numbers from files: libraries write to them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free is this one.
            os.open(os.devnull, os.O_RDWR)


def with_lossy_output(
    verb: Callable[[list[str]], int], *, read: bool
) -> Callable[[list[str]], int]:
    """A verb that goes on where its output cannot be written or, if it is ``read`` alone, ends well: `lossy_output`."""

    def run(words: list[str]) -> int:
        with lossy_output(read=read):
            return verb(words)
        return DONE

    return run


def warn_once(logger: logging.Logger, about: object, message: str, *arguments: object) -> None:
    """Warn of what several parts of the work meet: once in this process for each thing that it is about."""
    if (message, about) not in _told:
        _told.add((message, about))
        logger.warning(message, *arguments)


def show(*parts: "RenderableType") -> None:
    """Print tables and texts of rich, no number cut off in a narrow terminal. If that fails, there is one warning.

    Text that comes from names must be `rich.text.Text`: plain strings may hold markup.
    """
    # Imported here: `--help` should not wait for it.
    from rich.console import Console
    from rich.table import Table

    try:
        for part in parts:
            if isinstance(part, Table):
                _keep_numbers_whole(part)
            narrowest = Console(width=_ANY_WIDTH).measure(part).minimum
            width = max(Console().width, narrowest)
            Console(width=width).print(part, highlight=False)
    except Exception as error:
        logger.warning("a table could not be printed (%s): the files have its numbers", error)


def _keep_numbers_whole(table: "Table") -> None:
    """Columns that do not wrap are as wide as what is in them: rich would cut them off."""
    from rich.console import Console

    wide = Console(width=_ANY_WIDTH)
    for column in table.columns:
        if column.no_wrap:
            cells = (column.header, *column.cells)
            column.min_width = max(wide.measure(cell).maximum for cell in cells)
