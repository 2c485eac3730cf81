"""Several trainings in one command: by seeds, by weights, by shares of the images, by networks, by checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest

from peerlearn.cli import main
from tests.e2e.detectors import scores, training_of, words, write_export
from tests.e2e.runs import events, rows

pytestmark = pytest.mark.slow(8)
SHORT = (
    *("--iterations", "3", "--milestones", "[2]", "--precise_bn_iterations", "1"),
    *("--base_lr", "0.002"),
)


def trainings(results: Path) -> list[Path]:
    return sorted(path for path in results.glob("detect-*") if path.is_dir())


def starts(results: Path) -> list[int]:
    return [len(events(run, "started")) for run in trainings(results)]


def test_trials_are_trainings_by_seeds_with_mean_and_deviation(place, tmp_path, capsys):
    results = tmp_path / "results"
    given = words(place, results, *SHORT)
    assert main([*given, "--trials", "3", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    (together,) = scores(results).values()
    metrics = together["metrics"]
    assert metrics["trials"] == 3
    assert starts(results) == [1, 1, 1]
    alone = []
    for seed in (5, 6, 7):
        # It is there already, and only scored.
        more = ("--seed", str(seed), "--data.subset_seed", str(seed - 5))
        assert main([*given, *more, "--results", str(results)]) == 0
        (file,) = _of_seed(results, seed)
        alone.append(file["metrics"])
    assert starts(results) == [1, 1, 1]
    for name in ("ap", "ap50", "ap75"):
        values = [each[name] for each in alone]
        assert metrics[f"{name}_trials"] == values
        assert metrics[name] == pytest.approx(np.mean(values), abs=1e-12)
        assert metrics[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert len(set(metrics["ap50_trials"])) == 3
    for name, mean in metrics["per_class_ap50"].items():
        assert mean == pytest.approx(np.mean([each["per_class_ap50"][name] for each in alone]))
    assert f"{metrics['ap50']:.2f} +- {metrics['ap50_std']:.2f}" in printed


def _of_seed(results: Path, seed: int) -> list[dict]:
    files = [json.loads(file.read_text()) for file in results.glob("detect-*.json")]
    return [
        each
        for each in files
        if each["protocol"]["seed"] == seed and each["protocol"]["trials"] == 1
    ]


def test_weights_and_shares_in_one_command(place, tmp_path, capsys):
    results = tmp_path / "results"
    given = words(place, results, *SHORT)
    more = ("--backbone_weights", "[export,random]", "--data.train_percent", "[30,100]")
    assert main([*given, *more]) == 0
    found = scores(results)
    expected = {
        "0 30 % of the images": ("export", 30, 3),
        "0 100 % of the images": ("export", 100, 9),
        "0 random weights, 30 % of the images": ("random", 30, 3),
        "0 random weights, 100 % of the images": ("random", 100, 9),
    }
    assert {
        row: (
            score["protocol"]["backbone_weights"],
            score["protocol"]["data.train_percent"],
            score["protocol"]["train_images"],
        )
        for row, score in found.items()
    } == expected
    assert starts(results) == [1, 1, 1, 1]
    assert len(list(results.glob("detect-*.json"))) == 4
    printed = " ".join(capsys.readouterr().out.split())
    for row in ("random weights, 30 % of the", "100 % of the"):
        assert row in printed
    # One of them alone is the same training, and the same file.
    assert main([*given, "--backbone_weights", "random"]) == 0
    assert starts(results) == [1, 1, 1, 1]
    assert len(list(results.glob("detect-*.json"))) == 4


def test_networks_of_a_cohort_one_after_another(place, tmp_path):
    results = tmp_path / "results"
    cohort = str(place / "cohort/step-00000003")
    assert main([*words(place, results, *SHORT), "--checkpoint", cohort]) == 0
    found = scores(results)
    assert set(found) == {"0", "1"}
    assert {score["step"] for score in found.values()} == {3}
    assert found["0"]["export_hash"] != found["1"]["export_hash"]
    names = [run.name.rpartition("-")[0] for run in trainings(results)]
    assert names == ["detect-00000003-0", "detect-00000003-1"]
    one = tmp_path / "one"
    assert main([*words(place, one, *SHORT), "--checkpoint", cohort, "--network", "1"]) == 0
    assert scores(one)["1"]["metrics"] == found["1"]["metrics"]


def test_several_checkpoints_are_averaged(place, tmp_path, capsys):
    write_export(tmp_path / "other", seed=3)
    results = tmp_path / "results"
    both = f"[{place / 'grey'},{tmp_path / 'other'}]"
    assert main([*words(place, results, *SHORT), "--checkpoint", both]) == 0
    files = [json.loads(file.read_text()) for file in sorted(results.glob("detect-*.json"))]
    means = [each["metrics"] for each in files if "runs" in each["metrics"]]
    alone = [each["metrics"] for each in files if "runs" not in each["metrics"]]
    (mean,) = means
    assert (len(alone), mean["runs"]) == (2, 2)
    for name in ("ap", "ap50", "ap75"):
        values = [each[name] for each in alone]
        assert sorted(mean[name]["values"]) == sorted(values)
        assert mean[name]["mean"] == pytest.approx(np.mean(values))
        assert mean[name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert len(trainings(results)) == 2


def test_the_folder_that_is_asked_for(place, tmp_path, capsys):
    run = tmp_path / "runs/mine"
    given = words(place, tmp_path / "results", *SHORT, "--run", str(run))
    assert main(given) == 0
    assert (run / "detector/model.safetensors").is_file()
    assert not trainings(tmp_path / "results")
    assert json.loads((run / "env.json").read_text())["verb"] == "detect"
    assert main(given) == 0
    assert f"{run} is done already" in capsys.readouterr().out
    assert main(["resume", str(run)]) == 0
    assert len(events(run, "started")) == 1


def test_other_batch_sizes_scale_rate_and_steps_and_say_so(place, tmp_path, capsys):
    """Half the batch: half the rate, twice the steps."""
    results = tmp_path / "results"
    given = words(place, results, *SHORT, "--base_batch_size", "4")
    assert main(given) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "lr 0.001 (base_lr 0.002 x 2/4), / 10 after steps 4, 6 steps of 2 images" in printed
    assert "(3 iterations of 4)" in printed
    run = training_of(results)
    assert json.loads((run / "env.json").read_text())["training"]["lr"] == 0.001
    assert rows(run)[-1]["step"] == 6
    # Past the only milestone, 2 iterations of 4 images.
    assert rows(run)[-1]["lr"] == pytest.approx(0.0001)
    (score,) = scores(results).values()
    assert (score["protocol"]["lr"], score["protocol"]["steps"]) == (0.001, 6)
    assert score["protocol"]["base_lr"] == 0.002
    assert "base_lr: 0.002" in (run / "config.yaml").read_text()
