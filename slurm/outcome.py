"""How a start of a job ended, as each of its processes saw it; and what is to be made of it.

FOLDER/outcomes/TASK-RESTART-RANK.json    {"kind", "code", "reason", "step"}
FOLDER/outcomes-TASK.jsonl                one line for each start, with the decision
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line, read_json_lines, write_text
from slurm.jobs import job_key, states_of
from slurm.submission import OUTCOMES_FOLDER, Submission, local_identity

_POLL_SECONDS = 2.0
# done; saved, and to go on; crashed, which another start may not do; failed, by what the user must mend.
Kind = Literal["done", "saved", "crashed", "failed"]
Decision = Literal["done", "requeue", "failed"]
# How a process exits that cannot write its outcome; 78 is sysexits' word for what the user must mend.
UNWRITTEN_CODES: dict[Kind, int] = {"done": DONE, "saved": SAVED_RUN_AGAIN, "failed": 78}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One process's end, or that of a whole start.

    Attributes:
        kind: done, saved, crashed or failed.
        code: the command's exit code, negative for the signal it died of.
        reason: one line for people.
        step: how far the run had come; None if no step began.
    """

    kind: Kind
    code: int
    reason: str
    step: int | None = None


def write_outcome(folder: Path, *, task: int, restart: int, rank: int, outcome: Outcome) -> None:
    """Leave it for the end of the batch script."""
    file = folder / OUTCOMES_FOLDER / f"{task}-{restart}-{rank}.json"
    write_text(file, json.dumps(asdict(outcome)) + "\n")


def read_outcomes(folder: Path, *, task: int, restart: int) -> dict[int, Outcome]:
    """What the processes of one start have left, by rank."""
    found = {}
    for file in (folder / OUTCOMES_FOLDER).glob(f"{task}-{restart}-*.json"):
        found[int(file.stem.rsplit("-", 1)[1])] = Outcome(**json.loads(file.read_text()))
    return found


def read_history(folder: Path, task: int) -> list[dict[str, Any]]:
    """The starts of a task so far, oldest first; a line cut short by a full disk is left out."""
    return list(read_json_lines(folder / f"outcomes-{task}.jsonl"))


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
) -> None:
    """Write a start down, with what was made of it; ``attempt`` is the run's newest."""
    line = {
        "time": now_text(),
        "job": job,
        "restart": restart,
        "attempt": attempt,
        "kind": outcome.kind,
        "step": outcome.step,
        "reason": reason,
        "decision": decision,
    }
    append_json_line(folder / f"outcomes-{task}.jsonl", line)


def whole_outcome(outcomes: dict[int, Outcome], *, code: int, processes: int) -> Outcome:
    """Of all processes together.

    Args:
        outcomes: of those that could leave one.
        code: srun's.
        processes: how many there were.
    """
    steps = [outcome.step for outcome in outcomes.values() if outcome.step is not None]
    step = max(steps, default=None)

    def first(kind: Kind) -> Outcome | None:
        ranks = sorted(rank for rank, outcome in outcomes.items() if outcome.kind == kind)
        # The one that died by itself says more than those that lost it.
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
    # A save is one of all processes: whoever tells of it speaks for all.
    known = first("saved") or first("crashed") or first("failed")
    if known:
        return known
    return Outcome(
        kind="crashed",
        code=code,
        reason=f"srun ended with {code} and no process could say why",
        step=step,
    )


def decide(
    outcome: Outcome, earlier: list[dict[str, Any]], *, max_crashes: int, makes_steps: bool = True
) -> tuple[Decision, str]:
    """What to do after a start that ended so.

    Args:
        outcome: of the start.
        earlier: the starts before it, as `read_history` gives them.
        max_crashes: a job that crashes oftener is not started again.
        makes_steps: of a command that does not, no progress is asked.

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
    if crashes and crashes[-1]["step"] == outcome.step:
        return "failed", f"crashed twice in {_step(outcome.step)}: {outcome.reason}"
    if len(crashes) >= max_crashes:
        return (
            "failed",
            f"crashed {len(crashes) + 1} times, max_crashes is {max_crashes}: {outcome.reason}",
        )
    return "requeue", outcome.reason


def _trailing(earlier: list[dict[str, Any]], *, step: int | None) -> int:
    """How many starts just before came exactly so far."""
    count = 0
    for line in reversed(earlier):
        if line["step"] != step:
            break
        count += 1
    return count


def _step(step: int | None) -> str:
    return "start-up" if step is None else f"step {step}"


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
            codes.append({"done": DONE, "saved": SAVED_RUN_AGAIN}.get(outcome.kind, FAILURE))
        if waiting:
            time.sleep(_POLL_SECONDS)
    return max(codes, key=lambda code: (code == FAILURE, code))


def _identity(job: str, executor: str) -> dict[str, Any]:
    return local_identity(int(job)) if executor == "local" else {}


def outcome_of(submission: Submission, task: int, state: str) -> Outcome:
    """How a job that is no more has ended, by what it left; else by Slurm's word."""
    if submission.config.executor == "slurm":
        history = read_history(submission.folder, task)
        last = history[-1] if history else None
        if last and last["decision"] != "requeue":
            kind: Kind = "done" if last["decision"] == "done" else "failed"
            return Outcome(kind=kind, code=DONE, reason=last["reason"], step=last["step"])
        return Outcome(kind="failed", code=FAILURE, reason=state)
    found = read_outcomes(submission.folder, task=task, restart=0)
    processes = submission.config.tasks_per_node
    done = len(found) == processes and not any(outcome.code for outcome in found.values())
    return whole_outcome(found, code=DONE if done else FAILURE, processes=processes)
