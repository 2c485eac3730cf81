"""The picture of how the candidates of a linear protocol did on held-out images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlearn.evaluation.plots import (
    COLUMN_INCHES,
    GREY,
    end_at_100,
    plain_style,
    save_figure,
    series_style,
    thin_x_labels,
    wrapped,
)

_HEIGHT_INCHES = 2.6
# Keys of a candidate's settings, and what their axis is called.
_AXES = {"base_lr": "base learning rate", "c": "C (inverse strength of the penalty)"}


@plain_style()
def plot_candidates(file: Path, choice: Mapping[str, Any], *, title: str) -> None:
    """Draw the held-out accuracy over the learning rate or C, a line for each kind of inputs; the chosen is circled.

    Args:
        file: file of the picture; its ending names the format.
        choice: {chosen, held_out_top1}, as result files have them.
        title: title of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN_INCHES, _HEIGHT_INCHES), layout="constrained")
    axes = figure.add_subplot()
    chosen, candidates = choice["chosen"], choice["held_out_top1"]
    key = next(each for each in _AXES if each in chosen)
    for number, kind in enumerate(dict.fromkeys(each["inputs"] for each in candidates)):
        points = sorted((each[key], each["top1"]) for each in candidates if each["inputs"] == kind)
        axes.plot(*zip(*points, strict=True), label=kind, clip_on=False, **series_style(number))
    best = next(each["top1"] for each in candidates if chosen.items() <= each.items())
    axes.plot(
        *([chosen[key]], [best]), "o", ms=9, mfc="none", mec=GREY, clip_on=False, label="chosen"
    )
    numbers = sorted({each[key] for each in candidates})
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set(xlabel=_AXES[key], ylabel="held-out top-1 (%)")
    end_at_100(axes)
    axes.legend(title="inputs")
    figure.suptitle(wrapped(title, COLUMN_INCHES - 0.1))
    figure.draw_without_rendering()
    thin_x_labels(axes)
    save_figure(figure, file)
