import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.voc import (
    VOCResult,
    evaluate,
)
from tests.detection.drawn import (
    APART,
    NAN,
    NUM_CLASSES,
    RULES,
    TIED,
    A,
    B,
    C,
    found,
    images_with,
    target,
    tensors,
)
from tests.detection.oracles import plain_devkit, pycocotools


def ap50(detection, its_target, rule):
    return evaluate([detection], [its_target], num_classes=1, rule=rule).ap50


def by_rule(detection, its_target):
    return [ap50(detection, its_target, rule) for rule in RULES]


class TestClosedForms:
    def test_an_iou_of_exactly_the_threshold_is_enough_for_coco_alone(self):
        half = found([[0, 0, 10, 5]], [0.9])
        whole = target([[0, 0, 10, 10]])
        result = evaluate([half], [whole], num_classes=1, rule="coco")
        assert (result.ap50, result.ap75, result.ap) == pytest.approx((100, 0, 10))
        # 50 of 100 pixels, corners included.
        half, whole = found([[1, 1, 10, 5]], [0.9]), target([[1, 1, 10, 10]])
        assert [ap50(half, whole, rule) for rule in ("voc07", "voc10")] == [0, 0]
        # 60 of 100: at 0.50 and 0.55, not at 0.60.
        most = found([[1, 1, 10, 6]], [0.9])
        for rule in ("voc07", "voc10"):
            result = evaluate([most], [whole], num_classes=1, rule=rule)
            assert (result.ap50, result.ap75, result.ap) == pytest.approx((100, 0, 20))

    def test_corners_belong_to_the_box_in_voc(self):
        # 9 of 16 pixels; but 4 of 9 between the corners.
        assert by_rule(found([[1, 1, 3, 3]], [0.9]), target([[1, 1, 4, 4]])) == [100, 100, 0]

    @pytest.mark.filterwarnings("error")
    def test_a_box_of_one_pixel_is_a_box(self):
        pixel = [[5, 5, 5, 5]]
        assert by_rule(found(pixel, [0.9]), target(pixel)) == [100, 100, 0]

    def test_a_second_detection_of_an_object_is_wrong(self):
        # Right, wrong, right of two objects: precision 1 up to recall 1/2, then 2/3.
        detection = found([A, A, B], [0.9, 0.8, 0.7])
        assert by_rule(detection, target([A, B])) == pytest.approx(
            [
                100 * (6 + 5 * 2 / 3) / 11,
                100 * (1 / 2 + 1 / 2 * 2 / 3),
                100 * (51 + 50 * 2 / 3) / 101,
            ]
        )

    def test_a_low_precision_is_lifted_to_the_best_at_a_higher_recall(self):
        # Wrong, right, right of two objects: precisions 0, 1/2, 2/3.
        detection = found([C, A, B], [0.9, 0.8, 0.7])
        assert by_rule(detection, target([A, B])) == pytest.approx([200 / 3] * 3)

    def test_what_is_not_found_counts_as_precision_zero(self):
        detection = found([A], [0.9])
        assert by_rule(detection, target([A, B])) == pytest.approx(
            [100 * 6 / 11, 100 / 2, 100 * 51 / 101]
        )

    @pytest.mark.parametrize(("right", "levels"), [(2, 3), (3, 3), (4, 5), (5, 6), (6, 6), (7, 7)])
    def test_levels_of_recall_in_voc07_are_detectron2s_floats(self, right, levels):
        detection = found(APART[:right], [0.9] * right)
        assert ap50(detection, target(APART[:10]), "voc07") == pytest.approx(100 * levels / 11)

    def test_detections_of_a_difficult_object_are_neither_right_nor_wrong(self):
        # In coco the first takes the difficult object, and the second is wrong.
        detection = found([B, B, A], [0.9, 0.8, 0.7])
        result = by_rule(detection, target([A, B], difficult=[False, True]))
        assert result == pytest.approx([100, 100, 50])

    def test_of_equal_overlaps_voc_looks_at_the_first_object(self):
        for difficult, expected in (([False, True], 100), ([True, False], 0)):
            same = target([A, A], difficult=difficult)
            assert by_rule(found([A], [0.9]), same) == [expected, expected, 100]

    def test_an_object_that_is_taken_is_not_replaced_by_the_next_best_in_voc(self):
        # The second detection covers 19/21 of the first object, which is taken, and 16/24 of the other.
        objects = target([[0, 0, 199, 9], [50, 0, 249, 9]])
        detection = found([[0, 0, 199, 9], [10, 0, 209, 9]], [0.9, 0.8])
        assert by_rule(detection, objects) == pytest.approx([100 * 6 / 11, 50, 100])

    def test_of_equal_overlaps_coco_takes_the_last_object(self):
        # The first detection covers 9/11 of both; the other fits the first object, and 8/12 of the second.
        objects = target([[0, 0, 10, 9], [2, 0, 12, 9]])
        detection = found([[1, 0, 11, 9], [0, 0, 10, 9]], [0.9, 0.8])
        result = evaluate([detection], [objects], num_classes=1, rule="coco")
        assert result.ap75 == pytest.approx(100)

    def test_coco_takes_a_difficult_object_only_if_there_is_no_other(self):
        objects = target([A, [0, 0, 8, 9]], difficult=[True, False])
        assert ap50(found([A], [0.9]), objects, "coco") == 100
        assert ap50(found([A, A], [0.9, 0.8]), objects, "coco") == 100
        assert ap50(found([A, A, A, B], [0.9, 0.8, 0.7, 0.6]), objects, "coco") == 100

    def test_of_equal_scores_the_first_given_comes_first(self):
        for rule in RULES:
            assert ap50(found([A, B], [0.5, 0.5]), target([A]), rule) == 100
            assert ap50(found([B, A], [0.5, 0.5]), target([A]), rule) == pytest.approx(50)
            right, wrong = found([A], [0.5]), found([B], [0.5])
            pairs = [(right, target([A])), (wrong, target([]))]
            for order, expected in ((pairs, 100), (pairs[::-1], 50)):
                images, objects = zip(*order, strict=True)
                result = evaluate(images, objects, num_classes=1, rule=rule)
                assert result.ap50 == pytest.approx(expected)

    def test_coco_looks_at_100_detections_of_a_class_in_an_image(self):
        detection = found([B] * 100 + [A, A], [0.9] * 100 + [0.1, 0.1], [0] * 101 + [1])
        objects = target([A, A], [0, 1])
        for rule, first in (("voc07", 100 / 101), ("voc10", 100 / 101), ("coco", 0)):
            result = evaluate([detection], [objects], num_classes=2, rule=rule)
            assert result.per_class_ap50.tolist() == pytest.approx([first, 100])

    @pytest.mark.parametrize("rule", RULES)
    def test_a_class_without_an_object_that_counts_is_left_out(self, rule):
        detection = found([A, A, A, A], [0.9, 0.8, 0.7, 0.6], [0, 1, 2, 4])
        objects = target([A, A, A, B], [0, 1, 3, 1], [False, True, False, True])
        result = evaluate([detection], [objects], num_classes=5, rule=rule)
        assert result.per_class_ap50.tolist() == [100, NAN, NAN, 0, NAN]
        assert (result.ap, result.ap50, result.ap75) == pytest.approx((50, 50, 50))

    @pytest.mark.parametrize("rule", RULES)
    def test_nothing_found_and_nothing_there(self, rule):
        for detection in (found([], []), found([A], [0.9], [1])):
            result = evaluate([detection], [target([A])], num_classes=2, rule=rule)
            assert result[:3] == (0, 0, 0)
        for images in ([], [found([], [])], [found([A], [0.9])]):
            empty = [target([]) for _ in images]
            result = evaluate(images, empty, num_classes=3, rule=rule)
            assert all(math.isnan(value) for value in result[:3])
            assert result.per_class_ap50.tolist() == [NAN] * 3

    def test_an_object_is_found_in_its_own_image_and_class_only(self):
        there, elsewhere = target([A, B], [0, 1]), target([C])
        images = [found([C], [0.9]), found([A, B], [0.8, 0.7], [0, 0])]
        for rule in RULES:
            result = evaluate(images, [there, elsewhere], num_classes=2, rule=rule)
            assert result.per_class_ap50.tolist() == [0, 0]

    def test_a_miss_in_one_image_leaves_the_objects_of_another_as_they_are(self):
        # Right, wrong, wrong, right of three objects: precision 1 up to recall 1/3, then 1/2 up to 2/3.
        images = [found([A, A, B], [0.9, 0.8, 0.6]), found([C], [0.7])]
        objects = [target([A, B]), target([A])]
        expected = ((4 + 3 / 2) / 11, (1 + 1 / 2) / 3, (34 + 33 / 2) / 101)
        for rule, ap in zip(RULES, expected, strict=True):
            result = evaluate(images, objects, num_classes=1, rule=rule)
            assert result.ap50 == pytest.approx(100 * ap)

    def test_the_rule_is_voc07_unless_told(self):
        result = evaluate([found([A], [0.9])], [target([A, B])], num_classes=1)
        assert result.ap == pytest.approx(100 * 6 / 11)


