"""Runs of several real processes (gloo), one process to compare them with, and what is done to them."""

import os
import re
import signal
from pathlib import Path

from tests.e2e.runs import SMALL, command, ends, environment, launch, wait_for
from tests.warm import run as run_process

# In float64 sums round to 1e-16, whatever their order.
DOUBLE = Path(__file__).parent / "double_precision.py"
QUIET = ["--monitor.every_epochs", "0"]
PROBED = ["--monitor.linear", "true"]
# Two epochs of three steps, in which the queue wraps.
SHORT = ["--data.limit", "104", *QUIET]


def finish(processes: int, run: Path, *more: str, driver: Path | None = None) -> None:
    words = ["pretrain", *SMALL, *more, "--run", str(run)]
    for code, output in ends(launch(processes, *words, driver=driver)):
        assert code == 0, output


def finish_alone(*words: str) -> None:
    """One process, in float64."""
    found = run_process(command(*words, driver=DOUBLE), env=environment(), capture_output=True)
    assert found.returncode == 0, found.stderr


def resume_after(kind: signal.Signals, victim: int, run: Path, *words: str) -> None:
    """Two processes, one of which gets the signal after some steps; then they are resumed to the end."""
    every = ("--checkpoint.every_steps", "2")
    ranks = launch(2, "pretrain", *SMALL, *words, *every, "--run", str(run), STEP_SECONDS="0.2")
    wait_for(lambda: (run / "checkpoints/step-00000004").exists(), ranks)
    ranks[victim].send_signal(kind)
    found = ends(ranks)
    if kind == signal.SIGTERM:
        assert [code for code, _ in found] == [75, 75]
    else:
        code, output = found[1 - victim]
        assert found[victim][0] == -kind
        assert code == 1
        assert f"rank {victim} died (process {ranks[victim].pid} on" in output
        assert f"rank {1 - victim} stops too" in output
        assert f"rank {victim} died" in (run / "FAILED").read_text()
    for code, output in ends(launch(2, "resume", str(run))):
        assert code == 0, output
    assert not (run / "FAILED").exists()


def assert_a_stopped_rank_is_named(processes: int, run: Path, *words: str) -> None:
    """Rank 1 is stopped while it trains; rank 0 waits for the ranks' timeout and names it."""
    long = [*QUIET, "--epochs", "60", "--rank_timeout_seconds", "10"]
    ranks = launch(processes, "pretrain", *SMALL, *long, *words, "--run", str(run))
    wait_for(lambda: (run / "checkpoints/latest").exists(), ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        output, _ = ranks[0].communicate(timeout=240)
    finally:
        for rank in ranks[1:]:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    assert re.search(rf"rank 1 has been silent for \d+ s \(process {ranks[1].pid} on", output)
