"""Precision over recall of each class, and what becomes of each detection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from detection.voc import (
    IGNORED,
    RIGHT,
    WRONG,
    evaluate,
    outcomes_by_image,
    precision_recall,
)
from tests.detection.drawn import (
    NUM_CLASSES,
    RULES,
    TIED,
    A,
    B,
    C,
    found,
    target,
    tensors,
)


def area_under(curve, rule):
    """AP of a curve, as the papers write it: a loop over levels or points."""
    recall, precision = curve.recall.tolist(), curve.precision.tolist()
    best = [max(precision[n:]) for n in range(len(precision))]
    if rule == "voc10":
        before = [0, *recall]
        return sum((r - b) * p for r, b, p in zip(recall, before[:-1], best, strict=True))
    levels = np.linspace(0, 1, 101) if rule == "coco" else np.arange(0, 1.1, 0.1)
    reached = [
        next((p for r, p in zip(recall, best, strict=True) if r >= level), 0) for level in levels
    ]
    return sum(reached) / len(levels)


@pytest.mark.parametrize("rule", RULES)
class TestCurves:
    @settings(max_examples=100)
    @given(images=TIED)
    def test_the_average_precision_is_that_of_the_curve(self, rule, images):
        detections, targets = tensors(images)
        curves = precision_recall(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        expected = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule).per_class_ap50
        assert len(curves) == NUM_CLASSES
        for curve, ap50 in zip(curves, expected.tolist(), strict=True):
            if math.isnan(ap50):
                assert [len(values) for values in curve] == [0, 0, 0]
            else:
                assert 100 * area_under(curve, rule) == pytest.approx(ap50)
                assert curve.scores.tolist() == sorted(curve.scores.tolist(), reverse=True)

    def test_a_curve_that_is_known(self, rule):
        # Right, wrong, ignored, right of two objects that count; and a class of a difficult object alone.
        detection = found([A, A, C, B, A], [0.9, 0.8, 0.7, 0.6, 0.5], [0, 0, 0, 0, 1])
        objects = target([A, B, C, A], [0, 0, 0, 1], [False, False, True, True])
        curve, *others = precision_recall([detection], [objects], num_classes=3, rule=rule)
        assert curve.recall.tolist() == [0.5, 0.5, 1]
        assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
        assert curve.scores.tolist() == [0.9, 0.8, 0.6]
        assert [len(values) for other in others for values in other] == [0] * 6

    def test_outcomes_stand_in_the_order_of_the_detections(self, rule):
        detections = [
            found([B, A, A], [0.2, 0.3, 0.9], [1, 0, 0]),
            found([], []),
            found([C, B, A], [0.5, 0.6, 0.7], [0, 0, 1]),
        ]
        targets = [target([A, B], [0, 1]), target([A]), target([C, B], [0, 0], [True, False])]
        outcomes = outcomes_by_image(detections, targets, num_classes=2, rule=rule)
        assert [each.tolist() for each in outcomes] == [
            [RIGHT, WRONG, RIGHT],
            [],
            [IGNORED, RIGHT, WRONG],
        ]

    @settings(max_examples=50)
    @given(images=TIED)
    def test_outcomes_are_those_of_the_curves(self, rule, images):
        detections, targets = tensors(images)
        curves = precision_recall(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        outcomes = torch.cat(
            outcomes_by_image(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        )
        labels = torch.cat([each["labels"] for each in detections])
        for label, curve in enumerate(curves):
            own = outcomes[labels == label]
            counts = torch.cat([each["labels"][~each["difficult"]] for each in targets]) == label
            if counts.any():
                assert int((own != IGNORED).sum()) == len(curve.recall)
                assert int((own == RIGHT).sum()) == round(
                    float(curve.recall[-1:].sum() * counts.sum())
                )


def test_detections_that_coco_does_not_look_at_are_not_judged():
    detection = found([B] * 100 + [A], [0.9] * 100 + [0.1])
    (outcomes,) = outcomes_by_image([detection], [target([A])], num_classes=1, rule="coco")
    assert outcomes.tolist() == [WRONG] * 100 + [IGNORED]
