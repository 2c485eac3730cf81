"""Scores on validation images: their values, their protocol, and that nothing takes them for scores on test images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from linear_eval.classifiers import Problem, classify_by_logistic_regression
from peerlearn.cli import main
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.data.subsets import hold_out
from peerlearn.evaluation.features import extract_features
from peerlearn.evaluation.validation_images import hold_out_validation
from peerlearn.export import load_export

WORDS = ["--data.validation_images", "307", "--data.train_limit", "611"]


def score(verb: str, run: Path, folder: Path, *more: str) -> dict:
    """The result of network 0."""
    words = ["--checkpoint", str(run), "--network", "0", "--results", str(folder)]
    assert main([*verb.split(), *words, "--device", "cpu", *more]) == 0
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def features(export: Path, images: ImageDataset) -> np.ndarray:
    (found,) = extract_features(
        [load_export(export)],
        images,
        image_size=16,
        batch_size=64,
        device=torch.device("cpu"),
        workers=0,
    )
    return found.double().numpy()


def test_knn_scores_them_as_scikit_learn_does(runs, tmp_path, monkeypatch, capsys):
    """The run was pretrained on the first 200 of 1437 images. Features are kept, and those of test images too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    knn = ["--k", "7", "--temperature", "0.1"]
    test = score("knn", runs[0], tmp_path / "test", *knn, "--data.train_limit", "611")
    capsys.readouterr()
    for folder in ("once", "kept"):
        found = score("knn", runs[0], tmp_path / folder, *knn, *WORDS)
    printed = " ".join(capsys.readouterr().out.split())
    assert "digits, validation images n 307" in printed
    assert "split validation" in printed
    assert "test_images" not in printed
    rest, held, _ = hold_out_validation(load_dataset("digits"), 307, None, runs[0])
    export = runs[0] / "export/step-00000012/net-0"
    oracle = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    oracle.fit(features(export, rest)[:611], rest.labels[:611])
    expected = 100 * oracle.score(features(export, held), held.labels)
    assert found["metrics"]["top1"] == pytest.approx(expected, abs=1e-9)
    assert (found["metrics"]["n"], test["metrics"]["n"]) == (307, 360)
    assert (found["dataset"], test["dataset"]) == ("digits, validation images", "digits")
    protocol = found["protocol"]
    told = ("split", "validation_images", "train_images", "validation_seen_in_pretraining")
    assert [protocol[key] for key in told] == ["validation", 307, 611, "no"]
    assert not [key for key in protocol if "test" in key]
    assert not [key for key in test["protocol"] if "validation" in key or key == "split"]


def test_logistic_regression_chooses_within_the_images_that_are_left(
    runs, tmp_path, monkeypatch, capsys
):
    """Of the first 611 that are left, a tenth of each class decides between two penalties."""
    seen: list[Problem] = []

    def watched(config, problem: Problem, **more):
        seen.append(problem)
        return classify_by_logistic_regression(config, problem, **more)

    monkeypatch.setattr("linear_eval.evaluate.classify_by_logistic_regression", watched)
    words = ["--penalties_c", "0.1", "10", "--inputs", "raw", "--cache", "false", *WORDS]
    found = score("linear logistic_regression", runs[0], tmp_path, *words)
    assert "digits, validation images" in " ".join(capsys.readouterr().out.split())
    rest, held, _ = hold_out_validation(load_dataset("digits"), 307, None, runs[0])
    labels = rest.labels[:611]
    (problem,) = seen
    fit_index, chooser_index = hold_out(labels, 10, seed=0)
    assert torch.equal(problem.train.labels, labels)
    assert torch.equal(problem.fit.labels, labels[fit_index])
    assert torch.equal(problem.held_out.labels, labels[chooser_index])
    assert torch.equal(problem.test.labels, held.labels)
    assert (found["metrics"]["n"], found["protocol"]["split"]) == (307, "validation")
    assert found["protocol"]["train_images"] == 611


def test_the_dry_run_tells_them(runs, capsys):
    words = ["--checkpoint", str(runs[0]), "--network", "0", "--dry_run"]
    assert main(["knn", *words, *WORDS]) == 0
    line = "# images of digits: 611 to learn from and 307 validation images to score on"
    assert line in capsys.readouterr().out.splitlines()
