"""What of a study is done, goes on, is due or has failed: from the files of its runs, and from Slurm's list of jobs."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peerlearn.errors import UserError
from peerlearn.evaluation.results import read_result
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.lock import living_owner, look_at_owner
from peerlearn.runs.step_folders import best_step, latest_step, step_folder
from slurm.client import OwnJob
from slurm.jobs import Record, records_of, states_of
from slurm.submission import TRAINING_VERBS
from studies.evaluations import (
    Evaluation,
    Order,
    Outcome,
    Problem,
    forget_outcome,
    job_name,
    order_folder,
    orders,
    read_outcome,
    read_outcomes,
)

Training = Literal["none", "live", "done", "failed", "dead"]
Standing = Literal["due", "live", "done", "failed"]
_LOCK_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Runs, and the evaluations of their exports.

    Attributes:
        root: folder of the study, or the run that is watched alone.
        runs: folders of the runs.
        evaluations: evaluations of each export.
        exports: exports to evaluate: last, all, or an interval in epochs.
        keep: what stays of a run once it is evaluated: all, last or results.
    """

    root: Path
    runs: list[Path]
    evaluations: list[Evaluation]
    exports: str | int = "last"
    keep: str = "all"


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The jobs of this account that wait or run in Slurm; none where Slurm is not asked.

    Attributes:
        names: names of the jobs.
        numbers: numbers of the jobs, 12_3 and 15 for the third of an array.
    """

    names: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, jobs: Sequence[OwnJob]) -> "Jobs":
        """The names and numbers of Slurm's list."""
        return cls(
            names=frozenset(job.name for job in jobs),
            numbers=frozenset(number for job in jobs for number in (job.number, job.own_number)),
        )


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """An evaluation of an export that has landed, and how it stands.

    Attributes:
        run: folder of the run.
        order: what is measured.
        standing: due, live (a job waits or runs, or a process measures), done or failed.
        outcome: how it ended; None unless it is done or has failed.
    """

    run: Path
    order: Order
    standing: Standing
    outcome: Outcome | None

    @property
    def folder(self) -> Path:
        return order_folder(self.run, self.order)

    @property
    def title(self) -> str:
        """The evaluation in words: ``base-seed-0, step 400: knn --k 20``."""
        return f"{self.run.name}, step {self.order.step}: {self.order.line}"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the work has found.

    Attributes:
        training: state of each run's training, by its folder.
        ordered: evaluations of the exports that have landed.
        troubles: why the exports of a run cannot be told, by its folder.
    """

    training: dict[Path, Training]
    ordered: list[Ordered] = field(default_factory=list)
    troubles: dict[Path, str] = field(default_factory=dict)

    def with_standing(self, standing: Standing) -> list[Ordered]:
        """The evaluations that stand so."""
        return [each for each in self.ordered if each.standing == standing]

    @property
    def goes_on(self) -> bool:
        """Whether a run goes on, or an evaluation waits or goes on."""
        return bool(self.with_standing("live")) or "live" in self.training.values()

    @property
    def finished(self) -> bool:
        """Whether nothing goes on, and no evaluation is due."""
        return not self.goes_on and not self.with_standing("due")

    def is_over(self, run: Path) -> bool:
        """Whether nothing is to come of a run: it has ended, and so has every evaluation of it."""
        own = {each.standing for each in self.ordered if each.run == run}
        return self.training[run] in ("done", "failed") and not own & {"due", "live"}

    def is_measured(self, run: Path) -> bool:
        """Whether a run is done and every evaluation of it has its results."""
        own = [each for each in self.ordered if each.run == run]
        whole = all(each.standing == "done" and not _shortcoming(each) for each in own)
        return self.training[run] == "done" and whole


def look(work: Work, jobs: Jobs) -> Look:
    """Look at the files of all runs once."""
    for run in work.runs:
        look_at_owner(run)
    found = Look(training={run: training_of(run, jobs) for run in work.runs})
    for run in work.runs:
        try:
            due = orders(run, work.evaluations, work.exports, live=found.training[run] == "live")
        except UserError as error:
            found.troubles[run] = str(error)
            continue
        found.ordered.extend(_ordered(run, order, jobs) for order in due)
    return found


def _ordered(run: Path, order: Order, jobs: Jobs) -> Ordered:
    folder = order_folder(run, order)
    outcome = read_outcome(folder)
    standing: Standing = "due"
    if outcome is not None:
        standing = outcome.kind
    elif job_name(run, order) in jobs.names or (folder.is_dir() and living_owner(folder)):
        standing = "live"
    return Ordered(run=run, order=order, standing=standing, outcome=outcome)


def training_of(run: Path, jobs: Jobs) -> Training:
    """The state of a run's training: not begun, live, done, failed (it says so), or stopped before it was done."""
    newest = newest_training(run)
    if newest and newest["executor"] == "slurm" and newest["job"] in jobs.numbers:
        return "live"
    if newest and newest["executor"] == "local" and states_of([newest]):
        return "live"
    if RunDirectory(run).done:
        return "done"
    owner = living_owner(run)
    if owner and (not jobs.numbers or not owner.get("job") or owner["job"] in jobs.numbers):
        return "live"
    if RunDirectory(run).failed_mark.exists():
        return "failed"
    return "dead" if newest or RunDirectory(run).begun else "none"


