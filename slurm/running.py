"""Which jobs work on a run now, wherever they were submitted."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.heartbeat import process_exists, process_started_at
from peerlearn.run_lock import living_owner
from slurm.client import JobState, job_states
from slurm.submission import jobs_of


def states_of(records: Sequence[dict[str, Any]]) -> dict[str, JobState]:
    """The states of the jobs of some records of jobs.jsonl; those that nobody knows of any more are left out.

    Raises:
        UserError: Slurm does not answer.
    """
    slurm = [record["job"] for record in records if record["executor"] == "slurm"]
    states = job_states(slurm)
    for record in records:
        if record["executor"] == "local" and _local_is_alive(record):
            states[record["job"]] = JobState(state="RUNNING")
    return states


def live_jobs(run: Path) -> dict[str, JobState]:
    """The jobs that work on the run, or wait to.

    Raises:
        UserError: Slurm does not answer.
    """
    records = list(jobs_of(run))
    return {job: state for job, state in states_of(records).items() if state.live}


def check_free(run: Path) -> None:
    """Make sure that no other job is to write the run, and no process does.

    Raises:
        UserError: one is.
    """
    training = [r for r in jobs_of(run) if r["verb"] in ("pretrain", "resume")]
    for job, state in states_of(training).items():
        if state.live:
            raise UserError(
                f"{run}: job {job} ({state.state.lower()}) works on it already: `peerlearn cancel {run}` ends it"
            )
    owner = living_owner(run)
    if owner is not None:
        raise UserError(
            f"{run} is in use by process {owner['pid']} on {owner['host']}: wait for it, or stop it first"
        )


def _local_is_alive(record: dict[str, Any]) -> bool:
    pid = int(record["job"])
    return (
        record.get("host") == socket.gethostname()
        and process_exists(pid)
        and process_started_at(pid) == record.get("started")
    )
