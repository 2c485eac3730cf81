"""Pictures of results, as PNG files."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Beyond so many classes neither their names nor numbers can be read.
_MOST_NAMED = 30

logger = logging.getLogger(__name__)


def draw(picture: Callable[[Path], object], file: Path) -> None:
    """Have a picture of a score drawn into a file: whatever fails is one warning, since the score stands without it."""
    try:
        picture(file)
    except Exception as error:  # A drawing library raises what it likes.
        # Half a picture, or that of an earlier score, would show what is not so.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        # Matplotlib tells of a wrong formula at length.
        reason = shorten(str(error) or type(error).__name__, 120)
        logger.warning("%s could not be drawn (%s); the score beside it stands", file, reason)


def plot_confusion(
    file: Path, confusion: "Tensor", class_names: Sequence[str], *, title: str
) -> None:
    """Draw a confusion matrix, int (C, C), rows the true classes: its shares within each row, in percent."""
    from matplotlib.figure import Figure

    classes = len(confusion)
    named = classes <= _MOST_NAMED
    side = min(3 + 0.4 * classes, 14)
    shares = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    # A figure of its own, not pyplot's: nothing global, and no display is looked for.
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if named:
        # A dollar sign in a name is a dollar sign, not a formula.
        axes.set_xticks(range(classes), class_names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), class_names, parse_math=False)
        for row, column in confusion.nonzero().tolist():
            share = float(shares[row, column])
            axes.text(
                *(column, row, f"{share:.0f}"),
                ha="center",
                va="center",
                color="white" if share > 50 else "black",
            )
    figure.savefig(file, dpi=100)
