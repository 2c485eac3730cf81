"""Runs on a data set whose splits are of different classes: what can be measured, and what is refused."""

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from peerlearn.cli import main
from tests.e2e.runs import pretrain, rows, write_noise

CLASSES = [
    *("--data.name", "fashion_mnist_classes", "--data.limit", "64", "--data.image_size", "28"),
    *("--epochs", "1", "--monitor.every_epochs", "1", "--monitor.test_limit", "50"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("by_class") / "run"
    said = StringIO()
    with redirect_stderr(said):
        assert pretrain(run, *CLASSES) == 0
    (run.parent / "said").write_text(said.getvalue())
    return run


def test_a_run_without_labels_is_measured_without_them(run: Path):
    said = (run.parent / "said").read_text()
    assert "kNN is off: the splits of fashion_mnist_classes are of different classes\n" in said
    last = rows(run)[-1]
    assert last["net/0/rankme"] > 1
    assert last["net/0/feature_std"] > 0
    assert not [key for key in last if "knn" in key]


def test_a_classifier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert pretrain(tmp_path / "run", *CLASSES, "--method", "supervised") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(
        "method supervised needs test images of the classes that it trains, and the splits of fashion_mnist_classes "
        "are of different classes: choose another data.name, or method prototypical"
    )


@pytest.mark.parametrize("verb", [["knn", "--k", "5"], ["linear", "logistic_regression"]])
def test_evaluators_of_one_set_of_classes_refuse_it(run: Path, verb: list, capsys):
    assert main([*verb, "--checkpoint", str(run), "--device", "cpu"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "fashion_mnist_classes is split by class: train and test have different" in said
    assert "use peerlearn fewshot" in said


@pytest.mark.parametrize("verb", [["knn"], ["linear", "logistic_regression"]])
def test_so_does_a_dry_run_before_the_networks_are_there(verb: list, tmp_path: Path, capsys):
    words = ["--checkpoint", str(tmp_path / "none"), "--data.name", "fashion_mnist_classes"]
    assert main([*verb, *words, "--dry_run"]) == 1
    assert "is split by class: train and test have" in " ".join(capsys.readouterr().err.split())


def fewshot(run: Path, *words: str) -> int:
    few = ["--ways", "3", "--shots", "1", "--episodes", "5", "--network", "0", "--device", "cpu"]
    return main(["fewshot", "--checkpoint", str(run), *few, "--cache", "false", *words])


def test_novel_classes_are_told_apart_centred_by_the_base_classes(run: Path, tmp_path: Path):
    words = ["--features", "cl2n", "--data.base_split", "train", "--data.limit", "150"]
    assert fewshot(run, *words, "--results", str(tmp_path)) == 0
    (file,) = tmp_path.glob("fewshot-*.json")
    protocol = json.loads(file.read_text())["protocol"]
    assert (protocol["split"], protocol["base_split"]) == ("test", "train")


def test_a_base_split_of_the_novel_classes_is_refused(run: Path, capsys):
    words = ["--features", "cl2n", "--data.base_split", "test", "--data.limit", "150"]
    assert fewshot(run, *words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the class 'Ankle boot', and 2 more are in the test split and in the test split" in said


def test_a_tree_of_other_classes_in_each_split(tmp_path: Path, capsys: pytest.CaptureFixture):
    folders = {"train": "abc", "val": "de", "test": "fgh"}
    tree = tmp_path / "birds"
    write_noise(tree, {f"{split}/{name}": 8 for split, names in folders.items() for name in names})
    mine = ["--data.name", "folder", "--data.root", str(tree), "--data.image_size", "16"]
    run = tmp_path / "run"
    assert pretrain(run, *mine, "--epochs", "1", "--batch_size", "8", "--queue.size", "8") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "kNN is off: " in said
    assert "use peerlearn fewshot" in said
    assert rows(run)[-1]["net/0/rankme"] > 1
    words = ["--queries", "3", "--data.name", "folder", "--data.root", str(tree)]
    assert fewshot(run, *words) == 0
    assert fewshot(run, *words, "--ways", "2", "--data.split", "validation") == 0
    centred = ["--features", "cl2n", "--data.base_split", "train"]
    assert fewshot(run, *words, *centred) == 0
    (tree / "test/f").rename(tree / "test/a")
    assert fewshot(run, *words, *centred) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "birds: the class 'a' is in the train split and in the test split" in said