def summary(per_class):
    """What a table (C, T) of APs comes to."""
    known = per_class[~np.isnan(per_class[:, 0])]
    if len(known) == 0:
        return [math.nan] * 3
    return [known.mean(), known[:, 0].mean(), known[:, 5].mean()]


def assert_equal(result: VOCResult, per_class: np.ndarray, within: float):
    table = [*result[:3], *result.per_class_ap50.tolist()]
    expected = [*summary(per_class), *per_class[:, 0]]
    assert table == pytest.approx(expected, abs=within, nan_ok=True)


def random_boxes(generator, n):
    corners = generator.uniform(0, 300, (n, 2))
    return np.hstack([corners, corners + generator.uniform(5, 150, (n, 2))])


def a_large_case(images=150):
    """Float32 detections around the objects of an image, whose class some get wrong, and around nothing."""
    generator = np.random.default_rng(0)
    detections, targets = [], []
    for _ in range(images):
        n, d = generator.integers(0, 9), generator.integers(0, 40)
        boxes, labels = random_boxes(generator, n + 2), generator.integers(0, NUM_CLASSES, n + 2)
        near = generator.integers(0, n + 2, d)
        moved = (boxes[near] + generator.normal(0, 8, (d, 4))).reshape(d, 2, 2)
        confused = generator.random(d) < 0.1
        detections.append(
            {
                "boxes": torch.from_numpy(np.sort(moved, axis=1).reshape(d, 4)).float(),
                "scores": torch.from_numpy(generator.random(d)).float(),
                "labels": torch.from_numpy((labels[near] + confused) % NUM_CLASSES),
            }
        )
        targets.append(
            {
                "boxes": torch.from_numpy(boxes[:n]).float(),
                "labels": torch.from_numpy(labels[:n]),
                "difficult": torch.from_numpy(generator.random(n) < 0.2),
            }
        )
    return detections, targets


