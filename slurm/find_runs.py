"""The runs that a command line names: run directories, and folders that hold some."""

import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from peerlearn.errors import UserError
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from slurm.submission import JOBS_FILE

# Number of runs that are read at once: most of the time is waiting for a file server.
READERS = 32
# The largest depth of a run below a folder on the command line.
_LEVELS = 2


def find_runs(words: Sequence[Path]) -> list[Path]:
    """The named runs, and the runs in named folders: a study, `runs`.

    Raises:
        UserError: a folder is missing, or no folder holds a run.
    """
    with ThreadPool(READERS) as readers:
        for word, there in zip(words, readers.map(Path.exists, words), strict=True):
            if not there:
                raise UserError(
                    f"{word} is not there: name run directories, or a folder that has some"
                )
        places = [_Place(word, _LEVELS) for word in words]
        while any(place.levels is not None for place in places):
            insides = readers.map(_look_into, places, chunksize=1)
            places = [found for inside in insides for found in inside]
    if not places:
        raise UserError(f"no run in {', '.join(map(str, words))}: name run directories")
    return list({place.folder.absolute(): place.folder for place in places}.values())


def is_run(folder: Path) -> bool:
    """Whether the folder is a run, or was submitted to become one."""
    if (folder / STUDY_FILE).is_file():
        return False
    return RunDirectory(folder).begun or (folder / JOBS_FILE).is_file()


class _Place(NamedTuple):
    """A folder and the number of levels below it in which runs are looked for; None for a run."""

    folder: Path
    levels: int | None


def _look_into(place: _Place) -> list[_Place]:
    """The place itself if it is a run, else the folders in it."""
    folder, levels = place
    if levels is None or is_run(folder):
        return [_Place(folder, None)]
    if levels == 0:
        return []
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries if each.is_dir() and each.name[0] != "."]
    except OSError:
        return []
    return [_Place(folder / name, levels - 1) for name in sorted(names)]
