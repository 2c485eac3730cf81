"""Detectors as jobs of a real SLURM: one is told to stop in its training, goes on, and is compared like any other."""

import json
import shlex
from pathlib import Path

import pytest

from slurm.submission import jobs_of
from tests.e2e.detectors import STEPS, words, write_shapes
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import FAULTS, logs, saved_when_told, started_at, wait_until
from tests.studies.small_studies import kinds, peerlearn, run_of, write_config, write_profile

HELD_STEP = 3


@pytest.mark.slow(90)
def test_a_detect_study_on_the_real_cluster(cluster: Cluster, tmp_path: Path):
    root, go = tmp_path / "s", tmp_path / "go"
    write_shapes(tmp_path)
    # All but the checkpoint and the place of the results, which the study gives.
    keys = words(tmp_path, tmp_path, "--network", "0", "--backbone_weights", "export", "random")
    line = shlex.join(["detect", *keys[5:]])
    profile = Path(write_profile(tmp_path))
    held = tmp_path / "held.yaml"
    faults = f", PYTHONPATH={FAULTS}, HOLD_STEP={HELD_STEP}, HOLD_UNTIL={go}]"
    held.write_text(profile.read_text().replace("]", faults))
    # One at a time: the training that is looked at is the one that waits.
    file = write_config(
        tmp_path, cluster=str(profile), evaluation_cluster=str(held), evaluate=[line], throttle=1
    )
    peerlearn("study", str(file), **cluster.environment)

    # A training that a job has begun, at the step where it waits.
    wait_until(go.with_suffix(".held").exists, "a detector's training")
    seed = next(seed for seed in (0, 1) if trainings(run_of(root, seed)))
    run, (training,) = run_of(root, seed), trainings(run_of(root, seed))
    (of_run,) = json.loads(peerlearn("status", "--json", str(run), **cluster.environment))
    assert (of_run["state"], of_run["evaluations_running"]) == ("done", 1)
    shown = ("status", "--json", str(run / "results"))
    (of_training,) = json.loads(peerlearn(*shown, **cluster.environment))
    assert of_training["state"] == "running"
    assert (of_training["step"], of_training["total_steps"]) == (HELD_STEP, STEPS)

    (job,) = (record["job"] for record in jobs_of(run) if record["verb"] == "measure")
    cluster.call("scancel", "--signal=USR2", job)
    wait_until(lambda: "saving after this step" in logs(run), "the signal")
    go.touch()
    peerlearn("resume", str(root), **cluster.environment)
    assert cluster.restarts(job) == 1
    assert started_at(training) == [0, *saved_when_told(training)]
    assert len(started_at(training)) == 2
    for each in (0, 1):
        assert kinds(run_of(root, each)) == {line: "done"}
        # One training from the export, one from new weights.
        assert len(trainings(run_of(root, each))) == 2
        assert (run_of(root, each) / "DONE").exists()
    done = peerlearn("status", str(run / "results"), **cluster.environment)
    assert done.count(f"{STEPS}/{STEPS}") == 2

    printed = " ".join(peerlearn("table", str(root), **cluster.environment).split())
    scores = json.loads((root / "table.json").read_text())["scores"]
    scores = [score for score in scores if score["network"] == "0"]
    found = {(score["variant"], score["metric"]): score for score in scores}
    assert set(found) == {
        (variant, metric) for variant in ("", "random weights") for metric in ("ap", "ap50", "ap75")
    }
    for (variant, metric), score in found.items():
        values = [metric_of(run_of(root, each), variant, metric) for each in (0, 1)]
        assert score["values"] == {"0": values[0], "1": values[1]}
        if metric == "ap":
            # The other two stand in table.csv.
            assert f"{score['mean']:.2f} +- {score['std']:.2f}" in printed


def trainings(run: Path) -> list[Path]:
    return [path for path in run.glob("results/detect-*") if path.is_dir()]


def metric_of(run: Path, variant: str, metric: str) -> float:
    results = [json.loads(file.read_text()) for file in run.glob("results/detect-*.json")]
    (found,) = (result for result in results if result["variant"] == variant)
    return float(found["metrics"][metric])