class TestOracles:
    @pytest.mark.parametrize("rule", ["voc07", "voc10"])
    @settings(max_examples=100)
    @given(images=TIED)
    def test_a_loop_over_boxes_agrees(self, rule, images):
        detections, targets = tensors(images)
        result = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        assert_equal(result, plain_devkit(detections, targets, NUM_CLASSES, rule), 1e-10)

    @settings(max_examples=100)
    @given(images=TIED)
    def test_pycocotools_agrees(self, images):
        detections, targets = tensors(images)
        result = evaluate(detections, targets, num_classes=NUM_CLASSES, rule="coco")
        assert_equal(result, pycocotools(detections, targets, NUM_CLASSES), 1e-6)

    def test_both_agree_on_many_detections(self):
        detections, targets = a_large_case()
        for rule in ("voc07", "voc10"):
            result = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule)
            assert 5 < result.ap < result.ap50 < 60
            assert_equal(result, plain_devkit(detections, targets, NUM_CLASSES, rule), 1e-10)
        result = evaluate(detections, targets, num_classes=NUM_CLASSES, rule="coco")
        assert_equal(result, pycocotools(detections, targets, NUM_CLASSES), 1e-6)

    def test_pycocotools_agrees_beyond_100_detections(self):
        generator = np.random.default_rng(1)
        objects = random_boxes(generator, 30)
        moved = np.sort(
            (objects.repeat(6, 0) + generator.normal(0, 4, (180, 4))).reshape(180, 2, 2), axis=1
        ).reshape(180, 4)
        detections = [found(moved.tolist(), generator.random(180).tolist())]
        targets = [target(objects.tolist())]
        result = evaluate(detections, targets, num_classes=1, rule="coco")
        assert_equal(result, pycocotools(detections, targets, 1), 1e-6)

    def test_levels_of_recall_in_coco_are_pycocotools_floats(self):
        """Of a hundred objects, so many are found that the recall is a level, or as a float just not."""
        numbers = (29, 34, 35, 41, 47, 57, 58, 69, 70, 82, 83, 94, 95, 100)
        images = range(100)
        classes = list(range(len(numbers)))
        targets = [target([A] * len(classes), classes) for _ in images]
        of_image = [[label for label in classes if numbers[label] > image] for image in images]
        detections = [found([A] * len(its), [0.9] * len(its), its) for its in of_image]
        result = evaluate(detections, targets, num_classes=len(classes), rule="coco")
        assert_equal(result, pycocotools(detections, targets, len(classes)), 1e-9)
        assert result.per_class_ap50[:3].tolist() == pytest.approx(
            [3000 / 101, 3500 / 101, 3500 / 101]
        )

    @pytest.mark.parametrize("rule", ["voc07", "voc10"])
    def test_an_iou_that_equals_a_threshold_of_voc_is_too_low(self, rule):
        for n in range(10, 20):
            detections, targets = [found([[1, 1, n, 1]], [0.9])], [target([[1, 1, 20, 1]])]
            result = evaluate(detections, targets, num_classes=1, rule=rule)
            assert result.ap == pytest.approx(10 * (n - 10))
            assert_equal(result, plain_devkit(detections, targets, 1, rule), 1e-9)

    def test_thresholds_of_coco_are_pycocotools_floats(self):
        for width in (*(n / 20 for n in range(10, 20)), *np.linspace(0.5, 0.95, 10)):
            detections, targets = [found([[0, 0, width, 1]], [0.9])], [target([[0, 0, 1, 1]])]
            result = evaluate(detections, targets, num_classes=1, rule="coco")
            assert result.ap == pytest.approx(10 * (round(20 * width) - 9))
            assert_equal(result, pycocotools(detections, targets, 1), 1e-9)


