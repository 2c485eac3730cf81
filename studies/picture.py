"""The picture of a study's tables: a panel for each, like Figure 3 of the paper."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.evaluation.plots import (
    COLORS,
    COLUMN_INCHES,
    FONT_POINTS,
    GREY,
    PAGE_INCHES,
    cut_errors,
    end_at_100,
    plain_style,
    save_figure,
    shortened,
    thin_x_labels,
    wrapped,
)
from peerlearn.evaluation.uncertainty import is_percentage
from peerlearn.runs.score_names import ENSEMBLE, WEIGHTED_ENSEMBLE
from studies.scores import INDIVIDUAL
from studies.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Marker and line of each network; the others' markers take turns.
_STYLES = {INDIVIDUAL: ("o", "-"), ENSEMBLE: ("D", "--"), WEIGHTED_ENSEMBLE: ("s", ":")}
_OTHER_MARKERS = "^v<>PX"
# Heights of a panel's parts, and widths of names, in inches.
_ROW_INCHES, _LINE_INCHES, _AXIS_INCHES, _CURVES_INCHES = 0.2, 0.15, 0.4, 1.6
_NAME_INCHES, _AXIS_NAME_INCHES, _TITLE_INCHES = 1.1, 1.4, 2.3


@plain_style()
def plot_tables(tables: Sequence[Table], file: Path) -> None:
    """Draw the means with their standard deviations, and the published figures as hollow markers.

    One table has the width of a paper's column; several stand side by side on a page.

    Args:
        tables: tables of a study; at least one.
        file: file of the picture; its ending names the format.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(tables))
    each = list(map(_panel_inches, tables))
    heights = [max(each[n : n + columns]) for n in range(0, len(each), columns)]
    # A Figure, and not pyplot: pyplot keeps global state and looks for a display.
    figure = Figure(
        figsize=(COLUMN_INCHES if columns == 1 else PAGE_INCHES, sum(heights)),
        layout="constrained",
    )
    panels = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).ravel()
    for axes, table in zip(panels, tables, strict=False):
        draw_panel(axes, table)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    figure.draw_without_rendering()
    for axes, table in zip(panels, tables, strict=False):
        if axis_numbers(_labels(table)):
            thin_x_labels(axes)
    save_figure(figure, file)


def draw_panel(axes: "Axes", table: Table) -> None:
    """Draw a table: lines over a compared axis of several numbers, else a dot for each name, from top to bottom.

    Colours tell the groups apart, else the labels, or in a single group the networks. Markers tell networks apart.
    Published figures are hollow.
    """
    numbers = axis_numbers(_labels(table))
    (_draw_lines if numbers else _draw_dots)(axes, table, numbers)
    axes.set_title(wrapped(_title(table), _TITLE_INCHES))
    axes.grid(axis="y" if numbers else "x")
    if is_percentage(table.metric):
        end_at_100(axes, "y" if numbers else "x")
    _add_legend(axes, table, coloured=_coloured(table))


def _draw_lines(axes: "Axes", table: Table, numbers: Mapping[str, float]) -> None:
    for (network, group), rows in _series(table, lambda row: row.group).items():
        look = _look(table, network, group)
        scored = sorted((numbers[row.label], *_spread(row)) for row in rows if row.score)
        if scored:
            xs, mean, std = zip(*scored, strict=True)
            errors = _errors(table, mean, std)
            axes.errorbar(xs, mean, yerr=errors, **look, clip_on=False)
        figures = [(numbers[row.label], row.published) for row in rows if row.published is not None]
        _draw_published(axes, figures, look)
    if is_geometric(list(numbers.values())):
        axes.set_xscale("log")
    compared = shortened(table.compared, _AXIS_NAME_INCHES, FONT_POINTS)
    axes.set_xlabel(f"{compared} (baseline {shortened(table.baseline, 0.6, FONT_POINTS)})")
    axes.set_ylabel(f"{table.metric_text}, mean ± std")
    axes.set_xticks(list(numbers.values()), list(map(_name, numbers)))
    axes.minorticks_off()


