"""Staying until jobs have ended."""

import time
from collections.abc import Sequence
from typing import Any

from peerlearn.cli import SAVED_RUN_AGAIN
from slurm.jobs import job_key, states_of
from slurm.outcome import Kind, Outcome, read_history, read_outcomes, whole_outcome
from slurm.submission import Submission, local_identity

_POLL_SECONDS = 2.0


def wait_for_jobs(submission: Submission, jobs: Sequence[str]) -> int:
    """Wait for all of them, and say how each ended.

    Returns:
        0 if all have done what they were to do, 75 if some are saved and to be resumed, else 1.
    """
    executor = submission.config.executor
    waiting = {job: {"job": job, "executor": executor, **_identity(job, executor)} for job in jobs}
    codes: list[int] = []
    said: dict[str, str] = {}
    while waiting:
        states = states_of(waiting.values())
        for job, record in list(waiting.items()):
            state = states.get(job_key(record))
            if state is not None and state.live:
                if said.get(job) != state.text:
                    print(f"job {job}: {state.text}", flush=True)
                said[job] = state.text
                continue
            del waiting[job]
            outcome = outcome_of(submission, jobs.index(job), state.state if state else "gone")
            print(f"job {job}: {outcome.kind} ({outcome.reason})", flush=True)
            codes.append({"done": 0, "saved": SAVED_RUN_AGAIN}.get(outcome.kind, 1))
        if waiting:
            time.sleep(_POLL_SECONDS)
    return max(codes, key=lambda code: (code == 1, code))


def _identity(job: str, executor: str) -> dict[str, Any]:
    return local_identity(int(job)) if executor == "local" else {}


def outcome_of(submission: Submission, task: int, state: str) -> Outcome:
    """How a job that is no more has ended, by what it left; else by Slurm's word."""
    if submission.config.executor == "slurm":
        history = read_history(submission.folder, task)
        last = history[-1] if history else None
        if last and last["decision"] != "requeue":
            kind: Kind = "done" if last["decision"] == "done" else "failed"
            return Outcome(kind=kind, code=0, reason=last["reason"], step=last["step"])
        return Outcome(kind="failed", code=1, reason=state)
    found = read_outcomes(submission.folder, task=task, restart=0)
    processes = submission.config.tasks_per_node
    done = len(found) == processes and not any(outcome.code for outcome in found.values())
    return whole_outcome(found, code=0 if done else 1, processes=processes)