@pytest.mark.parametrize("rule", RULES)
class TestInvariances:
    @settings(max_examples=50)
    @given(images=images_with(st.just(0)), data=st.data())
    def test_the_order_of_images_and_of_detections_is_free_without_ties(self, rule, images, data):
        detections, targets = tensors(images)
        total = sum(len(each["scores"]) for each in detections)
        scores = torch.tensor(data.draw(st.permutations(range(total))), dtype=torch.float64)
        for each, its in zip(
            detections, scores.split([len(each["scores"]) for each in detections]), strict=True
        ):
            each["scores"] = its
        before = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        turned = [
            {key: values.flip(0) for key, values in each.items()} for each in detections[::-1]
        ]
        after = evaluate(turned, targets[::-1], num_classes=NUM_CLASSES, rule=rule)
        assert_same(before, after)

    def test_numbers_of_classes_are_free(self, rule):
        detections, targets = a_large_case(30)
        before = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        number = torch.tensor([4, 0, 2])
        for each in (*detections, *targets):
            each["labels"] = number[each["labels"]]
        after = evaluate(detections, targets, num_classes=5, rule=rule)
        assert after.ap == pytest.approx(before.ap)
        assert torch.equal(after.per_class_ap50[number], before.per_class_ap50)
        assert after.per_class_ap50[[1, 3]].isnan().all()

    def test_the_origin_and_the_scale_of_scores_are_free(self, rule):
        detections, targets = a_large_case(30)
        before = evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule)
        for each in (*detections, *targets):
            each["boxes"] = each["boxes"].double() + torch.tensor([1, 2, 1, 2])
        for each in detections:
            each["scores"] = each["scores"].double() ** 3 - 7
        assert_same(before, evaluate(detections, targets, num_classes=NUM_CLASSES, rule=rule))

    def test_dtypes_are_free(self, rule):
        before = evaluate(
            [found([A, B], [1, 2], [0, 1])],
            [target([A, C], [0, 1], [False, True])],
            num_classes=2,
            rule=rule,
        )
        for of_boxes, of_others in (
            (torch.int64, torch.uint8),
            (torch.float16, torch.int32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float16),
        ):
            detection = {
                "boxes": torch.tensor([A, B], dtype=of_boxes),
                "scores": torch.tensor([1, 2], dtype=of_others),
                "labels": torch.tensor([0, 1], dtype=of_others),
            }
            objects = {
                "boxes": torch.tensor([A, C], dtype=of_boxes),
                "labels": torch.tensor([0, 1], dtype=of_others),
                "difficult": torch.tensor([0, 1], dtype=of_others),
            }
            assert_same(before, evaluate([detection], [objects], num_classes=2, rule=rule))
        arrays = [
            {key: values.numpy() for key, values in each.items()} for each in (detection, objects)
        ]
        assert_same(before, evaluate(arrays[:1], arrays[1:], num_classes=2, rule=rule))


def assert_same(one: VOCResult, other: VOCResult):
    assert [*one[:3], *one.per_class_ap50.tolist()] == pytest.approx(
        [*other[:3], *other.per_class_ap50.tolist()], nan_ok=True
    )


def test_a_detectors_own_output_is_taken():
    """Parameters' results, and the empty tensors that people write."""
    detection = found([A], [0.9])
    detection["scores"].requires_grad_()
    nothing = {"boxes": torch.empty(0), "scores": torch.tensor([]), "labels": torch.tensor([])}
    no_object = {"boxes": torch.empty(0, 4), "labels": torch.empty(0), "difficult": torch.empty(0)}
    result = evaluate(
        [nothing, detection, nothing], [no_object, target([A]), target([])], num_classes=1
    )
    assert result.ap == 100


