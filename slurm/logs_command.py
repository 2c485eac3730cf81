"""`peerlearn logs`: what a rank of a run has logged, and what it goes on to log."""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import numbered_files
from slurm.jobs import JobWatch, Record, records_of, submission_of
from slurm.status import RunStatus, find_runs, is_run, read_statuses
from slurm.submission import TRAINING_VERBS

_POLL_SECONDS = 0.5
# Slurm is asked no oftener.
_STATUS_SECONDS = 2.0


def main(argv: Sequence[str]) -> int:
    """`peerlearn logs RUN [-f] [--rank R] [--attempt K]`. Returns the exit code."""
    arguments = _parse(argv)
    run: Path = arguments.run
    if not is_run(run):
        inside = find_runs([run])
        raise UserError(f"{run} holds {len(inside)} runs: name one of them, as {inside[0]}")
    if arguments.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(run, arguments.rank, arguments.attempt)
        return DONE
    files = _log_files(run, arguments.rank, arguments.attempt)
    if not files:
        raise UserError(_nothing_yet(run))
    printer = _Printer()
    for file in files:
        printer.print_new(file)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn logs",
        description="Print what a run has logged at its newest start; before that begins, what its job has printed. "
        "Example: peerlearn logs runs/a -f",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on with what comes, over restarts, until the run neither runs nor waits",
    )
    parser.add_argument("--rank", type=int, default=0, help="of the process (default: 0)")
    parser.add_argument("--attempt", type=int, help="which start, from 1 (default: the newest)")
    return parser.parse_args(argv)


def _follow(run: Path, rank: int, attempt: int | None) -> None:
    """Print what comes until the run neither runs nor waits, or until a given attempt is not the newest any more."""
    printer, watch = _Printer(), JobWatch()
    files: list[Path] = []
    status: RunStatus | None = None
    look_at = 0.0
    while True:
        now = time.monotonic()
        if now >= look_at:
            look_at = now + _STATUS_SECONDS
            status = read_statuses([run], watch)[0]
        assert status is not None
        over = not status.live or attempt not in (None, RunDirectory(run).newest_attempt())
        # What was written before the look above is printed before the end.
        newest = _log_files(run, rank, attempt, wait=not over and _may_come(run, rank))
        for file in dict.fromkeys([*files, *newest]):
            printer.print_new(file)
        files = newest
        if over:
            print(f"{run}: {status.text}", file=sys.stderr)
            return
        time.sleep(_POLL_SECONDS)


def _may_come(run: Path, rank: int) -> bool:
    """Whether the newest start has a process of that rank, or has not said how many it has."""
    started = [event for event in RunDirectory(run).events() if event["event"] == "started"]
    if not started or started[-1].get("attempt") != RunDirectory(run).newest_attempt():
        return True
    return rank < int(started[-1].get("processes", 1))


class _Printer:
    """Prints of each file what it has not printed yet, under a line with the file's name."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}
        self._last: Path | None = None

    def print_new(self, file: Path) -> None:
        """Print what the file has more than at the last call; of a file cut short meanwhile, all."""
        known = file in self._offsets
        offset = self._offsets.get(file, 0)
        try:
            with file.open("rb") as opened:
                size = opened.seek(0, 2)
                if size < offset:
                    offset = 0
                if known and size == offset:
                    return
                if file != self._last:
                    gap = "" if self._last is None else "\n"
                    print(f"{gap}==> {file} <==", flush=True)
                    self._last = file
                opened.seek(offset)
                shutil.copyfileobj(opened, sys.stdout.buffer)
                self._offsets[file] = opened.tell()
        except FileNotFoundError:
            return
        sys.stdout.buffer.flush()


def _log_files(run: Path, rank: int, attempt: int | None, *, wait: bool = False) -> list[Path]:
    """The files to print, the one that goes on last; none if there are none yet.

    Args:
        run: its folder.
        rank: whose.
        attempt: which start; None is the newest, and what a job has printed that was submitted after it.
        wait: a rank that has logged nothing yet may be about to.

    Raises:
        UserError: there is no such attempt or rank; names those there are.
    """
    directory = RunDirectory(run)
    newest = directory.newest_attempt()
    if attempt is not None and not directory.logs(attempt).is_dir():
        there = f"1 to {newest}" if newest else "none yet"
        raise UserError(f"{run}: no attempt {attempt}; there is {there}")
    folder = directory.logs(attempt or newest)
    logs = directory.rank_logs(attempt or newest)
    files = [_of_rank(logs, rank, folder, wait=wait)] if logs else []
    if attempt is None and (job := _job_to_come(directory)):
        folder = submission_of(run, job)
        if printed := numbered_files(folder, f"{job['job']}_", "_log.out"):
            files.append(_of_rank(printed, rank, folder, wait=wait))
    return [file for file in files if file is not None]


def _of_rank(files: dict[int, Path], rank: int, folder: Path, *, wait: bool) -> Path | None:
    if rank in files:
        return files[rank]
    if wait:
        return None
    ranks = ", ".join(map(str, sorted(files)))
    raise UserError(f"{folder}: no log of rank {rank}; there are those of {ranks}")


def _job_to_come(directory: RunDirectory) -> Record | None:
    """The newest job that trains the run, if it has not begun to yet, or died before it did."""
    training = [r for r in records_of(directory.root) if r["verb"] in TRAINING_VERBS]
    started = [str(e.get("time", "")) for e in directory.events() if e["event"] == "started"]
    if not training or (started and started[-1] >= str(training[-1].get("time", ""))):
        return None
    return training[-1]


def _nothing_yet(run: Path) -> str:
    status = read_statuses([run], JobWatch())[0]
    return f"{run}: no log yet ({status.text}); -f waits for it"