def _draw_dots(axes: "Axes", table: Table, _: Mapping[str, float]) -> None:
    places, names = _places(table)
    networks = list(_styles(table))
    for (network, label), rows in _series(table, lambda row: row.label).items():
        look = _look(table, network, label) | {"linestyle": "none"}
        # The networks of a name stand below each other, as far as one row has room.
        shift = 0.5 * (networks.index(network) - (len(networks) - 1) / 2) / len(networks)
        scored = [
            (places[row.group, row.label] + shift, *_spread(row)) for row in rows if row.score
        ]
        if scored:
            ys, mean, std = zip(*scored, strict=True)
            errors = _errors(table, mean, std)
            axes.errorbar(mean, ys, xerr=errors, **look, clip_on=False)
        figures = [
            (row.published, places[row.group, row.label] + shift)
            for row in rows
            if row.published is not None
        ]
        _draw_published(axes, figures, look)
    axes.set_yticks(list(names.values()), list(names))
    axes.tick_params(axis="y", length=0)
    last = max(places.values())
    axes.set(ylim=(last + 0.6, -0.6), xlabel=f"{table.metric_text}, mean ± std")


def _places(table: Table) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """The row of each group and label, with a gap between groups; and the places of the names beside them."""
    groups: dict[str, dict[str, None]] = {}
    for row in table.rows:
        groups.setdefault(row.group, {})[row.label] = None
    places: dict[tuple[str, str], float] = {}
    names: dict[str, float] = {}
    place = 0.0
    for group, labels in groups.items():
        first = place
        for label in labels:
            places[group, label] = place
            place += 1
        names[group] = (first + place - 1) / 2
        place += 0.5
    if len(groups) > 1:
        return places, _unlike(names)
    return places, _unlike({_own(table, label): each for (_, label), each in places.items()})


def _unlike(names: Mapping[str, float]) -> dict[str, float]:
    """Names as they are drawn. Two that become alike when they are shortened are told apart by their number."""
    drawn: dict[str, float] = {}
    for number, (name, place) in enumerate(names.items(), start=1):
        shown = _name(name)
        drawn[f"{number}: {shown}" if shown in drawn else shown] = place
    return drawn


def _series(table: Table, name_of: Any) -> dict[tuple[str, str], list[Row]]:
    """The rows by network and by the name that they have in common."""
    series: dict[tuple[str, str], list[Row]] = {}
    for row in table.rows:
        series.setdefault((row.network, name_of(row)), []).append(row)
    return series


def _spread(row: Row) -> tuple[float, float]:
    assert row.score is not None
    return row.score.mean, row.score.std or 0.0


def _errors(table: Table, mean: Sequence[float], std: Sequence[float]) -> Any:
    return cut_errors(mean, std) if is_percentage(table.metric) else std


def _draw_published(
    axes: "Axes", figures: Sequence[tuple[float, float]], look: Mapping[str, Any]
) -> None:
    if figures:
        own = {**look, "linestyle": "none", "mfc": "none", "ms": 7}
        axes.plot(*zip(*figures, strict=True), clip_on=False, **own)


def _look(table: Table, network: str, name: str) -> dict[str, Any]:
    marker, line = _styles(table)[network]
    coloured = _coloured(table)
    number = coloured.index(name) if coloured else list(_styles(table)).index(network)
    return {"color": COLORS[number % len(COLORS)], "marker": marker, "linestyle": line}


def _coloured(table: Table) -> list[str]:
    """What has a colour each: groups of lines, labels of several groups; nothing where colours tell networks."""
    groups = list(dict.fromkeys(row.group for row in table.rows))
    if len(groups) < 2:
        return []
    return groups if axis_numbers(_labels(table)) else _labels(table)


def _labels(table: Table) -> list[str]:
    return list(dict.fromkeys(row.label for row in table.rows))


