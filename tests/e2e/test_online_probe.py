"""Runs whose networks are watched by linear classifiers that learn beside them."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from peerlearn.cli import main
from peerlearn.data.datasets import load_dataset
from peerlearn.evaluation.features import extract_features
from peerlearn.export import load_export
from tests.e2e.runs import (
    SMALL,
    assert_same_run,
    command,
    environment,
    events,
    newest_tensors,
    pretrain,
    rows,
    standing,
    wait_for,
    write_noise,
)
from tests.warm import Process

PROBED = ["--monitor.linear", "true"]


@pytest.fixture(scope="module")
def probed(once) -> Path:
    def make(run: Path) -> None:
        process = Process(
            command("pretrain", *SMALL, *PROBED, "--run", str(run)),
            env=environment(),
            stdout=subprocess.PIPE,
        )
        (run.parent / f"{run.name}.said").write_bytes(process.communicate()[0])
        assert process.returncode == 0

    return once("probed", make)


def test_the_score_is_that_of_the_saved_classifiers_on_exported_networks(probed):
    """Of the networks in eval mode, on the test images; and the line, the table and the standing have it."""
    test = load_dataset("digits", "test")
    assert test.labels is not None
    backbones = [load_export(probed / f"export/step-00000012/net-{m}") for m in (0, 1)]
    features = extract_features(
        backbones, test, image_size=16, batch_size=32, device=torch.device("cpu"), workers=0
    )
    saved = {name: t.double().numpy() for name, t in newest_tensors(probed)["linear_probe"].items()}
    logits = []
    for m, rows_of in enumerate(features):
        weight, bias, mean, variance = (
            saved[f"{m}.{name}"] for name in ("weight", "bias", "mean", "variance")
        )
        scale = np.sqrt(variance + 1e-5 * variance.mean())
        logits.append((rows_of.double().numpy() - mean) / scale @ weight.T + bias)
    expected = {
        f"{part}/linear_top1": 100 * float((each.argmax(1) == test.labels.numpy()).mean())
        for part, each in (("net/0", logits[0]), ("net/1", logits[1]), ("ensemble", sum(logits)))
    }
    first, *_, last = rows(probed)
    found = {key: value for key, value in last.items() if key.endswith("linear_top1")}
    # Another order of sums may change the answer for an image or so, of 360.
    assert found == pytest.approx(expected, abs=0.6)
    assert not [key for key in first if "linear" in key]
    assert all(row[f"net/{m}/linear_loss"] > 0 for row in rows(probed)[1:] for m in (0, 1))
    said = (probed.parent / f"{probed.name}.said").read_text()
    assert f"  linear top-1 %: net/0 {found['net/0/linear_top1']:.2f}  net/1 " in said
    assert "network 0, linear probe" in said
    kept = standing(probed)
    assert (kept.linear_top1, kept.linear_network) == (found["ensemble/linear_top1"], "ensemble")
    assert kept.knn_top1 == last["ensemble/knn_top1"]


def test_after_kill_9_it_goes_on_to_the_same_bytes(probed, tmp_path):
    run = tmp_path / "r"
    words = ["pretrain", *SMALL, *PROBED, "--run", str(run), "--checkpoint.every_steps", "1"]
    process = Process(command(*words), env=environment(STEP_SECONDS="0.2"), stdout=subprocess.PIPE)
    wait_for(lambda: (run / "checkpoints/step-00000003/manifest.json").exists(), [process])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = Process(command("resume", str(run)), env=environment(), stdout=subprocess.PIPE)
    resumed.communicate()
    assert resumed.returncode == 0
    assert events(run, "started")[-1]["step"] >= 3
    assert_same_run(run, probed)


def test_the_key_cannot_change_within_a_run(probed, tmp_path, capsys):
    assert main(["resume", str(probed), "--monitor.linear", "false", "--epochs", "3"]) == 1
    assert "monitor.linear" in capsys.readouterr().err


def test_images_with_labels_for_training_alone_are_learned_from_and_not_measured(tmp_path, capsys):
    write_noise(tmp_path / "mine", {f"train/{name}": 40 for name in "ab"})
    mine = ["--data.name", "folder", "--data.root", str(tmp_path / "mine"), "--epochs", "1"]
    run = tmp_path / "run"
    assert pretrain(run, *mine, *PROBED) == 0
    assert (
        "the linear probe is not measured: like kNN, it needs labelled" in capsys.readouterr().err
    )
    last = rows(run)[-1]
    assert last["net/0/linear_loss"] > 0
    assert not [key for key in last if key.endswith("_top1")]
