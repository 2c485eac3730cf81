"""Result files and their means over runs."""

import json
import math

import pytest

from peerlearn.errors import UserError
from peerlearn.evaluation.results import read_result, write_mean_result, write_result
from peerlearn.evaluation.uncertainty import accuracy_metrics


def write(folder, top1: float, *, seed: int, k: int = 5, network: str = "0", variant: str = ""):
    return write_result(
        folder,
        task="knn",
        dataset="digits",
        step=7,
        network=network,
        metrics=accuracy_metrics(top1, 50),
        protocol={"k": k},
        export_hash=f"hash {seed}",
        seed=seed,
        seconds=1.5,
        variant=variant,
    )


def test_the_same_measured_again_replaces_its_file_and_another_protocol_adds_one(tmp_path):
    first = write(tmp_path, 80.0, seed=0)
    assert write(tmp_path, 82.0, seed=0) == first
    assert first.name.startswith("knn-digits-00000007-0-")
    others = {write(tmp_path, 80.0, seed=1), write(tmp_path, 80.0, seed=0, k=6)}
    assert len({first, *others}) == 3
    found = read_result(first)
    assert found["metrics"]["top1"] == 82.0
    assert found["metrics"]["top1_standard_error"] == pytest.approx(
        100 * math.sqrt(0.82 * 0.18 / 50)
    )
    assert {"schema", "versions", "hardware", "seconds", "export_hash", "protocol"} <= set(found)


def test_a_dataset_of_any_name_has_a_file(tmp_path):
    """The name itself stands in it."""
    name = "my photos/2019 $x$ \U0001f600 " + "y" * 300
    file = write_result(
        tmp_path,
        task="knn",
        dataset=name,
        step=7,
        network="0",
        metrics=accuracy_metrics(50.0, 4),
        protocol={},
        export_hash="h",
        seed=0,
        seconds=1.0,
    )
    assert file.name.startswith("knn-my_photos_2019__x____yyy")
    assert len(file.name) < 120
    assert read_result(file)["dataset"] == name


def test_a_mean_tells_every_runs_value(tmp_path):
    paths = [
        write(tmp_path / str(seed), top1, seed=seed) for seed, top1 in enumerate((80.0, 90.0, 85.0))
    ]
    mean = json.loads(write_mean_result(tmp_path / "mean", paths).read_text())
    top1 = mean["metrics"]["top1"]
    assert (top1["mean"], top1["std"], top1["values"]) == (85.0, 5.0, [80.0, 90.0, 85.0])
    # Student's t, two degrees of freedom: 4.303.
    assert top1["ci95"] == pytest.approx(4.30265 * 5 / math.sqrt(3), rel=1e-5)
    assert (mean["metrics"]["n"], mean["metrics"]["runs"], mean["seed"]) == (50, 3, [0, 1, 2])
    assert mean["export_hash"] == ["hash 0", "hash 1", "hash 2"]
    assert mean["seconds"] == 4.5


def test_a_mean_has_the_variant_of_its_scores(tmp_path):
    paths = [write(tmp_path, 80.0, seed=seed, variant="random weights") for seed in (0, 1)]
    mean = write_mean_result(tmp_path / "mean", paths)
    assert read_result(mean)["variant"] == "random weights"


def test_scores_of_different_protocols_have_no_mean(tmp_path):
    paths = [write(tmp_path / str(k), 80.0, seed=0, k=k) for k in (5, 6)]
    with pytest.raises(UserError, match="under different protocols and are not averaged"):
        write_mean_result(tmp_path / "mean", paths)
    assert not (tmp_path / "mean").exists()
