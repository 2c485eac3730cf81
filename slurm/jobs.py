"""The jobs that work on a run now, wherever they were submitted."""

import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.file_ages import FileAges
from peerlearn.runs.heartbeat import process_exists, process_started_at
from peerlearn.runs.lock import living_owner
from slurm.client import NOT_ASKED, JobState, job_states
from slurm.submission import NUMBERS_FILE, TRAINING_VERBS, jobs_of

# squeue may not know a fresh job yet, and a file of another machine may be seen late. What is missing for so long, in
# answers that came, is gone.
SETTLED_SECONDS = 60.0
_ASK_AGAIN_SECONDS = 60.0
_PATIENCE_SECONDS = 300.0

Record = dict[str, Any]
JobKey = tuple[str, str, Any]


def job_key(record: Record) -> JobKey:
    """A key that no other job has. A number alone is no key: Slurm's jobs and local processes may share one."""
    return record["executor"], record["job"], record.get("started")


def states_of(
    records: Iterable[Record], *, patience_seconds: float = 0.0
) -> dict[JobKey, JobState]:
    """The states of the jobs in these records of jobs.jsonl. Jobs that nobody remembers are left out.

    Args:
        records: the records.
        patience_seconds: how long Slurm is asked again while it cannot be reached.

    Raises:
        UserError: Slurm does not answer.
    """
    records = list(records)
    numbers = [record["job"] for record in records if record["executor"] == "slurm"]
    slurm = job_states(numbers, patience_seconds=patience_seconds)
    states = {}
    for record in records:
        state = slurm.get(record["job"]) if record["executor"] == "slurm" else _local_state(record)
        if state is not None:
            states[job_key(record)] = state
    return states


def _local_state(record: Record) -> JobState | None:
    if record["executor"] != "local" or record.get("host") != socket.gethostname():
        return None
    pid = int(record["job"])
    alive = process_exists(pid) and process_started_at(pid) == record.get("started")
    return JobState(state="RUNNING") if alive else None


def records_of(run: Path) -> list[Record]:
    """The records of a run's jobs, oldest first; none if the file cannot be read."""
    try:
        return list(jobs_of(run))
    except OSError:
        return []


def submission_of(run: Path, record: Record) -> Path:
    """The submission folder of a job, also after its run directory was moved."""
    folder = Path(record["folder"])
    return folder if folder.is_dir() else RunDirectory(run).jobs / folder.name


def may_appear(run: Path, record: Record, state: JobState | None, ages: FileAges) -> bool:
    """Whether a job that Slurm does not know was submitted so recently that Slurm's list may lag."""
    if record["executor"] != "slurm" or (state is not None and not state.unknown):
        return False
    age = ages.age_seconds(submission_of(run, record) / NUMBERS_FILE)
    return age is not None and age < SETTLED_SECONDS


class JobWatch:
    """Asks for the states of jobs again and again. If Slurm does not answer, it says so once and goes on without."""

    def __init__(self) -> None:
        self._ended: dict[JobKey, JobState] = {}
        self._ask_from = 0.0
        self._said = False

    def states(self, records: Iterable[Record]) -> dict[JobKey, JobState]:
        """The states of the records' jobs, by one question to Slurm. Jobs that nobody remembers are left out."""
        records = list(records)
        local = [record for record in records if record["executor"] == "local"]
        slurm = [record for record in records if record["executor"] == "slurm"]
        # A job that has ended is asked about once, which spares the accounting database.
        asked = [record for record in slurm if job_key(record) not in self._ended]
        answer = self._ask(asked)
        if answer is None:
            answer = {job_key(record): NOT_ASKED for record in asked}
        else:
            self._ended |= {key: state for key, state in answer.items() if state.ended}
        known = {key: self._ended[key] for key in map(job_key, slurm) if key in self._ended}
        return states_of(local) | known | answer

    def _ask(self, records: Sequence[Record]) -> dict[JobKey, JobState] | None:
        """The states of jobs of Slurm; None if it does not answer."""
        if time.monotonic() < self._ask_from:
            return None
        try:
            return states_of(records)
        except UserError as error:
            # squeue waits long for a controller that is down, so the next question comes later.
            self._ask_from = time.monotonic() + _ASK_AGAIN_SECONDS
            if not self._said:
                print(f"peerlearn: by the run directories alone: {error}", file=sys.stderr)
            self._said = True
            return None


def check_free(run: Path) -> None:
    """Make sure that no other job or process writes the run, or will.

    Raises:
        UserError: there is such a job or process.
    """
    training = [record for record in records_of(run) if record["verb"] in TRAINING_VERBS]
    states, ages = states_of(training, patience_seconds=_PATIENCE_SECONDS), FileAges()
    for record in training:
        job, state = record["job"], states.get(job_key(record))
        if state is not None and state.live:
            raise UserError(
                f"{run}: job {job} ({state.text}) works on it already: `peerlearn cancel {run}` ends it"
            )
        if may_appear(run, record, state, ages):
            raise UserError(
                f"{run}: job {job} was submitted just now, and Slurm does not list it yet: try again in a minute"
            )
    owner = living_owner(run)
    if owner is not None:
        raise UserError(
            f"{run} is in use by process {owner['pid']} on {owner['host']}: wait for it, or stop it first"
        )
