"""Files of a run for a reader of the board: the end of its newest log, and its metrics as CSV.

Only plain files below the run directory are opened: a link could lead to a file that its owner alone may read.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import open_regular
from peerlearn.runs.text import csv_cell

_LOG_BYTES, _LOG_LINES = 2**18, 400
_ROWS_OF_PIECE = 500
# Of a terminal: colours and the cursor (CSI), titles and links (OSC), and others of two characters.
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[ -/]*[0-~])")
# Characters that are no text; format characters could show it in another order than it is in.
_NO_TEXT = ("Cc", "Cf", "Cs", "Zl", "Zp")


def log_tail(run: RunDirectory) -> str | None:
    """The last lines of the main rank's newest log, without what only a terminal understands; None without a log."""
    try:
        with _plain_file(run.log(run.newest_attempt(), 0), run.root) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            content = file.read(_LOG_BYTES)
    except OSError:
        return None
    text = content.decode(errors="replace")
    lines = text.split("\n")[1 if size > _LOG_BYTES else 0 :]
    return "\n".join(map(_plain_line, lines[-_LOG_LINES:]))


def _plain_line(line: str) -> str:
    # A progress bar writes its line again and again; the last time counts.
    line = _ESCAPE.sub("", line.rstrip("\r")).rpartition("\r")[2]
    return "".join(
        each for each in line if each == "\t" or unicodedata.category(each) not in _NO_TEXT
    )


def metrics_csv(run: RunDirectory) -> Iterator[bytes] | None:
    """The rows of metrics.jsonl as CSV, some rows at a time; None without the file. Damaged lines are left out.

    The columns are the names of all rows. They are read first, up to where the file ends now.
    """
    try:
        file = _plain_file(run.metrics, run.root)
    except OSError:
        return None
    return _csv_pieces(file)


def _csv_pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        end = file.seek(0, os.SEEK_END)
        names: dict[str, None] = {}
        for row in _rows(file, end):
            names.update(dict.fromkeys(row))
        piece = io.StringIO(newline="")
        rows = csv.writer(piece, lineterminator="\n")
        rows.writerow(map(csv_cell, names))
        for number, row in enumerate(_rows(file, end), start=1):
            rows.writerow(_cell(row.get(name)) for name in names)
            if number % _ROWS_OF_PIECE == 0:
                yield piece.getvalue().encode()
                piece.seek(0)
                piece.truncate()
        yield piece.getvalue().encode()


def _rows(file: BinaryIO, end: int) -> Iterator[dict[str, object]]:
    file.seek(0)
    while file.tell() < end:
        if not (line := file.readline()):
            # It was cut short since.
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _cell(value: object) -> str:
    return "" if value is None else csv_cell(str(value))


def _plain_file(path: Path, root: Path) -> BinaryIO:
    """A file to read that lies below the folder and is no link, pipe or device.

    Raises:
        OSError: it is not there, or something else.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise FileNotFoundError(path)
    return open_regular(path, follows_links=False)
