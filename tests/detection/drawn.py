"""Detections and objects for tests of average precision: some known, some drawn by hypothesis."""

import math

import pytest
import torch
from hypothesis import strategies as st

RULES = ("voc07", "voc10", "coco")
# Boxes of one image that do not touch each other.
APART = [[100 * i, 0, 100 * i + 9, 9] for i in range(12)]
A, B, C = APART[:3]
NAN = pytest.approx(math.nan, nan_ok=True)


def found(boxes, scores, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def target(boxes, labels=None, difficult=None):
    labels = [0] * len(boxes) if labels is None else labels
    difficult = [False] * len(boxes) if difficult is None else difficult
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult, dtype=torch.bool),
    }


NUM_CLASSES = 3
# So few places that overlaps, equal overlaps and overlaps of exactly a threshold are usual.
SPANS = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)
BOXES = st.builds(lambda x, y: [x[0], y[0], x[1], y[1]], SPANS, SPANS)
LABELS = st.integers(0, NUM_CLASSES - 1)
OBJECTS = st.lists(st.tuples(BOXES, LABELS, st.booleans()), max_size=5)


def detections_with(scores):
    """Drawn boxes, and some that sit on drawn objects."""
    return st.lists(st.tuples(BOXES, LABELS, scores, st.integers(0, 9)), max_size=9)


def images_with(scores):
    return st.lists(st.tuples(OBJECTS, detections_with(scores)), min_size=1, max_size=4)


TIED = images_with(st.integers(1, 4).map(lambda n: n / 4))


def tensors(images):
    detections, targets = [], []
    for objects, drawn in images:
        targets.append(target(*map(list, zip(*objects, strict=True))) if objects else target([]))
        boxes, labels, scores = [], [], []
        for box, label, score, near in drawn:
            if near < len(objects):
                box, label, _ = objects[near]
            for values, value in ((boxes, box), (labels, label), (scores, score)):
                values.append(value)
        detections.append(found(boxes, scores, labels))
    return detections, targets
