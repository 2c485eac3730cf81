"""Copies of the source tree with something added, as its next author would; other processes find it there."""

import os
import subprocess
import sys
from pathlib import Path

from peerlearn import HOME, PACKAGES


def copied_tree(folder: Path) -> Path:
    """The source files of all packages, below ``folder``."""
    for package in PACKAGES:
        for path in (HOME / package).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                copy = folder / path.relative_to(HOME)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    return folder


def add_line(file: Path, after: str, line: str) -> None:
    """Put a line into a file, below the one that begins with ``after``."""
    lines = file.read_text().splitlines()
    (place,) = (n for n, each in enumerate(lines) if each.startswith(after))
    file.write_text("\n".join([*lines[: place + 1], line, *lines[place + 1 :]]) + "\n")


def command_of(tree: Path, *words: str) -> dict:
    """Arguments for `subprocess`: the command of that tree."""
    return {
        "args": [sys.executable, "-m", "peerlearn", *words],
        "cwd": tree,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
        "text": True,
    }


def run_in(tree: Path, *words: str, code: int = 0) -> str:
    """Run the command of that tree to its end; its output, on both streams."""
    done = subprocess.run(
        **command_of(tree, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert done.returncode == code, done.stdout
    return done.stdout
