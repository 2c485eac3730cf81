"""Ages of files by the clock of their own file system.

The clock of a file server is not that of the machine that wrote the file, nor that of the machine that asks. So the
time of a file is compared with the time that the same file system gives to a new one.
"""

import os
import tempfile
import time
from pathlib import Path

# File systems keep times to so many seconds or better.
_GRAIN_SECONDS = 2.0


class FileAges:
    """Measures ages, by one new file on each file system. It has no name, or loses it at once."""

    def __init__(self) -> None:
        # Device -> time of its file system less this process's monotonic time.
        self._ahead: dict[int, float] = {}

    def age_seconds(self, file: Path) -> float | None:
        """Seconds since the file was written; None where nobody can tell.

        That is, no folder of the file system that was asked about could be written so far, or the time of the file is
        yet to come: a clock has been set.
        """
        try:
            status = file.stat()
        except OSError:
            return None
        if status.st_dev not in self._ahead:
            try:
                self._ahead[status.st_dev] = _new_file_seconds(file.parent) - time.monotonic()
            except OSError:
                return None
        age = time.monotonic() + self._ahead[status.st_dev] - status.st_mtime
        return max(age, 0.0) if age >= -_GRAIN_SECONDS else None


def _new_file_seconds(folder: Path) -> float:
    """The time of a file that is written there now."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\n")
        file.flush()
        return os.fstat(file.fileno()).st_mtime
