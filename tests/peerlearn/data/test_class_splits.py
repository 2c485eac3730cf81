"""Splits of different classes share neither a class nor an image."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peerlearn.data.class_splits import check_disjoint
from peerlearn.data.datasets import CLASS_SPLITS, ImageDataset, load_dataset
from peerlearn.errors import UserError
from tests.e2e.runs import write_noise


def held(split: str, names: tuple[str, ...], seed: int) -> ImageDataset:
    """Four random images in memory."""
    pixels = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 1, 5, 6), dtype=torch.uint8, generator=pixels)
    labels = torch.arange(4) % len(names)
    return ImageDataset(
        name="digits",
        split=split,
        images=images,
        labels=labels,
        class_names=names,
        mean=(0.5,),
        std=(0.5,),
    )


SPLITS = [
    held(split, (f"{split} a", f"{split} b"), seed) for seed, split in enumerate(CLASS_SPLITS)
]


def refusal(splits: list[ImageDataset]) -> str:
    with pytest.raises(UserError) as caught:
        check_disjoint(splits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_built_in_splits_are_disjoint():
    check_disjoint(SPLITS)
    check_disjoint([load_dataset("fashion_mnist_classes", split) for split in CLASS_SPLITS])


def test_a_class_of_two_splits_is_named_with_them():
    test = replace(SPLITS[2], class_names=("Gurmukhi", "test b"))
    train = replace(SPLITS[0], class_names=("train a", "Gurmukhi"))
    assert refusal([train, SPLITS[1], test]) == (
        "digits: the class 'Gurmukhi' is in the train split and in the test split, which must be of different "
        "classes: leave it in one of them"
    )
    all_of_them = replace(test, class_names=train.class_names)
    assert "the class 'Gurmukhi', and 1 more are in the train split" in refusal(
        [train, all_of_them]
    )


def test_an_image_of_two_splits_is_named_by_its_numbers():
    images = SPLITS[2].images.clone()
    images[1] = SPLITS[1].images[3]
    assert refusal([*SPLITS[:2], replace(SPLITS[2], images=images)]) == (
        "digits: image 3 of the validation split is the same image as image 1 of the test split, and the splits must "
        "share none: remove one of the two"
    )


def test_an_image_may_stand_twice_in_one_split():
    images = SPLITS[2].images.clone()
    images[1] = images[0]
    check_disjoint([*SPLITS[:2], replace(SPLITS[2], images=images)])


def test_the_same_numbers_in_another_shape_are_another_image():
    turned = SPLITS[0].images.reshape(4, 1, 6, 5)
    check_disjoint([SPLITS[0], replace(SPLITS[1], images=turned)])


FOLDERS = {"train": "ab", "val": "cd", "test": "ef"}


def load(root: Path) -> list[ImageDataset]:
    return [
        load_dataset("folder", split, root=str(root), own_classes=True) for split in CLASS_SPLITS
    ]


def test_the_same_file_in_two_splits_is_named_by_both_paths(tmp_path: Path):
    write_noise(tmp_path, {f"{split}/{name}": 2 for split in FOLDERS for name in FOLDERS[split]})
    check_disjoint(load(tmp_path))
    shutil.copy(tmp_path / "train/b/001.png", tmp_path / "test/e/000.png")
    message = refusal(load(tmp_path))
    assert message.startswith(
        f"{tmp_path.name}: {tmp_path}/train/b/001.png (train split) is the same image as "
        f"{tmp_path}/test/e/000.png (test split)"
    )


def test_a_file_that_is_gone_is_passed_over(tmp_path: Path):
    write_noise(tmp_path, {f"{split}/{name}": 1 for split in FOLDERS for name in FOLDERS[split]})
    splits = load(tmp_path)
    for path in (tmp_path / "train/a/000.png", tmp_path / "val/c/000.png"):
        path.unlink()
    check_disjoint(splits)
