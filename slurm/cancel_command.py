"""`peerlearn cancel`: end the jobs of runs."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.runs.directory import JOBS_FOLDER, STUDY_FILE, RunDirectory, check_owner
from peerlearn.runs.environment import now_text
from peerlearn.runs.file_ages import FileAges
from peerlearn.runs.files import append_json_line
from peerlearn.runs.lock import living_owner
from slurm.client import JobState, NoAnswerError, cancel_jobs
from slurm.find_runs import find_runs
from slurm.jobs import Record, job_key, may_appear, records_of, states_of
from slurm.status import CANCELLED_FILE
from slurm.submission import STARTS_BEFORE, locked_home

_PATIENCE_SECONDS = 300.0


def main(argv: Sequence[str]) -> int:
    """`peerlearn cancel RUN ...`.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn cancel",
        description="End all jobs of runs, waiting or running: jobs that train and jobs that evaluate. A training "
        "saves before it ends, and `peerlearn resume` continues it. Example: peerlearn cancel runs/a",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run, or a folder that holds runs: a study",
    )
    words: list[Path] = parser.parse_args(argv).runs
    studies = [word for word in words if (word / STUDY_FILE).is_file()]
    for study in studies:
        check_owner(study)
    with contextlib.ExitStack() as held:
        # Nobody submits further jobs of a study meanwhile.
        for study in studies:
            held.enter_context(locked_home(study / JOBS_FOLDER))
        try:
            runs = [*studies, *find_runs(words)]
        except UserError:
            if not studies:
                raise
            runs = studies
        ended = _cancel(runs)
    for run in runs:
        if run not in ended and run not in studies:
            print(f"{run}: nothing to cancel: {_why_nothing(run)}")
    return DONE


def _cancel(runs: Sequence[Path]) -> set[Path]:
    """End the jobs of runs and studies, a study's own jobs first: a living watch would submit further ones.

    Returns:
        The runs and studies that had any.
    """
    jobs = [(run, record) for run in runs for record in records_of(run)]
    # Jobs of this machine first: they need no Slurm.
    ended = {place for place, record in jobs if _cancel_local(place, record)}
    slurm = [(place, record) for place, record in jobs if record["executor"] == "slurm"]
    states = states_of((record for _, record in slurm), patience_seconds=_PATIENCE_SECONDS)
    alive, ages = [], FileAges()
    for place, record in slurm:
        state = states.get(job_key(record))
        if state is not None and state.live:
            alive.append((place, record, state))
        elif may_appear(place, record, state, ages) and _ends_unlisted(record["job"]):
            alive.append((place, record, JobState(state="SUBMITTED")))
    listed = [record["job"] for _, record, state in alive if state.live]
    cancel_jobs(listed, patience_seconds=_PATIENCE_SECONDS)
    for place, record, state in alive:
        _note(place, record, state)
        ended.add(place)
    return ended


def _ends_unlisted(job: str) -> bool:
    """End a job that Slurm does not list yet. Returns False if Slurm has no such job."""
    try:
        cancel_jobs([job], patience_seconds=_PATIENCE_SECONDS)
    except NoAnswerError:
        raise
    except UserError:
        return False
    return True


def _cancel_local(place: Path, record: Record) -> bool:
    """Tell a job of this machine to save and end.

    Returns:
        False if the job is not one of this machine, or is not alive.
    """
    if record["executor"] != "local" or not states_of([record]):
        return False
    try:
        os.kill(int(record["job"]), signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise UserError(
            f"{place}: job {record['job']} is another user's, who alone can end it"
        ) from error
    _note(place, record, JobState(state="RUNNING"))
    return True


def _why_nothing(run: Path) -> str:
    owner = living_owner(run)
    if owner is None:
        return "none of its jobs waits or runs"
    return (
        f"no job of this machine or of Slurm: stop process {owner['pid']} on {owner['host']} itself"
    )


def _note(place: Path, record: Record, state: JobState) -> None:
    """Print that a job is cancelled, and record it for `peerlearn status`."""
    was = state.state.lower()
    print(f"{place}: job {record['job']} ({record['verb']}, {was}) is told to end", flush=True)
    # A full disk must not keep a job alive.
    with contextlib.suppress(OSError):
        starts = RunDirectory(place).newest_attempt()
        note = {"job": record["job"], "time": now_text(), STARTS_BEFORE: starts}
        append_json_line(place / CANCELLED_FILE, note)
