"""How a start of a job ended, as each of its processes saw it; and the decision that follows.

FOLDER/outcomes/TASK-RESTART-RANK.json    {"kind", "code", "reason", "step"}
FOLDER/outcomes-TASK.jsonl                one line for each start, with the decision
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import (
    append_json_line,
    numbered_files,
    read_json_lines,
    write_text,
)
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.standing import read_standing
from peerlearn.runs.text import printable
from slurm.client import NOT_ASKED, JobState
from slurm.jobs import SETTLED_SECONDS, JobWatch, job_key
from slurm.submission import OUTCOMES_FOLDER, Submission, job_numbers, local_identity

_POLL_SECONDS = 2.0
# How a batch script begins the output of a start, and what the processes' own last words are not.
_START_LINE = re.compile(r"start \d+ on ")
_OTHERS_WORDS = ("srun:", "slurmstepd:", "job ")
_TAIL_BYTES = 64 * 1024
# done; saved, to be continued; crashed, which another start may not repeat; failed by what the user must mend.
Kind = Literal["done", "saved", "crashed", "failed"]
Decision = Literal["done", "requeue", "failed"]
# What a line of the history must hold.
_LINE = {"kind": str, "decision": str, "reason": str, "attempt": int, "step": int | None}
# The exit code of a process that cannot write its outcome. 78 is sysexits' code for what the user must mend.
UNWRITTEN_CODES: dict[Kind, int] = {"done": DONE, "saved": SAVED_RUN_AGAIN, "failed": 78}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one process, or of a whole start.

    Attributes:
        kind: kind of the end: done, saved, crashed or failed.
        code: exit code of the command; negative for the signal that killed it.
        reason: reason of the end, one line for people.
        step: last step that began; None if no step began.
    """

    kind: Kind
    code: int
    reason: str
    step: int | None = None


def write_outcome(folder: Path, *, task: int, restart: int, rank: int, outcome: Outcome) -> None:
    """Write the outcome of a process, for the end of the batch script."""
    file = folder / OUTCOMES_FOLDER / f"{task}-{restart}-{rank}.json"
    write_text(file, json.dumps(asdict(outcome)) + "\n")


def read_outcomes(folder: Path, *, task: int, restart: int) -> dict[int, Outcome]:
    """The outcomes that the processes of one start have written, by rank. A damaged one counts as not written."""
    found = {}
    files = numbered_files(folder / OUTCOMES_FOLDER, f"{task}-{restart}-", ".json")
    for rank, file in files.items():
        with contextlib.suppress(OSError, ValueError, TypeError):
            outcome = Outcome(**read_json_object(file))
            hints = get_type_hints(Outcome) | {"kind": str}
            typed = all(isinstance(vars(outcome)[key], hint) for key, hint in hints.items())
            if typed and outcome.kind in get_args(Kind):
                found[rank] = outcome
    return found


def read_history(folder: Path, task: int) -> list[dict[str, Any]]:
    """The starts of a task so far, oldest first. A line that is damaged, or cut short by a full disk, is left out."""
    return [
        line
        for line in read_json_lines(folder / f"outcomes-{task}.jsonl")
        if all(isinstance(line.get(key), hint) for key, hint in _LINE.items())
    ]


def add_to_history(
    folder: Path,
    task: int,
    outcome: Outcome,
    *,
    job: str,
    restart: int,
    decision: Decision,
    reason: str,
    attempt: int,
    nodes: str,
) -> None:
    """Record a start and the decision after it.

    Args:
        folder: folder of the submission.
        task: number of the command in the submission.
        outcome: outcome of the start.
        job: number of the job.
        restart: number of the start, from 0.
        decision: decision after the start.
        reason: reason of the decision.
        attempt: newest attempt of the run.
        nodes: nodes of the start, in Slurm's form.
    """
    line = {
        "time": now_text(),
        "job": job,
        "restart": restart,
        "attempt": attempt,
        "nodes": nodes,
        "kind": outcome.kind,
        "step": outcome.step,
        "cause": outcome.reason,
        "reason": reason,
        "decision": decision,
    }
    append_json_line(folder / f"outcomes-{task}.jsonl", line)


