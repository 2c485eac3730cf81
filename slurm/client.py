"""Calls of Slurm's own programs: squeue, sacct, scontrol, scancel. Their words reach the user unchanged."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peerlearn.errors import UserError

_CALL_SECONDS = 60.0
# States of jobs that run or wait.
LIVE_STATES = frozenset(
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
    | {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "REQUEUE_FED"}
)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job, as Slurm knows it.

    Attributes:
        state: state in Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, PREEMPTED, TIMEOUT, ...
        reason: why the job waits or failed, in Slurm's word; "" if unknown.
    """

    state: str
    reason: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def text(self) -> str:
        """The state for people: ``pending (Priority)``."""
        return f"{self.state.lower()} ({self.reason})" if self.reason else self.state.lower()


class OwnJob(NamedTuple):
    """A job that waits or runs.

    Attributes:
        number: number of the job, 12 or 12_3.
        own_number: number by which its processes know it; another one for the tasks of an array.
        state: state in Slurm's word.
        name: name of the job.
    """

    number: str
    own_number: str
    state: str
    name: str


def call(*words: str) -> str:
    """Run one of Slurm's programs.

    Returns:
        The output of the program.

    Raises:
        UserError: the program is not on this machine, does not answer, or refuses. The message has its own words.
    """
    if shutil.which(words[0]) is None:
        raise UserError(
            f"`{words[0]}` is not on this machine: submit from a login node of the cluster, or use --cluster local"
        )
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=_CALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{words[0]} gave no answer for {_CALL_SECONDS:.0f} s") from error
    if answer.returncode != 0:
        raise UserError(own_words(words[0], answer.stderr or answer.stdout))
    return answer.stdout


def own_words(program: str, text: str) -> str:
    """The message of a program, on one line that begins with its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = "; ".join(line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines)
    return f"{program}: {said or 'it failed without a word'}"


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of jobs (123, or 123_4 of an array). Jobs that Slurm has forgotten are left out.

    squeue is asked first; it knows a job until some minutes after its end. Then sacct is asked, if there is accounting.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    found = {job: state for job, state in _queued(_without_tasks(jobs)).items() if job in wanted}
    missing = wanted - set(found)
    if missing:
        found |= {job: state for job, state in _accounted(missing).items() if job in missing}
    return found


def own_jobs() -> list[OwnJob]:
    """The jobs of this account that wait or run, each task of an array by itself.

    Raises:
        UserError: Slurm does not answer.
    """
    words = ("--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%A|%T|%j")
    return [OwnJob(*line.split("|", 3)) for line in call("squeue", *words).splitlines()]


def _without_tasks(jobs: Sequence[str]) -> list[str]:
    """The jobs with arrays in place of their tasks. squeue takes an array, and then names each of its tasks."""
    return sorted({job.split("_")[0] for job in jobs})


def _queued(jobs: Sequence[str]) -> dict[str, JobState]:
    words = ("--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    try:
        listed = call("squeue", f"--jobs={','.join(jobs)}", *words)
    except UserError as error:
        if "Invalid job id" in str(error):  # squeue has forgotten the only job asked for.
            return {}
        raise
    states = {}
    for line in listed.splitlines():
        job, state, reason = line.split("|", 3)
        states[job] = JobState(state=state, reason="" if reason == "None" else reason)
    return states


def _accounted(jobs: set[str]) -> dict[str, JobState]:
    words = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,Reason")
    try:
        listed = call("sacct", f"--jobs={','.join(sorted(jobs))}", *words)
    except UserError:
        return {}  # No accounting here.
    states = {}
    for line in listed.splitlines():
        job, state, reason = line.split("|", 3)
        # The state may be "CANCELLED by 1000".
        states[job] = JobState(state=state.split()[0], reason="" if reason == "None" else reason)
    return states
