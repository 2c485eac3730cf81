"""Calls of Slurm's own programs: sbatch, squeue, sacct, scontrol, scancel. Their words reach the user unchanged.

A controller may be away for minutes: it is restarted, or swamped. So a question has three answers: yes, no, and none.
Without an answer nothing is known, and nothing is concluded.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peerlearn.errors import UserError

_CALL_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 20.0
# A command line takes some 128 kB in one word.
_JOBS_PER_CALL = 1000
# States of jobs that run or wait.
LIVE_STATES = frozenset(
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
    | {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "REQUEUE_FED"}
)
# States of jobs that Slurm may be about to start again, and of those that it does not tell.
_MAY_RETURN = frozenset({"NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "UNKNOWN"})
# Parts of what Slurm's programs say if they could not ask the controller or the database.
_NOT_REACHED = (
    *("timed out", "Unable to contact", "Connection refused", "Connection reset", "not responding"),
    *("Zero Bytes were transmitted", "Communication connection failure", "Broken pipe"),
    *("Transport endpoint", "in standby mode", "No route to host", "Network is unreachable"),
    *("temporarily", "configuration source", "Munge encode failed", "authentication", "resolve"),
    *("Unexpected message received", "message timeout", "send failure", "receive failure"),
)
# The user's variables that change what Slurm's programs print or do. SLURM_CONF only says where the cluster is, and
# SLURM_CLUSTERS which of several.
_USERS_VARIABLES = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SBATCH_", "SRUN_", "SALLOC_")
_USERS_FORMATS = ("SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SLURM_JSON", "SLURM_YAML")
# Further ones make a process part of a job or of a group of processes.
_JOB_VARIABLES = ("SLURM_", "SLURMD_", "SUBMITIT_")
_PLACES = ("SLURM_CONF", "SLURM_CLUSTERS")
_RANK_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


class NoAnswerError(UserError):
    """Slurm could not be asked: nothing is known."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job, as Slurm knows it.

    Attributes:
        state: state in Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, PREEMPTED, TIMEOUT, ...; UNKNOWN
            if Slurm could not be asked or contradicts itself.
        reason: why the job waits or failed, in Slurm's word; "" if unknown.
    """

    state: str
    reason: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def ended(self) -> bool:
        """Whether the job has ended for good. One that lost its nodes may yet be started again."""
        return not self.live and self.state not in _MAY_RETURN

    @property
    def unknown(self) -> bool:
        return self.state == "UNKNOWN"

    @property
    def text(self) -> str:
        """The state for people: ``pending (Priority)``."""
        return f"{self.state.lower()} ({self.reason})" if self.reason else self.state.lower()


# The state of a job that Slurm could not be asked about.
NOT_ASKED = JobState(state="UNKNOWN", reason="Slurm cannot be asked")


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


def call(
    *words: str, patience_seconds: float = 0.0, environment: dict[str, str] | None = None
) -> str:
    """Run one of Slurm's programs, without the user's variables that would change what it prints.

    Args:
        words: program and its words.
        patience_seconds: how long Slurm is asked again, with growing pauses, while it cannot be reached.
        environment: environment of the program; None = that of this process.

    Returns:
        The output of the program.

    Raises:
        NoAnswerError: Slurm cannot be reached.
        UserError: the program is not on this machine, or refuses. The message has its own words.
    """
    if shutil.which(words[0]) is None:
        raise UserError(
            f"`{words[0]}` is not on this machine: submit from a login node of the cluster, or use --cluster local"
        )
    own = neutral(dict(os.environ) if environment is None else environment)
    end, pause = time.monotonic() + patience_seconds, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return _call_once(words, own)
        except NoAnswerError as error:
            left = end - time.monotonic()
            if pause > left:
                raise
            if pause == _FIRST_PAUSE_SECONDS:
                print(f"{error}: asking again for {left:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _call_once(words: Sequence[str], environment: dict[str, str]) -> str:
    try:
        answer = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_CALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"{words[0]} gave no answer for {_CALL_SECONDS:.0f} s") from error
    if answer.returncode == 0:
        return answer.stdout
    said = _own_words(words[0], answer.stderr or answer.stdout)
    if answer.returncode < 0:
        raise NoAnswerError(f"{said} (killed by signal {-answer.returncode})")
    kind = NoAnswerError if any(part in said for part in _NOT_REACHED) else UserError
    raise kind(said)


def neutral(environment: dict[str, str]) -> dict[str, str]:
    """The environment without the user's variables that would change what Slurm's programs print."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_USERS_VARIABLES) and name not in _USERS_FORMATS
    }


def outside_any_job(environment: dict[str, str]) -> dict[str, str]:
    """The environment as on a login node, also where this process is part of a job."""
    return {
        name: value
        for name, value in neutral(environment).items()
        if (not name.startswith(_JOB_VARIABLES) or name in _PLACES) and name not in _RANK_VARIABLES
    }