def whole_outcome(
    outcomes: dict[int, Outcome], *, code: int, processes: int, last_words: str = ""
) -> Outcome:
    """The outcome of all processes of a start together.

    Args:
        outcomes: outcomes of the processes that could write one, by rank.
        code: exit code of srun.
        processes: number of processes.
        last_words: last line of their output, for a start of which no process could write its outcome.
    """
    steps = [outcome.step for outcome in outcomes.values() if outcome.step is not None]
    step = max(steps, default=None)

    def first(kind: Kind) -> Outcome | None:
        ranks = sorted(rank for rank, outcome in outcomes.items() if outcome.kind == kind)
        # A process that died of a signal says more than those that lost it.
        died = [rank for rank in ranks if outcomes[rank].code < 0]
        if not ranks:
            return None
        rank = (died or ranks)[0]
        return Outcome(
            kind=kind,
            code=outcomes[rank].code,
            reason=f"rank {rank}: {outcomes[rank].reason}"
            if processes > 1
            else outcomes[rank].reason,
            step=step,
        )

    if code == DONE:
        return Outcome(kind="done", code=DONE, reason="done", step=step)
    # All processes save together, so one that tells of a save speaks for all.
    known = first("saved") or first("crashed") or first("failed")
    if known:
        return known
    return Outcome(
        kind="crashed",
        code=code,
        reason=last_words or f"srun ended with {code} and no process could say why",
        step=step,
    )


def last_words(folder: Path, job: str) -> str:
    """The last line that the newest start of a job has printed for people; "" if it printed none."""
    try:
        with (folder / f"{job}_0_log.out").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if _START_LINE.match(line):
            return ""
        if line.strip() and not line.startswith(_OTHERS_WORDS):
            return printable(line.strip().removeprefix("peerlearn: "))
    return ""


def decide(
    outcome: Outcome,
    earlier: list[dict[str, Any]],
    *,
    max_crashes: int,
    makes_steps: bool = True,
    nodes: str = "",
) -> tuple[Decision, str]:
    """Decide what to do after a start.

    Args:
        outcome: outcome of the start.
        earlier: starts before it, as `read_history` returns them.
        max_crashes: largest number of crashes after which the job is started again.
        makes_steps: whether the command makes steps; only then must a start make progress.
        nodes: nodes of the start, in Slurm's form.

    Returns:
        The decision, and its reason in one line.
    """
    if outcome.kind == "done":
        return "done", outcome.reason
    if outcome.kind == "failed":
        return "failed", outcome.reason
    stalled = 1 + _trailing(earlier, step=outcome.step)
    if makes_steps and stalled > max_crashes + 1:
        return (
            "failed",
            f"{stalled} starts in a row came no further than {_step(outcome.step)}: {outcome.reason}",
        )
    if outcome.kind == "saved":
        return "requeue", outcome.reason
    crashes = [line for line in earlier if line["kind"] == "crashed"]
    if crashes and _is_repeated(crashes[-1], outcome, nodes):
        return "failed", f"crashed twice in {_step(outcome.step)}: {outcome.reason}"
    if len(crashes) >= max_crashes:
        return (
            "failed",
            f"crashed {len(crashes) + 1} times, max_crashes is {max_crashes}: {outcome.reason}",
        )
    return "requeue", outcome.reason


def _is_repeated(before: dict[str, Any], outcome: Outcome, nodes: str) -> bool:
    """Whether a crash is the one before over again, which a further start would only repeat.

    A start-up is the command's own fault if it crashes alike on other nodes; alike on the same, it may be the node's.
    """
    if before["step"] != outcome.step:
        return False
    if outcome.step is not None:
        return True
    alike = _without_numbers(str(before.get("cause", ""))) == _without_numbers(outcome.reason)
    return alike and before.get("nodes") != nodes


def _without_numbers(cause: str) -> str:
    """A cause without what differs from start to start: numbers of processes and ports, and names of hosts."""
    return re.sub(r" on \S+|\d+", "", cause)


def _trailing(earlier: list[dict[str, Any]], *, step: int | None) -> int:
    """How many starts in a row, directly before this one, ended at the same step."""
    count = 0
    for line in reversed(earlier):
        if line["step"] != step:
            break
        count += 1
    return count


def _step(step: int | None) -> str:
    return "start-up" if step is None else f"step {step}"