def newest_training(run: Path) -> Record | None:
    """The record of the newest job that trains the run: no other one can be live."""
    records = [record for record in records_of(run) if record["verb"] in TRAINING_VERBS]
    return records[-1] if records else None


def problems(work: Work, found: Look) -> list[Problem]:
    """What is missing, and why."""
    listed = []
    for run in work.runs:
        why = {"none": "it has not begun", "live": "it is not done yet"}.get(found.training[run])
        if found.training[run] in ("dead", "failed"):
            why = failure_of(run)
        if why:
            listed.append(Problem(run=run.name, what="pretraining", why=why))
        if run in found.troubles:
            listed.append(Problem(run=run.name, what="exports", why=found.troubles[run]))
        ordered = [each for each in found.ordered if each.run == run]
        for each in ordered:
            if why := _shortcoming(each):
                what = f"{each.order.line}, step {each.order.step}"
                listed.append(Problem(run=run.name, what=what, why=why))
        if found.training[run] == "done":
            known = {each.order.line for each in ordered} | {o.line for o in read_outcomes(run)}
            listed += [
                Problem(run=run.name, what=each.line, why="it has no whole export to evaluate")
                for each in work.evaluations
                if each.line not in known
            ]
    return listed


def _shortcoming(each: Ordered) -> str:
    """The reason why an evaluation has no whole result; "" if it has one."""
    if each.standing == "due":
        return "it has not begun"
    if each.standing == "live":
        return "it waits or goes on"
    assert each.outcome is not None
    if each.standing == "failed":
        return each.outcome.reason
    for name, file in zip(each.outcome.results, each.outcome.files(each.run), strict=True):
        try:
            read_result(file)
        except FileNotFoundError:
            return f"its result {name} is gone"
        except (OSError, ValueError, TypeError):
            return f"{name} is damaged: restore or remove it"
    return ""


def failure_of(run: Path) -> str:
    """The reason why a stopped run is not done, as far as its files tell."""
    with contextlib.suppress(OSError):
        if lines := RunDirectory(run).failed_mark.read_text(errors="replace").split("\n"):
            return " ".join(line.strip() for line in lines if line.strip())
    stopped = [e for e in RunDirectory(run).events() if e["event"] in ("started", "stopped")]
    if stopped and stopped[-1]["event"] == "stopped":
        return f"it was stopped at step {stopped[-1].get('step')}"
    return "it ended without a word" if stopped else "it never began"


def to_train(training: Training, *, again: bool) -> bool:
    """Whether a training is to be started or continued; one that has failed only if it is tried again."""
    return training in ("none", "dead") or (again and training == "failed")


def ask_again(found: Look) -> None:
    """Forget the evaluations that have failed or whose results are gone, so that they are due."""
    for each in found.ordered:
        if each.standing in ("done", "failed") and _shortcoming(each):
            forget_outcome(each.folder)


def drop_bulk(work: Work, found: Look) -> None:
    """Remove the saves and exports that the study does not keep, of the runs that are measured."""
    for run in work.runs if work.keep != "all" else ():
        directory = RunDirectory(run)
        if not found.is_measured(run) or (work.evaluations and not read_outcomes(run)):
            continue
        shutil.rmtree(directory.checkpoints, ignore_errors=True)
        stays = [latest_step(directory.exports), best_step(directory.exports)]
        names = [step_folder(step) for step in stays if step is not None]
        for folder in directory.exports.glob("step-*"):
            if work.keep == "results" or folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
