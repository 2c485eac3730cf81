"""Crashes of the processes, the disk and the files themselves, in jobs of the real cluster."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerlearn.runs.checkpoint import saved_steps
from peerlearn.runs.directory import RunDirectory
from slurm.outcome import read_history
from tests.e2e.runs import assert_same_run, events, flip_last_byte, small_disk
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    TWO_NODES,
    attempts,
    kill,
    logs,
    pid,
    started_at,
    submit,
    wait_for_end,
    wait_for_step,
    wait_until,
)


def outcomes(run: Path) -> list[dict]:
    """What was made of each start."""
    return read_history(run / "slurm" / "pretrain-1", 0)


def test_kill_9_of_a_rank(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """First of one, then of the other."""
    run = tmp_path / "a"
    job = submit(cluster, run, options=TWO_NODES)
    for rank, at in ((0, 23), (1, 53)):
        wait_for_step(run, at, attempt=rank + 1)
        kill(run, rank)
    wait_for_end(cluster, job, run)
    *crashes, last = outcomes(run)
    for rank, (at, crash) in enumerate(zip((23, 53), crashes, strict=True)):
        assert (crash["kind"], crash["decision"]) == ("crashed", "requeue")
        assert crash["reason"] == f"rank {rank}: died of SIGKILL"
        assert crash["step"] >= at
        assert started_at(run)[rank + 1] == crash["step"] // 10 * 10
    assert last["kind"] == "done"
    assert_same_run(run, together)


def test_processes_killed_with_all_that_could_say_why(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    """Twice, at different steps: not taken for the same crash, though no process is left to tell its step."""
    run = tmp_path / "a"
    job = submit(cluster, run)
    for start, at in ((1, 20), (2, 60)):
        wait_for_step(run, at, attempt=start)
        parent = int(Path(f"/proc/{pid(run, 0)}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        wait_until(lambda: attempts(run) > start, "the next start")  # noqa: B023
    wait_for_end(cluster, job, run)
    found = outcomes(run)
    assert [line["kind"] for line in found] == ["crashed", "crashed", "done"]
    assert found[0]["step"] >= 20
    assert found[1]["step"] >= 60
    assert_same_run(run, alone)


def test_killed_in_mid_save(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """SIGKILL while the folder of a save has its temporary name; the stump is not taken for a save."""
    run = tmp_path / "a"
    job = submit(cluster, run, "--checkpoint.every_steps", "5")
    wait_for_step(run, 40)
    wait_until(lambda: any((run / "checkpoints").glob(".tmp-*")), "a save")
    kill(run, 0)
    wait_for_end(cluster, job, run)
    assert [line["decision"] for line in outcomes(run)] == ["requeue", "done"]
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert started_at(run)[1] % 5 == 0
    assert_same_run(run, alone)


def test_stuck_rank(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """SIGSTOP: the other rank gives it up, writes its own stacks, names it, and the job is requeued."""
    run = tmp_path / "a"
    job = submit(cluster, run, "--rank_timeout_seconds", "10", options=TWO_NODES)
    wait_for_step(run, 30)
    kill(run, 1, signal.SIGSTOP)
    wait_for_end(cluster, job, run)
    failed = events(run, "failed")[0]
    assert re.search(
        r"rank 1 has been silent for \d+ s \(process \d+ on .*; rank 0 stops too", failed["reason"]
    )
    assert failed["kind"] == "lost_rank"
    log = (RunDirectory(run).logs(1) / "rank-0.log").read_text()
    assert "Current thread" in log
    assert re.search(r"File .*peerlearn/compute/dist.py., line \d+ in", log)
    assert [line["decision"] for line in outcomes(run)] == ["requeue", "done"]
    assert_same_run(run, together)


def test_damaged_latest_while_the_job_waits(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """One byte of the newest save flips between two starts: the one before it is taken."""
    run = tmp_path / "a"
    job = submit(cluster, run)
    wait_for_step(run, 45)
    cluster.call("scontrol", "requeue", job)
    cluster.wait_for_state(job, "PENDING")
    newest, before = saved_steps(run / "checkpoints")[:2]
    flip_last_byte(next(newest.glob("*.safetensors")))
    wait_for_end(cluster, job, run)
    (damaged,) = events(run, "checkpoint_damaged")
    assert damaged["folder"] == newest.name
    assert started_at(run)[1] == int(before.name.removeprefix("step-"))
    assert_same_run(run, alone)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, mib=32) as disk:
        yield disk


def test_full_disk(cluster: Cluster, alone: Path, disk: Path) -> None:
    """It stays full: the run gives up and is not started again. With room, a new job goes on from the last save."""
    run = disk / "a"
    job = submit(cluster, run)
    wait_for_step(run, 42)
    filler = disk / "filler"
    with filler.open("wb") as file:
        # Other writers take what one call leaves.
        while shutil.disk_usage(disk).free:
            try:
                file.write(bytes(min(shutil.disk_usage(disk).free, 2**20)))
                file.flush()
            except OSError:
                break
    wait_for_end(cluster, job, run, "FAILED")
    assert cluster.restarts(job) == 0
    filler.unlink()
    again = submit(cluster, run, verb="resume")
    wait_for_end(cluster, again, run)
    assert_same_run(run, alone)


def test_hanging_storage(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """An fsync that does not come back, on one rank of two: the process ends itself, and the job starts anew."""
    run = tmp_path / "a"
    faults = ("HANG_STEPS=45", f"CRASH_ONCE={tmp_path}")
    keys = ("--checkpoint.max_seconds", "10")
    job = submit(cluster, run, *keys, options=TWO_NODES, faults=faults)
    wait_for_end(cluster, job, run)
    assert f"{run}/checkpoints: the save of step 50 has hung for 10 s, giving up" in logs(run)
    assert [line["reason"] for line in outcomes(run)] == ["rank 0: died of SIGKILL", "done"]
    assert started_at(run) == [0, 40]
    assert_same_run(run, together)


def test_the_same_step_crashing_twice_stops_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, faults=("CRASH_STEPS=47",))
    wait_for_end(cluster, job, run, "FAILED")
    assert cluster.restarts(job) == 1
    assert [line["step"] for line in outcomes(run)] == [47, 47]
    assert (run / "FAILED").read_text() == "crashed twice in step 47: died of SIGSEGV\n"
    assert started_at(run) == [0, 40]


def test_crashing_too_often_stops_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a"
    faults = ("CRASH_STEPS=12,23,34", f"CRASH_ONCE={tmp_path}")
    job = submit(cluster, run, options=("--max_crashes", "2"), faults=faults)
    wait_for_end(cluster, job, run, "FAILED")
    assert cluster.restarts(job) == 2
    assert (run / "FAILED").read_text() == "crashed 3 times, max_crashes is 2: died of SIGSEGV\n"
    # Whoever mends it goes on by hand.
    again = submit(cluster, run, verb="resume")
    wait_for_end(cluster, again, run)
    assert started_at(run) == [0, 10, 20, 30]


def test_what_fails_before_there_is_a_run_leaves_its_place_free(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    """A mistake that only the job can find: told, not requeued, and the same folder takes the next attempt."""
    run = tmp_path / "a"
    job = submit(cluster, run, "--device", "cuda:9")
    wait_for_end(cluster, job, run, "FAILED")
    assert cluster.restarts(job) == 0
    assert "device 'cuda:9' is not available" in outcomes(run)[0]["reason"]
    assert [path.name for path in run.iterdir()] == ["slurm"]
    again = submit(cluster, run)
    wait_for_end(cluster, again, run)
    assert_same_run(run, alone)
