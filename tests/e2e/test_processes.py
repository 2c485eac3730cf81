"""Several real processes (gloo) against one, and against each other's deaths."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import (
    SMALL,
    STEPS,
    assert_same_run,
    assert_same_to_rounding,
    ends,
    environment,
    events,
    exported_files,
    free_port,
    launch,
    newest_tensors,
    pretrain,
    rows,
    wait_for,
)
from tests.e2e.several_processes import (
    DOUBLE,
    PROBED,
    QUIET,
    SHORT,
    assert_a_stopped_rank_is_named,
    finish,
    finish_alone,
    resume_after,
)

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.ddp


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, ("--cohort.batch_norm_splits", "4")),
        (2, ("--cohort.sync_batch_norm", "true", "--optimizer.nesterov", "true")),
        (2, ("--symmetric", "true", "--cohort.batch_norm_splits", "2", *PROBED)),
        (2, ("--method", "simclr", "--cohort.batch_norm_splits", "4", *PROBED)),
        (2, ("--method", "simclr", "--cohort.sync_batch_norm", "true")),
        (2, ("--cohort.share_stages", "all", "--cohort.batch_norm_splits", "2")),
        (
            2,
            (
                *("--cohort.frozen", "1", "--cohort.batch_norm_splits", "2"),
                *("--queue.momentum_schedule", "cosine", "--mutual_warmup_epochs", "1.5"),
            ),
        ),
        # Shared stages, a queue that wraps in mid-batch, and 203 images: the last incomplete batch is dropped.
        (
            4,
            (
                *("--cohort.networks", "3", "--cohort.backbones", "resnet32", "--epochs", "1"),
                *("--cohort.batch_norm_splits", "4", "--data.limit", "203"),
            ),
        ),
    ],
)
def test_a_share_of_the_batch_each_equals_one_process(processes, more, tmp_path):
    """Losses, queues, weights, momentum, batch-norm statistics: to 1e-9 in float64, where sums round to 1e-16."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish_alone("pretrain", *SMALL, *SHORT, *more, "--run", str(alone))
    finish(processes, together, *SHORT, *more, driver=DOUBLE)
    assert len(rows(alone)) > 5
    assert_same_to_rounding(together, alone)


def test_two_processes_in_float32_start_as_one_does(tmp_path):
    """In float32 the last bits differ at once and then grow from step to step; the first steps show the size."""
    assert pretrain(tmp_path / "a", *SHORT, "--cohort.batch_norm_splits", "4") == 0
    finish(2, tmp_path / "b", *SHORT, "--cohort.batch_norm_splits", "4")
    for ours, theirs in list(zip(rows(tmp_path / "b"), rows(tmp_path / "a"), strict=True))[:3]:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_plain_batch_norm_means_a_part_per_process(tmp_path):
    """Two processes with plain batch norm are one with two parts: MoCo's own setting, shuffled keys included."""
    finish(2, tmp_path / "a", *SHORT, driver=DOUBLE)
    words = ["pretrain", *SMALL, *SHORT, "--cohort.batch_norm_splits", "2"]
    finish_alone(*words, "--run", str(tmp_path / "b"))
    tensors, expected = newest_tensors(tmp_path / "a"), newest_tensors(tmp_path / "b")
    for name, tensor in expected["networks"].items():
        torch.testing.assert_close(tensors["networks"][name], tensor, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="session")
def undisturbed(once) -> Path:
    more = ("--checkpoint.export_key_networks", "true")
    return once("undisturbed-2", lambda run: finish(2, run, *more))


def test_only_the_main_rank_prints_and_every_rank_has_its_log(undisturbed, tmp_path):
    logs = sorted(path.name for path in (undisturbed / "logs/attempt-1").iterdir())
    assert logs == [
        "rank-0.heartbeat.json",
        "rank-0.log",
        "rank-0.step",
        "rank-1.heartbeat.json",
        "rank-1.log",
        "rank-1.step",
        "standing.json",
    ]
    words = ["pretrain", *SMALL, "--data.name", "fashion_mnits", "--run", str(tmp_path / "x")]
    (code, output), other = ends(launch(2, *words))
    assert (code, other) == (2, (2, ""))
    assert output.count("\n") == 1
    assert "did you mean 'fashion_mnist'?" in output


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_any_rank_then_resume_equals_the_undisturbed_run(
    undisturbed, tmp_path, victim, kind
):
    run = tmp_path / "r"
    resume_after(kind, victim, run, "--checkpoint.export_key_networks", "true")
    assert_same_run(run, undisturbed)


def test_a_rank_that_is_stopped_is_named_after_the_timeout(tmp_path):
    assert_a_stopped_rank_is_named(2, tmp_path / "s")


