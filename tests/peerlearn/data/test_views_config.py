"""The random views of a config: which recipe each view gets, and which values are refused."""

from dataclasses import fields, replace

import pytest
import torch

from peerlearn.config import config_to_yaml, load_config, parse_config
from peerlearn.data.recipes import AUGMENTATIONS, SECOND_VIEWS, Augmentation
from peerlearn.data.views_config import ViewConfig
from peerlearn.errors import UsageError, UserError
from pretrain.config import PretrainConfig
from pretrain.preview import preview
from pretrain.training_data import view_recipes

SMALL = [
    *("--data.name", "digits", "--data.limit", "100", "--data.image_size", "16"),
    *("--batch_size", "32", "--cohort.backbones", "conv4", "--device", "cpu"),
]


def parsed(words: str) -> PretrainConfig:
    given = [*SMALL, *words.split()]
    return parse_config(PretrainConfig, given, verb="pretrain", description="", example="")[0]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_without_any_key_a_recipe_is_itself(name):
    first, second = parsed(f"--data.augmentation {name}").data.recipes()
    assert first == AUGMENTATIONS[name]
    assert second == SECOND_VIEWS.get(name, first)


def test_every_value_of_a_recipe_has_a_key():
    names = {field.name for field in fields(Augmentation)}
    assert {field.name for field in fields(ViewConfig)} == names - {"crop_scale"}
    words = (
        "--data.augmentation crop_flip --data.crop_scale 0.3 0.9 --data.views.crop_ratio 0.5 2 "
        "--data.views.crop_padding 0 --data.views.centred false --data.views.flip_probability 0.25 "
        "--data.views.jitter 0.1 0.2 0.3 0.4 --data.views.jitter_probability 0.6 "
        "--data.views.grayscale_probability 0.7 --data.views.grayscale_first true "
        "--data.views.blur_probability 0.15 --data.views.blur_sigma 0.2 0.3 "
        "--data.views.solarize_probability 0.35 --data.views.solarize_threshold 0.45"
    )
    expected = Augmentation(
        crop_scale=(0.3, 0.9),
        crop_ratio=(0.5, 2.0),
        flip_probability=0.25,
        jitter=(0.1, 0.2, 0.3, 0.4),
        jitter_probability=0.6,
        grayscale_probability=0.7,
        grayscale_first=True,
        blur_probability=0.15,
        blur_sigma=(0.2, 0.3),
        solarize_probability=0.35,
        solarize_threshold=0.45,
    )
    assert parsed(words).data.recipes() == (expected, expected)
    padded = parsed("--data.views.crop_padding 3").data.recipes()[0]
    assert padded == replace(AUGMENTATIONS["moco_v2"], crop_padding=3)
    centred = parsed("--data.views.centred true").data.recipes()[0]
    assert centred == replace(AUGMENTATIONS["moco_v2"], centred=True)


def test_the_pair_of_byol_can_be_written_by_hand(tmp_path):
    by_hand = parsed(
        "--data.augmentation moco_v2 --data.crop_scale 0.08 1 --data.views.jitter 0.4 0.4 0.2 0.1 "
        "--data.views.blur_probability 1 --data.views.second.blur_probability 0.1 "
        "--data.views.second.solarize_probability 0.2"
    )
    named = parsed("--data.augmentation byol")
    assert by_hand.data.recipes() == named.data.recipes()
    assert by_hand.data.recipes()[0] != by_hand.data.recipes()[1]
    path = tmp_path / "c.yaml"
    path.write_text(config_to_yaml(by_hand))
    assert load_config(PretrainConfig, path) == by_hand


def test_a_key_of_both_views_changes_both_of_an_unlike_pair():
    first, second = parsed(
        "--data.augmentation byol --data.views.blur_probability 0.3"
    ).data.recipes()
    assert (first.blur_probability, second.blur_probability) == (0.3, 0.3)
    assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)


def test_the_second_view_alone_may_be_cropped_otherwise():
    first, second = parsed("--data.views.second.crop_scale 0.5 0.6").data.recipes()
    assert (first.crop_scale, second.crop_scale) == ((0.2, 1.0), (0.5, 0.6))


