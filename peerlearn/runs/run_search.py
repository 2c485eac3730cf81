"""Run directories below folders, however deep they lie."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peerlearn.errors import UserError
from peerlearn.runs.directory import STUDY_FILE, RunDirectory


class FoundRun(NamedTuple):
    """A run that was searched for.

    Attributes:
        folder: folder of the run, below the top as it was named.
        top: folder in which it was searched for; the run itself where a run was named.
    """

    folder: Path
    top: Path


def search_runs(tops: Sequence[Path]) -> list[FoundRun]:
    """The runs in the folders, in the order of their names; a run that is reached by several ways stands once.

    What lies within a run is no run. Hidden folders are left aside, links are followed.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    seen: set[str] = set()
    return [FoundRun(folder, top) for top in tops for folder in _below(top, seen, is_named=True)]


def _below(folder: Path, seen: set[str], *, is_named: bool = False) -> Iterator[Path]:
    # Each place is looked at once: a link may lead to a folder above itself, or to a run of another name.
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    if RunDirectory(folder).begun and not (folder / STUDY_FILE).is_file():
        yield folder
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(each.name for each in entries if _is_folder(each))
    except OSError as error:
        if is_named:
            reason = error.strerror or error
            raise UserError(f"{folder}: {reason}: name runs, or folders that hold some") from error
        return
    for name in names:
        yield from _below(folder / name, seen)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.is_dir()
    except OSError:
        # A link to itself.
        return False