def wait_for_jobs(submission: Submission, jobs: Sequence[str]) -> int:
    """Wait for all jobs, also while Slurm does not answer, and print how each ended.

    Returns:
        0 if all are done, 75 if some are saved and to be resumed, else 1.
    """
    executor = submission.config.executor
    waiting = {job: {"job": job, "executor": executor, **_identity(job, executor)} for job in jobs}
    codes: list[int] = []
    said: dict[str, str] = {}
    missing = MissingJobs()
    watch = JobWatch()
    while waiting:
        states = watch.states(waiting.values())
        for job, record in list(waiting.items()):
            state = states.get(job_key(record))
            if state is not None and state.live and said.get(job) != state.text:
                print(f"job {job}: {state.text}", flush=True)
                said[job] = state.text
            over = state is None or not state.live
            if executor == "slurm":
                over = missing.has_ended(job, state, decided=is_decided(submission.folder, job))
            if not over:
                continue
            del waiting[job]
            outcome = outcome_of(submission, jobs.index(job), state)
            print(f"job {job}: {outcome.kind} ({outcome.reason})", flush=True)
            codes.append({"done": DONE, "saved": SAVED_RUN_AGAIN}.get(outcome.kind, FAILURE))
        if waiting:
            time.sleep(_POLL_SECONDS)
    return max(codes, key=lambda code: (code == FAILURE, code))


class MissingJobs:
    """Tells jobs that have ended from those that Slurm does not know for a while, by this process's own clock."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def has_ended(self, job: str, state: JobState | None, *, decided: bool) -> bool:
        """Note the answer about a job of Slurm, and tell whether the job has ended for good.

        Args:
            job: number of the job.
            state: state of the job; None if Slurm does not know the job.
            decided: whether the job has left the decision that it is not started again (`is_decided`).
        """
        if state == NOT_ASKED or (state is not None and state.live):
            self._since.pop(job, None)
            return False
        if decided or (state is not None and state.ended):
            return True
        since = self._since.setdefault(job, time.monotonic())
        return time.monotonic() - since >= SETTLED_SECONDS


def is_decided(folder: Path, job: str) -> bool:
    """Whether a job of the submission in ``folder`` has left the decision that it is not started again."""
    try:
        history = read_history(folder, job_numbers(folder).index(job))
    except (OSError, ValueError):
        return False
    return bool(history) and history[-1]["decision"] != "requeue"


def _identity(job: str, executor: str) -> dict[str, Any]:
    return local_identity(int(job)) if executor == "local" else {}


def outcome_of(submission: Submission, task: int, state: JobState | None) -> Outcome:
    """The outcome of a job that has ended: from the files it left, else from Slurm's word for its state.

    Args:
        submission: submission of the job.
        task: number of the command in the submission.
        state: state of the job; None if Slurm does not know the job.
    """
    if submission.config.executor == "slurm":
        history = read_history(submission.folder, task)
        last = history[-1] if history else None
        if last and last["decision"] != "requeue":
            kind: Kind = "done" if last["decision"] == "done" else "failed"
            return Outcome(kind=kind, code=DONE, reason=last["reason"], step=last["step"])
        return Outcome(kind="failed", code=FAILURE, reason=_word(submission, task, state))
    found = read_outcomes(submission.folder, task=task, restart=0)
    processes = submission.config.tasks_per_node
    done = len(found) == processes and not any(outcome.code for outcome in found.values())
    whole = whole_outcome(found, code=DONE if done else FAILURE, processes=processes)
    return checked(whole, submission, task)


def checked(outcome: Outcome, submission: Submission, task: int) -> Outcome:
    """The outcome, unless it claims that a training is done which is not: the run itself says when it is."""
    run = submission.trained_run(task)
    if outcome.kind != "done" or run is None or run.done:
        return outcome
    standing = read_standing(run.logs(run.newest_attempt()))
    total = f" of {standing.total_steps}" if standing and standing.total_steps else ""
    where = "before its first step" if outcome.step is None else f"at step {outcome.step}{total}"
    return replace(
        outcome, kind="crashed", code=FAILURE, reason=f"it exited with 0 {where}, and is not done"
    )


def _word(submission: Submission, task: int, state: JobState | None) -> str:
    """Slurm's word for the state of a job that has left no decision, and the job's own last words."""
    word = state.text if state else "Slurm does not know it, and it left no outcome"
    with contextlib.suppress(OSError, ValueError, LookupError):
        if said := last_words(submission.folder, job_numbers(submission.folder)[task]):
            return f"{word}: {said}"
    return word
