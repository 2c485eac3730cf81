"""Running what a sweep lacks, one process after another."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from peerlearn import HOME
from peerlearn.errors import DONE, SAVED_RUN_AGAIN
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import append_text
from peerlearn.runs.stop import Stop
from studies.sweep import Sweep, SweptRun, config_file, unwritable

_LOOK_SECONDS = 0.2


def run_missing(sweep: Sweep, stop: Stop) -> bool:
    """Run, or go on with, every run that is not done; a failure is printed and stops no other.

    Returns:
        Whether it came through; False: it was told to stop, or a run was.

    Raises:
        UserError: the folder cannot be written.
    """
    runs = sweep.runs
    left = [run for run in runs if run.state != "done"]
    print(f"{sweep.root}: {len(runs)} runs, {len(runs) - len(left)} of them done", flush=True)
    for number, run in enumerate(left, start=len(runs) - len(left) + 1):
        head = f"[{number}/{len(runs)}] {run.folder.name}"
        if stop.requested:
            return False
        if run.state == "done":
            print(f"{head}: another process has done it meanwhile", flush=True)
            continue
        verb = "goes on" if run.state == "begun" else "starts"
        print(f"{head}: {verb} (`peerlearn logs {run.folder} -f` follows it)", flush=True)
        begun = time.monotonic()
        code = _run(sweep, run, stop)
        if code == SAVED_RUN_AGAIN or (stop.requested and code != DONE):
            return False
        ended = "done" if code == DONE else f"failed: {why_not_done(run)}"
        print(f"{head}: {ended} ({time.monotonic() - begun:.0f} s)", flush=True)
    return True


def _run(sweep: Sweep, run: SweptRun, stop: Stop) -> int:
    """One run in a process of its own, told to stop when this one is. Returns its exit code."""
    # By its resolved config: what becomes of a file that it names, meanwhile, changes no later run.
    words = ["pretrain", str(config_file(sweep, run.variant)), *run.own_words, "--auto_resume"]
    paths = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        with run.log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "peerlearn", *words],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is this process's to hand on: once, and as what saves.
                start_new_session=True,
            )
    except OSError as error:
        raise unwritable(sweep, error) from error
    told = False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(_LOOK_SECONDS)
                break
            if stop.requested and not told:
                child.terminate()
                told = True
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if code < 0 and not told:
        with contextlib.suppress(OSError):
            append_text(run.log, f"peerlearn: ended by {signal.Signals(-code).name}\n")
    return code


def why_not_done(run: SweptRun) -> str:
    """In one line; "" for a run that is done."""
    state = run.state
    if state == "done":
        return ""
    if failed := _lines(RunDirectory(run.folder).failed_mark):
        return " ".join(failed)
    said = (_lines(run.log) or [""])[-1]
    if said.startswith("peerlearn: "):
        return said.removeprefix("peerlearn: ")
    return "it has begun and is not done" if state == "begun" else "it has not begun"


def _lines(file: Path) -> list[str]:
    """Those that hold anything; of a file that is not there, none."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
