"""The picture of a sweep's scores: a panel per grid, like Figure 3 of the paper."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.evaluation.plots import plain_text
from peerlearn.runs.score_names import ENSEMBLE
from studies.sweep import Sweep
from studies.sweep_scores import INDIVIDUAL, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@plain_text()
def plot_sweep(sweep: Sweep, scores: Sequence[Score], file: Path) -> None:
    """Draw a panel for each grid: top-1 over the compared axis, with a line or a group of bars for each row."""
    from matplotlib.figure import Figure

    grids = sweep.grids
    columns = min(2, len(grids))
    rows = math.ceil(len(grids) / columns)
    # A Figure, and not pyplot: pyplot keeps global state and looks for a display.
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, grid in zip(panels, grids, strict=False):
        own = [s for s in scores if s.cell.grid == grid and s.metric == "top1"]
        *others, compared = sweep.config.grids[grid]
        labels = sweep.config.grids[grid][compared]
        numbers = axis_numbers(list(labels))
        across = compared if numbers or not others else " / ".join(others)
        if numbers:
            _draw_lines(axes, own, numbers, baseline=sweep.config.baseline[grid])
        else:
            _draw_bars(axes, own, list(labels), baseline=sweep.config.baseline[grid])
        axes.set(title=grid, xlabel=across, ylabel="top-1 (%)")
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    figure.savefig(file, dpi=100)


def axis_numbers(labels: Sequence[str]) -> dict[str, float]:
    """The labels as rising numbers; empty if a label is no number, or if there is only one label."""
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        return {}
    if len(numbers) < 2 or not all(map(math.isfinite, numbers.values())):
        return {}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def doubles(numbers: Sequence[float]) -> bool:
    """Whether there are several steps, and each number is about twice the one before (64, 126 counts as twice)."""
    return (
        len(numbers) > 2
        and numbers[0] > 0
        and all(1.9 <= b / a <= 2.1 for a, b in pairwise(numbers))
    )


def _rows_of(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The rows of the scores: their labels on all axes but the last."""
    return list(dict.fromkeys(score.cell.labels[:-1] for score in scores))


def _points(
    scores: Sequence[Score], row: tuple[str, ...], network: str
) -> dict[str, tuple[float, float]]:
    """The mean and the standard deviation for each label of the last axis."""
    return {
        s.cell.labels[-1]: (s.mean, s.std or 0.0)
        for s in scores
        if s.cell.labels[:-1] == row and s.network == network
    }


def _draw_lines(
    axes: "Axes", scores: Sequence[Score], numbers: dict[str, float], *, baseline: str
) -> None:
    for row_number, row in enumerate(_rows_of(scores)):
        for network, style in ((INDIVIDUAL, "-o"), (ENSEMBLE, "--D")):
            points = _points(scores, row, network)
            labels = [label for label in numbers if label in points]
            if not labels:
                continue
            axes.errorbar(
                [numbers[label] for label in labels],
                [points[label][0] for label in labels],
                yerr=[points[label][1] for label in labels],
                fmt=style,
                capsize=3,
                color=f"C{row_number % 10}",
                label=", ".join([*row, network]),
            )
            if baseline in points:
                axes.plot(numbers[baseline], points[baseline][0], "o", ms=14, mfc="none", mec="k")
    values = list(numbers.values())
    if doubles(values):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, list(numbers))
    axes.minorticks_off()
    axes.plot([], [], "o", ms=10, mfc="none", mec="k", label="baseline")
    axes.legend(fontsize="x-small")


def _draw_bars(
    axes: "Axes", scores: Sequence[Score], labels: Sequence[str], *, baseline: str
) -> None:
    """Draw the individual networks as bars and the ensembles as diamonds. Each of several rows is a group of bars."""
    rows = _rows_of(scores)
    width = 0.8 / len(labels) if len(rows) > 1 else 0.8
    lowest: list[float] = []
    highest: list[float] = []
    for row_number, row in enumerate(rows):
        bars, joint = _points(scores, row, INDIVIDUAL), _points(scores, row, ENSEMBLE)
        for number, label in enumerate(labels):
            if label not in bars:
                continue
            x = float(number)
            if len(rows) > 1:
                x = row_number + (number - (len(labels) - 1) / 2) * width
            axes.bar(
                *(x, bars[label][0], width),
                yerr=bars[label][1],
                capsize=3,
                color=f"C{number % 10}",
                hatch="//" if label == baseline else None,
                edgecolor="black",
                linewidth=0.5,
                label=f"{label} (baseline)" if label == baseline else label,
            )
            for mean, std in [found[label] for found in (bars, joint) if label in found]:
                lowest.append(mean - std)
                highest.append(mean + std)
            if label in joint:
                mean, std = joint[label]
                # Beside the bar's own error bar.
                beside = x + 0.25 * width
                axes.errorbar(
                    beside, mean, yerr=std, fmt="D", color="black", mfc="white", capsize=3
                )
    if lowest:
        # Differences of a point or two would not show on an axis from 0.
        margin = max(0.3 * (max(highest) - min(lowest)), 0.5)
        axes.set_ylim(max(min(lowest) - margin, 0), min(max(highest) + margin, 105))
    names = [" / ".join(row) for row in rows] if len(rows) > 1 else list(labels)
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 3 else 0)
    if any(score.network == ENSEMBLE for score in scores):
        axes.errorbar([], [], fmt="D", color="black", mfc="white", label="ensemble")
    handles, texts = axes.get_legend_handles_labels()
    once = dict(zip(texts, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize="x-small")
