"""Networks of one cohort on different real processes (gloo), against one process that has them all."""

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
    ends,
    events,
    exported_files,
    launch,
    newest_tensors,
    pretrain,
    rows,
    wait_for,
    without_clocks,
)
from tests.e2e.several_processes import (
    DOUBLE,
    PROBED,
    SHORT,
    assert_a_stopped_rank_is_named,
    finish,
    finish_alone,
    resume_after,
)

FOUR = ["--cohort.networks", "4", "--cohort.share_stages", "0"]
SUPERVISED = ["--method", "supervised", "--supervised.images_per_class", "2"]
SYNC = ["--cohort.sync_batch_norm", "true"]
TRAFFIC = {"exchange_bytes_per_rank", "gradient_bytes_per_rank"}
WATCHED = [
    *(*PROBED, "--monitor.key_networks", "true", "--checkpoint.export_key_networks", "true"),
    *("--checkpoint.export_every_epochs", "1"),
]
pytestmark = pytest.mark.ddp


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
    finish_alone("pretrain", *SMALL, *SHORT, *more, "--run", str(alone))
    finish(processes, apart, *SHORT, *more, "--parallel.cohort", *layout.split(" "), driver=DOUBLE)
    assert len(rows(alone)) > 5
    assert_same_to_rounding(apart, alone, besides=TRAFFIC)
    assert_same_exports_to_rounding(apart, alone)


@pytest.mark.parametrize(("processes", "more"), [(2, ()), (4, SYNC)])
def test_the_bytes_that_a_process_sends_are_counted(processes, more, tmp_path):
    """Of B 32, D 16 and M 2 in float64: keys and embeddings of this process's images, and all embeddings' gradients."""
    run = tmp_path / "r"
    finish(processes, run, *SHORT, *more, "--parallel.cohort", "2", driver=DOUBLE)
    images = 32 // (processes // 2)
    sent = 8 * 16 * (2 * images + 2 * 32)
    tensors = newest_tensors(run)
    one = sum(
        tensor.nbytes
        for name, tensor in tensors["networks"].items()
        if name.split(".")[1] == "0" and not name.endswith(("mean", "var", "tracked"))
    )
    for row in rows(run):
        assert row["exchange_bytes_per_rank"] == sent
        assert row["gradient_bytes_per_rank"] == (one if processes == 4 else 0)


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
    assert without_clocks(first) == without_clocks(first_alone)
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
    resume_after(kind, victim, run, *WATCHED, "--parallel.cohort", "2")
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
    finish_alone(*resume, "--allow_elastic")
    finish_alone("pretrain", *words, str(alone))
    assert_same_tensors_to_rounding(run, alone)
    # Whatever the config says by now, this step was trained apart.
    assert main(["replay", str(run), "--step", "1"]) == 1
    assert "networks on different processes (networks:processes 0:0 1:1)" in capsys.readouterr().err


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
    assert_a_stopped_rank_is_named(4, tmp_path / "s", "--parallel.cohort", "2")
