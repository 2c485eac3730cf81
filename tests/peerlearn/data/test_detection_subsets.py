"""Which images a detector is trained on: those with objects, shares of them, and no test images among them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peerlearn.data.coco import coco
from peerlearn.data.detection_sets import DetectionDataset, dataset_of, no_objects
from peerlearn.data.detection_subsets import (
    first_images,
    select_images,
    share,
    training_part,
    without_difficult,
)
from peerlearn.data.leakage import Leaks, leaks
from peerlearn.data.voc import voc
from peerlearn.errors import UserError
from tests.detection_trees import write_coco, write_devkit, write_jpeg

# Of each image, the classes of its objects; difficult ones are negative: -1 is class 1.
IMAGES = [[0, -1], [], [-2], [2, 2], [-1, -3], [1]]


def made(images: Sequence[Sequence[int]] = IMAGES, classes: int = 4) -> DetectionDataset:
    """Image i has the size (i + 1, 9), and its objects lie at x = 0, 1, 2 ..."""
    annotated = []
    for i, labels in enumerate(images):
        objects = no_objects((i + 1, 9))
        for place, label in enumerate(labels):
            objects.add((place, 0, place + 1, 1), abs(label), difficult=label < 0, truncated=i == 0)
        annotated.append((Path(f"{i}.jpg"), (i + 1, 9), objects))
    names = [str(label) for label in range(classes)]
    return dataset_of("made", "train", names, annotated, "Made")


def names(dataset: DetectionDataset) -> list[str]:
    return [path.name for path in dataset.images]


def test_images_without_objects_are_left_out():
    part = training_part(made(), difficult="keep")
    assert names(part) == ["0.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert [labels.tolist() for labels in part.labels] == [[0, 1], [2], [2, 2], [1, 3], [1]]
    assert part.sizes[:, 0].tolist() == [1, 3, 4, 5, 6]


def test_difficult_objects_are_dropped_on_request_and_then_images_that_have_no_others():
    part = training_part(made(), difficult="drop")
    assert names(part) == ["0.jpg", "3.jpg", "5.jpg"]
    assert [labels.tolist() for labels in part.labels] == [[0], [2, 2], [1]]
    assert part.boxes[1].tolist() == [[0, 0, 1, 1], [1, 0, 2, 1]]
    assert [flags.tolist() for flags in part.difficult] == [[False], [False, False], [False]]
    assert [flags.tolist() for flags in part.truncated] == [[True], [False, False], [False]]
    # The classes stay, with their numbers.
    assert part.class_names == ("0", "1", "2", "3")
    assert part.fingerprint() != made().fingerprint()


def test_difficult_objects_of_voc_and_crowds_of_coco_are_dropped(tmp_path: Path):
    data = voc("trainval2007", write_devkit(tmp_path))
    assert without_difficult(data).boxes[0].tolist() == [[0, 0, 60, 40]]
    path = write_coco(tmp_path)
    part = training_part(coco(tmp_path / "images", path), difficult="drop")
    assert names(part) == ["one.jpg", "two.jpg"]
    assert part.boxes[1].tolist() == [[5, 6, 12, 14]]


@pytest.mark.parametrize(
    ("images", "difficult", "line"),
    [
        (
            [[], []],
            "keep",
            "Made train: none of its 2 images has an object, and images without objects are not trained on: "
            "choose another split",
        ),
        (
            [[-1], [], [-1, -2]],
            "drop",
            "Made train: none of its 3 images has an object left, as all 3 are difficult and are dropped: "
            "keep difficult objects, or choose another split",
        ),
    ],
)
def test_where_nothing_is_left_that_is_said(images, difficult, line):
    with pytest.raises(UserError) as caught:
        training_part(made(images), difficult=difficult)
    assert str(caught.value) == line


LABELS = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(torch.tensor), min_size=1, max_size=60
)
SEEDS = st.integers(0, 3)


@given(labels=LABELS, seed=SEEDS, percent=st.floats(0.1, 100))
def test_a_share_has_every_class_and_its_percentage_if_that_is_enough(labels, seed, percent):
    chosen = share(labels, percent, seed=seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    classes = set(torch.cat(labels).tolist())
    assert set(torch.cat([labels[i] for i in chosen.tolist()]).tolist()) == classes
    rounded = round(len(labels) * percent / 100)
    assert rounded <= len(chosen) <= max(rounded, len(classes))


@given(labels=LABELS, seed=SEEDS, smaller=st.floats(0.1, 100), larger=st.floats(0.1, 100))
def test_a_smaller_share_is_part_of_a_larger_one(labels, seed, smaller, larger):
    smaller, larger = sorted((smaller, larger))
    few, many = (set(share(labels, percent, seed=seed).tolist()) for percent in (smaller, larger))
    assert few <= many
    assert share(labels, 100, seed=seed).tolist() == list(range(len(labels)))


def test_a_share_is_random_by_its_seed_alone():
    labels = [torch.tensor([0])] * 1000
    chosen = [share(labels, 10, seed=seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 100
    # From everywhere: the mean of 100 of 0..999 has a standard deviation of 27.
    assert 400 < sum(chosen[0]) / 100 < 600


def test_images_that_bring_a_class_come_before_others_in_the_order_of_the_share():
    # One image in a hundred has the rare class; 1 % is one image.
    labels = [torch.tensor([0])] * 99 + [torch.tensor([0, 1])]
    for seed in range(5):
        assert 99 in share(labels, 1, seed=seed).tolist()
    # A class of its own each: no smaller share has them all.
    assert len(share([torch.tensor([i]) for i in range(7)], 1, seed=0)) == 7


def test_training_takes_the_share_of_the_images_with_objects():
    images = [[i % 3] if i % 2 else [] for i in range(400)]
    part = training_part(made(images), difficult="keep", percent=10, seed=3)
    assert len(part) == 20
    whole = training_part(made(images), difficult="keep")
    chosen = share(whole.labels, 10, seed=3)
    assert names(part) == names(select_images(whole, chosen))


def test_a_limit_keeps_the_first_images():
    assert names(first_images(made(), 2)) == ["0.jpg", "1.jpg"]
    assert len(first_images(made(), 99)) == len(IMAGES)
    with pytest.raises(UserError, match=r"^data\.limit is 0: give a positive number"):
        first_images(made(), 0)


def split_of(name: str, paths: Sequence[Path]) -> DetectionDataset:
    annotated = [(path, (60, 40), no_objects((60, 40))) for path in paths]
    return dataset_of("made", name, ["a"], annotated, "Made")


def test_leaks_are_the_same_bytes_and_near_duplicates_across_the_splits_alone(tmp_path: Path):
    train = [tmp_path / f"train/{seed}.jpg" for seed in range(6)]
    test = [tmp_path / f"test/{seed}.jpg" for seed in range(10, 15)]
    for path in (*train, *test):
        write_jpeg(path, int(path.stem), (300, 200))
    # Twice in training, which is no leak; and twice in the test.
    shutil.copy(train[0], train[1])
    shutil.copy(test[0], test[1])
    assert leaks(split_of("train", train), split_of("test", test)) == Leaks((), (), 5, 0)
    shutil.copy(train[4], test[3])
    with Image.open(train[2]) as image:
        image.resize((150, 100)).save(test[2], quality=60)
    test[4].write_bytes(b"no image")
    found = leaks(split_of("train", train), split_of("test", test))
    assert found == Leaks(((test[3], train[4]),), ((test[2], train[2]),), 5, 1)
    assert found.counts() == {"same": 1, "near": 1, "undecodable": 1}
    assert found.line() == (
        "2 of 5 test images are copies of training images, which makes the score too good (1 of the same bytes, "
        f"1 that look alike): {test[3]} ({train[4]}), {test[2]} ({train[2]}): remove them from one of the splits"
    )


def test_an_image_of_both_splits_is_a_leak(tmp_path: Path):
    write_jpeg(tmp_path / "both.jpg", 1)
    both = split_of("train", [tmp_path / "both.jpg"])
    assert leaks(both, both).same == ((tmp_path / "both.jpg", tmp_path / "both.jpg"),)


def test_nothing_found_is_no_line():
    assert Leaks((), (), 5, 0).line() == ""
