"""A sheet of images and the views that were drawn of them, as a PNG file."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from peerlearn.data.datasets import ImageDataset

# In inches. A caption of so many signs fits into a line of the sheet.
_PANEL_INCHES, _LINE_INCHES = 1.25, 0.17
_LINE_LETTERS = 180


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

    from peerlearn.evaluation.plots import LONGEST_NAME, save_figure

    lines = "\n".join(fill(line, _LINE_LETTERS) for line in sheet.caption.splitlines())
    width = _PANEL_INCHES * len(sheet.titles) + 0.9
    height = _PANEL_INCHES * len(sheet.rows) + 0.4 + _LINE_INCHES * (1 + lines.count("\n"))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(sheet.rows), len(sheet.titles), squeeze=False)
    for row, beside in zip(sheet.rows, panels, strict=True):
        for image, panel in zip(row.panels, beside, strict=True):
            _draw_image(panel, image)
        name = "\n".join(printable(part, LONGEST_NAME) for part in row.name.split("\n"))
        beside[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    for title, panel in zip(sheet.titles, panels[0], strict=True):
        panel.set_title(title, fontsize=8)
    figure.suptitle(lines, fontsize=8, x=0.01, ha="left")
    save_figure(figure, file)


def _draw_image(panel: "Axes", image: "Tensor") -> None:
    panel.set(xticks=[], yticks=[])
    panel.set_frame_on(False)
    white = 1.0 if image.is_floating_point() else 255
    shown = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=white, interpolation="nearest")
