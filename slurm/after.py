"""The end of a batch script: after a start of a job, requeue it or leave it.

`python -P -m slurm.after FOLDER TASK CODE` on the job's first node; CODE is srun's.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from peerlearn.errors import UserError
from peerlearn.run_dir import RunDirectory, now_text
from slurm.client import call
from slurm.outcome import Outcome, decide, read_outcomes, whole_outcome
from slurm.submission import Submission, read_submission

# SLURM kills the batch script of a requeued job; this long it may take.
_REQUEUE_SECONDS = 300.0


def main(folder: str, task: str, code: str) -> int:
    """Returns the exit code of the batch script, if it is not requeued."""
    submission = read_submission(Path(folder))
    return after(
        submission, int(task), int(code), restart=int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    )


def after(submission: Submission, task: int, code: int, *, restart: int) -> int:
    """Decide and act."""
    processes = submission.config.nodes * submission.config.tasks_per_node
    found = read_outcomes(submission.folder, task=task, restart=restart)
    if not found and code == 128 + signal.SIGUSR2:
        outcome = Outcome(kind="saved", code=code, reason="told to stop while starting")
    else:
        outcome = whole_outcome(found, code=code, processes=processes)
    history = submission.folder / "outcomes.jsonl"
    lines = (
        [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
    )
    earlier = [line for line in lines if line["task"] == task]
    decision, reason = decide(outcome, earlier, max_crashes=submission.config.max_crashes)
    job = _job()
    line = {
        "time": now_text(),
        "task": task,
        "job": job,
        "restart": restart,
        "kind": outcome.kind,
        "step": outcome.step,
        "reason": reason,
        "decision": decision,
    }
    with history.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"job {job}, start {restart}: {outcome.kind}, {decision} ({reason})", flush=True)
    run = submission.tasks[task].run
    run_directory = RunDirectory(Path(submission.working_directory, run)) if run else None
    if decision == "requeue":
        try:
            _requeue(job, run_directory, outcome)
        except UserError as error:
            decision, reason = "failed", f"{reason}; could not be requeued: {error}"
    if decision == "failed" and run_directory and run_directory.root.is_dir():
        run_directory.event("job_failed", job=job, reason=reason)
        run_directory.mark_failed(reason)
    return code


def _requeue(job: str, run: RunDirectory | None, outcome: Outcome) -> None:
    if run and run.config.exists():
        run.event("requeued", job=job, reason=outcome.reason, step=outcome.step)
    call("scontrol", "requeue", job)
    time.sleep(_REQUEUE_SECONDS)


def _job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"peerlearn: {error}")