def test_inputs_stay_as_they_are():
    detections, targets = a_large_case(5)
    copies = [{key: v.clone() for key, v in each.items()} for each in (*detections, *targets)]
    evaluate(detections, targets, num_classes=NUM_CLASSES)
    for each, copy in zip((*detections, *targets), copies, strict=True):
        assert all(torch.equal(each[key], copy[key]) for key in copy)


def detection_with(**changes):
    return {**found([A, B], [0.9, 0.8], [0, 1]), **changes}


def target_with(**changes):
    return {**target([A, B], [0, 1]), **changes}


@pytest.mark.parametrize(
    ("detection", "objects", "message"),
    [
        (
            detection_with(scores=torch.ones(3)),
            target_with(),
            "detections of image 1: scores has the shape (3,), it must be (2,) like boxes",
        ),
        (
            detection_with(labels=torch.zeros(2, 1)),
            target_with(),
            "detections of image 1: labels has the shape (2, 1), it must be (2,) like boxes",
        ),
        (
            detection_with(),
            target_with(difficult=torch.tensor(False)),
            "targets of image 1: difficult has the shape (), it must be (2,) like boxes",
        ),
        (
            detection_with(),
            target_with(boxes=torch.empty(0)),
            "targets of image 1: labels has the shape (2,), it must be (0,) like boxes",
        ),
        (
            detection_with(boxes=torch.ones(2, 5)),
            target_with(),
            "detections of image 1: boxes has the shape (2, 5), it must be (n, 4)",
        ),
        (
            detection_with(),
            target_with(boxes=torch.ones(4)),
            "targets of image 1: boxes has the shape (4,), it must be (n, 4)",
        ),
        (
            detection_with(labels=torch.tensor([0, 2])),
            target_with(),
            "detections of image 1: labels[1] is 2: a label is no class of 0..1",
        ),
        (
            detection_with(),
            target_with(labels=torch.tensor([-1, 0])),
            "targets of image 1: labels[0] is -1: a label is no class of 0..1",
        ),
        (
            detection_with(labels=torch.tensor([0.5, math.nan])),
            target_with(),
            "detections of image 1: labels[0] is 0.5: a label is no class of 0..1",
        ),
        (
            detection_with(scores=torch.tensor([0.5, math.nan])),
            target_with(),
            "detections of image 1: scores[1] is nan: a value is not a finite number",
        ),
        (
            detection_with(boxes=torch.tensor([[0, 0, 1, 1], [0, math.inf, 1, math.inf]])),
            target_with(),
            "detections of image 1: boxes[1] is [0.0, inf, 1.0, inf]: a corner is not a finite number",
        ),
        (
            detection_with(),
            target_with(boxes=torch.tensor([[0, 0, 1, 1], [5, 0, 3, 1]])),
            "targets of image 1: boxes[1] is [5, 0, 3, 1]: x2 < x1 - 1 or y2 < y1 - 1",
        ),
        (
            detection_with(),
            {"boxes": torch.ones(1, 4), "labels": torch.zeros(1)},
            "targets of image 1 have no difficult: give boxes, labels, difficult",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_image_and_key(detection, objects, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        evaluate(
            [found([A], [0.9]), detection], [target([A]), objects], num_classes=2, rule="voc10"
        )
    assert str(caught.value) == message


def test_a_box_of_no_width_counts_under_the_pixel_convention():
    # 0.3 pixels wide where the first pixel is 0: so are corners as Detectron2 writes them.
    thin = [[11.0, 1.0, 10.3, 20.0]]
    result = evaluate([found(thin, [0.9])], [target(thin)], num_classes=1, rule="voc07")
    assert result.ap == 100
    with pytest.raises(ValueError, match="x2 < x1 or y2 < y1"):
        evaluate([found(thin, [0.9])], [target(thin)], num_classes=1, rule="coco")


def test_arguments_that_do_not_fit_are_named():
    one, two = [found([A], [0.9])], [target([A])] * 2
    with pytest.raises(
        ValueError, match="there are detections of 1 images and targets of 2: give both"
    ):
        evaluate(one, two, num_classes=1)
    with pytest.raises(ValueError, match="rule is 'voc12': choose voc07, voc10, coco"):
        evaluate(one, two[:1], num_classes=1, rule="voc12")
    with pytest.raises(ValueError, match="num_classes is 0: at least one class is needed"):
        evaluate(one, two[:1], num_classes=0)
