"""All runs and studies below a folder as they stand now, for one who looks again and again."""

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from peerlearn.report.signs_of_life import state_text
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from peerlearn.runs.registry import RegisteredRun, read_runs
from peerlearn.runs.run_contents import Memory
from peerlearn.runs.run_index import read_index
from peerlearn.runs.run_search import search_runs
from peerlearn.runs.standing import Standing, read_standing

_READERS = 16
# Looking takes at most a fifth of the time, and is not done more often than this.
_REST, _LEAST_SECONDS = 4.0, 1.0


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """A run as it stands.

    Attributes:
        name: path of the run below the folder.
        registered: what its files tell.
        standing: how its newest start stands.
        attempt: number of its newest start; 0 before the first.
        state: its state in words, with what its heartbeats tell.
    """

    name: str
    registered: RegisteredRun
    standing: Standing
    attempt: int
    state: str


@dataclass(frozen=True, kw_only=True)
class WatchedFolder:
    """The runs and studies of a folder.

    Attributes:
        runs: runs by their names.
        studies: runs of each study by the study's name.
    """

    runs: dict[str, WatchedRun]
    studies: dict[str, list[WatchedRun]]


class RunWatch:
    """Looks at a folder when it is asked, and remembers what it has read. It writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._looks = threading.Lock()
        self._memories: dict[Path, Memory] = {}
        self._seen: WatchedFolder | None = None
        self._rests_until = 0.0

    def now(self) -> WatchedFolder:
        """The folder as it was a moment ago. While another thread looks, what was seen before.

        Raises:
            UserError: the folder is missing or cannot be read.
        """
        if self._seen is not None and time.monotonic() < self._rests_until:
            return self._seen
        # The first look is waited for.
        if not self._looks.acquire(blocking=self._seen is None):
            return self._seen or self.now()
        try:
            if self._seen is None or time.monotonic() >= self._rests_until:
                self._seen = self._look()
            return self._seen
        except BaseException:
            self._seen = None
            raise
        finally:
            self._looks.release()

    def _look(self) -> WatchedFolder:
        begun = time.monotonic()
        found = search_runs([self.folder])
        if not self._memories:
            index = read_index(self.folder)
            self._memories = {self.folder / path: memory for path, memory in index.items()}
        read = read_runs(found, self._memories)
        self._memories = {
            each.folder: memory for each, (_, memory) in zip(found, read, strict=True)
        }
        with ThreadPool(_READERS) as readers:
            watched = readers.map(self._watched, [run for run, _ in read])
        runs = {run.name: run for run in watched}
        now = time.monotonic()
        self._rests_until = now + max(_LEAST_SECONDS, _REST * (now - begun))
        return WatchedFolder(runs=runs, studies=self._studies(runs))

    def _watched(self, registered: RegisteredRun) -> WatchedRun:
        run = RunDirectory(Path(registered.name))
        attempt = run.newest_attempt()
        standing = read_standing(run.logs(attempt)) if attempt else None
        return WatchedRun(
            name=self._name(run.root),
            registered=registered,
            standing=standing or Standing(),
            attempt=attempt,
            state=state_text(run, registered.state, attempt),
        )

    def _name(self, folder: Path) -> str:
        """A run that was named itself has the name of its folder."""
        return os.path.relpath(folder, self.folder if folder != self.folder else folder.parent)

    def _studies(self, runs: Mapping[str, WatchedRun]) -> dict[str, list[WatchedRun]]:
        """The studies: folders above runs, and those of the folder itself, which may not have a run yet."""
        above = {str(parent) for name in runs for parent in Path(name).parents} - {"."}
        names = sorted({*above, *_folders(self.folder)})
        studies = [name for name in names if (self.folder / name / STUDY_FILE).is_file()]
        return {study: _below(study, runs.values()) for study in studies}


def _below(study: str, runs: Iterable[WatchedRun]) -> list[WatchedRun]:
    return [run for run in runs if run.name.startswith(f"{study}/")]


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [each.name for each in entries if not each.name.startswith(".")]
    except OSError:
        return []
