"""Faults of every kind at random steps of one run on two nodes, while its exports are evaluated: nothing of it shows
in the end."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from peerlearn.runs.checkpoint import saved_steps
from tests.e2e.runs import assert_same_run, command, events, flip_last_byte
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    STEPS,
    TWO_NODES,
    attempts,
    kill,
    logs,
    started_at,
    submit,
    wait_for_end,
    wait_for_step,
    wait_until,
)
from tests.studies.small_studies import KNN, measurements, outcomes, write_profile

# squeue lags every third time, and a wrapper chats.
SQUEUE = """#!/bin/sh
echo x >> CALLS
[ $(($(wc -l < CALLS) % 3)) = 0 ] && exit 0
echo "Your quota: 12 of 40 hours"
exec /usr/bin/squeue "$@"
"""
AWAY_SECONDS = 15


def usr2(cluster: Cluster, job: str, run: Path) -> None:
    cluster.call("scancel", "--signal=USR2", job)


def requeue(cluster: Cluster, job: str, run: Path) -> None:
    cluster.call("scontrol", "requeue", job)


def kill_main(cluster: Cluster, job: str, run: Path) -> None:
    kill(run, 0)


def kill_other(cluster: Cluster, job: str, run: Path) -> None:
    kill(run, 1)


def preempt(cluster: Cluster, job: str, run: Path) -> None:
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.call("sbatch", *words, "--wrap=true")


def requeue_and_damage(cluster: Cluster, job: str, run: Path) -> None:
    requeue(cluster, job, run)
    cluster.wait_for_state(job, "PENDING")
    flip_last_byte(next(saved_steps(run / "checkpoints")[0].glob("*.safetensors")))


def kill_while_the_controller_is_frozen(cluster: Cluster, job: str, run: Path) -> None:
    daemon = cluster.daemons["slurmctld"]
    daemon.send_signal(signal.SIGSTOP)
    kill(run, 0)
    time.sleep(AWAY_SECONDS)
    daemon.send_signal(signal.SIGCONT)


def kill_while_the_controller_is_dead(cluster: Cluster, job: str, run: Path) -> None:
    cluster.daemons["slurmctld"].kill()
    cluster.daemons["slurmctld"].wait()
    kill(run, 1)
    time.sleep(AWAY_SECONDS)
    cluster.start("slurmctld", "-D", "-f", str(cluster.folder / "slurm.conf"))


def exit_with_0(cluster: Cluster, job: str, run: Path) -> None:
    (run.parent / "exit").touch()


def watch_words(run: Path) -> list[str]:
    return [
        *("watch", str(run), "--evaluate", KNN, "--exports", "all", "--interval_seconds", "0.5"),
        *("--cluster", write_profile(run.parent)),
    ]


@pytest.mark.slow(400)
def test_golden(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """The weights and metrics to the byte, and every score once."""
    drawn = random.Random(12)
    faults = [
        *(usr2, requeue, kill_main, kill_other, preempt, requeue_and_damage),
        *(kill_while_the_controller_is_frozen, kill_while_the_controller_is_dead, exit_with_0),
    ]
    drawn.shuffle(faults)
    # Before the end by as many steps as Slurm may take to preempt.
    steps = sorted(drawn.sample(range(15, STEPS - 40), len(faults)))
    run = tmp_path / "a"
    variables = ("STEP_SECONDS=0.1", f"EXIT_FILE={tmp_path}/exit")
    # The ranks of the start after the third do not meet.
    setup = '[ "$SLURM_RESTART_COUNT" != 3 ] || export MASTER_ADDR=nowhere.invalid; set -e'
    options = (*TWO_NODES, "--setup", setup, "--max_crashes", "9")
    lagging = tmp_path / "programs"
    lagging.mkdir()
    (lagging / "squeue").write_text(SQUEUE.replace("CALLS", str(tmp_path / "calls")))
    (lagging / "squeue").chmod(0o755)
    environment = {
        **cluster.environment,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{lagging}:{cluster.environment['PATH']}",
    }
    job = submit(cluster, run, "--rank_timeout_seconds", "20", options=options, faults=variables)
    watcher: subprocess.Popen[bytes] | None = None
    for attempt, (fault, at) in enumerate(zip(faults, steps, strict=True), start=1):
        wait_for_step(run, at, attempt=attempt)
        if watcher is not None:
            watcher.kill()
            watcher.wait()
        watcher = subprocess.Popen(
            command(*watch_words(run)), env=environment, stdout=subprocess.DEVNULL
        )
        fault(cluster, job, run)
        wait_until(lambda: attempts(run) > attempt, f"a start after {fault.__name__}")  # noqa: B023
    wait_for_end(cluster, job, run)
    assert watcher is not None
    assert watcher.wait(timeout=400) == 0
    wait_until(lambda: not cluster.call("squeue", "--noheader"), "the end of all jobs")
    assert attempts(run) == 1 + len(faults), logs(run)
    assert started_at(run) == sorted(started_at(run))
    assert events(run, "job_failed") == []
    assert_same_run(run, together)
    assert {place: each.kind for place, each in outcomes(run).items()} == {
        (KNN, 62): "done",
        (KNN, 124): "done",
    }
    assert measurements(run) == 2
