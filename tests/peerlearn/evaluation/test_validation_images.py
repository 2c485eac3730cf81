"""Training images that are held out and scored in place of the test images."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.compute.dist import Ranks
from peerlearn.config import with_added
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.data.subsets import hold_out_images
from peerlearn.errors import UserError
from peerlearn.evaluation.data import EvaluationDataConfig, load_splits
from peerlearn.evaluation.selection import Selection
from peerlearn.evaluation.validation_images import hold_out_validation
from peerlearn.runs.training_facts import TrainingFacts, write_env
from tests.e2e.runs import write_noise

RANKS = Ranks(torch.device("cpu"))
DIGITS = load_dataset("digits")


def numbered(labels: list[int]) -> ImageDataset:
    """Images that show their own number."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    names = tuple(map(str, range(max(labels) + 1)))
    return ImageDataset(
        name="digits",
        split="train",
        images=images,
        labels=torch.tensor(labels),
        class_names=names,
        mean=(0.5,),
        std=(0.5,),
    )


def numbers(dataset: ImageDataset) -> list[int]:
    assert isinstance(dataset.images, torch.Tensor)
    return dataset.images.flatten().tolist()


def write_run(folder: Path, config: str = "", **facts) -> Path:
    """What a run of digits tells of its training."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 3\n{config}")
    told = {"dataset": "digits", "data_root": None, "images": 1, "seed": 3, "lr": 0.1}
    write_env(folder / "env.json", "pretrain", TrainingFacts(**{**told, "processes": 1, **facts}))
    return folder


def selection(run: Path | None) -> Selection:
    return Selection(
        folders={}, ensemble=False, alone=True, exports=Path("exports"), run=run, step=0
    )


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=90), data=st.data())
def test_an_image_is_scored_or_learned_from_and_never_both(labels, data):
    images = data.draw(st.integers(1, len(labels) - 1))
    rest, held, seen = hold_out_validation(numbered(labels), images, None, None)
    assert (len(held), held.split, rest.split, seen) == (images, "validation", "train", "unknown")
    assert sorted(numbers(rest) + numbers(held)) == list(range(len(labels)))
    assert numbers(rest) == sorted(numbers(rest))
    for part in (rest, held):
        assert part.labels is not None
        assert part.labels.tolist() == [labels[i] for i in numbers(part)]


@pytest.mark.parametrize(
    ("config", "facts", "first", "seen"),
    [
        ("data: {limit: 30}", {}, 30, "no"),
        # Beyond the limit of the run are 13 images, and 14 are asked for.
        ("data: {limit: 77}", {}, 0, "without labels"),
        ("data: {limit: 1}", {}, 1, "no"),
        ("method: moco", {}, 0, "without labels"),
        ("method: supervised", {}, 0, "with labels"),
        ("{method: supervised, data: {limit: 30}}", {}, 30, "no"),
        ("data: {limit: 30, packed: digits.beton}", {}, 0, "without labels"),
        ("data: {split: test}", {}, 0, "no"),
        ("data: {limit: 30, split: train+unlabeled}", {}, 30, "no"),
        ("", {"dataset": "fashion_mnist"}, 0, "other data"),
        ("data: {limit: 30}", {"data_root": "/elsewhere"}, 0, "unknown"),
        ("data: {limit: 30}", {"initial_weights": [{"network": 0}]}, 0, "unknown"),
    ],
)
def test_they_are_drawn_beyond_what_the_run_was_pretrained_on_if_they_can(
    config: str, facts: dict, first: int, seen: str, tmp_path: Path
):
    labels = [number % 3 for number in range(90)]
    if config.startswith("{"):
        config = config[1:-1].replace(", data", "\ndata")
    run = write_run(tmp_path / "run", config, **facts)
    _, held, told = hold_out_validation(numbered(labels), 14, None, run)
    assert told == seen
    expected = first + hold_out_images(torch.tensor(labels[first:]), 14, seed=0)
    assert numbers(held) == expected.tolist()


def test_images_beyond_the_limit_that_lack_a_class_are_not_enough(tmp_path: Path):
    """As in folders, which are read class by class."""
    run = write_run(tmp_path / "run", "data: {limit: 40}")
    labels = torch.arange(3).repeat_interleave(30)
    _, held, seen = hold_out_validation(numbered(labels.tolist()), 14, None, run)
    assert seen == "without labels"
    assert sorted(labels[numbers(held)].bincount().tolist()) == [4, 5, 5]


def test_a_run_that_fine_tunes_and_an_export_alone_do_not_tell(tmp_path: Path):
    run = write_run(tmp_path / "run")
    facts = TrainingFacts(dataset="digits", data_root=None, images=1, seed=0, lr=0.1, processes=1)
    write_env(run / "env.json", "linear", facts)
    for each in (run, None):
        assert hold_out_validation(DIGITS, 14, None, each).seen == "unknown"


@pytest.mark.parametrize(
    ("words", "learned"),
    [
        ({}, 1137),
        ({"limit": 200}, 200),
        ({"train_limit": 1101, "limit": 200}, 1101),
        ({"train_limit": 1400}, 1137),
    ],
)
def test_limits_count_the_training_images_that_are_left(words: dict, learned: int, tmp_path: Path):
    run = write_run(tmp_path / "run", "data: {limit: 1000}")
    data = EvaluationDataConfig(validation_images=300, **words)
    splits = load_splits(data, selection(run), RANKS)
    assert (len(splits.train), len(splits.test)) == (learned, 300)
    assert splits.title == "digits, validation images"
    protocol = splits.protocol()
    told = [protocol.pop(name) for name in ("train_fingerprint", "validation_fingerprint")]
    assert told == [splits.train.fingerprint(), splits.test.fingerprint()]
    assert protocol == {
        "split": "validation",
        "train_images": learned,
        "validation_images": 300,
        "validation_seen_in_pretraining": "no",
    }
    # Beyond the run's thousand, and none of those to learn from, which are the first that are left.
    _, counts = torch.cat([DIGITS.images[1000:], splits.test.images]).unique(
        dim=0, return_counts=True
    )
    assert int((counts > 1).sum()) == 300
    assert torch.equal(splits.train.images[:1000], DIGITS.images[: min(1000, learned)])


def test_shots_are_drawn_from_the_images_that_are_left(tmp_path: Path):
    data = EvaluationDataConfig(name="digits", validation_images=1387, shots=3)
    splits = load_splits(data, selection(None), RANKS)
    assert splits.train.labels is not None
    assert splits.train.labels.bincount().tolist() == [3] * 10


def test_the_test_split_is_not_needed_and_tells_nothing_new(tmp_path: Path):
    write_noise(tmp_path, {"train/ant": 4, "train/bee": 5})
    words = {"name": "folder", "root": str(tmp_path)}
    splits = load_splits(EvaluationDataConfig(**words, validation_images=4), selection(None), RANKS)
    assert splits.test.labels is not None
    assert splits.test.labels.bincount().tolist() == [2, 2]
    with pytest.raises(UserError):
        load_splits(EvaluationDataConfig(**words), selection(None), RANKS)
    protocol = load_splits(EvaluationDataConfig(name="digits"), selection(None), RANKS).protocol()
    assert list(protocol) == [
        "train_images",
        "test_images",
        "train_fingerprint",
        "test_fingerprint",
    ]


def test_labels_that_were_trained_on_are_warned_of(tmp_path: Path, caplog):
    run = write_run(tmp_path / "run", "method: supervised")
    with caplog.at_level(logging.WARNING):
        load_splits(EvaluationDataConfig(validation_images=300), selection(run), RANKS)
    assert "trained on the validation images, with their labels" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"validation_images": 0}, "data.validation_images must be at least 1, got 0"),
        ({"validation_images": -3}, "data.validation_images must be at least 1, got -3"),
        (
            {"validation_images": 3, "test_limit": 3},
            "data.validation_images takes the place of the test images, which data.test_limit counts: set one to null",
        ),
        (
            {"validation_images": 1437},
            "data.validation_images 1437 leaves nothing to learn from: digits has 1437 training images; choose fewer",
        ),
        (
            {"validation_images": 30, "name": "fashion_mnist_classes"},
            "fashion_mnist_classes is split by class: train and test have different classes; use peerlearn fewshot, or "
            "choose another by --data.name",
        ),
    ],
)
def test_refused(words: dict, message: str):
    with pytest.raises((UserError, ValueError)) as error:
        load_splits(EvaluationDataConfig(**{"name": "digits", **words}), selection(None), RANKS)
    assert str(error.value) == message


def test_saved_configs_of_earlier_versions_score_test_images():
    assert with_added(EvaluationDataConfig, {})["validation_images"] is None
