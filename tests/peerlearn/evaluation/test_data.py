"""Finding the dataset to evaluate on, and loading its splits, whose classes are the same or their own."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import load_dataset
from peerlearn.errors import UserError
from peerlearn.evaluation.data import (
    DatasetPlace,
    EvaluationDataConfig,
    find_dataset,
    load_split,
    load_splits,
)
from peerlearn.evaluation.selection import Selection
from peerlearn.runs.training_facts import TrainingFacts, write_env
from tests.e2e.runs import write_noise

RANKS = Ranks(torch.device("cpu"))


def selection(run: Path | None) -> Selection:
    return Selection(
        folders={}, ensemble=False, alone=True, exports=Path("exports"), run=run, step=0
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    facts = TrainingFacts(
        dataset="cifar10", data_root="/images/cifar10", images=50000, seed=0, lr=0.1, processes=1
    )
    write_env(run / "env.json", "pretrain", facts)
    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, ("cifar10", "/images/cifar10")),
        ({"root": "/elsewhere"}, ("cifar10", "/elsewhere")),
        # The root of the run's dataset is not that of another.
        ({"name": "digits"}, ("digits", None)),
        ({"name": "digits", "root": "/here"}, ("digits", "/here")),
    ],
)
def test_the_dataset_is_the_one_asked_for_or_the_runs(run: Path, words: dict, expected: tuple):
    assert find_dataset(EvaluationDataConfig(**words), selection(run)) == expected


def test_an_export_that_stands_alone_tells_no_dataset():
    with pytest.raises(UserError, match="exports does not tell its dataset: give one by --data"):
        find_dataset(EvaluationDataConfig(), selection(None))


def class_folders(root: Path, split: str, names: Sequence[str]) -> None:
    write_noise(root, {f"{split}/{name}": 2 for name in names})


@pytest.mark.parametrize(("dataset", "held_out"), [("folder", "test"), ("imagenet", "val")])
def test_splits_may_have_classes_of_their_own(dataset: str, held_out: str, tmp_path: Path):
    """As few-shot splits do: three classes to learn from, and two that are new."""
    class_folders(tmp_path, "train", ["ant", "bee", "cat"])
    class_folders(tmp_path, held_out, ["dog", "eel"])
    place = DatasetPlace(dataset, str(tmp_path))
    with pytest.raises(
        UserError, match="belongs to none of the 3 classes of the train split"
    ) as error:
        load_split(place, "test", None)
    assert str(error.value).endswith("if they are to have different ones, use peerlearn fewshot")
    novel = load_split(place, "test", None, own_classes=True)
    assert novel.class_names == ("dog", "eel")
    assert novel.labels is not None
    assert novel.labels.tolist() == [0, 0, 1, 1]
    base = load_split(place, "train", 4, own_classes=True)
    assert (base.class_names, len(base)) == (("ant", "bee", "cat"), 4)


def test_the_test_split_is_numbered_as_the_train_split_unless_asked(tmp_path: Path):
    class_folders(tmp_path, "train", ["ant", "bee", "cat"])
    class_folders(tmp_path, "test", ["bee", "cat"])
    words = {"root": str(tmp_path)}
    assert load_dataset("folder", "test", **words).labels.tolist() == [1, 1, 2, 2]
    own = load_dataset("folder", "test", **words, own_classes=True)
    assert own.labels.tolist() == [0, 0, 1, 1]


def test_packed_splits_have_the_same_classes_in_any_case():
    splits = [load_dataset("digits", "test", limit=9, own_classes=own) for own in (False, True)]
    assert splits[0].fingerprint() == splits[1].fingerprint()


def test_both_splits_come_with_their_limits_and_the_subset(run: Path):
    data = EvaluationDataConfig(name="digits", limit=200, test_limit=30, shots=4)
    train, test, _ = load_splits(data, selection(run), RANKS)
    assert train.labels is not None
    assert train.labels.bincount().tolist() == [4] * 10
    assert (len(test), test.split) == (30, "test")


@pytest.mark.parametrize("limit", [None, 40])
def test_splits_of_different_classes_are_no_evaluation_of_one_classifier(run: Path, limit):
    data = EvaluationDataConfig(name="fashion_mnist_classes", limit=limit)
    with pytest.raises(UserError) as error:
        load_splits(data, selection(run), RANKS)
    assert str(error.value) == (
        "fashion_mnist_classes is split by class: train and test have different classes; use peerlearn fewshot, or "
        "choose another by --data.name"
    )
