"""What `peerlearn status` takes on a slow disk: many runs at once, against one run after another.

    python benchmarks/status.py [--runs 200] [--delay_ms 2] [--rounds 5] [--output FILE]

The runs lie on this machine's disk, written by the program's own classes. Slow is simulated: within this process every
open, stat and listing of a path below them first sleeps for the delay, as long as a call to a busy file server takes.
What such a server does to many calls at once is not simulated. Both sides alternate within one run; times are wall
seconds of the whole verb, from the search for the runs to the last line of the table. Half of the runs are being
trained by two processes, the others are done, stopped or failed.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from peerlearn.runs import lock, metrics
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line, write_text
from peerlearn.runs.heartbeat import Heartbeat, process_started_at
from peerlearn.runs.metrics import MetricsLog
from peerlearn.runs.score_names import ENSEMBLE, KNN_K, KNN_TEMPERATURE, KNN_TOP1, score_name
from slurm import status
from slurm.status_command import main as status_main
from slurm.submission import JOBS_FILE

EPOCHS, ROWS_OF_EPOCH, STEPS_OF_ROW, RANKS = 200, 2, 50, 2
STEPS_OF_EPOCH = ROWS_OF_EPOCH * STEPS_OF_ROW
STEPS = EPOCHS * STEPS_OF_EPOCH
ENDS = ("done", "stopped", "failed")


def _write_run(root: Path, end: str | None) -> None:
    """A run with the files of a training: at its end, or three quarters on the way and alive."""
    run = RunDirectory(root)
    run.create_folder()
    run.write_config("seed: 0\n")
    attempt = run.start_attempt("pretrain", None)
    job = {
        "job": str(os.getpid()),
        "verb": "pretrain",
        "executor": "local",
        "folder": str(run.jobs),
    }
    own = {"host": platform.node(), "started": process_started_at(os.getpid())}
    run.jobs.mkdir()
    append_json_line(
        root / JOBS_FILE, {"time": now_text(), **job, **(own if end is None else {"host": "gone"})}
    )
    run.event("started", attempt=attempt, step=0, total_steps=STEPS, processes=RANKS)
    beats = [Heartbeat(run.logs(attempt), rank) for rank in range(RANKS)]
    log = MetricsLog(
        run, attempt=attempt, step=0, steps_per_epoch=STEPS_OF_EPOCH, total_steps=STEPS, writes=True
    )
    last = STEPS if end == "done" else STEPS * 3 // 4
    for step in range(STEPS_OF_ROW, last + 1, STEPS_OF_ROW):
        row = {"loss": 1.0, "images_per_second": 500.0, "lr": 0.1}
        row |= {score_name(net, "loss"): 1.0 for net in range(4)}
        if step % STEPS_OF_EPOCH == 0:
            row |= {score_name(net, KNN_TOP1): 70.0 for net in (*range(4), ENSEMBLE)}
            row |= {KNN_K: 200, KNN_TEMPERATURE: 0.1}
            run.event("saved", step=step, seconds=0.1)
        log.write(step, row)
    log.close()
    for beat in beats:
        beat.at_step(last)
        beat.end()
    if end is None:
        owner = {"host": platform.node(), "pid": os.getpid(), "started": own["started"]}
        lock._write_owner(root / lock.LOCK_FILES[1], {**owner, "since": now_text()}, 1)
        return
    run.event(end, attempt=attempt, step=last)
    if end == "done":
        run.mark_done()
    if end == "failed":
        run.mark_failed("rank 0: out of memory")


class SlowDisk:
    """Makes the file operations below a folder slow, and counts them.

    Attributes:
        operations: number of the operations so far.
    """

    def __init__(self, folder: Path, delay_seconds: float) -> None:
        self.operations = 0
        self._folder = str(folder)
        self._delay_seconds = delay_seconds

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Be slow for as long as the block lasts."""
        with contextlib.ExitStack() as stack:
            for module, name in (
                *((os, each) for each in ("stat", "lstat", "open", "scandir", "listdir")),
                (io, "open"),
            ):
                slow = self._slowed(getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, slow))
            yield

    def _slowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(path: Any, *words: Any, **more: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder):
                self.operations += 1
                time.sleep(self._delay_seconds)
            return function(path, *words, **more)

        return slow


def _seconds(folder: Path) -> float:
    begun = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status_main([str(folder)])
    seconds = time.monotonic() - begun
    assert printed.getvalue().count("running") >= 1
    return seconds


def main() -> None:
    """Print the medians and their ratio, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--delay_ms", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        # TensorBoard's files play no part.
        with mock.patch.object(metrics, "_open_board", return_value=None):
            for number in range(options.runs):
                end = ENDS[number // 2 % len(ENDS)] if number % 2 else None
                _write_run(folder / f"run-{number:03d}", end)
        disk = SlowDisk(folder, options.delay_ms / 1000)
        seconds: dict[str, list[float]] = {"one after another": [], "peerlearn status": []}
        with disk.in_place():
            for _ in range(options.rounds):
                with mock.patch.object(status, "_READERS", 1):
                    seconds["one after another"].append(_seconds(folder))
                before = disk.operations
                seconds["peerlearn status"].append(_seconds(folder))
        operations = (disk.operations - before) / options.runs
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    slow, fast = medians.values()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {options.runs} runs, "
        f"{options.delay_ms:g} ms for each file operation, {operations:.1f} operations for each run"
    )
    for name, each in seconds.items():
        print(f"{name:18} {medians[name]:6.2f} s   ({min(each):.2f} .. {max(each):.2f})")
    print(f"ratio of medians   {slow / fast:6.1f}")
    if options.output:
        figures = {
            "benchmark": "status",
            "runs": options.runs,
            "delay_ms": options.delay_ms,
            "rounds": options.rounds,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "operations_of_each_run": round(operations, 1),
            "seconds": {name: [round(s, 3) for s in each] for name, each in seconds.items()},
            "median_seconds": {name: round(median, 3) for name, median in medians.items()},
            "ratio_of_medians": round(slow / fast, 1),
        }
        write_text(options.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
