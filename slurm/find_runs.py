"""Which runs a command line means: run directories, and folders that hold some."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peerlearn.errors import UserError
from slurm.submission import JOBS_FILE

_LEVELS = 2


def find_runs(words: Sequence[Path]) -> list[Path]:
    """The runs named, and those of folders named: a sweep, a pipeline, `runs`.

    Raises:
        UserError: a folder is not there, or none of them holds a run.
    """
    for word in words:
        if not word.exists():
            raise UserError(f"{word} is not there: name run directories, or a folder that has some")
    found = [run for word in words for run in _runs_below(word, _LEVELS)]
    if not found:
        raise UserError(f"no run in {', '.join(map(str, words))}: name run directories")
    return list({run.absolute(): run for run in found}.values())


def is_run(folder: Path) -> bool:
    """Whether it is a run, or has been submitted to become one."""
    return (folder / "config.yaml").is_file() or (folder / JOBS_FILE).is_file()


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if (folder / "pipeline.yaml").is_file():
        levels = _LEVELS
    if levels == 0 or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs_below(path, levels - 1)
