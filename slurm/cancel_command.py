"""`peerlearn cancel`: end the jobs of runs."""

import contextlib
import importlib
import os
import signal
from collections.abc import Container, Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line
from peerlearn.runs.lock import living_owner
from slurm.client import JobState, call
from slurm.jobs import JobKey, Record, job_key, records_of, states_of
from slurm.status import CANCELLED_FILE, find_runs


def main(argv: Sequence[str]) -> int:
    """`peerlearn cancel RUN ...`. Returns the exit code."""
    parser = ArgumentParser(
        prog="peerlearn cancel",
        description="End all jobs of runs, those that train and those that evaluate, waiting or running. What runs is "
        "told to save first; `peerlearn resume` continues it. Example: peerlearn cancel runs/a",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run, or a folder that holds some: a sweep, a pipeline",
    )
    words: list[Path] = parser.parse_args(argv).runs
    runs = find_runs(words)
    jobs = [(run, record) for run in runs for record in records_of(run)]
    # A pipeline's own first: they would make up for what ends under their eyes.
    jobs = [*_pipeline_jobs(words, {job_key(record) for _, record in jobs}), *jobs]
    # First those that need no Slurm.
    ended = {place for place, record in jobs if _cancel_local(place, record)}
    slurm = [(place, record) for place, record in jobs if record["executor"] == "slurm"]
    states = states_of(record for _, record in slurm)
    alive = [
        (*job, state) for job in slurm if (state := states.get(job_key(job[1]))) and state.live
    ]
    if alive:
        call("scancel", *(record["job"] for _, record, _ in alive))
    for place, record, state in alive:
        _note(place, record, state)
        ended.add(place)
    for run in runs:
        if run not in ended:
            print(f"{run}: nothing to cancel: {_why_nothing(run)}")
    return DONE


def _pipeline_jobs(words: Sequence[Path], known: Container[JobKey]) -> list[tuple[Path, Record]]:
    """The jobs of pipelines that are no run's: those that watch and sum up."""
    folders = [folder for word in words for folder in (word, *word.glob("*"), *word.glob("*/*"))]
    # By name, as the CLI finds verbs: nothing here stands on `studies`.
    jobs = importlib.import_module("studies.ledger").jobs_without_a_run(folders)
    return [(folder, record) for folder, record in jobs if job_key(record) not in known]


def _cancel_local(place: Path, record: Record) -> bool:
    """Tell a job of this machine to save and end; False if it is none, or not alive."""
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
    """Say it, and leave it for `peerlearn status`."""
    was = state.state.lower()
    print(f"{place}: job {record['job']} ({record['verb']}, {was}) is told to end", flush=True)
    # A full disk keeps no job alive.
    with contextlib.suppress(OSError):
        append_json_line(place / CANCELLED_FILE, {"job": record["job"], "time": now_text()})
