"""Few-shot training and evaluation as jobs of a real SLURM, watched, compared and shown like any other."""

import json
import shlex
import statistics
from pathlib import Path

import pytest

from peerlearn.runs.step_folders import best_step
from tests.e2e.runs import rows
from tests.e2e.test_prototypical import WORDS
from tests.slurm.cluster import Cluster
from tests.studies.small_studies import peerlearn, run_of, write_config, write_profile

FEW_SHOT = "fewshot --ways 3 --shots 1 5 --episodes 30 --device cpu"


@pytest.mark.slow(60)
def test_a_few_shot_study_on_the_real_cluster(cluster: Cluster, tmp_path: Path):
    root = tmp_path / "s"
    file = write_config(
        tmp_path,
        cluster=write_profile(tmp_path),
        watch="here",
        pretrain=shlex.join(WORDS[1:]),
        evaluate=[FEW_SHOT],
        compare={"score": "fewshot/accuracy"},
    )
    printed = " ".join(peerlearn("study", str(file), **cluster.environment).split())
    runs = [run_of(root, seed) for seed in (0, 1)]
    shown = peerlearn("status", *map(str, runs), **cluster.environment)
    assert "few-shot (epoch)" in shown
    assert "few-shot: accuracy in % over 3-way 1-shot validation episodes, ensemble" in shown
    for status in json.loads(peerlearn("status", "--json", *map(str, runs), **cluster.environment)):
        (*_, row) = rows(Path(status["run"]))
        assert (status["state"], status["few_shot_epoch"]) == ("done", 4)
        assert status["few_shot_top1"] == row["ensemble/episode_top1"]

    scores = json.loads((root / "table.json").read_text())["scores"]
    chosen = [s for s in scores if s["chosen"] and s["metric"] == "accuracy"]
    assert {(s["network"], s["variant"]) for s in chosen} == {
        (network, f"3-way {shots}-shot")
        for network in ("individual", "0", "1", "ensemble")
        for shots in (1, 5)
    }
    for score in chosen:
        values = [accuracy(run, score["network"], score["variant"]) for run in runs]
        assert score["values"] == {"0": values[0], "1": values[1]}
        assert score["mean"] == pytest.approx(statistics.fmean(values))
        # Each network stands in table.csv.
        shown = score["network"] in ("individual", "ensemble")
        assert not shown or f"{score['mean']:.2f} +- {score['std']:.2f}" in printed
    assert "the step that validation chose" in printed
    assert "3-way 5-shot" in printed


def accuracy(run: Path, network: str, variant: str) -> float:
    """Of the networks of the step that validation chose."""
    if network == "individual":
        return statistics.fmean(accuracy(run, each, variant) for each in ("0", "1"))
    step = best_step(run / "export")
    results = [json.loads(file.read_text()) for file in run.glob("results/fewshot-*.json")]
    (found,) = (
        result
        for result in results
        if (result["step"], result["network"], result["variant"]) == (step, network, variant)
    )
    return float(found["metrics"]["accuracy"])
