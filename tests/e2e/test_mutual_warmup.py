"""Whole runs in which the weight of the terms between networks rises."""

import re
import shutil

import pytest

from peerlearn.cli import main
from peerlearn.runs.checkpoint import saved_steps
from tests.e2e.runs import STEPS, assert_same_run, pretrain, rows

# 1.9 epochs of 6 steps: the weight is below 1 in each of the first 12 steps.
WARMUP = ["--mutual_warmup_epochs", "1.9", "--monitor.every_epochs", "0"]
ALPHA, BETA = 0.5, 0.1
TERMS = ("scl_hard", "scl_soft", "icl_hard", "icl_soft")
FEW_SHOT = [
    *("--method", "prototypical", "--data.name", "fashion_mnist_classes"),
    *("--prototypical.ways", "3", "--prototypical.queries", "5"),
    *("--prototypical.steps_per_epoch", "6", "--batch_size", "256"),
]


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    "words",
    [
        ["--accumulation_steps", "2"],
        ["--method", "simclr"],
        ["--method", "supervised", "--supervised.teaching", "dml"],
        FEW_SHOT,
    ],
    ids=["moco", "simclr", "supervised", "prototypical"],
)
def test_a_steps_loss_is_the_weighted_sum_of_its_terms(words, tmp_path):
    run = tmp_path / "r"
    assert pretrain(run, *WARMUP, *words, "--epochs", "1") == 0
    steps = [row for row in rows(run) if row["step"]]
    assert [row["mutual_weight"] for row in steps] == pytest.approx([s / 11.4 for s in range(6)])
    for row in steps:
        # The terms as they are, without the weight.
        named = {
            name: sum(value for key, value in row.items() if re.fullmatch(rf"net/\d/{name}", key))
            for name in (*TERMS, "cross_entropy", "teaching", "prototypical")
        }
        mutual = ALPHA * named["scl_soft"] + BETA * (named["icl_hard"] + named["icl_soft"])
        assert mutual > 0
        others = sum(value for name, value in named.items() if name not in TERMS)
        expected = ALPHA * named["scl_hard"] + row["mutual_weight"] * mutual + others
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["loss"] == pytest.approx(row["net/0/loss"] + row["net/1/loss"], rel=1e-5)


@pytest.mark.slow(6)
def test_resumed_while_the_weight_rises_a_run_equals_the_undisturbed_one(tmp_path, capsys):
    undisturbed, resumed = tmp_path / "a", tmp_path / "b"
    assert pretrain(undisturbed, *WARMUP, "--checkpoint.every_steps", "4") == 0
    shutil.copytree(undisturbed, resumed)
    shutil.rmtree(resumed / "export")
    newest = saved_steps(resumed / "checkpoints")[0]
    assert newest.name == f"step-{STEPS:08d}"
    shutil.rmtree(newest)
    (resumed / "DONE").unlink()
    # It is refused to change, as alpha is.
    assert main(["resume", str(resumed), "--mutual_warmup_epochs", "1.5"]) == 1
    assert "mutual_warmup_epochs 1.9 -> 1.5" in capsys.readouterr().err
    assert main(["resume", str(resumed)]) == 0
    assert_same_run(resumed, undisturbed)


def test_the_first_step_learns_from_no_peer_and_without_a_warmup_nothing_is_logged(tmp_path):
    own = ["--terms", "scl_hard", "--monitor.every_epochs", "0"]
    short = ["--epochs", "1", "--data.limit", "32"]
    assert pretrain(tmp_path / "a", *WARMUP, *short) == 0
    assert pretrain(tmp_path / "b", *own, *short) == 0
    (ours,), (theirs,) = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert ours["mutual_weight"] == 0.0
    assert "mutual_weight" not in theirs
    for key in ("loss", "net/0/loss", "net/1/loss", "net/0/gradient_norm", "net/1/gradient_norm"):
        assert ours[key] == theirs[key]
