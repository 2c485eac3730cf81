"""The picture of a confusion matrix: whole where its names can be read, else in blocks with the most confused pairs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peerlearn.evaluation.plots import (
    COLORS,
    COLUMN_INCHES,
    GREY,
    PAGE_INCHES,
    PALE,
    SEQUENTIAL_MAP,
    SMALL_POINTS,
    plain_style,
    save_figure,
    shortened,
    wrapped,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from torch import Tensor

# So many classes have room for numbers and names in a column, and on a page.
_MOST_IN_A_COLUMN, _MOST_NAMED = 10, 30
# A matrix of more classes is drawn in so many blocks at most: one of 1,000 classes has no room for its own cells.
_MOST_BLOCKS = 100
_PAIRS = 8
# Widths of names, and of the bar of colours beside a matrix.
_COLUMN_NAME_INCHES, _PAGE_NAME_INCHES, _PAIR_NAME_INCHES = 0.8, 1.3, 1.3
_BAR_INCHES, _LINE_INCHES = 0.55, 0.15
_MATRIX_INCHES = 2.4
# From this share on, white is read better than black on the colours of the map.
_WHITE_FROM = 45
# The least share that the blocks' colours tell from nothing.
_LEAST_SHARE = 0.1


class Pair(NamedTuple):
    """A true class and another that its images are taken for.

    Attributes:
        true: number of the true class.
        predicted: number of the other one.
        images: number of images of the true class that are taken for the other one.
        of: number of images of the true class.
    """

    true: int
    predicted: int
    images: int
    of: int


def confused_pairs(confusion: "Tensor", most: int) -> list[Pair]:
    """The pairs of classes that most images are confused in, from the most on; of equals the first.

    Args:
        confusion: confusion matrix, int (C, C), rows the true classes.
        most: largest number of pairs.
    """
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:most].tolist()
    totals = confusion.sum(1).tolist()
    classes = len(confusion)
    return [
        Pair(place // classes, place % classes, int(wrong[place]), totals[place // classes])
        for place in order
        if wrong[place] > 0
    ]


def block_shares(confusion: "Tensor", most: int = _MOST_BLOCKS) -> "Tensor":
    """Shares within the rows of a confusion matrix in percent, float (b, b), added up in blocks of neighbours.

    A cell is the share of its true classes' images that are taken for any of its predicted classes: the mean over the
    true classes that have images; NaN where none has. Up to so many classes are blocks of their own.
    """
    classes = len(confusion)
    size = math.ceil(classes / most)
    blocks = math.ceil(classes / size)
    totals = confusion.sum(1)
    shares = 100 * confusion.double() / totals[:, None].clamp_min(1)
    sums = shares.new_zeros(blocks, blocks)
    block = shares.new_tensor(range(classes)).long() // size
    sums.index_put_((block[:, None], block), shares, accumulate=True)
    filled = shares.new_zeros(blocks).index_add_(0, block, (totals > 0).double())
    return sums / filled[:, None]


@plain_style()
def plot_confusion(
    file: Path, confusion: "Tensor", class_names: Sequence[str], *, title: str
) -> None:
    """Draw a confusion matrix: its shares within each row, in percent.

    Up to 30 classes have their names, and the shares as numbers. Of more, neither could be read, and single cells
    hardly be seen. So their matrix shows on a logarithmic scale where confusions lie: from 101 classes on in blocks of
    neighbours, for data sets number their classes in an order that means something, as ImageNet does by kind. And a
    list names the pairs of classes in which most images are confused.

    Args:
        file: file of the picture; its ending names the format.
        confusion: confusion matrix, int (C, C), rows the true classes. A class without images is a grey row.
        class_names: names of the C classes.
        title: title of the picture.
    """
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing global, and no display is looked for.
    figure = Figure(layout="constrained")
    draw_matrix = _draw_named if len(confusion) <= _MOST_NAMED else _draw_blocks
    draw_matrix(figure, confusion, class_names, title)
    save_figure(figure, file)


def _draw_named(
    figure: "Figure", confusion: "Tensor", class_names: Sequence[str], title: str
) -> None:
    classes = len(confusion)
    small = classes <= _MOST_IN_A_COLUMN
    width = COLUMN_INCHES if small else PAGE_INCHES
    room = _COLUMN_NAME_INCHES if small else _PAGE_NAME_INCHES
    names = [shortened(name, room) for name in class_names]
    # The matrix is square, and has names at two sides.
    figure.set_size_inches(width, width - _BAR_INCHES + _set_title(figure, title, width))
    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True)
    axes = figure.add_subplot()
    image = axes.imshow(_or_below(shares, -1.0), cmap=_colours(), vmin=0, vmax=100)
    figure.colorbar(image, label="share of the true class (%)", aspect=30, pad=0.02)
    axes.set(xlabel="predicted class", ylabel=f"true class{_of_empty(shares)}")
    axes.set_xticks(range(classes), names, rotation=90)
    axes.set_yticks(range(classes), names)
    for row, column in confusion.nonzero().tolist():
        share = float(shares[row, column])
        if round(share) > 0:
            axes.text(
                *(column, row, f"{share:.0f}"),
                ha="center",
                va="center",
                fontsize=SMALL_POINTS,
                color="white" if share > _WHITE_FROM else "black",
            )


def _draw_blocks(
    figure: "Figure", confusion: "Tensor", class_names: Sequence[str], title: str
) -> None:
    from matplotlib.colors import LogNorm

    classes = len(confusion)
    figure.set_size_inches(
        PAGE_INCHES, _MATRIX_INCHES + _set_title(figure, title, PAGE_INCHES) + 0.4
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    shares = block_shares(confusion)
    image = left.imshow(
        # What has no logarithm is below the scale.
        _or_below(shares, _LEAST_SHARE / 10),
        cmap=_colours(),
        norm=LogNorm(_LEAST_SHARE, 100),
        extent=(0, classes, classes, 0),
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=left, label="share of the true class (%)", pad=0.02)
    bar.ax.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    size = math.ceil(classes / _MOST_BLOCKS)
    blocks = f", {size} in a block" if size > 1 else ""
    left.set(
        xlabel=f"predicted class (number{blocks})",
        ylabel=f"true class (number{blocks}){_of_empty(shares)}",
    )
    _draw_pairs(right, confused_pairs(confusion, _PAIRS), class_names)


def _draw_pairs(axes: "Axes", pairs: Sequence[Pair], class_names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="confused images", title="most confused: true → taken for")
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "none", ha="center", va="center", color=GREY)
        return
    names = [
        f"{shortened(class_names[pair.true], _PAIR_NAME_INCHES)}\n"
        f"→ {shortened(class_names[pair.predicted], _PAIR_NAME_INCHES)}"
        for pair in pairs
    ]
    most = pairs[0].images
    axes.barh(range(len(pairs)), [pair.images for pair in pairs], color=COLORS[0], height=0.6)
    for place, pair in enumerate(pairs):
        axes.text(
            *(pair.images + 0.03 * most, place, f"{pair.images:,} of {pair.of:,}"),
            va="center",
            fontsize=SMALL_POINTS,
        )
    axes.set_yticks(range(len(pairs)), names)
    axes.tick_params(axis="y", length=0)
    # Room for the words beside the longest bar; and a list begins above.
    axes.set(xlim=(0, 1.9 * most), ylim=(_PAIRS - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _or_below(shares: "Tensor", below: float) -> "np.ndarray":
    """Shares for `imshow`, with a value below the scale for those that are 0."""
    return shares.where(shares != 0, below).numpy()


def _of_empty(shares: "Tensor") -> str:
    return "; grey: no images" if shares.isnan().any() else ""


def _set_title(figure: "Figure", title: str, width: float) -> float:
    """Write a title in as many lines as it needs. Returns their height in inches."""
    shown = wrapped(title, width - 0.1)
    figure.suptitle(shown)
    return _LINE_INCHES * (1 + shown.count("\n"))


def _colours() -> "Colormap":
    """The map of shares: white for none, grey where there is nothing to have a share of."""
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL_MAP].with_extremes(bad=PALE, under="white")