def test_a_method_of_one_view_takes_the_first_and_refuses_keys_of_the_second():
    config = parsed("--method supervised --data.augmentation byol")
    assert view_recipes(config, 1) == (AUGMENTATIONS["byol"],)
    assert view_recipes(config, 2) == (AUGMENTATIONS["byol"], SECOND_VIEWS["byol"])
    wrong = parsed("--method supervised --data.views.second.blur_probability 0.1")
    with pytest.raises(UserError) as caught:
        preview(wrong)
    assert str(caught.value) == (
        "data.views.second.blur_probability must be null with method supervised, which draws one view of each image"
    )


def test_the_dry_run_tells_what_each_view_is():
    _, *lines = preview(parsed("--data.augmentation crop_flip")).lines
    assert lines[0] == "each view: crop_scale 0.2 1, crop_ratio 0.75 1.333, flip_probability 0.5"
    words = "--data.augmentation none --data.views.second.solarize_probability 1"
    _, *lines = preview(parsed(words)).lines
    assert lines[:2] == [
        "view 1: centred true",
        "view 2: centred true, solarize_probability 1, solarize_threshold 0.5",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.views.jitter 0.4 0.4", "data.views.jitter must be 4 numbers, got [0.4, 0.4]"),
        (
            "--data.views.second.blur_sigma 1 2 3",
            "data.views.second.blur_sigma must be 2 numbers, got [1.0, 2.0, 3.0]",
        ),
        (
            "--data.views.jitter 0.4 0.4 0.4 0.6",
            "data.views.jitter must lie in [0, 100], hue in [0, 0.5], got [0.4, 0.4, 0.4, 0.6]",
        ),
        (
            "--data.views.flip_probability 2",
            "data.views.flip_probability must lie in [0, 1], got 2.0",
        ),
        (
            "--data.views.second.solarize_threshold 255",
            "data.views.second.solarize_threshold must lie in [0, 1], got 255.0",
        ),
        (
            "--data.views.second.crop_scale 0 1",
            "data.views.second.crop_scale must rise within (0, 1], got [0.0, 1.0]",
        ),
        (
            "--data.augmentation moco_cifar --data.views.blur_sigma 0.1 1",
            "data.views.blur_sigma must be null, or data.views.blur_probability above 0: it is 0",
        ),
        (
            "--data.augmentation crop_flip --data.views.second.jitter_probability 0.5",
            "data.views.second.jitter_probability must be 0, or data.views.second.jitter given: its strengths are all "
            "0",
        ),
        (
            "--data.augmentation none --data.views.crop_ratio 1 1",
            "data.views.crop_ratio must be null, or data.views.crop_padding 0 and data.views.centred false: crops of a "
            "fixed size are not scaled",
        ),
        (
            "--data.augmentation none --data.views.crop_padding 4",
            "data.views.crop_padding must be 0, or data.views.centred false: the centred square is never shifted",
        ),
    ],
)
def test_bad_values_name_key_and_fix(words, message):
    with pytest.raises(UsageError) as caught:
        parsed(words)
    assert str(caught.value) == message


def test_a_chance_that_is_set_to_0_leaves_its_strength_without_effect():
    """As in a grid over the chance alone."""
    first, _ = parsed("--data.views.blur_probability 0 --data.views.blur_sigma 1 2").data.recipes()
    assert (first.blur_probability, first.blur_sigma) == (0.0, (1.0, 2.0))


def test_training_sees_the_views_of_the_config(tmp_path):
    """Two views of which the second is nothing but the first's negative."""
    from peerlearn.compute.dist import Ranks
    from peerlearn.runs.directory import RunDirectory
    from pretrain.state import build

    config = parsed(
        "--data.augmentation none --data.views.second.solarize_probability 1 --data.views.second.solarize_threshold 0"
    )
    training = build(config, RunDirectory(tmp_path / "run"), Ranks(torch.device("cpu")))
    first, second = next(training.loader.epoch(0)).views
    dataset = training.data.train
    mean, std = dataset.mean[0], dataset.std[0]
    torch.testing.assert_close(1 - (first * std + mean), second * std + mean, atol=1e-6, rtol=0)
