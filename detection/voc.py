"""Average precision of detected boxes, and the curves behind it, by the rules of Pascal VOC and of COCO.

Each rule gives the numbers of the program that published scores come from: the VOC rules those of Detectron2's
`PascalVOCDetectionEvaluator`, which is the devkit's MATLAB code in Python; the COCO rule those of pycocotools.

Dimensions: D detections, O objects, P pairs of a detection and an object, T thresholds of the IoU, C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Rule = Literal["voc07", "voc10", "coco"]

# The floats of Detectron2 and of pycocotools. Some are not the nearest to the number meant, as 0.30000000000000004,
# which decides where a recall or an IoU equals it.
_VOC_THRESHOLDS = np.arange(50, 100, 5) / 100
_VOC_RECALLS = np.arange(0, 1.1, 0.1)
_COCO_RECALLS = np.linspace(0, 1, 101)
_THRESHOLDS = {
    "voc07": _VOC_THRESHOLDS,
    "voc10": _VOC_THRESHOLDS,
    "coco": np.linspace(0.5, 0.95, 10),
}
_COCO_DETECTIONS = 100
_AT_50, _AT_75 = 0, 5
_ALL, _ONLY_50 = slice(None), slice(1)

# What becomes of a detection.
WRONG, RIGHT, IGNORED = 0, 1, 2


class VOCResult(NamedTuple):
    """Average precision (AP), in percent, not rounded.

    A mean leaves out the classes without an object that counts; it is NaN where no class has one.

    ap: mean over classes and the IoU thresholds 0.50, 0.55 .. 0.95.
    ap50: mean over classes at the IoU threshold 0.50.
    ap75: mean over classes at the IoU threshold 0.75.
    per_class_ap50: of each class at the IoU threshold 0.50, float64 (C,); NaN where no object counts.
    """

    ap: float
    ap50: float
    ap75: float
    per_class_ap50: Tensor


def evaluate(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    *,
    num_classes: int,
    rule: Rule = "voc07",
) -> VOCResult:
    """Average precision of the detections of all images.

    Every rule takes the detections of a class by falling score. Of equal scores the one of the earlier image comes
    first, and within an image the earlier one.

    voc07, voc10: corners are pixels that belong to the box, as in the devkit, so a box is x2 - x1 + 1 wide. A
    detection is compared with the object of its class and image that it overlaps most (the first of equals). If their
    IoU does not exceed the threshold, it is wrong. Else, if the object is difficult, it is neither right nor wrong,
    however many such detections there are. Else it is right if no detection before it took the object. AP is the mean
    of the best precision at a recall of at least 0, 0.1 .. 1 (voc07), or the area under the curve of that precision
    (voc10). As in Detectron2, voc07 asks for a hair more than 0.3, 0.6 and 0.7: 3 objects of 10 do not reach the
    fourth level.

    coco: a box is x2 - x1 wide. A detection takes, of the objects that no other took and whose IoU reaches the
    threshold, the one that it overlaps most (the last of equals). It takes a difficult one only if there is no other,
    and is then neither right nor wrong. Only the first 100 detections of a class in an image are looked at. AP is the
    mean of the best precision at a recall of at least 0, 0.01 .. 1.

    Args:
        detections: of each image, {boxes (n, 4), scores (n,), labels (n,)}, tensors of any real dtype; boxes are
            (x1, y1, x2, y2), from the same origin as the targets' (the devkit's first pixel is 1).
        targets: of each image in the same order, {boxes (n, 4), labels (n,), difficult (n,)}.
        num_classes: number of classes C; labels are 0 .. C - 1.
        rule: voc07, voc10 or coco.

    Returns:
        AP in percent.

    Raises:
        ValueError: the numbers of images or the shapes of an image do not fit, a key is missing, a label is no class, a
            score or corner is not finite, a box ends before it begins (by more than a pixel,
            under a VOC rule), or the rule is unknown.

    Example:
        >>> import torch
        >>> from detection.voc import evaluate
        >>> box = torch.tensor([[1, 1, 10, 10]])
        >>> target = {"boxes": box, "labels": torch.tensor([0]), "difficult": torch.tensor([False])}
        >>> found = {"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([0])}
        >>> result = evaluate([found], [target], num_classes=2)
        >>> result.ap, result.per_class_ap50.tolist()
        (100.0, [100.0, nan])
    """
    judged = _judge_classes(detections, targets, num_classes, rule)
    percent = np.full((num_classes, len(_THRESHOLDS[rule])), np.nan)
    for label, of_class in judged.items():
        percent[label] = 100 * _average_precision(rule, of_class)
    per_class = torch.from_numpy(percent)
    means = per_class.nanmean(dim=0)
    return VOCResult(
        float(means.mean()), float(means[_AT_50]), float(means[_AT_75]), per_class[:, _AT_50]
    )


class Curve(NamedTuple):
    """Precision over recall of one class: a point for each detection that is right or wrong, by falling score.

    recall: share of the objects that the detections up to this one find, float64 (points,).
    precision: share of right ones among these detections, float64 (points,).
    scores: score of this detection, float64 (points,).
    """

    recall: Tensor
    precision: Tensor
    scores: Tensor


def precision_recall(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    *,
    num_classes: int,
    rule: Rule = "voc07",
) -> list[Curve]:
    """The curve of each class at the IoU threshold 0.50, of which `evaluate` takes the average precision.

    Detections are right or wrong as there. A class without an object that counts has an empty curve.

    Args:
        detections: as in `evaluate`.
        targets: as in `evaluate`.
        num_classes: number of classes C.
        rule: voc07, voc10 or coco.

    Returns:
        A curve for each of the C classes.

    Raises:
        ValueError: as `evaluate` does.
    """
    judged = _judge_classes(detections, targets, num_classes, rule, _ONLY_50)
    curves = [Curve(*torch.empty(3, 0, dtype=torch.float64)) for _ in range(num_classes)]
    for label, of_class in judged.items():
        recall, precision = of_class.recall_and_precision()
        counts = of_class.outcomes[0] != IGNORED
        points = (recall[0], precision[0], of_class.scores)
        curves[label] = Curve(*(torch.from_numpy(values[counts]) for values in points))
    return curves


def outcomes_by_image(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    *,
    num_classes: int,
    rule: Rule = "voc07",
) -> list[Tensor]:
    """What becomes of each detection at the IoU threshold 0.50, as `evaluate` judges it.

    Args:
        detections: as in `evaluate`.
        targets: as in `evaluate`.
        num_classes: number of classes C.
        rule: voc07, voc10 or coco.

    Returns:
        Of each image, `WRONG`, `RIGHT` or `IGNORED` for its detections in the order given, int8 (n,).

    Raises:
        ValueError: as `evaluate` does.
    """
    _, _, outcomes, order = _judge(detections, targets, num_classes, rule, _ONLY_50)
    numbers = [len(image["scores"]) for image in detections]
    # Those that a rule does not look at are not judged either.
    in_order = torch.full((sum(numbers),), IGNORED, dtype=torch.int8)
    in_order[torch.from_numpy(order)] = torch.from_numpy(outcomes[0])
    return list(in_order.split(numbers))


@dataclass(frozen=True)
class _Judged:
    """What became of the detections of one class.

    Attributes:
        objects: number of objects that count.
        scores: scores, falling, (D,).
        outcomes: whether each detection is right, wrong or ignored, at each threshold, (T, D).
    """

    objects: int
    scores: np.ndarray
    outcomes: np.ndarray

    def recall_and_precision(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the detections up to each, (T, D) both."""
        right, wrong = (np.cumsum(self.outcomes == what, axis=1) for what in (RIGHT, WRONG))
        return right / self.objects, right / np.maximum(right + wrong, 1)


def _judge_classes(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    num_classes: int,
    rule: Rule,
    which: slice = _ALL,
) -> dict[int, _Judged]:
    """What became of the detections of each class that has an object that counts, at some of the thresholds."""
    found, objects, outcomes, _ = _judge(detections, targets, num_classes, rule, which)
    counted = np.bincount(objects.labels[objects.values == 0], minlength=num_classes)
    ends = np.searchsorted(found.labels, np.arange(num_classes + 1))
    judged = {}
    for label in np.flatnonzero(counted):
        of_class = slice(ends[label], ends[label + 1])
        by_score = np.argsort(-found.values[of_class], kind="stable")
        judged[int(label)] = _Judged(
            objects=int(counted[label]),
            scores=found.values[of_class][by_score],
            outcomes=outcomes[:, of_class][:, by_score],
        )
    return judged


def _judge(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    num_classes: int,
    rule: Rule,
    which: slice,
) -> tuple["_Boxes", "_Boxes", np.ndarray, np.ndarray]:
    """Compare all detections with the objects, at some of the thresholds.

    Returns:
        The detections by class, image and falling score; the objects; the outcomes of the detections, (T, D); and the
        place that each detection has in what was given, (D,).
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}: choose {', '.join(get_args(Rule))}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: at least one class is needed")
    if len(detections) != len(targets):
        raise ValueError(
            f"there are detections of {len(detections)} images and targets of {len(targets)}: give both of every image"
        )
    found = _collect(detections, "detections", "scores", num_classes, rule)
    objects = _collect(targets, "targets", "difficult", num_classes, rule)
    order = np.lexsort((-found.values, found.groups))
    groups = found.groups[order]
    places = np.arange(len(groups)) - np.searchsorted(groups, groups)
    if rule == "coco":
        order, places = order[places < _COCO_DETECTIONS], places[places < _COCO_DETECTIONS]
    found = found[order]
    objects = objects[np.argsort(objects.groups, kind="stable")]
    return found, objects, _outcomes(rule, found, objects, places, which), order


@dataclass(frozen=True)
class _Boxes:
    """Boxes of all images together.

    Attributes:
        corners: x1, y1, x2, y2, (n, 4).
        labels: classes, (n,).
        values: scores, or not 0 where difficult, (n,).
        groups: numbers (n,) of the groups, each a class in an image; they rise with the class, then with the image.
    """

    corners: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    groups: np.ndarray

    def __getitem__(self, which: np.ndarray) -> "_Boxes":
        return _Boxes(
            self.corners[which], self.labels[which], self.values[which], self.groups[which]
        )


def _edge(rule: Rule) -> float:
    """How much wider a box is than its corners lie apart, in pixels."""
    return 0.0 if rule == "coco" else 1.0


def _collect(
    images: Sequence[Mapping[str, Any]], name: str, value_key: str, num_classes: int, rule: Rule
) -> _Boxes:
    keys = ("boxes", "labels", value_key)
    parts: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for number, image in enumerate(images):
        where = f"{name} of image {number}"
        for key in keys:
            if key not in image:
                raise ValueError(f"{where} have no {key}: give {', '.join(keys)}")
            parts[key].append(_numbers(image[key]))
        boxes, *others = (parts[key][-1] for key in keys)
        if boxes.size == 0:
            boxes = parts["boxes"][-1] = boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{where}: boxes has the shape {boxes.shape}, it must be (n, 4)")
        for key, values in zip(keys[1:], others, strict=True):
            if values.shape != (len(boxes),):
                raise ValueError(
                    f"{where}: {key} has the shape {values.shape}, it must be ({len(boxes)},) like boxes"
                )
    corners = np.concatenate([np.empty((0, 4)), *parts["boxes"]])
    labels, values = (np.concatenate([np.empty(0), *parts[key]]) for key in keys[1:])
    image_of = np.arange(len(images)).repeat(np.array([*map(len, parts["boxes"])], int))
    with np.errstate(invalid="ignore"):  # Corners that are not finite are complained of first.
        sides = corners[:, 2:] - corners[:, :2] + _edge(rule)
    less = "" if rule == "coco" else " - 1"
    is_class = (labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))
    for key, bad, problem in (
        ("boxes", ~np.isfinite(corners).all(axis=1), "a corner is not a finite number"),
        ("boxes", (sides < 0).any(axis=1), f"x2 < x1{less} or y2 < y1{less}"),
        ("labels", ~is_class, f"a label is no class of 0..{num_classes - 1}"),
        (value_key, ~np.isfinite(values), "a value is not a finite number"),
    ):
        if bad.any():
            first = bad.argmax()
            image = image_of[first]
            row = first - np.searchsorted(image_of, image)
            given = torch.as_tensor(images[image][key])[row].tolist()
            raise ValueError(f"{name} of image {image}: {key}[{row}] is {given}: {problem}")
    labels = labels.astype(np.int64)
    return _Boxes(corners, labels, values, labels * len(images) + image_of)


def _numbers(values: Any) -> np.ndarray:
    numbers: np.ndarray = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    return numbers


def _outcomes(
    rule: Rule, found: _Boxes, objects: _Boxes, places: np.ndarray, which: slice
) -> np.ndarray:
    """Whether each detection is right, wrong or ignored, at each threshold: (T, D)."""
    thresholds = _THRESHOLDS[rule][which, None]
    at = np.arange(len(thresholds))[:, None]
    edge = _edge(rule)
    difficult = objects.values != 0
    outcomes = np.full((len(thresholds), len(places)), WRONG, np.int8)
    taken = np.zeros((len(thresholds), len(difficult)), bool)
    for chosen, starts, subjects, others in _rounds(found, objects, places):
        ious = _ious(found.corners[subjects], objects.corners[others], edge)
        if rule == "coco":
            allowed = (ious >= thresholds) & ~taken[:, others]
            order = np.lexsort((others, ious, ~difficult[others]))
        else:
            allowed = ious > thresholds
            order = np.lexsort((-others, ious))
        # Each pair's place by preference, so that one maximum finds the best pair that is allowed.
        preference = np.empty_like(order)
        preference[order] = np.arange(len(order))
        best = np.maximum.reduceat(np.where(allowed, preference, -1), starts, axis=1)
        # A detection without such a pair looks at its first one, which keeps every group to its own objects.
        taker = others[np.where(best >= 0, order[best], starts)]
        hit = np.where(taken[at, taker], WRONG, RIGHT)
        hit[difficult[taker]] = IGNORED
        outcomes[:, chosen] = np.where(best >= 0, hit, WRONG)
        taken[at, taker] |= best >= 0
    return outcomes


def _rounds(
    found: _Boxes, objects: _Boxes, places: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The first detection of every group, then the second, and so on, with all objects of their groups.

    Yields:
        The detections with an object to be compared with, where the pairs of each begin, and the detections (P,) and
        objects (P,) of these pairs, no more than there are objects.
    """
    begin = np.searchsorted(objects.groups, found.groups, side="left")
    end = np.searchsorted(objects.groups, found.groups, side="right")
    compared = np.flatnonzero(end > begin)
    by_place = compared[np.argsort(places[compared], kind="stable")]
    for chosen in np.split(by_place, np.cumsum(np.bincount(places[compared]))[:-1]):
        if len(chosen) == 0:
            continue
        counts = (end - begin)[chosen]
        starts = np.cumsum(counts) - counts
        others = np.arange(counts.sum()) + np.repeat(begin[chosen] - starts, counts)
        yield chosen, starts, np.repeat(chosen, counts), others


def _ious(one: np.ndarray, other: np.ndarray, edge: float) -> np.ndarray:
    """Of pairs of boxes (P, 4), whose sides are longer by ``edge`` than their corners lie apart: (P,)."""
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    inside = np.maximum(high - low + edge, 0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + edge).prod(axis=1) for boxes in (one, other)]
    union: np.ndarray = areas[0] + areas[1] - inside
    ious: np.ndarray = np.divide(inside, union, out=np.zeros_like(union), where=union > 0)
    return ious


def _average_precision(rule: Rule, of_class: _Judged) -> np.ndarray:
    """Of one class at each threshold, (T,)."""
    recall, precision = of_class.recall_and_precision()
    best: np.ndarray = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    if rule == "voc10":
        area: np.ndarray = (np.diff(recall, axis=1, prepend=0) * best).sum(axis=1)
        return area
    levels = _COCO_RECALLS if rule == "coco" else _VOC_RECALLS
    # A level that is not reached has the precision 0.
    padded = np.pad(best, ((0, 0), (0, 1)))
    at = np.stack([np.searchsorted(row, levels) for row in recall])
    mean: np.ndarray = np.take_along_axis(padded, at, axis=1).mean(axis=1)
    return mean
