"""Few-shot training and evaluation as jobs of a real SLURM, watched, summed up and shown like any other."""

import json
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml

from peerlearn.runs.step_folders import best_step
from studies.ledger import Entry
from tests.e2e.runs import command, environment, rows
from tests.e2e.test_prototypical import WORDS
from tests.slurm.cluster import Cluster
from tests.studies.test_pipeline import jobs, wait_for
from tests.warm import run as run_process

FEW_SHOT = "fewshot --ways 3 --shots 1 5 --episodes 30 --device cpu"


@pytest.mark.slow(60)
def test_a_few_shot_pipeline_on_the_real_cluster(cluster: Cluster, tmp_path: Path):
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "executor: slurm\npartition: main\ntime_minutes: 10\n"
        "environment: [GLOO_SOCKET_IFNAME=lo, OMP_NUM_THREADS=1]\n"
    )
    root = tmp_path / "p"
    content = {
        "folder": str(root),
        "cluster": str(profile),
        "watch": "here",
        "seeds": [0, 1],
        "pretrain": [f"mcl = {shlex.join(WORDS[1:])}"],
        "evaluate": [FEW_SHOT],
        "interval_seconds": 0.5,
    }
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content))

    def peerlearn(*words: str) -> str:
        found = run_process(
            command(*words),
            env=environment(PYTHONPATH=str(Path(__file__).parents[2]), **cluster.environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    peerlearn("pipeline", str(file))

    def summary() -> Entry | None:
        return next((e for key, e in jobs(root).items() if key.startswith("summary ")), None)

    wait_for(lambda: summary() and summary().job, "summary job")
    assert cluster.wait_for_state(summary().job["job"], "COMPLETED", "FAILED") == "COMPLETED"
    runs = [root / "runs" / f"mcl-seed-{seed}" for seed in (0, 1)]
    shown = peerlearn("status", *map(str, runs))
    assert "few-shot (epoch)" in shown
    assert "few-shot: accuracy in % over 3-way 1-shot validation episodes, ensemble" in shown
    for status in json.loads(peerlearn("status", "--json", *map(str, runs))):
        (*_, row) = rows(Path(status["run"]))
        assert (status["state"], status["few_shot_epoch"]) == ("done", 4)
        assert status["few_shot_top1"] == row["ensemble/episode_top1"]

    printed = " ".join(peerlearn("summary", str(root)).split())
    scores = json.loads((root / "summary.json").read_text())["scores"]
    chosen = [s for s in scores if s["chosen"] and s["metric"] == "accuracy"]
    assert {(s["network"], s["variant"]) for s in chosen} == {
        (network, f"3-way {shots}-shot") for network in ("0", "1", "ensemble") for shots in (1, 5)
    }
    for score in chosen:
        values = [accuracy(run, score["network"], score["variant"]) for run in runs]
        assert score["values"] == {"0": values[0], "1": values[1]}
        assert score["mean"] == pytest.approx(statistics.fmean(values))
        assert f"{score['mean']:.2f} +- {score['std']:.2f}" in printed
    assert printed.count("│ best │") == len(chosen)
    assert "3-way 5-shot" in printed


def accuracy(run: Path, network: str, variant: str) -> float:
    """Of the networks of the step that validation chose."""
    step = best_step(run / "export")
    results = [json.loads(file.read_text()) for file in run.glob("results/fewshot-*.json")]
    (found,) = (
        result
        for result in results
        if (result["step"], result["network"], result["variant"]) == (step, network, variant)
    )
    return float(found["metrics"]["accuracy"])
