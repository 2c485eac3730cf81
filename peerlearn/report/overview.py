"""The overview of a folder: its runs and studies with how they stand, what differs, their scores and notes."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from peerlearn.commands.runs_table import differing_keys, shown_scores, value_text
from peerlearn.report.parts import Cell, Entry, Paragraph, Section, Table
from peerlearn.report.run_watch import WatchedFolder, WatchedRun
from peerlearn.report.standing_parts import LONGEST_REASON
from peerlearn.runs.progress import time_text
from peerlearn.runs.run_contents import RunScore
from peerlearn.runs.standing import number
from peerlearn.runs.text import printable

RUN_PATH, STUDY_PATH = "/run/", "/study/"
_STANDING = ("run", "state", "step", "of steps", "images/s", "time left")


def path_of(start: str, name: str, page: str = "") -> str:
    """The path of a page: ``/run/my%20run/log``."""
    return start + quote(os.fsencode(name)) + page


def overview_sections(folder: WatchedFolder) -> list[Section]:
    """All that the overview tells."""
    return [_studies_section(folder), *runs_sections(list(folder.runs.values()))]


def runs_sections(runs: Sequence[WatchedRun]) -> list[Section]:
    """A table of runs, and what is wrong with them."""
    return [_runs_section(runs), _remarks_section(runs)]


def _studies_section(folder: WatchedFolder) -> Section:
    rows = [_study_row(name, runs) for name, runs in folder.studies.items()]
    table = Table(
        caption="Studies, and how many of their runs that have begun are in each state.",
        headings=("study", "done", "running", "failed", "stopped", "runs that have begun"),
        rows=tuple(rows),
    )
    return Section(anchor="studies", title="Studies", parts=(table,) if rows else ())


def _study_row(name: str, runs: Sequence[WatchedRun]) -> tuple[Cell, ...]:
    states = Counter(run.registered.state for run in runs)
    counts = (states[state] for state in ("done", "running", "failed", "stopped"))
    return (Entry(text=printable(name), path=path_of(STUDY_PATH, name)), *counts, len(runs))


def _runs_section(runs: Sequence[WatchedRun]) -> Section:
    if not runs:
        hint = Paragraph(text="No run yet. One that begins will stand here.")
        return Section(anchor="runs", title="Runs", parts=(hint,))
    registered = [run.registered for run in runs]
    names, keys = shown_scores(registered, None), differing_keys(registered)
    # Most scores are measured once; a second column of the same numbers would tell nothing.
    lasting = [
        name for name in names if any(_changed(run.registered.scores.get(name)) for run in runs)
    ]
    is_noted = any(run.notes.texts or run.notes.tags for run in registered)
    headings = [*_STANDING]
    for name in names:
        part, _, figure = printable(name).rpartition("/")
        headings.append(f"{figure} {part}\nbest (%)")
        headings += [f"{figure} {part}\nlast (%)"] if name in lasting else []
    headings += map(printable, keys)
    headings += ["tags", "notes"] if is_noted else []
    table = Table(
        caption=_caption(names, runs),
        headings=tuple(headings),
        rows=tuple(
            (
                *_standing_cells(run),
                *_score_cells(run, names, lasting),
                *(_config_cell(run, key) for key in keys),
                *(_note_cells(run) if is_noted else ()),
            )
            for run in runs
        ),
    )
    return Section(anchor="runs", title="Runs", parts=(table,))


def _changed(score: RunScore | None) -> bool:
    return score is not None and score.best != score.last


def _caption(names: Sequence[str], runs: Sequence[WatchedRun]) -> str:
    parts = [
        f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'}, with the keys that differ between their configs."
    ]
    for name in names:
        scores = [run.registered.scores[name] for run in runs if name in run.registered.scores]
        how = {score.by for score in scores}
        told = (
            next(iter(how))
            if len(how) == 1
            else "measured in several ways: see the pages of the runs"
        )
        parts.append(
            f"{printable(name)}: n = {len(scores):,}{f'; {printable(told)}' if told else ''}."
        )
    return " ".join(parts)


def _standing_cells(run: WatchedRun) -> tuple[Cell, ...]:
    then = run.standing
    is_running = run.registered.state == "running"
    steps = [step for step in (then.step, run.registered.step) if step is not None]
    left = then.seconds_left if is_running else None
    return (
        _link(run),
        run.state,
        max(steps, default=None),
        then.total_steps,
        then.images_per_second if is_running else None,
        None if left is None else Entry(text=time_text(left), number=left),
    )


def _score_cells(
    run: WatchedRun, names: Iterable[str], lasting: Sequence[str]
) -> Iterable[float | None]:
    for name in names:
        score = run.registered.scores.get(name)
        yield None if score is None else score.best
        if name in lasting:
            yield None if score is None else score.last


def _config_cell(run: WatchedRun, key: str) -> Cell:
    config = run.registered.config
    # Its text is exact; by its number it is sorted.
    return (
        Entry(text=printable(value_text(config[key])), number=number(config[key]))
        if key in config
        else None
    )


def _note_cells(run: WatchedRun) -> tuple[Cell, Cell]:
    notes = run.registered.notes
    tags = " ".join(f"#{tag}" for tag in notes.tags)
    return printable(tags) or None, "\n".join(map(printable, notes.texts)) or None


def _remarks_section(runs: Sequence[WatchedRun]) -> Section:
    """Why runs have failed, and what cannot be read of them."""
    rows = []
    for run in runs:
        reason = run.registered.reason
        told = [] if reason is None else [f"failed: {printable(reason, LONGEST_REASON)}"]
        rows += [(_link(run), printable(text)) for text in (*told, *run.registered.problems)]
    table = Table(
        caption="Why runs have failed, and what could not be read.",
        headings=("run", "problem"),
        rows=tuple(rows),
    )
    return Section(anchor="problems", title="Problems", parts=(table,) if rows else ())


def _link(run: WatchedRun) -> Entry:
    return Entry(text=printable(run.name), path=path_of(RUN_PATH, run.name))
