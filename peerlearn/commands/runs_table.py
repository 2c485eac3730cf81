"""Runs as a table for people, as CSV and as JSON."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peerlearn.runs.registry import RegisteredRun
from peerlearn.runs.run_contents import RunScore
from peerlearn.runs.score_names import ENSEMBLE, measured_part
from peerlearn.runs.text import csv_cell, printable

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"running": "cyan", "done": "green", "failed": "red", "stopped": "yellow"}
# Width of the table in a file or a pipe: one line for each run, however long.
_PLAIN_WIDTH = 10_000
_SCORE_WIDTH = len("(99.99)")
# Where a run lies is no difference between runs.
_PLACE = "run"


def value_text(value: Any) -> str:
    """A value of a config as it is written in words: ``true``, ``null``, ``[conv4, resnet18]``."""
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing_keys(runs: Sequence[RegisteredRun]) -> list[str]:
    """The keys that have several values among those runs that have them, in the order of the configs."""
    values: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.config.items():
            values[key].add(value_text(value))
    return [key for key, found in values.items() if len(found) > 1 and key != _PLACE]


def json_text(runs: Sequence[RegisteredRun]) -> str:
    """A list with an object for each run."""
    differing = differing_keys(runs)
    return json.dumps(
        [
            {
                "run": run.name,
                "state": run.state,
                "reason": run.reason,
                "step": run.step,
                "differs": {key: run.config[key] for key in differing if key in run.config},
                "scores": {name: asdict(score) for name, score in run.scores.items()},
                "tags": run.notes.tags,
                "notes": run.notes.texts,
                "problems": run.problems,
                "config": run.config,
            }
            for run in runs
        ]
    )


def csv_text(runs: Sequence[RegisteredRun]) -> str:
    """A header and a line for each run: its state, the keys that differ, best and last scores, tags and notes."""
    keys = differing_keys(runs)
    names = sorted({name for run in runs for name in run.scores})
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, lineterminator="\n")
    last = [f"{name} {which}" for name in names for which in ("best", "last")]
    rows.writerow(map(csv_cell, ["run", "state", "step", *keys, *last, "tags", "notes"]))
    for run in runs:
        cells = [
            *(run.name, run.state, "" if run.step is None else str(run.step)),
            *(value_text(run.config[key]) if key in run.config else "" for key in keys),
            *(str(value) for name in names for value in _both(run.scores.get(name))),
            *(" ".join(run.notes.tags), "; ".join(run.notes.texts)),
        ]
        rows.writerow(map(csv_cell, cells))
    return stream.getvalue()


def _both(score: RunScore | None) -> tuple[float | str, float | str]:
    return ("", "") if score is None else (score.best, score.last)


def print_table(runs: Sequence[RegisteredRun], sort: str | None = None) -> None:
    """Print the table, and below it what cannot be read of the runs.

    Args:
        runs: the runs.
        sort: key by which they are ordered: a score is shown even if the table would leave it out.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    names, differing = shown_scores(runs, sort), differing_keys(runs)
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("differs", overflow="fold")
    for name in names:
        part, _, figure = map(printable, name.rpartition("/"))
        heading = Text(f"{figure}\n{part}")
        table.add_column(heading, justify="right", overflow="fold", min_width=_SCORE_WIDTH)
    is_noted = any(run.notes.tags or run.notes.texts for run in runs)
    if is_noted:
        table.add_column("tags, notes", overflow="fold")
    for run in runs:
        differs = [f"{key} {value_text(run.config[key])}" for key in differing if key in run.config]
        noted = [*(f"#{tag}" for tag in run.notes.tags), *run.notes.texts]
        table.add_row(
            Text(printable(run.name)),
            Text(run.state, style=_STYLES.get(run.state, "")),
            Text(printable(", ".join(differs))),
            *(Text(_score_text(run.scores.get(name))) for name in names),
            *([Text(printable("; ".join(noted)))] if is_noted else []),
        )
    console = _console()
    console.print(table)
    for line in _remarks(runs, names):
        console.print(Text(line))


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def shown_scores(runs: Sequence[RegisteredRun], sort: str | None) -> list[str]:
    """The scores of the ensembles; where a run has none of a figure, those of network 0 too; and the one sorted by."""
    ensemble, single = f"{measured_part(ENSEMBLE)}/", f"{measured_part(0)}/"
    shown: dict[str, None] = {}
    for run in runs:
        for name in run.scores:
            joint = name.replace(single, ensemble)
            if ensemble in name or (single in name and joint not in run.scores) or name == sort:
                shown[name] = None
    return sorted(shown)


def _score_text(score: RunScore | None) -> str:
    if score is None:
        return "-"
    best, last = f"{score.best:.2f}", f"{score.last:.2f}"
    return best if best == last else f"{best} ({last})"


def _remarks(runs: Sequence[RegisteredRun], names: Sequence[str]) -> list[str]:
    """How the scores were measured, why runs failed, and what cannot be read."""
    lines = []
    for name in names:
        found = {run.scores[name].by for run in runs if name in run.scores}
        how = "".join(f", {by}" for by in found if by)
        if len(found) > 1:
            how = "; --json tells how each was measured"
        lines.append(f"{name}: best (last) in %{how}")
    lines += [f"{run.name} has failed: {run.reason}" for run in runs if run.reason is not None]
    lines += [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    return [printable(line) for line in lines]
