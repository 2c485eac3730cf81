"""Pictures of a detector's score: precision over recall of each class, and a sheet of images with boxes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.voc import IGNORED, RIGHT, WRONG, Curve
from peerlearn.evaluation.plots import LONGEST_NAME, LONGEST_TITLE, plain_style, save_figure
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Beyond so many panels nothing can be read.
_MOST_CLASSES = 100
MOST_IMAGES = 16
_IMAGES_IN_A_ROW = 4
# So many signs fit over a panel.
_LONGEST_PANEL_NAME = 18
# In inches, and in points of the labels' font.
_IMAGE_INCHES, _LABEL_POINTS = 3.5, 7
_DOTS_PER_INCH = 100
# More pixels of an image than that are not seen.
_SHOWN_SIDE = round(2 * _IMAGE_INCHES * _DOTS_PER_INCH)


@plain_style()
def plot_precision_recall(
    file: Path,
    curves: Sequence[Curve],
    class_names: Sequence[str],
    per_class_ap50: Sequence[float],
    *,
    title: str,
) -> None:
    """Draw precision over recall, a panel for each class, with the best precision at each recall as an area.

    Args:
        file: PNG file.
        curves: curves of the classes, as `detection.voc.precision_recall` gives them.
        class_names: names of the classes.
        per_class_ap50: average precision of the classes in percent; NaN for a class without objects.
        title: title of the picture.
    """
    from matplotlib.figure import Figure

    shown = min(len(curves), _MOST_CLASSES)
    if shown < len(curves):
        title = f"{title}, first {shown} of {len(curves)} classes"
    columns = math.ceil(math.sqrt(1.3 * shown))
    rows = math.ceil(shown / columns)
    size = (max(1.5 * columns, 4.5), max(1.5 * rows, 3.2) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[shown:]:
        panel.set_axis_off()
    for panel, curve, name, ap50 in zip(
        panels[:shown], curves, class_names, map(float, per_class_ap50), strict=False
    ):
        _plot_curve(panel, curve, name, ap50)
    panels[0].set(xlim=(0, 100), ylim=(0, 105), xticks=(0, 50, 100), yticks=(0, 50, 100))
    # The lowest panel of every column has the numbers, also where the last row is not full.
    for panel in panels[max(shown - columns, 0) : shown]:
        panel.tick_params(labelbottom=True)
    figure.suptitle(printable(title, LONGEST_TITLE), fontsize=10)
    figure.supxlabel("recall (%), IoU 0.50", fontsize=9)
    figure.supylabel("precision (%)", fontsize=9)
    save_figure(figure, file)


def _plot_curve(panel: "Axes", curve: Curve, name: str, ap50: float) -> None:
    panel.tick_params(labelsize=7)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    shown = "" if math.isnan(ap50) else f"  {ap50:.1f}"
    panel.set_title(f"{printable(name, _LONGEST_PANEL_NAME)}{shown}", fontsize=8)
    if not curve.precision.any():
        text = "no objects" if math.isnan(ap50) else "none found"
        panel.text(50, 50, text, ha="center", va="center", fontsize=8, color="0.4")
        return
    recall = 100 * torch.cat([curve.recall.new_zeros(1), curve.recall])
    precision = 100 * torch.cat([curve.precision[:1], curve.precision])
    best = precision.flip(0).cummax(0).values.flip(0)
    panel.fill_between(recall, best, step="pre", color="#cfe0f3")
    panel.plot(recall, precision, color="#1f4e9c", linewidth=1)


class _Look(NamedTuple):
    """How a box is drawn.

    color: colour of its line and of its label's ground.
    style: style of its line.
    mark: sign before its label.
    words: what the legend says of it.
    at_end: whether the label is at the lower right corner, and not at the upper left one. So the labels of a right and
        a wrong detection of the same object do not hide each other.
    """

    color: str
    style: Any
    mark: str
    words: str
    at_end: bool = False


# Told apart by the sign and the line too: not everybody sees the colours.
_LOOKS = {
    RIGHT: _Look("#0b6b3a", "solid", "✓ ", "✓ right"),
    WRONG: _Look("#b3261e", (0, (1, 1)), "✗ ", "✗ wrong", at_end=True),
    IGNORED: _Look("#5f5f5f", "dashdot", "~ ", "~ neither: the object is difficult"),
}
_UNJUDGED = _Look("#1f4e9c", "solid", "", "detection")
_OBJECT = _Look("#000000", (0, (3, 3)), "missed: ", "object")


@plain_style()
def draw_sheet(
    file: Path,
    images: Sequence[Tensor],
    detections: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    *,
    title: str,
    targets: Sequence[Mapping[str, Tensor]] | None = None,
    outcomes: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    least_score: float = 0.5,
) -> None:
    """Draw the first 16 images with their objects (dashed) and their detections, the right and the wrong ones marked.

    Args:
        file: PNG file.
        images: images, uint8 (channels, h, w).
        detections: of each image, {boxes (n, 4), scores (n,), labels (n,)}; corners in pixels from 0 in the image.
        class_names: names of the classes.
        title: title of the picture.
        targets: of each image, {boxes (n, 4), labels (n,)}, corners likewise; None = unknown.
        outcomes: what became of the detections of each image, as `detection.voc.outcomes_by_image` gives it; None =
            unknown.
        names: name of each image, written above it; None = nothing is.
        least_score: score from which on a detection is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    images = images[:MOST_IMAGES]
    columns = min(len(images), _IMAGES_IN_A_ROW)
    rows = math.ceil(len(images) / columns)
    figure = Figure(
        figsize=(max(_IMAGE_INCHES * columns, 6), _IMAGE_INCHES * rows + 0.9), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, panel in enumerate(panels):
        panel.set_axis_off()
        if number < len(images):
            if names:
                panel.set_title(printable(names[number], LONGEST_NAME), fontsize=8)
            _draw_image(
                panel,
                images[number],
                _from_score(detections[number], least_score),
                class_names,
                targets[number] if targets else None,
                outcomes[number][detections[number]["scores"] >= least_score] if outcomes else None,
            )
    looks = [*_LOOKS.values()] if outcomes else [_UNJUDGED]
    lines = [
        Line2D([], [], color=look.color, linestyle=look.style, linewidth=2, label=look.words)
        for look in [*([_OBJECT] if targets else []), *looks]
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9)
    figure.suptitle(
        f"{printable(title, LONGEST_TITLE)}: detections of a score of {least_score:.2f} and more",
        fontsize=11,
    )
    save_figure(figure, file)


def _from_score(detection: Mapping[str, Tensor], least_score: float) -> dict[str, Tensor]:
    kept = detection["scores"] >= least_score
    return {key: values[kept] for key, values in detection.items()}


def _draw_image(
    panel: "Axes",
    image: Tensor,
    detection: Mapping[str, Tensor],
    class_names: Sequence[str],
    target: Mapping[str, Tensor] | None,
    outcomes: Tensor | None,
) -> None:
    _, height, width = image.shape
    shown = _shrunk(image)
    pixels = shown.permute(1, 2, 0) if len(shown) == 3 else shown.float().mean(0)
    # Pixels are squares between whole numbers, as the corners count them.
    panel.imshow(pixels.cpu().numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    if target is not None:
        missed = set(range(len(target["boxes"]))) if outcomes is not None else set()
        if outcomes is not None:
            missed -= _found_objects(detection, target, outcomes)
        rows = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        for number, (box, label) in enumerate(rows):
            text = _name(class_names, label) if number in missed else ""
            _draw_box(panel, (height, width), box, _OBJECT, text)
    looks = (
        [_UNJUDGED] * len(detection["boxes"])
        if outcomes is None
        else [_LOOKS[outcome] for outcome in outcomes.tolist()]
    )
    rows_of = (detection[key].tolist() for key in ("boxes", "labels", "scores"))
    for look, box, label, score in zip(looks, *rows_of, strict=True):
        text = f"{_name(class_names, label)} {score:.2f}"
        _draw_box(panel, (height, width), box, look, text)


def _shrunk(image: Tensor) -> Tensor:
    """The image with not many more pixels than a panel shows: drawing a photo whole takes much memory."""
    step = max(image.shape[1:]) // _SHOWN_SIDE
    if step < 2:
        return image
    return F.avg_pool2d(image[None].float(), step, ceil_mode=True)[0].to(image.dtype)


def _found_objects(
    detection: Mapping[str, Tensor], target: Mapping[str, Tensor], outcomes: Tensor
) -> set[int]:
    """The numbers of the objects that right detections, or those of difficult objects, are of."""
    from torchvision.ops import box_iou

    hits = (outcomes != WRONG).nonzero().flatten()
    if len(hits) == 0 or len(target["boxes"]) == 0:
        return set()
    ious = box_iou(detection["boxes"][hits].float(), target["boxes"].float())
    same = detection["labels"][hits][:, None] == target["labels"][None]
    return set(ious.where(same, -1).argmax(1).tolist())


def _name(class_names: Sequence[str], label: int) -> str:
    return printable(class_names[label], LONGEST_NAME)


def _draw_box(
    panel: "Axes", image_size: tuple[int, int], box: Sequence[float], look: _Look, text: str
) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    corner, size = (left, top), (right - left, bottom - top)
    # White below the line and in its gaps, so that it is seen on any image.
    panel.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.5))
    panel.add_patch(
        Rectangle(
            corner, *size, fill=False, edgecolor=look.color, linestyle=look.style, linewidth=1.5
        )
    )
    if text:
        text = look.mark + text
        x, y = _label_corner(image_size, box, look, len(text))
        panel.text(
            *(x, y, text),
            va="top",
            fontsize=_LABEL_POINTS,
            color="white",
            bbox={"facecolor": look.color, "edgecolor": "none", "pad": 1},
        )


def _label_corner(
    image_size: tuple[int, int], box: Sequence[float], look: _Look, signs: int
) -> tuple[float, float]:
    """The upper left corner of a label of so many signs: within the image as far as there is room."""
    height, width = image_size
    left, top, right, bottom = box
    pixels_per_point = max(image_size) / (72 * _IMAGE_INCHES)
    label_height = 1.6 * _LABEL_POINTS * pixels_per_point
    label_width = (0.62 * signs + 0.4) * _LABEL_POINTS * pixels_per_point
    if look is _OBJECT:
        x, y = left, bottom
    elif look.at_end:
        x, y = right - label_width, bottom - label_height
    else:
        x, y = left, top - label_height
    return max(min(x, width - label_width), 0), max(min(y, height - label_height), 0)
