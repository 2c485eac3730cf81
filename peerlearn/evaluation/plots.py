"""How pictures of results look, for a paper's column or page, and how they come into files: PNG, SVG or PDF."""

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

from peerlearn.errors import UsageError
from peerlearn.runs.files import replacing
from peerlearn.runs.output import warn_once
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The files that a picture can be: pixels, or shapes and text of any size.
PictureFormat = Literal["png", "svg", "pdf"]
PICTURE_FORMATS: tuple[str, ...] = get_args(PictureFormat)

# Widths of a picture in a paper of two columns, in inches: in one column, and over both.
COLUMN_INCHES, PAGE_INCHES = 3.3, 6.8
# Sizes of letters in points, for a picture that is printed at its own width; none is smaller.
FONT_POINTS, SMALL_POINTS = 8, 7
DOTS_PER_INCH = 200

# Okabe and Ito, "Color universal design" (2008): also who does not see red or green tells these apart. Their yellow is
# left out, which is pale on white. Each has its marker and line, for those who print in black and white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
# Greys of what is beside the data: text and lines of helpers, and the ground.
GREY, PALE = "0.4", "0.9"
# Perceptually uniform, and light where nothing is, as paper is.
SEQUENTIAL_MAP = "magma_r"

_STYLE: Any = {
    "axes.prop_cycle": f"cycler(color={list(COLORS)!r})",
    "axes.labelsize": FONT_POINTS,
    "axes.titlesize": FONT_POINTS,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "errorbar.capsize": 2,
    "figure.dpi": DOTS_PER_INCH,
    "figure.titlesize": FONT_POINTS,
    "font.size": FONT_POINTS,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "image.cmap": SEQUENTIAL_MAP,
    "legend.fontsize": SMALL_POINTS,
    "legend.title_fontsize": SMALL_POINTS,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "savefig.dpi": DOTS_PER_INCH,
    # A dollar sign in a name is drawn as one, and begins no formula.
    "text.parse_math": False,
    "xtick.labelsize": SMALL_POINTS,
    "ytick.labelsize": SMALL_POINTS,
    # TrueType fonts within the file, and text that can be searched and changed.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    # The same picture is the same file.
    "svg.hashsalt": "peerlearn",
}
# What a library would else write of the hour.
_TIMELESS = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

# Longer names would leave no room for the picture.
LONGEST_NAME = 30
LONGEST_TITLE = 200
# The shortest name that `printable` can make.
_SHORTEST_NAME = 6
# A renderer's letters are up to so much wider than the font says, for they begin at whole pixels.
_WIDER = 1.04
_PIXELS_APART = 3
# In percent.
_LEAST_SPAN = 2.0

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


def check_picture(file: Path) -> None:
    """Make sure that the ending of a file named on the command line is that of a picture.

    Raises:
        UsageError: it is not.
    """
    if file.suffix.lower().removeprefix(".") not in PICTURE_FORMATS:
        raise UsageError(
            f"--output {file} must end in .{', .'.join(PICTURE_FORMATS[:-1])} or .{PICTURE_FORMATS[-1]}"
        )


def save_figure(figure: "Figure", file: Path) -> None:
    """Write a figure as a whole, in the format that the file's ending names.

    Raises:
        OSError: the disk does not take it. An earlier file stays.
    """
    with replacing(file) as stream:
        write_figure(figure, stream, file.suffix.removeprefix(".").lower())


def write_figure(figure: "Figure", stream: IO[bytes], picture_format: str) -> None:
    """Write a figure, which `plain_style` is around, as bytes of a format: the same bytes for the same figure."""
    metadata = _TIMELESS[picture_format]
    figure.savefig(stream, dpi=DOTS_PER_INCH, format=picture_format, metadata=metadata)


@contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib in the style of a paper, whatever the user's notebook or matplotlibrc has set, and in silence.

    It is a decorator too. The figure has to be drawn and saved within it.
    """
    # A folder for caches that cannot be written costs matplotlib time, and signs that a font lacks show as boxes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _own_backend():
            import matplotlib
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield


def series_style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series, by its number from 0: no two of the first 49 are alike."""
    kinds = len(COLORS)
    return {
        "color": COLORS[number % kinds],
        "marker": MARKERS[(number + number // kinds) % kinds],
        "linestyle": LINES[number % len(LINES)],
    }


def end_at_100(axes: "Axes", axis: Literal["x", "y"] = "y") -> None:
    """Let an axis of percentages end at 0 and at 100, and span enough that no small difference looks like a large one.

    Draw with `clip_on=False` what may lie on an end.
    """
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    more = max(0.0, _LEAST_SPAN - (high - low)) / 2
    ends = max(low - more, 0.0), min(high + more, 100.0)
    axes.set(**{f"{axis}lim": ends})


def cut_errors(values: Sequence[float], errors: Sequence[float]) -> tuple[list[float], list[float]]:
    """Error bars of percentages, downwards and upwards, none of which leaves 0..100."""
    pairs = list(zip(values, errors, strict=True))
    return [min(error, value) for value, error in pairs], [
        min(error, 100 - value) for value, error in pairs
    ]


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


def text_inches(text: str, points: float = SMALL_POINTS) -> float:
    """Width of a line of text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    size = FontProperties(family="DejaVu Sans", size=points)
    width, _, _ = text_to_path.get_text_width_height_descent(text, size, ismath=False)
    return _WIDER * width / 72


def shortened(name: str, inches: float, points: float = SMALL_POINTS) -> str:
    """A name without so much of its middle that it has room in a width, and in `LONGEST_NAME` characters."""
    longest = min(len(printable(name)), LONGEST_NAME)
    while longest > _SHORTEST_NAME and text_inches(printable(name, longest), points) > inches:
        longest -= 1
    return printable(name, longest if longest > _SHORTEST_NAME else _SHORTEST_NAME)


def wrapped(text: str, inches: float, points: float = FONT_POINTS) -> str:
    """A title in lines that have room in a width; its own line breaks stay."""
    return "\n".join(
        line
        for paragraph in text.split("\n")
        for line in _lines(printable(paragraph, LONGEST_TITLE), inches, points)
    )


def _lines(text: str, inches: float, points: float) -> Iterator[str]:
    line = ""
    # What belongs together stays together: "n = 500", "95 %".
    for word in re.split("(?<!=) (?![=%±])", text):
        longer = f"{line} {word}" if line else word
        if text_inches(longer, points) <= inches:
            line = longer
            continue
        if line:
            yield line
        # A word that has no room in a line of its own is broken where the line ends.
        line = ""
        for letter in word:
            if line and text_inches(line + letter, points) > inches:
                yield line
                line = ""
            line += letter
    yield line


def thin_x_labels(axes: "Axes") -> None:
    """Leave out labels of the horizontal axis that would touch the one before. The figure must have been laid out."""
    labels = axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    kept = _apart([(box.x0, box.x1) for box in boxes])
    names = [label.get_text() if number in kept else "" for number, label in enumerate(labels)]
    axes.set_xticks(axes.get_xticks(), names)


def _apart(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of spans, from left to right, of which none begins before the one before it has ended."""
    kept: list[int] = []
    for number, (begin, _) in sorted(enumerate(spans), key=lambda item: item[1]):
        if not kept or begin >= spans[kept[-1]][1] + _PIXELS_APART:
            kept.append(number)
    return kept
