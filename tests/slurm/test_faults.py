"""Faults that SLURM itself deals, on the real cluster: each run ends byte for byte as if nothing had happened."""

import time
from pathlib import Path

import pytest

from tests.e2e.runs import assert_same_run
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    TWO_NODES,
    logs,
    peerlearn,
    saved_when_told,
    started_at,
    submit,
    wait_for_end,
    wait_for_step,
    wait_until,
)


@pytest.mark.slow(150)
def test_time_limit(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """A limit of two minutes, to be told 30 s before: the job saves, requeues itself, and goes on at that very step.

    Of one minute, a busy machine would need all the time until the signal to import torch.
    """
    run, told = tmp_path / "a", tmp_path / "told"
    options = ("--time_minutes", "2", "--signal_seconds", "30")
    # It is there still when SLURM looks at the clock.
    faults = ("HOLD_STEP=20", f"HOLD_UNTIL={told}")
    job = submit(cluster, run, options=options, faults=faults)
    wait_until(lambda: "saving after this step" in logs(run), "SLURM to look at the clock")
    told.touch()
    wait_for_end(cluster, job, run)
    assert cluster.restarts(job) >= 1
    assert started_at(run) == [0, *saved_when_told(run)], logs(run)
    assert_same_run(run, alone)


def test_user_signal_twice(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """SIGUSR2 to both nodes' processes, and again 50 ms later, in mid-save: saved once, together."""
    run = tmp_path / "a"
    job = submit(cluster, run, options=TWO_NODES)
    wait_for_step(run, 40)
    cluster.call("scancel", "--signal=USR2", job)
    time.sleep(0.05)
    cluster.call("scancel", "--signal=USR2", job)
    wait_for_end(cluster, job, run)
    assert started_at(run) == [0, *saved_when_told(run)]
    assert len(started_at(run)) == 2
    assert started_at(run)[1] >= 40
    assert_same_run(run, together)


def test_signal_in_start_up(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """Told to stop while Python still imports: nothing is saved yet, and the job is simply started again."""
    run, told = tmp_path / "a", tmp_path / "told"
    job = submit(cluster, run, faults=("HOLD_STEP=-1", f"HOLD_UNTIL={told}"))
    wait_until(told.with_suffix(".held").exists, "a start of Python")
    cluster.call("scancel", "--signal=USR2", job)
    told.touch()
    wait_for_end(cluster, job, run)
    assert cluster.restarts(job) == 1
    assert started_at(run) == [0]
    assert_same_run(run, alone)


def urgent_job(cluster: Cluster) -> str:
    """One that takes both nodes away from whoever has them."""
    words = ("--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    return cluster.call("sbatch", *words, "--wrap=sleep 3").strip()


@pytest.mark.parametrize("told_by", ["SIGUSR2", "SIGTERM"])
def test_preemption(cluster: Cluster, together: Path, tmp_path: Path, told_by: str) -> None:
    """With the user's signal the job requeues itself; with SIGTERM alone it saves, and SLURM requeues it."""
    run = tmp_path / "a"
    if told_by == "SIGTERM":
        cluster.configure(SlurmctldParameters="")
    job = submit(cluster, run, options=TWO_NODES)
    wait_for_step(run, 30)
    urgent = urgent_job(cluster)
    wait_for_end(cluster, job, run)
    assert cluster.state(urgent) == "COMPLETED"
    assert cluster.restarts(job) == 1
    assert started_at(run) == [0, *saved_when_told(run)]
    assert len(started_at(run)) == 2
    assert f"{told_by}: saving after this step" in logs(run)
    assert_same_run(run, together)


def test_cancelled_stays_cancelled(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """scancel: saved, and not revived; a new job goes on from there."""
    run = tmp_path / "a"
    job = submit(cluster, run)
    wait_for_step(run, 50)
    cluster.call("scancel", job)
    wait_for_end(cluster, job, run, "CANCELLED")
    time.sleep(10)
    assert cluster.state(job) == "CANCELLED"
    assert started_at(run) == [0]
    assert saved_when_told(run)[0] >= 50
    again = submit(cluster, run, verb="resume")
    wait_for_end(cluster, again, run)
    assert started_at(run) == [0, *saved_when_told(run)]
    assert_same_run(run, alone)


def test_sigterm_that_nothing_follows(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """Saved, and then the job waits: neither ended nor requeued, until it is told to go on by SIGUSR2."""
    run = tmp_path / "a"
    job = submit(cluster, run)
    wait_for_step(run, 20)
    cluster.call("scancel", "--signal=TERM", job)
    wait_until(lambda: "waiting for SLURM to end this job" in logs(run), "the job to hold")
    time.sleep(8)
    assert cluster.state(job) == "RUNNING"
    assert cluster.restarts(job) == 0
    cluster.call("scancel", "--signal=USR2", job)
    wait_for_end(cluster, job, run)
    assert cluster.restarts(job) == 1
    assert started_at(run) == [0, *saved_when_told(run)]
    assert_same_run(run, alone)


def test_requeued_by_hand(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, options=TWO_NODES)
    wait_for_step(run, 35)
    cluster.call("scontrol", "requeue", job)
    wait_for_end(cluster, job, run)
    assert cluster.restarts(job) == 1
    assert started_at(run) == [0, *saved_when_told(run)]
    assert_same_run(run, together)


def test_node_death(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """A node that falls silent: SLURM notices, requeues, and the run goes on from its newest save."""
    run = tmp_path / "a"
    job = submit(cluster, run, options=TWO_NODES)
    wait_for_step(run, 25)
    cluster.kill_node("n2")
    wait_until(lambda: cluster.state(job) != "RUNNING", "SLURM to miss the node")
    cluster.start_node("n2")
    wait_for_end(cluster, job, run)
    assert cluster.restarts(job) >= 1
    assert started_at(run)[1] % 10 == 0
    assert started_at(run)[1] >= 20
    assert_same_run(run, together)


def test_two_jobs_on_one_run(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """Neither a second job nor a process beside it comes in; the job itself does, requeued."""
    run, go = tmp_path / "a", tmp_path / "go"
    job = submit(cluster, run, faults=("HOLD_STEP=5", f"HOLD_UNTIL={go}"))
    wait_until(go.with_suffix(".held").exists, "step 5")
    second = peerlearn(cluster, "submit", "--cluster", "slurm", "--", "resume", str(run))
    assert second.returncode == 1
    assert f"{run}: job {job} (running) works on it already" in second.stderr
    beside = peerlearn(cluster, "resume", str(run))
    assert beside.returncode == 1
    assert f"{run} is in use by process" in beside.stderr
    assert f"SLURM job {job}" in beside.stderr
    cluster.call("scontrol", "requeue", job)
    go.touch()
    wait_for_end(cluster, job, run)
    assert started_at(run) == [0, *saved_when_told(run)]
    assert_same_run(run, alone)
