"""Pictures of results, as PNG files."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from peerlearn.runs.files import replacing
from peerlearn.runs.output import warn_once
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

# Beyond so many classes neither their names nor numbers can be read.
_MOST_NAMED = 30
# Longer names would leave no room for the picture.
LONGEST_NAME = 30
LONGEST_TITLE = 90

logger = logging.getLogger(__name__)


def draw(picture: Callable[[Path], object], file: Path) -> None:
    """Have a picture of a score drawn into a file: whatever fails is a warning, since the score stands without it.

    What several pictures of one folder fail of is told once.
    """
    try:
        with plain_style():
            picture(file)
    except Exception as error:  # A drawing library raises what it likes.
        # Half a picture, or that of an earlier score, would show what is not so.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        # Without the file, which differs from one picture to the next.
        named = isinstance(error, OSError) and error.strerror
        # Matplotlib tells of a wrong formula at length.
        reason = shorten(printable(named or str(error)) or type(error).__name__, 120)
        about = (file.parent, reason)
        warn_once(
            logger, about, "%s could not be drawn (%s); the score beside it stands", file, reason
        )


def save_figure(figure: "Figure", file: Path, *, dpi: int) -> None:
    """Write a figure as a whole, in the format that the file's ending names.

    Raises:
        OSError: the disk does not take it. An earlier file stays.
    """
    with replacing(file) as stream:
        figure.savefig(stream, dpi=dpi, format=file.suffix.removeprefix("."))


@contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's notebook, login script or matplotlibrc has set, and in silence."""
    # A folder for caches that cannot be written costs matplotlib time, and signs that a font lacks show as boxes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _own_backend():
            import matplotlib
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            yield


@contextmanager
def _own_backend() -> Iterator[None]:
    """Have matplotlib imported without the backend that the environment names, which may not exist here."""
    named = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if named is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = named


@contextmanager
def plain_text() -> Iterator[None]:
    """Within it, a dollar sign in a name is drawn as one, and begins no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


@plain_text()
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
    axes.set(xlabel="predicted", ylabel="true", title=printable(title, LONGEST_TITLE))
    if named:
        names = [printable(name, LONGEST_NAME) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
        for row, column in confusion.nonzero().tolist():
            share = float(shares[row, column])
            axes.text(
                *(column, row, f"{share:.0f}"),
                ha="center",
                va="center",
                color="white" if share > 50 else "black",
            )
    save_figure(figure, file, dpi=100)