STOPPED_WHILE_MAIN_SAVES = """
import os, signal, sys
from peerlearn.cli import main
from peerlearn.compute import saves
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
rank, victim = os.environ["RANK"], os.environ["VICTIM"]
def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
if rank == victim == "0":
    saves.save_checkpoint = lambda *arguments: stop()
if rank == victim == "1":
    save = Attempt.save
    def save_after_stop(*arguments, **named):
        Ranks.from_main = lambda *ignored: stop()
        save(*arguments, **named)
    Attempt.save = save_after_stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_while_the_main_rank_saves_is_named_too(victim, tmp_path):
    """Ranks wait for hours for a main rank that evaluates or saves, but not for one that gives no sign of life."""
    driver = tmp_path / "stopped.py"
    driver.write_text(STOPPED_WHILE_MAIN_SAVES)
    words = ["pretrain", *SMALL, *QUIET, "--rank_timeout_seconds", "12"]
    ranks = launch(2, *words, "--run", str(tmp_path / "s"), driver=driver, VICTIM=str(victim))
    other = ranks[1 - victim]
    try:
        output, _ = other.communicate(timeout=240)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert other.returncode == 1
    stopped = f"rank {victim} has been silent for"
    assert stopped in output
    assert f"(process {ranks[victim].pid} on" in output


def test_another_number_of_processes_needs_allow_elastic(undisturbed, tmp_path, capsys):
    from peerlearn.cli import main

    run = tmp_path / "e"
    ranks = launch(2, "pretrain", *SMALL, *QUIET, "--run", str(run), STEP_SECONDS="0.2")
    wait_for(lambda: (run / "checkpoints/latest").exists(), ranks)
    ranks[0].terminate()
    assert [code for code, _ in ends(ranks)] == [75, 75]
    assert main(["resume", str(run)]) == 1
    assert "was trained by 2 processes, and now there are 1" in capsys.readouterr().err
    assert main(["resume", str(run), "--allow_elastic"]) == 0
    assert rows(run)[-1]["step"] == STEPS
    (event,) = events(run, "world_size_changed")
    assert (event["before"], event["now"]) == (2, 1)


@pytest.mark.slow(40)
@pytest.mark.parametrize(
    "launcher",
    [
        # torchrun would take --run for an abbreviation of its own --run-path: the dashes end its options.
        [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "PORT", "-m", "--"],
        [
            # Its launcher for CPUs starts a single process; this one asks for no GPU either.
            *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "PORT", "-m"),
        ],
    ],
    ids=["torchrun", "accelerate"],
)
def test_both_launchers_run_the_same_program(launcher, undisturbed, tmp_path):
    run = tmp_path / "l"
    words = ["peerlearn", "pretrain", *SMALL, "--checkpoint.export_key_networks", "true"]
    start = [free_port() if word == "PORT" else word for word in launcher]
    found = subprocess.run(
        [*start, *words, "--run", str(run)], env=environment(), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "2 x cpu" in found.stdout
    assert exported_files(run) == exported_files(undisturbed)


@pytest.mark.parametrize(
    ("processes", "more", "message"),
    [
        (3, (), "batch_size 32 must divide into 3 processes"),
        (4, ("--batch_size", "4"), "4 parts of at least 2 images"),
        (2, ("--cohort.batch_norm_splits", "3", "--batch_size", "36"), "a multiple of 2"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(processes, more, message, tmp_path):
    run = tmp_path / "b"
    found = ends(launch(processes, "pretrain", *SMALL, *more, "--run", str(run)))
    assert {code for code, _ in found} == {1}
    assert message in found[0][1]
    assert not run.exists()


NAN_ON_RANK_1 = """
import os, sys, torch
import pretrain.train as train
from peerlearn.cli import main
plain = train._micro_batches
bad = {int(step) for step in os.environ["BAD_STEPS"].split(",")}
step = -1
def micro_batches(batch, parts):
    global step
    step += 1
    for (first, second), labels in plain(batch, parts):
        if step in bad and os.environ.get("RANK", "1") == "1":
            first = first * float("nan")
        yield (first, second), labels
train._micro_batches = micro_batches
sys.exit(main(sys.argv[1:]))
"""


def test_nan_on_one_rank_skips_the_step_on_all_alike(tmp_path):
    driver = tmp_path / "nan.py"
    driver.write_text(NAN_ON_RANK_1)
    run = tmp_path / "n"
    words = ["pretrain", *SMALL, *QUIET, "--run", str(run)]
    for code, output in ends(launch(2, *words, driver=driver, BAD_STEPS="3,7")):
        assert code == 0, output
    assert rows(run)[-1]["skipped_steps"] == 2
    assert [row["step"] for row in rows(run) if "loss" not in row] == [4, 8]
    skipped = events(run, "step_skipped")
    assert [(e["step"], e["epoch"], e["batch"]) for e in skipped] == [(3, 0, 3), (7, 1, 1)]
    assert all("rank 1: scl_hard of network 0 is not finite" in e["reason"] for e in skipped)
    # Rank 1's half of the batch, in the order of the epoch's permutation.
    assert [len(e["images"]) for e in skipped] == [16, 16]
    for group, tensors in newest_tensors(run).items():
        if group != "rng":
            assert all(bool(tensor.isfinite().all()) for tensor in tensors.values()), group