def _title(table: Table) -> str:
    """What is shown, and of how many runs and images."""
    seeds = {len(score.values) for score in table.scores}
    tests = {score.n for score in table.scores if score.n is not None}
    parts = []
    if tests:
        parts.append(f"n = {_range(tests)}")
    if seeds:
        parts.append(f"{_range(seeds)} seed{'s' if seeds != {1} else ''}")
    return "\n".join(filter(None, [table.title, ", ".join(parts)]))


def _range(numbers: set[int]) -> str:
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def _own(table: Table, label: str) -> str:
    return f"{label} (baseline)" if label == table.baseline else label


def _name(text: str, inches: float = _NAME_INCHES) -> str:
    """A label that leaves room for the picture. A legend leaves out what begins with an underscore."""
    shown = shortened(text, inches)
    return f" {shown}" if shown.startswith("_") else shown


def _network(name: str) -> str:
    return _name(f"network {name}" if name.isdecimal() else name)


def _styles(table: Table) -> dict[str, tuple[str, str]]:
    others = itertools.cycle(_OTHER_MARKERS)
    networks = dict.fromkeys(row.network for row in table.rows)
    return {network: _STYLES.get(network) or (next(others), "-.") for network in networks}


def _add_legend(axes: "Axes", table: Table, *, coloured: Sequence[str]) -> None:
    """A line for each colour, each marker, and hollow ones, below the panel."""
    from matplotlib.transforms import ScaledTranslation

    columns = _legend_columns(table)
    inches = _NAME_INCHES if columns == 2 else _TITLE_INCHES
    for number, name in enumerate(coloured):
        if name:
            label = _name(_own(table, name), inches)
            axes.plot([], [], lw=4, color=COLORS[number % len(COLORS)], label=label)
    for number, (network, (marker, line)) in enumerate(_styles(table).items()):
        color = GREY if coloured else COLORS[number % len(COLORS)]
        shown = line if axis_numbers(_labels(table)) else "none"
        axes.plot([], [], color=color, marker=marker, ls=shown, label=_network(network))
    if any(row.published is not None for row in table.rows):
        axes.plot([], [], "o", color=GREY, mfc="none", ms=7, label="published")
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = ScaledTranslation(0, -_AXIS_INCHES, figure.dpi_scale_trans)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axes.transAxes + below,
        ncols=columns,
        frameon=False,
    )


def _legend_columns(table: Table) -> int:
    """Two, or one where a name needs the width of both."""
    names = [_own(table, name) for name in _coloured(table)]
    return 2 if all(shortened(name, _NAME_INCHES) == name for name in names) else 1


def _panel_inches(table: Table) -> float:
    """Height of a panel with its title and legend."""
    lines = wrapped(_title(table), _TITLE_INCHES).count("\n") + 1
    entries = len(_coloured(table)) + len(_styles(table)) + 1
    lines += math.ceil(entries / _legend_columns(table))
    return _plot_inches(table) + _AXIS_INCHES + 0.35 + _LINE_INCHES * lines


def _plot_inches(table: Table) -> float:
    if axis_numbers(_labels(table)):
        return _CURVES_INCHES
    return _ROW_INCHES * (max(_places(table)[0].values()) + 1.2)


def axis_numbers(labels: Sequence[str]) -> dict[str, float]:
    """The labels as rising numbers; empty if a label is no number, or if there is only one label."""
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        return {}
    if len(numbers) < 2 or not all(map(math.isfinite, numbers.values())):
        return {}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def is_geometric(numbers: Sequence[float]) -> bool:
    """Whether three rising numbers or more are spaced more evenly by their logarithms, as 1, 10, 20, 200 are."""
    if len(numbers) < 3 or numbers[0] <= 0:
        return False
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    factors = [math.log(b / a) for a, b in itertools.pairwise(numbers)]
    return max(factors) / min(factors) < max(steps) / min(steps)
