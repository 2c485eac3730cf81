"""Folders of training steps, named alike under checkpoints/ and export/; a file beside them names the newest.

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
    """The step that a folder's name tells; None for other names, as of a save that was set aside."""
    match = _PATTERN.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """Every step that has a folder, and the folder, the newest first; whole or not."""
    steps = ((step_of(path.name), path) for path in root.glob("step-*"))
    found = [(step, path) for step, path in steps if step is not None]
    return sorted(found, key=lambda item: item[0], reverse=True)


def write_latest(folder: Path) -> None:
    """Name a finished folder as the newest.

    Raises:
        OSError: the disk does not take it.
    """
    write_text(folder.parent / LATEST_FILE, folder.name + "\n")


def latest_step(root: Path) -> int | None:
    """The step that is named as the newest; None where the file is missing or spoilt."""
    try:
        return step_of((root / LATEST_FILE).read_text().strip())
    except (OSError, ValueError):
        return None
