"""An index of what the runs of a folder tell, so that files that have not changed are not read again.

    FOLDER/.peerlearn-index.json    {"version", "runs": {path of a run below FOLDER: its memory}}

It may be removed at any time. Processes that write it at once replace it as a whole, and each of its entries tells
which files it was read from, so that an old entry is never taken for a new one.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.run_contents import Memory

INDEX_FILE = ".peerlearn-index.json"
# Raised when what is remembered of a run changes its form or its meaning.
_VERSION = 1

logger = logging.getLogger(__name__)


def read_index(folder: Path) -> dict[str, Memory]:
    """What is remembered of the runs below a folder; nothing, with a line, where the index is damaged."""
    try:
        index = read_json_object(folder / INDEX_FILE)
        if index.get("version") != _VERSION:
            return {}
        return {path: dict(memory) for path, memory in dict(index["runs"]).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError):
        logger.warning("%s cannot be read: the runs are read without it", folder / INDEX_FILE)
        return {}


def write_index(folder: Path, runs: Mapping[str, Memory]) -> None:
    """Replace the index; a line where the disk does not take it."""
    text = json.dumps({"version": _VERSION, "runs": runs}) + "\n"
    try:
        write_text(folder / INDEX_FILE, text, durable=False)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the next look reads the runs again",
            folder / INDEX_FILE,
            error.strerror,
        )
