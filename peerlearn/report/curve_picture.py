"""A panel of curves as a picture: drawn, told in words, and with its numbers in a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peerlearn.evaluation.plots import LONGEST_NAME, SMALL_POINTS, end_at_100
from peerlearn.report.figures import HEIGHT_INCHES, inline_svg, plain_axes
from peerlearn.report.parts import Cell, Picture, Table
from peerlearn.report.series import Series
from peerlearn.report.thinning import marked_steps, thinned
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Number of rows of the table below a picture, and of curves that its description in words names.
_TABLE_ROWS, _MOST_TOLD = 12, 12
# A curve of fewer values shows each.
_FEW_VALUES = 20
# An axis begins at 0 if its first step is within this share of the last.
_NEAR_BEGIN = 0.1
_LEGEND_COLUMNS, _LEGEND_ROW_INCHES = 2, 0.17
_CROSS = ((-1, -1), (1, 1), (np.nan, np.nan), (-1, 1), (1, -1))
# Marks: the name of each sign, its lines, and its height in the axes.
_MARKS = {
    "restart": ("v", ((-1, 1), (0, -1), (1, 1)), 0.97),
    "skipped step": ("x", _CROSS, 0.92),
    "back to a save": ("<", ((1, 1), (-1, 0), (1, -1)), 0.87),
    "not finite": ("x", _CROSS, 0.03),
}
# Half the size of a sign, in shares of the axes.
_SIGN_SIZE = (0.007, 0.016)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve.

    Attributes:
        run: name of its run; "" where there is one run alone.
        network: network of the curve; "" of none, or of all.
        series: its values.
        color: its colour.
        line: its kind of line.
        marks: steps at which something happened to its run, by what it was.
    """

    run: str
    network: str
    series: Series
    color: str
    line: str
    marks: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The run and the network; "value" where there is but one curve."""
        return ", ".join(filter(None, [self.run, self.network])) or "value"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves of one kind of metric.

    Attributes:
        key: name of the panel on its page.
        title: name of the metric with its unit.
        about: what it is, and how it was measured.
        curves: curves, run by run.
        baselines: values to compare with, and what they are of.
        is_percentage: whether values lie within 0..100.
    """

    key: str
    title: str
    about: str
    curves: Sequence[Curve]
    baselines: Sequence[tuple[str, float]] = field(default=())
    is_percentage: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """The steps at the ends of the axis: the first and the last one of all curves."""
        steps = [curve.series.steps for curve in self.curves]
        first = min(int(each.min()) for each in steps)
        last = max(int(each.max()) for each in steps)
        # A run that logs each tenth step has begun at 0.
        return (0 if 0 < first <= _NEAR_BEGIN * last else first), last


