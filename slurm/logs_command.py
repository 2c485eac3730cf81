"""`peerlearn logs`: print the log of a rank of a run, and follow it."""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from peerlearn.runs.files import numbered_files
from peerlearn.runs.standing import integer
from slurm.find_runs import find_runs, is_run
from slurm.jobs import JobWatch, Record, records_of, submission_of
from slurm.status import RunStatus, has_not_begun, read_statuses
from slurm.submission import TRAINING_VERBS

_POLL_SECONDS = 0.5
# Slurm is asked no oftener.
_STATUS_SECONDS = 2.0


def main(argv: Sequence[str]) -> int:
    """`peerlearn logs RUN [-f] [--rank R] [--attempt K]`.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    run: Path = arguments.run
    if (run / STUDY_FILE).is_file() and records_of(run):
        _print_study(run, follow=arguments.follow)
        return DONE
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
        description="Print the log of a run's newest start. Before that start begins, print the output of its job. "
        "Example: peerlearn logs runs/a -f",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or a study")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="print new lines as they come, over restarts, until the run neither runs nor waits",
    )
    parser.add_argument("--rank", type=int, default=0, help="rank of the process (default: 0)")
    parser.add_argument(
        "--attempt", type=int, help="number of the start, from 1 (default: the newest)"
    )
    return parser.parse_args(argv)


def _print_study(study: Path, *, follow: bool) -> None:
    """Print the output of the job that runs or watches a study, and new lines until it has ended."""
    record, printer, watch = records_of(study)[-1], _Printer(), JobWatch()
    while True:
        states = watch.states([record]) if follow else {}
        goes_on = any(state.live or state.unknown for state in states.values())
        for file in numbered_files(
            submission_of(study, record), f"{record['job']}_", "_log.out"
        ).values():
            printer.print_new(file)
        if not goes_on:
            return
        time.sleep(_STATUS_SECONDS)


def _follow(run: Path, rank: int, attempt: int | None) -> None:
    """Print new lines until the run neither runs nor waits, or until the given attempt is no longer the newest."""
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
        # Read after the status: lines written before the end are printed before the loop ends.
        newest = _log_files(run, rank, attempt, wait=not over and _may_come(run, rank))
        for file in dict.fromkeys([*files, *newest]):
            printer.print_new(file)
        files = newest
        if over:
            print(f"{run}: {status.text}", file=sys.stderr)
            return
        time.sleep(_POLL_SECONDS)


def _may_come(run: Path, rank: int) -> bool:
    """Whether the newest start has a process of that rank, or has not told its number of processes yet."""
    started = [event for event in RunDirectory(run).events() if event["event"] == "started"]
    if not started or started[-1].get("attempt") != RunDirectory(run).newest_attempt():
        return True
    return rank < (integer(started[-1].get("processes")) or 1)


class _Printer:
    """Prints the new content of each file, under a line with the file's name."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}
        self._last: Path | None = None

    def print_new(self, file: Path) -> None:
        """Print what was added to the file since the last call. A file that has become shorter is printed whole."""
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
    """The files to print, the growing one last; an empty list if there are none yet.

    Args:
        run: folder of the run.
        rank: rank of the process.
        attempt: number of the start; None = the newest start, and the output of a job that was submitted after it.
        wait: whether a rank without a log may still write one.

    Raises:
        UserError: there is no such attempt or rank; the message names those that exist.
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
    """The newest job that trains the run, if it has not begun yet, or died before it began."""
    training = [r for r in records_of(directory.root) if r["verb"] in TRAINING_VERBS]
    started = [{}, *directory.events("started")][-1]
    if not training or not has_not_begun(training[-1], directory.newest_attempt(), started):
        return None
    return training[-1]


def _nothing_yet(run: Path) -> str:
    status = read_statuses([run], JobWatch())[0]
    return f"{run}: no log yet ({status.text}); -f waits for it"
