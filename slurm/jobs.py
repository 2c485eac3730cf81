"""Which jobs work on a run now, wherever they were submitted."""

import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import process_exists, process_started_at
from peerlearn.runs.lock import living_owner
from slurm.client import JobState, job_states
from slurm.submission import TRAINING_VERBS, jobs_of

# The state of a job that Slurm could not be asked about.
NOT_ASKED = JobState(state="UNKNOWN")
_ASK_AGAIN_SECONDS = 60.0

Record = dict[str, Any]
JobKey = tuple[str, str, Any]


def job_key(record: Record) -> JobKey:
    """What tells a job from all others: Slurm's numbers and those of processes overlap."""
    return record["executor"], record["job"], record.get("started")


def states_of(records: Iterable[Record]) -> dict[JobKey, JobState]:
    """The states of the jobs of some records of jobs.jsonl; those that nobody knows of any more are left out.

    Raises:
        UserError: Slurm does not answer.
    """
    records = list(records)
    slurm = job_states([record["job"] for record in records if record["executor"] == "slurm"])
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
    """The records of its jobs, oldest first; none if the file cannot be read."""
    try:
        return list(jobs_of(run))
    except OSError:
        return []


def submission_of(run: Path, record: Record) -> Path:
    """The submission of a job, which moves with its run."""
    folder = Path(record["folder"])
    return folder if folder.is_dir() else RunDirectory(run).jobs / folder.name


class JobWatch:
    """Asks what has become of jobs; where Slurm does not answer it says so once, and goes on without."""

    def __init__(self) -> None:
        self._ended: dict[JobKey, JobState] = {}
        self._ask_from = 0.0
        self._said = False

    def states(self, records: Iterable[Record]) -> dict[JobKey, JobState]:
        """The states of their jobs, by one question to Slurm; left out is what nobody knows of any more."""
        records = list(records)
        local = [record for record in records if record["executor"] == "local"]
        slurm = [record for record in records if record["executor"] == "slurm"]
        # Accounting is spared the same question every few seconds.
        asked = [record for record in slurm if job_key(record) not in self._ended]
        found = self._ask(asked)
        if found is None:
            found = {job_key(record): NOT_ASKED for record in asked}
        else:
            self._ended |= {key: state for key, state in found.items() if not state.live}
        known = {key: self._ended[key] for key in map(job_key, slurm) if key in self._ended}
        return states_of(local) | known | found

    def _ask(self, records: Sequence[Record]) -> dict[JobKey, JobState] | None:
        """None if Slurm does not answer."""
        if time.monotonic() < self._ask_from:
            return None
        try:
            return states_of(records)
        except UserError as error:
            # A controller that is down keeps squeue waiting.
            self._ask_from = time.monotonic() + _ASK_AGAIN_SECONDS
            if not self._said:
                print(f"peerlearn: by the run directories alone: {error}", file=sys.stderr)
            self._said = True
            return None


def check_free(run: Path) -> None:
    """Make sure that no other job is to write the run, and no process does.

    Raises:
        UserError: one is.
    """
    training = [record for record in records_of(run) if record["verb"] in TRAINING_VERBS]
    for (_, job, _), state in states_of(training).items():
        if state.live:
            raise UserError(
                f"{run}: job {job} ({state.text}) works on it already: `peerlearn cancel {run}` ends it"
            )
    owner = living_owner(run)
    if owner is not None:
        raise UserError(
            f"{run} is in use by process {owner['pid']} on {owner['host']}: wait for it, or stop it first"
        )
