"""Pictures of a detector's score: precision over recall of each class, and a sheet of images with boxes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.voc import IGNORED, RIGHT, WRONG, Curve
from peerlearn.evaluation.plots import (
    COLORS,
    COLUMN_INCHES,
    DOTS_PER_INCH,
    FONT_POINTS,
    GREY,
    PAGE_INCHES,
    SMALL_POINTS,
    plain_style,
    save_figure,
    shortened,
    text_inches,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More panels have no room on a page.
_MOST_CLASSES, _MOST_COLUMNS = 80, 8
MOST_IMAGES = 16
_IMAGES_IN_A_ROW = 4
# Room of a title and of the names of axes; of a legend's or a title's line; and below an image for the next one's name.
_AROUND_INCHES, _LINE_INCHES, _BETWEEN_INCHES = 0.45, 0.15, 0.2
# Width of a class name in a label.
_LABEL_INCHES = 0.8
# More pixels of an image than that are not seen.
_SHOWN_SIDE = round(2 * COLUMN_INCHES * DOTS_PER_INCH)


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

    Of more than 80 classes, those of the lowest and of the highest average precision are drawn.

    Args:
        file: file of the picture; its ending names the format.
        curves: curves of the classes, as `detection.voc.precision_recall` gives them.
        class_names: names of the classes.
        per_class_ap50: average precision of the classes in percent; NaN for a class without objects.
        title: title of the picture.
    """
    from matplotlib.figure import Figure

    classes = _shown_classes(list(map(float, per_class_ap50)))
    shown = len(classes)
    if shown < len(curves):
        title = f"{title}; {shown} of {len(curves):,} classes, of the lowest and the highest AP50"
    columns = min(math.ceil(math.sqrt(1.3 * shown)), _MOST_COLUMNS)
    rows = math.ceil(shown / columns)
    width = COLUMN_INCHES if columns <= 3 else PAGE_INCHES
    side = (width - _AROUND_INCHES) / columns
    shown_title = wrapped(title, width - 0.1)
    above = _LINE_INCHES * (1 + shown_title.count("\n"))
    figure = Figure(
        figsize=(width, max(rows * side, 1.2) + _AROUND_INCHES + above), layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[shown:]:
        panel.set_axis_off()
    for panel, number in zip(panels[:shown], classes, strict=True):
        ap50 = float(per_class_ap50[number])
        _plot_curve(panel, curves[number], class_names[number], ap50, side)
    panels[0].set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100))
    # The lowest panel of every column has the numbers, also where the last row is not full.
    for panel in panels[max(shown - columns, 0) : shown]:
        panel.tick_params(labelbottom=True)
    figure.suptitle(shown_title)
    figure.supxlabel("recall (%), IoU 0.50", fontsize=FONT_POINTS)
    figure.supylabel("precision (%)", fontsize=FONT_POINTS)
    save_figure(figure, file)


def _shown_classes(ap50: Sequence[float]) -> list[int]:
    """The numbers of the classes that have a panel: all, or those at both ends of the average precision, rising."""
    if len(ap50) <= _MOST_CLASSES:
        return list(range(len(ap50)))
    ranked = sorted(range(len(ap50)), key=lambda number: (math.isnan(ap50[number]), ap50[number]))
    known = sum(not math.isnan(each) for each in ap50)
    if known <= _MOST_CLASSES:
        return ranked[:_MOST_CLASSES]
    half = _MOST_CLASSES // 2
    return ranked[:half] + ranked[known - half : known]


def _plot_curve(panel: "Axes", curve: Curve, name: str, ap50: float, inches: float) -> None:
    """Draw one class into a panel of so many inches."""
    panel.grid()
    room = inches - 0.15
    shown = "" if math.isnan(ap50) else f"{ap50:.1f}"
    title = f"{shortened(name, PAGE_INCHES)}  {shown}".rstrip()
    if text_inches(title) > room:
        title = f"{shortened(name, room)}\n{shown}".rstrip()
    panel.set_title(title, fontsize=SMALL_POINTS, pad=3)
    if not curve.precision.any():
        text = "no objects" if math.isnan(ap50) else "none found"
        panel.text(50, 50, text, ha="center", va="center", fontsize=SMALL_POINTS, color=GREY)
        return
    recall = 100 * torch.cat([curve.recall.new_zeros(1), curve.recall])
    precision = 100 * torch.cat([curve.precision[:1], curve.precision])
    best = precision.flip(0).cummax(0).values.flip(0)
    panel.fill_between(recall, best, step="pre", color=COLORS[0], alpha=0.2, linewidth=0)
    panel.plot(recall, precision, color=COLORS[0], clip_on=False)


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
    RIGHT: _Look(COLORS[0], "solid", "✓ ", "✓ right"),
    WRONG: _Look(COLORS[1], (0, (1, 1)), "✗ ", "✗ wrong", at_end=True),
    IGNORED: _Look(GREY, "dashdot", "~ ", "~ neither: the object is difficult"),
}
_UNJUDGED = _Look(COLORS[0], "solid", "", "detection")
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
        file: file of the picture; its ending names the format.
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
    width = COLUMN_INCHES if columns <= 2 else PAGE_INCHES
    side = width / columns
    shown_title = wrapped(f"{title}: detections of a score of {least_score:.2f} and more", width)
    above = _LINE_INCHES * (1 + shown_title.count("\n"))
    aspects = [min(image.shape[1] / image.shape[2], 1) for image in images]
    heights = [
        side * max(aspects[n : n + columns]) + (_BETWEEN_INCHES if names else 0)
        for n in range(0, len(images), columns)
    ]
    figure = Figure(figsize=(width, sum(heights) + above + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for number, panel in enumerate(panels):
        panel.set_axis_off()
        if number < len(images):
            if names:
                panel.set_title(shortened(names[number], side - 0.1), fontsize=SMALL_POINTS, pad=2)
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
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=len(lines) if width == PAGE_INCHES else 2,
        frameon=False,
    )
    figure.suptitle(shown_title)
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
    return shortened(class_names[label], _LABEL_INCHES)


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
        figure = panel.get_figure(root=True)
        spec = panel.get_subplotspec()
        assert figure is not None
        assert spec is not None
        inches = figure.get_figwidth() / spec.get_gridspec().ncols
        x, y = _label_corner(image_size, inches, box, look, text_inches(text))
        panel.text(
            *(x, y, text),
            va="top",
            fontsize=SMALL_POINTS,
            color="white",
            bbox={"facecolor": look.color, "edgecolor": "none", "pad": 1},
        )


def _label_corner(
    image_size: tuple[int, int],
    inches: float,
    box: Sequence[float],
    look: _Look,
    label_inches: float,
) -> tuple[float, float]:
    """The upper left corner of a label: within the image as far as there is room.

    Args:
        image_size: height and width of the image in pixels.
        inches: length of its longer side in the picture.
        box: corners of the box in pixels.
        look: look of the box.
        label_inches: width of the label's text.
    """
    height, width = image_size
    left, top, right, bottom = box
    pixels_per_inch = max(image_size) / inches
    label_height = 1.6 * SMALL_POINTS / 72 * pixels_per_inch
    label_width = (label_inches + 0.04) * pixels_per_inch
    if look is _OBJECT:
        x, y = left, bottom
    elif look.at_end:
        x, y = right - label_width, bottom - label_height
    else:
        x, y = left, top - label_height
    return max(min(x, width - label_width), 0), max(min(y, height - label_height), 0)
