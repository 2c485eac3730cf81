"""What the tests of pictures ask of a figure: its texts, where they lie, and whether they meet."""

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from unittest import mock

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


def figure_of(picture: Callable[[Path], object], file: Path) -> Figure:
    """The figure that a picture saves into a file."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **more: object) -> None:
        saved.append(figure)
        save(figure, *arguments, **more)

    with mock.patch.object(Figure, "savefig", keep):
        picture(file)
    (figure,) = saved
    return figure


def check_texts(figure: Figure) -> None:
    """Make sure that no text leaves the figure or is too small to be read, and that no two labels of an axis meet."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for text in _texts(figure):
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, (text.get_text(), box, width, height)
        assert text.get_fontsize() >= 7, text.get_text()
    for axes in figure.axes:
        for labels in _tick_labels(axes, drawn=True):
            for one, other in combinations(labels, 2):
                # Boxes of letters of a slanting or upright line are a pixel too large.
                boxes = [each.get_window_extent().padded(-1) for each in (one, other)]
                assert not boxes[0].overlaps(boxes[1]), (one.get_text(), other.get_text())


def _seen(text: Text) -> bool:
    return text.get_visible() and bool(text.get_text().strip())


def _tick_labels(axes: Axes, *, drawn: bool) -> Iterator[list[Text]]:
    """Labels of the ticks within the limits of each axis; or of those beyond, which exist and are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for minor in (False, True):
            places = axis.get_ticklocs(minor=minor)
            labels = axis.get_ticklabels(minor=minor)
            yield [
                label
                # An axis without labels, within a grid of panels, has places alone.
                for place, label in zip(places, labels, strict=False)
                if (axes.axison and low <= place <= high) == drawn and _seen(label)
            ]


def _texts(figure: Figure) -> Iterator[Text]:
    """Every text that is drawn: titles, names of axes and ticks, legends and notes."""
    seen = [axes for axes in figure.axes if axes.get_visible()]
    hidden = [
        label for axes in seen for labels in _tick_labels(axes, drawn=False) for label in labels
    ]
    for artist in [*figure.texts, *figure.legends, *seen]:
        yield from (each for each in artist.findobj(Text) if _seen(each) and each not in hidden)
