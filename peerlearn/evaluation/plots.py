"""Pictures of results, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

# Beyond so many classes neither their names nor numbers can be read.
_MOST_NAMED = 30


def plot_confusion(
    file: Path, confusion: Tensor, class_names: Sequence[str], *, title: str
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
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
        for row, column in confusion.nonzero().tolist():
            share = float(shares[row, column])
            axes.text(
                *(column, row, f"{share:.0f}"),
                ha="center",
                va="center",
                color="white" if share > 50 else "black",
            )
    figure.savefig(file, dpi=100)
