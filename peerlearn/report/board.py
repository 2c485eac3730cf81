"""The pages of the board: which path has which, and that none is made anew before something has changed."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from peerlearn.commands.runs_table import csv_text
from peerlearn.report.answers import CSV, HTML, Answer, streamed, whole
from peerlearn.report.overview import (
    RUN_PATH,
    STUDY_PATH,
    overview_sections,
    path_of,
    runs_sections,
)
from peerlearn.report.page import page_policy, render_page
from peerlearn.report.parts import Entry, Section
from peerlearn.report.run_files import log_tail, metrics_csv
from peerlearn.report.run_page import run_sections
from peerlearn.report.run_watch import RunWatch, WatchedRun
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.lock import LOCK_FILES
from peerlearn.runs.text import printable

LOG, METRICS, TABLE = "/log", "/metrics.csv", "/runs.csv"
_MOST_PAGES = 32
# Making a page takes at most a fifth of the time.
_REST = 4.0


class Board:
    """Answers for paths."""

    def __init__(self, folder: Path) -> None:
        self._watch = RunWatch(folder)
        # Tables do not wait for pictures.
        self._tables, self._pages = PageStore(), PageStore()

    def answer(self, path: str) -> Answer | None:
        """The answer for a path; None if there is no such page.

        Raises:
            UserError: the folder is missing or cannot be read.
        """
        folder = self._watch.now()
        if path == "/":
            title = f"Runs in {printable(str(self._watch.folder))}"
            links = [Entry(text="as CSV", path=TABLE)]
            return self._tables.page(
                path, folder, lambda: _page(title, overview_sections(folder), links)
            )
        if path == TABLE:
            return whole(csv_text([run.registered for run in folder.runs.values()]), CSV)
        if path.startswith(STUDY_PATH):
            name = path.removeprefix(STUDY_PATH)
            runs = folder.studies.get(name)
            return None if runs is None else self._study(name, runs)
        if path.startswith(RUN_PATH):
            return self._run(path.removeprefix(RUN_PATH), folder.runs.get)
        return None

    def _study(self, name: str, runs: Sequence[WatchedRun]) -> Answer:
        return self._tables.page(
            STUDY_PATH + name,
            tuple(runs),
            lambda: _page(printable(name), runs_sections(runs), [_HOME]),
        )

    def _run(self, name: str, find: Callable[[str], WatchedRun | None]) -> Answer | None:
        if (watched := find(name)) is not None:
            return self._run_page(watched)
        for ending, answer in ((LOG, _log), (METRICS, _metrics)):
            watched = find(name.removesuffix(ending)) if name.endswith(ending) else None
            if watched is not None:
                return answer(RunDirectory(Path(watched.registered.name)))
        return None

    def _run_page(self, watched: WatchedRun) -> Answer:
        run = RunDirectory(Path(watched.registered.name))
        name = watched.name
        links = [
            _HOME,
            *(
                Entry(text=f"Study {printable(study)}", path=path_of(STUDY_PATH, study))
                for study in self._studies_of(name)
            ),
            Entry(text="Log", path=path_of(RUN_PATH, name, LOG)),
            Entry(text="Metrics as CSV", path=path_of(RUN_PATH, name, METRICS)),
        ]
        return self._pages.page(
            RUN_PATH + name,
            (watched.state, _stamps(run, watched.attempt)),
            lambda: _page(printable(name), run_sections([run]), links),
        )

    def _studies_of(self, name: str) -> list[str]:
        return [study for study in self._watch.now().studies if name.startswith(f"{study}/")]


_HOME = Entry(text="All runs", path="/")


class PageStore:
    """Keeps the pages that were asked for last. One is made at a time: drawing is not made for several threads."""

    def __init__(self) -> None:
        self._drawing = threading.Lock()
        # By path: what the page was made of, the page, and until when it stays in any case.
        self._made: OrderedDict[str, tuple[object, Answer, float]] = OrderedDict()

    def page(self, path: str, content: object, make: Callable[[], Answer]) -> Answer:
        """The page as it was made, or made anew where its content has changed and it is not young.

        While another page is drawn, the one from before is better than waiting.
        """
        made = self._made.get(path)
        if not self._drawing.acquire(blocking=made is None):
            assert made is not None
            return made[1]
        try:
            made = self._made.get(path)
            begun = time.monotonic()
            if made is None or (made[0] != content and begun >= made[2]):
                answer = make()
                now = time.monotonic()
                made = (content, answer, now + _REST * (now - begun))
            self._made[path] = made
            self._made.move_to_end(path)
            while len(self._made) > _MOST_PAGES:
                self._made.popitem(last=False)
            return made[1]
        finally:
            self._drawing.release()


def _page(title: str, sections: Sequence[Section], links: Sequence[Entry]) -> Answer:
    html = render_page(title, sections, live=True, links=links)
    return whole(html, HTML, policy=page_policy(live=True))


def _log(run: RunDirectory) -> Answer:
    text = log_tail(run)
    return whole("The run has no log that can be read.\n" if text is None else text)


def _metrics(run: RunDirectory) -> Answer | None:
    pieces = metrics_csv(run)
    return None if pieces is None else streamed(pieces, CSV)


def _stamps(run: RunDirectory, attempt: int) -> list[tuple[str, int, int, int]]:
    """What changes when a file changes that the page of a run shows; heartbeats aside."""
    found = []
    for folder in (run.root, run.results, run.exports, run.checkpoints, run.logs(attempt)):
        try:
            with os.scandir(folder) as entries:
                for each in entries:
                    if not _is_clockwork(each.name):
                        status = each.stat()
                        found.append((each.path, status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            continue
    return sorted(found)


def _is_clockwork(name: str) -> bool:
    """Whether a file changes all the time and tells nothing but that."""
    return name.startswith((".", *LOCK_FILES)) or name.endswith((".heartbeat.json", ".step"))
