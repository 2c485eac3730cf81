"""Cohorts on one backbone, with frozen networks, and with a momentum that moves: trained, saved, resumed, exported."""

import hashlib
import shutil

import pytest

from peerlearn.cli import main
from peerlearn.runs.checkpoint import saved_steps
from tests.e2e.runs import assert_same_run, flip_last_byte, pretrain, rows

WORDS = ["--data.limit", "96", "--checkpoint.every_steps", "2", "--cohort.networks", "3"]


@pytest.mark.slow(8)
@pytest.mark.parametrize(
    "words",
    [
        ["--cohort.share_stages", "all", "--monitor.linear", "true"],
        ["--queue.momentum_schedule", "cosine"],
        ["--cohort.share_stages", "all", "--method", "supervised", "--supervised.teaching", "one"],
        [
            "--cohort.share_stages",
            "all",
            "--method",
            "supervised",
            "--supervised.teaching",
            "cl_ilr",
        ],
        ["--cohort.frozen", "1", "--cohort.backbones", "conv4", "resnet32", "conv4"],
        ["--cohort.frozen", "0", "2", "--method", "simclr", "--monitor.linear", "true"],
        ["--cohort.frozen", "2", "--method", "supervised", "--supervised.teaching", "dml"],
    ],
    ids=lambda words: "-".join(words[1::2]),
)
def test_a_cohort_of_another_form_trains_and_resumes(words, tmp_path):
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    assert pretrain(undisturbed, *WORDS, *words) == 0
    shutil.copytree(undisturbed, resumed)
    (resumed / "DONE").unlink()
    flip_last_byte(saved_steps(resumed / "checkpoints")[0] / "networks.safetensors")
    assert main(["resume", str(resumed)]) == 0
    assert_same_run(resumed, undisturbed)


def test_the_log_tells_the_momentum_that_moves(tmp_path):
    words = ["--queue.momentum", "0.9", "--queue.momentum_schedule", "cosine"]
    assert pretrain(tmp_path / "run", *WORDS, *words, "--monitor.every_epochs", "0") == 0
    momenta = [row["queue/momentum"] for row in rows(tmp_path / "run")]
    # Six steps; the row of step n tells the momentum by which its key networks moved, that of step n - 1 from 0.
    assert momenta == pytest.approx([0.9, 0.90669873, 0.925, 0.95, 0.975, 0.99330127])


def test_heads_alone_are_exported_as_networks_of_one_backbone(tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *WORDS, "--cohort.share_stages", "all") == 0
    weights = [run / f"export/step-00000006/net-{m}/model.safetensors" for m in range(3)]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}) == 1
    last = rows(run)[-1]
    assert last["net/0/knn_top1"] == last["net/1/knn_top1"] == last["net/2/knn_top1"]
    assert last["net/0/uniformity"] != last["net/1/uniformity"]


def test_a_frozen_network_is_exported_as_it_was_and_its_student_is_not(tmp_path):
    run = tmp_path / "run"
    words = ["--cohort.frozen", "1", "--checkpoint.keep_last", "9", "--cohort.networks", "2"]
    assert pretrain(run, *WORDS[:-2], *words) == 0
    first, last = rows(run)[0], rows(run)[-1]
    assert first["net/1/knn_top1"] == last["net/1/knn_top1"]
    assert first["net/1/rankme"] == last["net/1/rankme"]
    assert first["net/0/rankme"] != last["net/0/rankme"]
    assert "net/1/gradient_norm" not in last
