"""The published augmentations, and the ranges of their values."""

import pytest

from peerlearn.data.recipes import AUGMENTATIONS, SECOND_VIEWS, Augmentation


def test_published_recipes():
    # main_moco.py and the CIFAR-10 notebook of facebookresearch/moco.
    v1, v2, cifar = (AUGMENTATIONS[name] for name in ("moco_v1", "moco_v2", "moco_cifar"))
    assert (v1.jitter, v1.jitter_probability) == ((0.4, 0.4, 0.4, 0.4), 1)
    assert (v2.jitter, v2.jitter_probability) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    assert (cifar.jitter, cifar.jitter_probability) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    assert (v1.crop_scale, v2.crop_scale, cifar.crop_scale) == ((0.2, 1), (0.2, 1), (0.08, 1))
    assert (v2.blur_probability, v2.blur_sigma) == (0.5, (0.1, 2.0))
    assert v1.blur_probability == cifar.blur_probability == 0
    for recipe in (v1, v2, cifar):
        assert recipe.grayscale_probability == 0.2
        assert recipe.flip_probability == 0.5
        assert recipe.crop_ratio == (3 / 4, 4 / 3)


def test_byol_s_two_views_differ_as_published():
    # Grill et al., appendix B, table 6.
    first, second = AUGMENTATIONS["byol"], SECOND_VIEWS["byol"]
    assert (first.blur_probability, first.solarize_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    for recipe in (first, second):
        assert (recipe.crop_scale, recipe.crop_ratio) == ((0.08, 1), (3 / 4, 4 / 3))
        assert (recipe.jitter, recipe.jitter_probability) == ((0.4, 0.4, 0.2, 0.1), 0.8)
        assert (recipe.grayscale_probability, recipe.flip_probability) == (0.2, 0.5)
        assert (recipe.blur_sigma, recipe.solarize_threshold) == ((0.1, 2.0), 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip_probability": 1.1},
        {"blur_probability": -0.1},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.5, 1.2)},
        {"crop_ratio": (2.0, 1.0)},
        {"crop_padding": -1},
        {"crop_padding": 1001},
        {"crop_ratio": (0.01, 1.0)},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (0.1, 2000.0)},
        {"jitter": (0.4, 101.0, 0.4, 0.1)},
        {"solarize_probability": 1.5},
        {"solarize_threshold": -0.1},
        {"jitter": (0.4, -0.4, 0.4, 0.1)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
    ],
)
def test_recipes_outside_the_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)
