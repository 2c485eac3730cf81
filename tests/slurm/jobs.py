"""Small pretraining runs as jobs of the real cluster, and the faults that befall them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import read_beat, read_step
from slurm.jobs import JobWatch
from slurm.status import RunStatus, read_statuses
from tests.e2e.runs import SMALL, ends, environment, launch
from tests.slurm.cluster import Cluster
from tests.warm import run as run_process

FAULTS = Path(__file__).parent / "faults"
# Instead of digits, for which each start would import scikit-learn.
FASHION = [
    *("--data.name", "fashion_mnist", "--monitor.train_limit", "250"),
    *("--monitor.test_limit", "250"),
]
# A save after every 10 of the steps, which a job waits between, so that its end is not there before the fault.
KEYS = [
    *SMALL,
    *FASHION,
    *("--data.limit", "250", "--batch_size", "8", "--epochs", "4"),
    *("--checkpoint.every_steps", "10", "--checkpoint.export_every_epochs", "2"),
    *("--checkpoint.export_key_networks", "true", "--monitor.every_epochs", "2"),
]
STEPS = 4 * 31
STEP_SECONDS = 0.05
PROFILE = [
    *("--cluster", "slurm", "--partition", "main", "--cpus_per_task", "1", "--time_minutes", "10"),
    *("--environment", "GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1"),
]
TWO_NODES = ("--nodes", "2")
PATIENCE_SECONDS = 400.0


def status(run: Path) -> RunStatus:
    return read_statuses([run], JobWatch())[0]


def peerlearn(cluster: Cluster, *words: str) -> subprocess.CompletedProcess:
    """The command, as on a login node."""
    return run_process(
        [sys.executable, "-m", "peerlearn", *words],
        env={**cluster.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def submit_words(run: Path, verb: str = "pretrain") -> list[str]:
    return ["resume", str(run)] if verb == "resume" else ["pretrain", *KEYS, "--run", str(run)]


def submit(
    cluster: Cluster,
    run: Path,
    *keys: str,
    options: tuple[str, ...] = (),
    faults: tuple[str, ...] = (),
    verb: str = "pretrain",
) -> str:
    """Submit a run or its continuation, with faults of `sitecustomize`; returns the job."""
    variables = (f"PYTHONPATH={FAULTS}", f"STEP_SECONDS={STEP_SECONDS}", *faults)
    # The profile ends with its variables.
    words = ["submit", *PROFILE, *variables, *options, "--", *submit_words(run, verb), *keys]
    found = peerlearn(cluster, *words)
    assert found.returncode == 0, found.stderr
    return found.stdout.split("job ")[1].split(":")[0]


def train_undisturbed(run: Path, processes: int) -> None:
    """The run that nothing happens to, without SLURM."""
    words = submit_words(run)
    if processes > 1:
        found = ends(launch(processes, *words, GLOO_SOCKET_IFNAME="lo"))
        assert [code for code, _ in found] == [0] * processes, found
    else:
        run_process(
            [sys.executable, "-m", "peerlearn", *words],
            env=environment(),
            check=True,
            capture_output=True,
        )


def wait_until(
    condition: Callable[[], bool], what: str, timeout_seconds: float = PATIENCE_SECONDS
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def step(run: Path) -> int:
    """That the newest start has come to; -1 before its first."""
    attempt = RunDirectory(run).newest_attempt()
    found = read_step(RunDirectory(run).logs(attempt)) if attempt else None
    return -1 if found is None else found


def wait_for_step(run: Path, wanted: int, attempt: int | None = None) -> None:
    directory = RunDirectory(run)
    wait_until(
        lambda: (attempt is None or directory.newest_attempt() >= attempt) and step(run) >= wanted,
        f"step {wanted} of {run}",
    )


def pid(run: Path, rank: int) -> int:
    """The training process of a rank of the newest start."""
    beat = read_beat(RunDirectory(run).logs(RunDirectory(run).newest_attempt()), rank)
    assert beat is not None
    return beat.pid


def kill(run: Path, rank: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid(run, rank), number)


def wait_for_end(cluster: Cluster, job: str, run: Path, state: str = "COMPLETED") -> None:
    found = cluster.wait_for_state(
        job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_seconds=PATIENCE_SECONDS
    )
    assert found == state, logs(run)


def logs(run: Path) -> str:
    """All that the jobs of a run have printed, for a failing test's message."""
    files = sorted([*run.glob("slurm/*/*_log.out"), *run.glob("evaluations/*/*/*_log.out")])
    return "\n".join(f"--- {file}\n{file.read_text()[-4000:]}" for file in files)


def attempts(run: Path) -> int:
    return RunDirectory(run).newest_attempt()


def started_at(run: Path) -> list[int]:
    """The step that each start of the run went on from."""
    return [event["step"] for event in RunDirectory(run).events() if event["event"] == "started"]


def saved_when_told(run: Path) -> list[int]:
    """The steps at which a signal made the run save."""
    return [event["step"] for event in RunDirectory(run).events() if event["event"] == "stopped"]
