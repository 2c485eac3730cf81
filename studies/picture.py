"""The picture of a study's tables: a panel for each, like Figure 3 of the paper."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.evaluation.plots import LONGEST_NAME, LONGEST_TITLE, plain_style, save_figure
from peerlearn.evaluation.uncertainty import is_percentage
from peerlearn.runs.score_names import ENSEMBLE, WEIGHTED_ENSEMBLE
from peerlearn.runs.text import printable
from studies.scores import INDIVIDUAL
from studies.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Marker and line of each network; the others' markers take turns.
_STYLES = {INDIVIDUAL: ("o", "-"), ENSEMBLE: ("D", "--"), WEIGHTED_ENSEMBLE: ("s", ":")}
_OTHER_MARKERS = "^v<>"
_COLORS = 10


@plain_style()
def plot_tables(tables: Sequence[Table], file: Path) -> None:
    """Draw the means with their standard deviations, and the published figures as hollow markers."""
    from matplotlib.figure import Figure

    columns = min(2, len(tables))
    rows = math.ceil(len(tables) / columns)
    # A Figure, and not pyplot: pyplot keeps global state and looks for a display.
    figure = Figure(figsize=(7 * columns, 5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, table in zip(panels, tables, strict=False):
        draw_panel(axes, table)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    save_figure(figure, file)


def draw_panel(axes: "Axes", table: Table) -> None:
    """Draw a table: a line for each group over a compared axis of numbers, else the labels side by side in each group.

    Colors tell groups, or labels, apart; markers tell networks apart. Published figures are hollow.
    """
    labels = list(dict.fromkeys(row.label for row in table.rows))
    groups = list(dict.fromkeys(row.group for row in table.rows))
    numbers = axis_numbers(labels)
    shift = {label: 0.8 * (n + 0.5) / len(labels) - 0.4 for n, label in enumerate(labels)}
    colored = groups if numbers else labels
    series: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in table.rows:
        x = numbers[row.label] if numbers else groups.index(row.group) + shift[row.label]
        name = row.group if numbers else row.label
        series.setdefault((row.network, name), []).append((x, row))
    styles = _styles(table)
    for (network, name), points in series.items():
        marker, line = styles[network]
        look: Any = {"color": f"C{colored.index(name) % _COLORS}", "marker": marker}
        scores = sorted((x, row.score.mean, row.score.std or 0.0) for x, row in points if row.score)
        if scores:
            xs, mean, std = zip(*scores, strict=True)
            axes.errorbar(xs, mean, yerr=std, ls=line if numbers else "none", capsize=3, **look)
        figures = [(x, row.published) for x, row in points if row.published is not None]
        axes.plot(
            [x for x, _ in figures], [y for _, y in figures], ls="none", mfc="none", ms=9, **look
        )
    if numbers:
        if doubles(list(numbers.values())):
            axes.set_xscale("log", base=2)
        axes.set_xticks(list(numbers.values()), list(map(_name, numbers)))
        axes.minorticks_off()
    elif len(groups) > 1:
        axes.set_xticks(range(len(groups)), list(map(_name, groups)), rotation=20)
    else:
        axes.set_xticks(list(shift.values()), list(map(_name, shift)), rotation=20)
    axes.set_title(printable(table.title, LONGEST_TITLE), fontsize="small")
    axes.set_ylabel(f"{table.metric_text}, mean +- std")
    if numbers:
        axes.set_xlabel(printable(f"{table.compared} (baseline {table.baseline})", LONGEST_TITLE))
    if is_percentage(table.metric):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 100.0))
    _add_legend(axes, table, colored)


def _name(text: str) -> str:
    """A label that leaves room for the picture. A legend leaves out what begins with an underscore."""
    shown = printable(text, LONGEST_NAME)
    return f" {shown}" if shown.startswith("_") else shown


def _styles(table: Table) -> dict[str, tuple[str, str]]:
    others = itertools.cycle(_OTHER_MARKERS)
    networks = dict.fromkeys(row.network for row in table.rows)
    return {network: _STYLES.get(network) or (next(others), "-.") for network in networks}


def _add_legend(axes: "Axes", table: Table, colored: Sequence[str]) -> None:
    """A line for each color, each marker, and hollow ones, beside the panel."""
    for number, name in enumerate(colored):
        if name:
            own = f"{name} (baseline)" if name == table.baseline else name
            axes.plot([], [], lw=6, color=f"C{number % _COLORS}", label=_name(own))
    for network, (marker, line) in _styles(table).items():
        axes.plot([], [], color="gray", marker=marker, ls=line, label=printable(network))
    if any(row.published is not None for row in table.rows):
        axes.plot([], [], "o", color="gray", mfc="none", ms=9, label="published")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))


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
        and all(1.9 <= b / a <= 2.1 for a, b in itertools.pairwise(numbers))
    )
