"""The schedule against Detectron2's published numbers, and its scaling to other batch sizes."""

import pytest

from detection.command import SHIPPED
from detection.config import DetectConfig, learning_rate
from peerlearn.config import parse_config


def config(**values) -> DetectConfig:
    return DetectConfig(checkpoint="x", **values)


def detectron2_rate(iteration: int) -> float:
    """Base-RCNN-FPN's solver with VOC's numbers: WarmupMultiStepLR of lr .02, as its source computes it."""
    warmup = 1.0
    if iteration < 100:
        alpha = iteration / 100
        warmup = (1 / 1000) * (1 - alpha) + alpha
    return 0.02 * warmup * 0.1 ** sum(milestone <= iteration for milestone in (12_000, 16_000))


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.00002),
        (50, 0.01001),
        (99, 0.0198002),
        (100, 0.02),
        (11_999, 0.02),
        (12_000, 0.002),
        (15_999, 0.002),
        (16_000, 0.0002),
        (17_999, 0.0002),
    ],
)
def test_the_rate_of_each_iteration_is_detectron2s(iteration, expected):
    assert learning_rate(iteration, config()) == pytest.approx(expected, rel=1e-12)
    assert detectron2_rate(iteration) == pytest.approx(expected, rel=1e-12)


def test_the_rate_of_every_iteration_is_detectron2s():
    for iteration in range(0, 18_000, 7):
        ours = learning_rate(iteration, config())
        assert ours == pytest.approx(detectron2_rate(iteration), rel=1e-12)


@pytest.mark.parametrize(
    ("batch_size", "lr", "steps", "milestones", "warmup"),
    [
        (16, 0.02, 18_000, (12_000, 16_000), 100),
        (8, 0.01, 36_000, (24_000, 32_000), 200),
        (4, 0.005, 72_000, (48_000, 64_000), 400),
        (32, 0.04, 9_000, (6_000, 8_000), 50),
    ],
)
def test_other_batch_sizes_see_as_many_images_at_a_rate_in_proportion(
    batch_size, lr, steps, milestones, warmup
):
    scaled = config(batch_size=batch_size)
    assert scaled.lr == pytest.approx(lr)
    assert scaled.base_lr == 0.02
    assert scaled.steps(scaled.iterations) == steps
    assert learning_rate(0, scaled) == pytest.approx(lr / 1000)
    assert learning_rate(warmup // 2, scaled) == pytest.approx(lr * 0.5005)
    assert learning_rate(warmup, scaled) == pytest.approx(lr)
    for number, milestone in enumerate(milestones):
        assert learning_rate(milestone - 1, scaled) == pytest.approx(lr * 0.1**number)
        assert learning_rate(milestone, scaled) == pytest.approx(lr * 0.1 ** (number + 1))


def test_c4_warms_up_and_falls_where_moco_does():
    words = ["moco_c4", "--checkpoint", "x", "--data.root", "y"]
    c4, _ = parse_config(
        DetectConfig, words, verb="detect", description="", example="", shipped=SHIPPED
    )
    rates = [learning_rate(step, c4) for step in (0, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    assert rates == pytest.approx([0.00002, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert c4.steps(c4.iterations) == 24_000


def test_no_warm_up_begins_at_the_whole_rate():
    assert learning_rate(0, config(warmup_iterations=0)) == 0.02
