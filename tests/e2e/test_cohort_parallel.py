"""Networks of one cohort on different real processes (gloo), against one process that has them all."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from peerlearn.cli import main
from peerlearn.export import load_export
from tests.e2e.runs import (
    SMALL,
    STEPS,
    assert_same_exports_to_rounding,
    assert_same_run,
    assert_same_tensors_to_rounding,
    assert_same_to_rounding,
    command,
    ends,
    environment,
    events,
    exported_files,
    launch,
    pretrain,
    rows,
    wait_for,
    without_clocks,
)
from tests.warm import run as run_process

DOUBLE = Path(__file__).parent / "double_precision.py"
QUIET = ["--monitor.every_epochs", "0"]
SHORT = ["--data.limit", "104", *QUIET]
PROBED = ["--monitor.linear", "true"]
FOUR = ["--cohort.networks", "4", "--cohort.share_stages", "0"]
SUPERVISED = ["--method", "supervised", "--supervised.images_per_class", "2"]
SYNC = ["--cohort.sync_batch_norm", "true"]
TRAFFIC = {"exchange_bytes_per_rank", "gradient_bytes_per_rank"}
WATCHED = [
    *(*PROBED, "--monitor.key_networks", "true", "--checkpoint.export_key_networks", "true"),
    *("--checkpoint.export_every_epochs", "1"),
]
pytestmark = pytest.mark.ddp


def finish(processes: int, run: Path, *more: str, driver: Path | None = None) -> None:
    words = ["pretrain", *SMALL, *more, "--run", str(run)]
    for code, output in ends(launch(processes, *words, driver=driver)):
        assert code == 0, output


@pytest.mark.parametrize(
    ("processes", "layout", "more"),
    [
        (2, "2", ()),
        (2, "2", (*FOUR, *PROBED, "--cohort.backbones", "[conv4, resnet32, conv4, conv4]")),
        (4, "2", ("--cohort.batch_norm_splits", "2", "--symmetric", "true")),
        (4, "2", (*FOUR, *SYNC)),
        (
            4,
            "0-1:0 2:1-3",
            ("--cohort.networks", "3", "--cohort.share_stages", "0", "--batch_size", "24", *SYNC),
        ),
        (4, "0:0-2 1:3", ("--batch_size", "24", *SYNC)),
        (4, "1:1-3 0:0", ("--batch_size", "24", "--cohort.batch_norm_splits", "3")),
        (2, "2", ("--method", "simclr", *PROBED)),
        (4, "2", ("--method", "simclr", *SYNC)),
        (2, "2", (*SUPERVISED, "--supervised.teaching", "dml")),
        (4, "2", (*SUPERVISED, *SYNC, "--supervised.teaching", "ensemble_teaching")),
        (2, "2", ("--cohort.frozen", "1")),
    ],
)
def test_networks_apart_equal_one_process(processes, layout, more, tmp_path):
    """Losses, queues, weights, momentum, batch-norm statistics: to 1e-9 in float64, where sums round to 1e-16."""
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    words = ["pretrain", *SMALL, *SHORT, *more, "--run", str(alone)]
    found = run_process(command(*words, driver=DOUBLE), env=environment(), capture_output=True)
    assert found.returncode == 0, found.stderr
    finish(processes, apart, *SHORT, *more, "--parallel.cohort", *layout.split(" "), driver=DOUBLE)
    assert len(rows(alone)) > 5
    assert_same_to_rounding(apart, alone, besides=TRAFFIC)
    assert_same_exports_to_rounding(apart, alone)


def test_parts_of_a_batch_are_the_same_images_for_all_networks(tmp_path):
    """With accumulation a batch norm sees a part of a process's share, so that as many processes are compared."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    more = [*SHORT, "--accumulation_steps", "2"]
    finish(2, together, *more, driver=DOUBLE)
    finish(4, apart, *more, "--parallel.cohort", "2", driver=DOUBLE)
    assert_same_to_rounding(apart, together, besides=TRAFFIC)


@pytest.fixture(scope="session")
def undisturbed(once) -> Path:
    return once("undisturbed-apart", lambda run: finish(2, run, *WATCHED, "--parallel.cohort", "2"))