def picture_of(panel: Panel) -> Picture:
    """The picture of a panel."""
    entries = _legend_entries(panel)
    rows = -(-len(entries) // _LEGEND_COLUMNS)
    return Picture(
        image=inline_svg(
            panel.key,
            lambda figure: _draw(figure, panel, entries),
            height_inches=HEIGHT_INCHES + rows * _LEGEND_ROW_INCHES,
        ),
        caption=panel.about,
        alternative=_in_words(panel),
        numbers=_numbers(panel),
    )


def _draw(figure: "Figure", panel: Panel, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.lines import Line2D

    axes = plain_axes(figure, panel.title)
    first, last = panel.ends
    for curve in panel.curves:
        shown = thinned(curve.series, first, last)
        marker = "o" if len(shown.steps) <= _FEW_VALUES else ""
        axes.plot(
            *(shown.steps, shown.values, curve.line),
            color=curve.color,
            marker=marker,
            markersize=2.5,
            clip_on=False,
        )
    for number, (_, value) in enumerate(panel.baselines):
        axes.axhline(value, **_baseline_look(number))
    if panel.is_percentage:
        end_at_100(axes)
    values = np.concatenate([curve.series.values for curve in panel.curves])
    if (values == values[0]).all():
        axes.set_yticks(values[:1])
    axes.set_xlim(first, max(last, first + 1))
    _draw_marks(axes, panel)
    if entries:
        figure.legend(
            [Line2D([], [], **look) for _, look in entries],
            [printable(name, LONGEST_NAME) for name, _ in entries],
            loc="lower left",
            bbox_to_anchor=(0, 0),
            ncols=_LEGEND_COLUMNS,
            frameon=False,
            fontsize=SMALL_POINTS,
            handlelength=2.2,
            borderaxespad=0,
        )


def _baseline_look(number: int) -> dict[str, Any]:
    dashes = (10, 3, 2, 3) if number else (10, 3)
    return {"color": "#000000", "alpha": 0.55, "linewidth": 0.8, "linestyle": (0, dashes)}


def _draw_marks(axes: "Axes", panel: Panel) -> None:
    """Signs along the upper edge; along the lower one, where values were not finite. A kind of a curve is one path."""
    first, last = panel.ends
    for curve in panel.curves:
        for name, steps in _marks_of(curve).items():
            _, lines, height = _MARKS[name]
            within = sorted(step for step in steps if first <= step <= last)
            places = marked_steps(np.array(within, dtype=np.int64), first, last)
            # After each sign the pen is lifted.
            sign = np.array([*lines, (np.nan, np.nan)]) * (
                _SIGN_SIZE[0] * max(last - first, 1),
                _SIGN_SIZE[1],
            )
            x, y = (places[:, None] + sign[:, 0]).ravel(), np.tile(sign[:, 1], len(places)) + height
            axes.plot(
                x,
                y,
                color=curve.color,
                linewidth=0.9,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )


def _marks_of(curve: Curve) -> dict[str, tuple[int, ...]]:
    """The steps of each mark that a curve has."""
    bad = curve.series.steps[~np.isfinite(curve.series.values)]
    found = {**curve.marks, "not finite": tuple(bad.tolist())}
    return {name: steps for name, steps in found.items() if steps}


def _legend_entries(panel: Panel) -> list[tuple[str, dict[str, Any]]]:
    """Names and looks: of each curve, or where there are several of both, of each run and of each network."""
    runs = {curve.run: curve.color for curve in panel.curves}
    networks = {curve.network: curve.line for curve in panel.curves}
    entries: list[tuple[str, dict[str, Any]]] = []
    if len(runs) > 1 and len(networks) > 1:
        entries += [(name, {"color": color}) for name, color in runs.items()]
        grey = {"color": "#000000", "alpha": 0.6}
        entries += [(name, {**grey, "linestyle": line}) for name, line in networks.items()]
    elif len(panel.curves) > 1 or panel.baselines:
        entries += [
            (curve.name, {"color": curve.color, "linestyle": curve.line}) for curve in panel.curves
        ]
    entries += [(name, _baseline_look(n)) for n, (name, _) in enumerate(panel.baselines)]
    there = {name for curve in panel.curves for name in _marks_of(curve)}
    for name, (sign, *_) in _MARKS.items():
        if name in there:
            look = {
                "color": "#000000",
                "marker": sign,
                "linestyle": "",
                "markersize": 3,
                "mfc": "none",
            }
            entries.append((name, look))
    return entries


def _in_words(panel: Panel) -> str:
    """What the picture shows, for those who do not see it."""
    first, last = panel.ends
    told = [_curve_in_words(curve) for curve in panel.curves[:_MOST_TOLD]]
    if len(panel.curves) > _MOST_TOLD:
        told.append(f"and {len(panel.curves) - _MOST_TOLD} more curves")
    told += [f"{name}: {value:.4g}" for name, value in panel.baselines]
    return f"Line chart of {panel.title} over steps {first:,} to {last:,}. {'; '.join(told)}."


def _curve_in_words(curve: Curve) -> str:
    finite = curve.series.values[np.isfinite(curve.series.values)]
    if not len(finite):
        return f"{curve.name}: no finite value"
    words = f"{curve.name}: from {finite[0]:.4g} to {finite[-1]:.4g}, between {finite.min():.4g} and {finite.max():.4g}"
    others = [f"{name} {len(steps):,} times" for name, steps in _marks_of(curve).items()]
    return ", ".join([words, *others])


def _numbers(panel: Panel) -> Table:
    """Values at some steps, the first and the last ones among them. They are as logged; none is made up between."""
    steps = np.unique(np.concatenate([curve.series.steps for curve in panel.curves]))
    ends = {int(curve.series.steps[-1]) for curve in panel.curves}
    places = np.linspace(0, len(steps) - 1, min(_TABLE_ROWS, len(steps))).round().astype(int)
    chosen = sorted({*steps[places].tolist(), *ends})
    rows = tuple(
        (step, *(_value_at(curve.series, step) for curve in panel.curves)) for step in chosen
    )
    some = f"{len(rows)} of {len(steps):,}" if len(rows) < len(steps) else f"all {len(steps):,}"
    return Table(
        caption=f"Numbers at {some} logged steps",
        headings=("step", *(curve.name for curve in panel.curves)),
        rows=rows,
        is_folded=True,
    )


def _value_at(series: Series, step: int) -> Cell:
    place = int(np.searchsorted(series.steps, step, "right")) - 1
    if place < 0 or series.steps[place] != step:
        return None
    return float(series.values[place])
