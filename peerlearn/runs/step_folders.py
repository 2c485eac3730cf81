"""Folders of training steps, with the same names under checkpoints/ and export/. A file beside them names the newest.

ROOT/  step-00001000/   step-00002000/   latest (text: step-00002000)   best (text: the step that validation chose)
"""

import re
from pathlib import Path

from peerlearn.runs.files import write_text

LATEST_FILE = "latest"
BEST_FILE = "best"
_PATTERN = re.compile(r"step-(\d+)")


def step_folder(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a folder's name; None for other names, such as that of a save that was set aside."""
    match = _PATTERN.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """Every step that has a folder, whole or not, and the folder, newest first."""
    steps = ((step_of(path.name), path) for path in root.glob("step-*"))
    found = [(step, path) for step, path in steps if step is not None]
    return sorted(found, key=lambda item: item[0], reverse=True)


def write_latest(folder: Path) -> None:
    """Write `latest`, which names a finished folder as the newest.

    Raises:
        OSError: the disk does not take the file.
    """
    write_text(folder.parent / LATEST_FILE, folder.name + "\n")


def write_best(folder: Path) -> None:
    """Write `best`, which names a finished folder as that of the step which validation chose.

    Raises:
        OSError: the disk does not take the file.
    """
    write_text(folder.parent / BEST_FILE, folder.name + "\n")


def latest_step(root: Path) -> int | None:
    """The step that `latest` names; None if the file is missing or damaged."""
    return _named_step(root / LATEST_FILE)


def best_step(root: Path) -> int | None:
    """The step that `best` names; None if the file is missing or damaged."""
    return _named_step(root / BEST_FILE)


def _named_step(file: Path) -> int | None:
    try:
        return step_of(file.read_text().strip())
    except (OSError, ValueError):
        return None