def _own_words(program: str, text: str) -> str:
    """The message of a program, on one line that begins with its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = "; ".join(line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines)
    return f"{program}: {said or 'it failed without a word'}"


def cancel_jobs(jobs: Sequence[str], *, patience_seconds: float = 0.0) -> None:
    """End jobs.

    Raises:
        NoAnswerError: Slurm cannot be reached.
        UserError: scancel refuses.
    """
    for part in _parts(jobs):
        call("scancel", *part, patience_seconds=patience_seconds)


def job_states(jobs: Sequence[str], *, patience_seconds: float = 0.0) -> dict[str, JobState]:
    """The states of jobs (123, or 123_4 of an array). Jobs that Slurm has forgotten are left out.

    squeue is asked first; it knows a job until some minutes after its end. Then sacct is asked, if there is accounting.
    A job that lives in the accounting alone is unknown: such a record may stay for ever after a crash of the database.

    Raises:
        NoAnswerError: Slurm cannot be reached.
        UserError: squeue refuses.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    queued = _in_parts(_queued, _without_tasks(jobs), patience_seconds)
    found = {job: state for job, state in queued.items() if job in wanted}
    missing = wanted - set(found)
    accounted = _in_parts(_accounted, sorted(missing), patience_seconds)
    return found | {job: state for job, state in accounted.items() if job in missing}


def _in_parts(
    ask: Callable[[Sequence[str], float], dict[str, JobState]],
    jobs: Sequence[str],
    patience_seconds: float,
) -> dict[str, JobState]:
    states: dict[str, JobState] = {}
    for part in _parts(jobs):
        states |= ask(part, patience_seconds)
    return states


def _parts(jobs: Sequence[str]) -> list[Sequence[str]]:
    return [jobs[first : first + _JOBS_PER_CALL] for first in range(0, len(jobs), _JOBS_PER_CALL)]


def own_jobs(*, patience_seconds: float = 0.0) -> list[OwnJob]:
    """The jobs of this account that wait or run, each task of an array by itself.

    Raises:
        NoAnswerError: Slurm cannot be reached.
        UserError: squeue refuses.
    """
    words = ("--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%A|%T|%j")
    listed = call("squeue", *words, patience_seconds=patience_seconds)
    return [OwnJob(*fields) for fields in _rows(listed, 4)]


def jobs_of_script(script: Path, *, patience_seconds: float = 0.0) -> set[str]:
    """The numbers of this account's jobs that a batch script was submitted as, an array's own number for its tasks.

    A script that was written for one submission identifies it, also if sbatch could not tell the number.

    Raises:
        NoAnswerError: Slurm cannot be reached.
        UserError: squeue refuses.
    """
    words = ("--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o")
    listed = call("squeue", *words, patience_seconds=patience_seconds)
    return {number for number, command in _rows(listed, 2) if command == str(script)}


def _rows(listed: str, fields: int) -> list[list[str]]:
    """The rows of a listing. What a wrapper of the program says beside them is left out."""
    rows = [line.split("|", fields - 1) for line in listed.splitlines()]
    return [row for row in rows if len(row) == fields and row[0][:1].isdigit()]


def _without_tasks(jobs: Sequence[str]) -> list[str]:
    """The jobs with arrays in place of their tasks. squeue takes an array, and then names each of its tasks."""
    return sorted({job.split("_")[0] for job in jobs})


def _queued(jobs: Sequence[str], patience_seconds: float) -> dict[str, JobState]:
    words = ("--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    try:
        listed = call(
            "squeue", f"--jobs={','.join(jobs)}", *words, patience_seconds=patience_seconds
        )
    except UserError as error:
        if "Invalid job id" in str(error):  # squeue has forgotten the only job asked for.
            return {}
        raise
    return {
        job: JobState(state=state, reason="" if reason == "None" else reason)
        for job, state, reason in _rows(listed, 3)
    }


def _accounted(jobs: Sequence[str], patience_seconds: float) -> dict[str, JobState]:
    words = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,Reason")
    try:
        listed = call(
            "sacct", f"--jobs={','.join(jobs)}", *words, patience_seconds=patience_seconds
        )
    except NoAnswerError:
        return dict.fromkeys(jobs, JobState(state="UNKNOWN", reason="sacct does not answer"))
    except UserError:
        return {}  # No accounting here.
    states = {}
    for job, state, reason in _rows(listed, 3):
        # The state may be "CANCELLED by 1000".
        word = (state.split() or ["UNKNOWN"])[0]
        states[job] = JobState(state=word, reason="" if reason == "None" else reason)
        if word in LIVE_STATES:
            said = f"{word.lower()} in the accounting, and squeue does not know it"
            states[job] = JobState(state="UNKNOWN", reason=said)
    return states