def test_what_is_watched_and_exported_is_of_all_networks(undisturbed, tmp_path):
    """The main process has one of the networks; kNN, its ensemble, the probe and exports have both."""
    alone = tmp_path / "alone"
    assert pretrain(alone, *WATCHED) == 0
    (first, last), (first_alone, last_alone) = (
        (rows(run)[0], rows(run)[-1]) for run in (undisturbed, alone)
    )
    # Nothing has been trained: only what moves between processes could differ.
    assert {**without_clocks(first), "epoch": 0} == {**without_clocks(first_alone), "epoch": 0}
    assert last.keys() == last_alone.keys() | TRAFFIC
    assert exported_files(undisturbed).keys() == exported_files(alone).keys()
    for name in ("net-0", "net-1", "net-0-key", "net-1-key"):
        ours, theirs = (
            load_export(run / f"export/step-{STEPS:08d}/{name}") for run in (undisturbed, alone)
        )
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_any_rank_then_resume_equals_the_undisturbed_run(
    undisturbed, tmp_path, victim, kind
):
    run = tmp_path / "r"
    words = ["pretrain", *SMALL, *WATCHED, "--parallel.cohort", "2", "--run", str(run)]
    words += ["--checkpoint.every_steps", "2"]
    ranks = launch(2, *words, STEP_SECONDS="0.2")
    wait_for(lambda: (run / "checkpoints/step-00000004").exists(), ranks)
    ranks[victim].send_signal(kind)
    found = ends(ranks)
    if kind == signal.SIGTERM:
        assert [code for code, _ in found] == [75, 75]
    else:
        assert f"rank {victim} died (process {ranks[victim].pid} on" in found[1 - victim][1]
    for code, output in ends(launch(2, "resume", str(run))):
        assert code == 0, output
    assert_same_run(run, undisturbed)


def test_another_layout_needs_allow_elastic_and_goes_on(tmp_path, capsys):
    """A save holds all networks, whichever process had them: one process goes on with it, to the same numbers."""
    run, alone = tmp_path / "r", tmp_path / "alone"
    words = [*SMALL, *SHORT, "--run"]
    ranks = launch(
        *(2, "pretrain", *words, str(run), "--parallel.cohort", "2"),
        *("--checkpoint.every_steps", "2"),
        driver=DOUBLE,
        STEP_SECONDS="0.2",
    )
    wait_for(lambda: (run / "checkpoints/step-00000002").exists(), ranks)
    ranks[0].terminate()
    assert [code for code, _ in ends(ranks)] == [75, 75]
    resume = ["resume", str(run), "--parallel.cohort", "1"]
    assert main(resume) == 1
    assert (
        "was trained by 2 processes (networks:processes 0:0 1:1), and now there are 1 processes"
        in capsys.readouterr().err
    )
    for line in ([*resume, "--allow_elastic"], ["pretrain", *words, str(alone)]):
        found = run_process(command(*line, driver=DOUBLE), env=environment(), capture_output=True)
        assert found.returncode == 0, found.stderr
    assert_same_tensors_to_rounding(run, alone)


WITH_INF = """
import os, sys
from peerlearn.cli import main
from peerlearn.compute import saves
if os.environ["RANK"] == "1":
    plain = saves.require_finite_weights
    def spoilt(module):
        named = dict(module.backbones[1].named_buffers())
        next(buffer for name, buffer in named.items() if "var" in name).fill_(float("inf"))
        plain(module)
    saves.require_finite_weights = spoilt
sys.exit(main(sys.argv[1:]))
"""


def test_weights_that_are_not_finite_on_one_process_are_told_by_all(tmp_path):
    """None waits for the one that stops."""
    driver = tmp_path / "spoilt.py"
    driver.write_text(WITH_INF)
    run = tmp_path / "r"
    words = ["pretrain", *SMALL, *SHORT, "--parallel.cohort", "2", "--run", str(run)]
    found = ends(launch(2, *words, driver=driver))
    assert [code for code, _ in found] == [1, 1]
    assert "holds NaN or Inf" in (run / "FAILED").read_text()
    assert {event["kind"] for event in events(run, "failed")} == {"crash"}


def test_a_process_of_a_team_that_is_stopped_is_named_after_the_timeout(tmp_path):
    run = tmp_path / "s"
    words = ["pretrain", *SMALL, *QUIET, "--epochs", "60", "--rank_timeout_seconds", "10"]
    ranks = launch(4, *words, "--parallel.cohort", "2", "--run", str(run))
    wait_for(lambda: (run / "checkpoints/latest").exists(), ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        output, _ = ranks[0].communicate(timeout=240)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    assert re.search(rf"rank 1 has been silent for \d+ s \(process {ranks[1].pid} on", output)
