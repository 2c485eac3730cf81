"""The end of a batch script: after a start of a job, requeue the job or end it.

`python -P -m slurm.requeue FOLDER TASK CODE` runs on the job's first node; CODE is srun's exit code.
"""

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from peerlearn.errors import FAILURE, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import read_step
from peerlearn.runs.lock import run_lock
from slurm.client import NoAnswerError, call, job_states
from slurm.outcome import (
    UNWRITTEN_CODES,
    Outcome,
    add_to_history,
    checked,
    decide,
    last_words,
    read_history,
    read_outcomes,
    whole_outcome,
)
from slurm.submission import Submission, submission_to_run

# SLURM kills the batch script of a requeued job. This is the longest time that it may take.
_REQUEUE_SECONDS = 300.0
# How long an absent controller is waited for: without it no other job can have this one's nodes either.
_PATIENCE_SECONDS = 3600.0


def main(folder: str, task: str, code: str) -> int:
    """Decide on the job and act.

    Returns:
        The exit code of the batch script, if the job is not requeued.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return after(submission_to_run(Path(folder)), int(task), int(code), restart=restart)


def after(submission: Submission, task: int, code: int, *, restart: int) -> int:
    """Decide on the job, record the decision, and act.

    Returns:
        The exit code of the batch script, if the job is not requeued.
    """
    run = submission.trained_run(task)
    attempt = run.newest_attempt() if run else 0
    history = read_history(submission.folder, task)
    job, nodes = _job(), os.environ.get("SLURM_JOB_NODELIST", "")
    outcome = checked(_outcome(submission, task, code, restart, job), submission, task)
    # A start that has made a step has cleared an older DONE.
    ended = run is not None and outcome.step is not None and run.done
    if run and outcome.step is None and attempt > (history[-1]["attempt"] if history else 0):
        # If all processes were killed, the run's own files tell the last step.
        outcome = replace(outcome, step=read_step(run.logs(attempt)))
    decision, reason = decide(
        outcome,
        history,
        max_crashes=submission.config.max_crashes,
        makes_steps=submission.tasks[task].words[0] != "watch",
        nodes=nodes,
    )
    if ended and decision == "requeue":
        decision, reason, code = "done", "the run had ended when its process was told to stop", 0
    if outcome.kind != "done" and decision != "done":
        code = code or FAILURE

    def note() -> None:
        add_to_history(
            submission.folder,
            task,
            outcome,
            job=job,
            restart=restart,
            decision=decision,
            reason=reason,
            attempt=attempt,
            nodes=nodes,
        )

    try:
        note()
    except OSError as error:
        # Without a record of its starts a job could be repeated for ever.
        decision, reason = "failed", f"{reason}; {submission.folder}: {error.strerror}"
    print(f"job {job}, start {restart}: {outcome.kind}, {decision} ({reason})", flush=True)
    if decision == "requeue" and (refusal := _requeue(job, run, outcome)):
        decision, reason = "failed", f"{reason}; could not be requeued: {refusal}"
        print(f"job {job}: {reason}", flush=True)
        with contextlib.suppress(OSError):
            note()
    if decision == "failed" and run:
        _mark_failed(run, job, reason)
    return code


def _outcome(submission: Submission, task: int, code: int, restart: int, job: str) -> Outcome:
    outcomes = read_outcomes(submission.folder, task=task, restart=restart)
    if not outcomes and code == 128 + signal.SIGUSR2:
        return Outcome(kind="saved", code=code, reason="told to stop while starting")
    for kind, told in UNWRITTEN_CODES.items():
        if not outcomes and code == told != 0:
            return Outcome(
                kind=kind, code=code, reason="its log says why: no file could be written"
            )
    processes = submission.config.nodes * submission.config.tasks_per_node
    said = last_words(submission.folder, job)
    return whole_outcome(outcomes, code=code, processes=processes, last_words=said)


def _mark_failed(run: RunDirectory, job: str, reason: str) -> None:
    """Write FAILED with the reason into the run, if the run fails with this job.

    A folder without config.yaml is no run yet, and a file in it would keep the run from starting. A run that another
    process holds or has finished does not fail because this job was refused.
    """
    if not run.config.exists():
        return
    with contextlib.suppress(UserError, OSError), run_lock(run.root):
        if not run.done:
            run.event("job_failed", job=job, reason=reason)
            run.mark_failed(reason)


def _requeue(job: str, run: RunDirectory | None, outcome: Outcome) -> str | None:
    """Ask for a requeue until Slurm ends this script.

    Returns:
        Why the job is not requeued, if Slurm refuses it; None if Slurm did not come to it, or could not be asked.
    """
    if run and run.config.exists():
        run.event("requeued", job=job, reason=outcome.reason, step=outcome.step)
    end = time.monotonic() + _PATIENCE_SECONDS
    try:
        while True:
            left = end - time.monotonic()
            refusal = _ask_for_requeue(job, left)
            if refusal and _goes_on(job, left):
                return refusal
            # Asked for now, or before: a question without an answer may have been heard all the same.
            time.sleep(_REQUEUE_SECONDS)
            if time.monotonic() > end:
                return None
    except NoAnswerError as error:
        print(f"job {job}: whether it is requeued is unknown: {error}", flush=True)
        return None


def _ask_for_requeue(job: str, patience_seconds: float) -> str | None:
    """Ask Slurm to requeue the job. Returns the reason of a refusal."""
    try:
        call("scontrol", "requeue", job, patience_seconds=patience_seconds)
    except NoAnswerError:
        raise
    except UserError as error:
        return str(error)
    return None


def _goes_on(job: str, patience_seconds: float) -> bool:
    """Whether Slurm takes the job for running: then it neither starts again nor ends by its user's will."""
    try:
        state = job_states([job], patience_seconds=patience_seconds).get(job)
    except NoAnswerError:
        raise
    except UserError:
        return False  # Nothing is known.
    return state is not None and state.state == "RUNNING"


def _job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"peerlearn: {error}")
