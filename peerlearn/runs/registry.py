"""All runs below some folders, with what their files tell: nothing else keeps a list of them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.lock import living_owner, look_at_owner
from peerlearn.runs.notes import Notes, read_notes
from peerlearn.runs.run_contents import Memory, RunScore, read_contents
from peerlearn.runs.run_index import read_index, write_index
from peerlearn.runs.run_search import FoundRun, search_runs

# Number of runs that are read at once: on a file server most of the time is waiting.
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class RegisteredRun:
    """A run, as its directory tells.

    Attributes:
        name: folder of the run, as the user named it.
        state: done, failed, running, or stopped: none of these, to be resumed.
        reason: reason for which the run failed; None of other runs.
        step: step of its newest row of metrics; None without one.
        config: config of the run by dotted keys; empty where it cannot be read.
        scores: scores of the run by their names.
        notes: notes and tags of the run.
        problems: what cannot be read of the run, in words.
    """

    name: str
    state: str
    reason: str | None
    step: int | None
    config: dict[str, Any]
    scores: dict[str, RunScore]
    notes: Notes
    problems: tuple[str, ...]


def read_registry(folders: Sequence[Path]) -> list[RegisteredRun]:
    """The runs below the folders, in the order of their names.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    found = search_runs(folders)
    # A run that was named itself has no folder of its own for an index.
    tops = dict.fromkeys(each.top for each in found if each.top != each.folder)
    indexes = {top: read_index(top) for top in tops}
    read = read_runs(
        found, {each.folder: indexes.get(each.top, {}).get(_key(each), {}) for each in found}
    )
    for top, index in indexes.items():
        memories = {
            _key(each): memory
            for each, (_, memory) in zip(found, read, strict=True)
            if each.top == top
        }
        if memories != index:
            write_index(top, memories)
    return [run for run, _ in read]


def read_runs(
    found: Sequence[FoundRun], memories: Mapping[Path, Memory]
) -> list[tuple[RegisteredRun, Memory]]:
    """The runs that were searched for, each with what to remember of it.

    Args:
        found: the runs.
        memories: what an earlier call has returned, by the runs' folders; a run without one is read whole.
    """
    with ThreadPool(_READERS) as readers:
        # Owners on other machines are waited for once, not one after another.
        readers.map(look_at_owner, [each.folder for each in found])
        return readers.map(lambda each: _read(each, memories.get(each.folder, {})), found)


def _key(found: FoundRun) -> str:
    return os.path.relpath(found.folder, found.top)


def _read(found: FoundRun, memory: Memory) -> tuple[RegisteredRun, Memory]:
    run = RunDirectory(found.folder)
    contents, memory = read_contents(run, memory)
    state, reason = _state(run)
    problems = [*contents.problems]
    if contents.is_cut and state != "running":
        problems.append(f"{run.metrics.name} ends in half a line")
    try:
        notes = read_notes(run.notes)
    except OSError as error:
        notes = Notes()
        problems.append(f"{run.notes.name} cannot be read ({error.strerror})")
    registered = RegisteredRun(
        name=str(found.folder),
        state=state,
        reason=reason,
        step=contents.step,
        config=contents.config,
        scores=contents.scores,
        notes=notes,
        problems=tuple(problems),
    )
    return registered, memory


def _state(run: RunDirectory) -> tuple[str, str | None]:
    if run.done:
        return "done", None
    reason = run.failure()
    if reason is not None:
        return "failed", reason
    return ("running" if living_owner(run.root) else "stopped"), None
