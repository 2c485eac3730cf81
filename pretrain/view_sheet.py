"""A sheet of images and the views that were drawn of them, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from peerlearn.data.datasets import ImageDataset

# Width of the names beside the images, and height of a line of the caption and of the columns' titles.
_NAME_INCHES, _LINE_INCHES, _TITLES_INCHES = 0.8, 0.14, 0.25
# So many columns have room in a column of a paper.
_MOST_IN_A_COLUMN = 3


class Row(NamedTuple):
    """An image of the sheet.

    name: number of the image in the data set, and its class.
    panels: the image, uint8 (channels, h, w), and its views, float in [0, 1].
    """

    name: str
    panels: "list[Tensor]"


class Sheet(NamedTuple):
    """What is drawn: titles of the columns, rows, and the text above."""

    titles: list[str]
    rows: list[Row]
    caption: str


def image_name(dataset: "ImageDataset", index: int) -> str:
    """The number of an image in its data set and, in a second line, its class."""
    if dataset.labels is None or not dataset.class_names:
        return f"{index:,}"
    return f"{index:,}\n{dataset.class_names[int(dataset.labels[index])]}"


def draw_sheet(file: Path, sheet: Sheet) -> None:
    """Draw a sheet.

    Raises:
        OSError: the file cannot be written.
    """
    # Imported here: matplotlib takes seconds.
    from peerlearn.evaluation.plots import plain_style

    with plain_style():
        _draw(file, sheet)


def _draw(file: Path, sheet: Sheet) -> None:
    from matplotlib.figure import Figure

    from peerlearn.evaluation.plots import (
        COLUMN_INCHES,
        PAGE_INCHES,
        SMALL_POINTS,
        save_figure,
        shortened,
        wrapped,
    )

    width = COLUMN_INCHES if len(sheet.titles) <= _MOST_IN_A_COLUMN else PAGE_INCHES
    lines = wrapped(sheet.caption, width - 0.1, SMALL_POINTS)
    side = (width - _NAME_INCHES) / len(sheet.titles)
    above = _TITLES_INCHES + _LINE_INCHES * (1 + lines.count("\n"))
    height = side * len(sheet.rows) + above
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(sheet.rows), len(sheet.titles), squeeze=False)
    for row, beside in zip(sheet.rows, panels, strict=True):
        for image, panel in zip(row.panels, beside, strict=True):
            _draw_image(panel, image)
        name = "\n".join(shortened(part, _NAME_INCHES - 0.1) for part in row.name.split("\n"))
        beside[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=SMALL_POINTS)
    for title, panel in zip(sheet.titles, panels[0], strict=True):
        panel.set_title(title, fontsize=SMALL_POINTS, pad=3)
    figure.suptitle(lines, fontsize=SMALL_POINTS, x=0.01, ha="left")
    save_figure(figure, file)


def _draw_image(panel: "Axes", image: "Tensor") -> None:
    panel.set(xticks=[], yticks=[])
    panel.set_frame_on(False)
    white = 1.0 if image.is_floating_point() else 255
    shown = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=white, interpolation="nearest")
