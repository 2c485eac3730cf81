"""Folders of training steps, with the same names under checkpoints/ and export/. A file beside them names the newest.

ROOT/  step-00001000/   step-00002000/   latest (text: step-00002000)
"""

import re
from pathlib import Path

from peerlearn.runs.files import write_text

LATEST_FILE = "latest"
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


def latest_step(root: Path) -> int | None:
    """The step that `latest` names; None if the file is missing or damaged."""
    try:
        return step_of((root / LATEST_FILE).read_text().strip())
    except (OSError, ValueError):
        return None
