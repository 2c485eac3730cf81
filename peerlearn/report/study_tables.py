"""The tables of a study's table.json, which `peerlearn study` and `peerlearn table` write."""

from collections.abc import Mapping, Sequence
from typing import Any

from peerlearn.evaluation.uncertainty import is_percentage
from peerlearn.report.metric_kinds import network_text
from peerlearn.report.parts import Cell, Table
from peerlearn.report.tables import filled_table
from peerlearn.runs.text import printable

# What one table is of.
_OF = ("grid", "line", "task", "dataset", "variant", "metric")
_UNMEASURED = "unmeasured"
_DIFFERENCE = ("difference_mean", "difference_ci95", "difference_p", "difference_p_holm")


def score_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table for each grid, evaluation and metric.

    Raises:
        TypeError, ValueError, LookupError, AttributeError: the content is none that the command writes.
    """
    by_table: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for score in content["scores"]:
        if score["shown"] is not False or score["published"] is not None:
            by_table.setdefault(tuple(str(score[key]) for key in _OF), []).append(score)
    captions = {str(each["title"]): str(each["caption"]) for each in content["tables"]}
    axes = content["config"]["grids"]
    return [_table(of, scores, captions, list(axes[of[0]])) for of, scores in by_table.items()]


def _table(
    of: tuple[str, ...],
    scores: Sequence[Mapping[str, Any]],
    captions: Mapping[str, str],
    axes: Sequence[str],
) -> Table:
    grid, _, task, dataset, variant, metric = of
    unit = " (%)" if is_percentage(metric) else ""
    title = f"{grid}: {task}/{metric}{f' on {dataset}' if dataset else ''}{f', {variant}' if variant else ''}"
    versus = f"vs {scores[0]['baseline']}"
    columns: dict[str, list[Cell]] = {
        "network": [network_text(str(score["network"])) for score in scores],
        **{axis: [_label(score, n) for score in scores] for n, axis in enumerate(axes)},
        f"{metric}{unit}: mean": [_mean(score) for score in scores],
        "std": _numbers(scores, "std"),
        "seeds": [score["seeds"] for score in scores],
        versus: _numbers(scores, _DIFFERENCE[0]),
        "half of 95 %": _numbers(scores, _DIFFERENCE[1]),
        "p": _numbers(scores, _DIFFERENCE[2]),
        "p (Holm)": _numbers(scores, _DIFFERENCE[3]),
        "published": _numbers(scores, "published"),
        "published gain": _numbers(scores, "published_gain"),
        "core-minutes": _numbers(scores, "core_minutes"),
        "memory (MB)": _numbers(scores, "peak_memory_mb"),
        "n": [score["n"] for score in scores],
        "step": [score["step"] for score in scores],
    }
    return filled_table(
        caption=printable(f"{title}. {captions.get(title, '')}".strip()),
        headings=[printable(heading) for heading in columns],
        rows=list(zip(*columns.values(), strict=True)),
    )


def _label(score: Mapping[str, Any], number: int) -> Cell:
    return printable(str(score["labels"][number]))


def _mean(score: Mapping[str, Any]) -> Cell:
    return _UNMEASURED if score["mean"] is None else float(score["mean"])


def _numbers(scores: Sequence[Mapping[str, Any]], key: str) -> list[Cell]:
    # Earlier versions have written no costs.
    return [None if (value := score.get(key)) is None else float(value) for score in scores]


def missing_table(content: Mapping[str, Any]) -> list[Table]:
    """What the study lacks, and why; none where nothing is missing.

    Raises:
        TypeError, LookupError: the content is none that the command writes.
    """
    rows = tuple(
        tuple(printable(str(problem[key])) for key in ("run", "what", "why"))
        for problem in content["problems"]
    )
    if not rows:
        return []
    return [Table(caption="What is missing.", headings=("run", "what", "why"), rows=rows)]
