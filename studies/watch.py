"""Watching runs: each evaluation is submitted once for each new export, and the ends of jobs are recorded."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from peerlearn.commands.verbs import VERBS
from peerlearn.config import nearest
from peerlearn.errors import UsageError, UserError
from peerlearn.evaluation.results import read_result
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.lock import living_owner
from peerlearn.runs.stop import Stop
from slurm.client import JobState
from slurm.config import SubmitConfig
from slurm.jobs import JobKey, Record, job_key, states_of
from slurm.outcome import outcome_of
from slurm.plan import plan_tasks
from slurm.submission import TRAINING_VERBS, Task, jobs_of, read_submission
from studies.landed import Export, Training, landed_exports
from studies.ledger import EVALUATIONS, Entry, Ledger, Order, hand_over

_NO_EVALUATION = ("pretrain", "resume", "pipeline")
_PLACEHOLDER = "RUN/export/step-N"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation of every export.

    Attributes:
        line: verb and words, as the user wrote them.
        config: resolved config, without its checkpoint.
    """

    line: str
    config: dict[str, Any]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The states of jobs at one moment.

    Attributes:
        asked: keys of the jobs that were asked about.
        states: states of those jobs that are still known.
    """

    asked: frozenset[JobKey] = frozenset()
    states: dict[JobKey, JobState] = field(default_factory=dict)

    def live(self, job: JobKey) -> bool:
        """Whether a job runs or waits. A job that was not asked about counts as live."""
        state = self.states.get(job)
        return job not in self.asked or (state is not None and state.live)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Runs, and the evaluations of their exports.

    Attributes:
        runs: folders of the runs.
        evaluations: evaluations of each export.
        cluster: profile of the evaluation jobs.
        every_epochs: interval of the evaluated exports in epochs; the last is always evaluated; None = all are.
        throttle: largest number of evaluations at once, over all runs; None = no limit.
    """

    runs: list[Path]
    evaluations: list[Evaluation]
    cluster: SubmitConfig
    every_epochs: int | None = None
    throttle: int | None = None


@dataclass
class Pass:
    """The result of one look at everything.

    Attributes:
        finished: whether no export is to come and nothing is left to submit.
        training: whether a run goes on.
        live: jobs of evaluations that run or wait.
        troubles: errors of what could not be done and will be tried again.
    """

    finished: bool = True
    training: bool = False
    live: list[str] = field(default_factory=list)
    troubles: list[UserError] = field(default_factory=list)


def resolve_evaluation(line: str) -> Evaluation:
    """Check a command line and resolve its config.

    Raises:
        UsageError: the verb or a key is unknown, or the verb evaluates nothing.
    """
    words = shlex.split(line)
    verb = words[0] if words else ""
    if verb not in VERBS:
        raise UsageError(f"evaluate: {line!r}: unknown verb {verb!r}{nearest(verb, VERBS)}")
    no_evaluation = UsageError(f"evaluate: {line!r}: {verb} is no evaluation of a checkpoint")
    if not VERBS[verb].dry_run or verb in _NO_EVALUATION:
        raise no_evaluation
    try:
        _, tasks = plan_tasks([*words, "--checkpoint", _PLACEHOLDER], [], to_come=True)
    except UserError as error:
        raise UsageError(f"evaluate: {line!r}: {error}") from error
    config = yaml.safe_load(tasks[0].config_yaml or "")
    if not isinstance(config, dict) or config.get("checkpoint") != _PLACEHOLDER:
        raise no_evaluation
    return Evaluation(line=line, config=config)


def evaluations_of(run: Path) -> Ledger:
    """The ledger of a run's evaluations."""
    return Ledger(run / EVALUATIONS)


def key_of(export: Export, evaluation: Evaluation) -> str:
    """The key of an evaluation that is to be done once: the step, the weights and the command line."""
    content = f"{export.step} {export.sha256} {evaluation.line}"
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def wanted(run: Path, watched: Watched, survey: Survey) -> dict[str, tuple[Export, Evaluation]]:
    """The exports of a run so far with their evaluations, by key."""
    exports = landed_exports(
        run, training=training_of(run, survey), every_epochs=watched.every_epochs
    )
    return {
        key_of(export, evaluation): (export, evaluation)
        for export in exports
        for evaluation in watched.evaluations
    }


def is_open(entry: Entry | None) -> bool:
    """Whether a job is to be submitted, or it is not yet known whether one was."""
    return entry is None or entry.in_doubt or entry.due


def survey_jobs(runs: Sequence[Path], ledgers: Sequence[Ledger]) -> Survey:
    """Ask for the states of the jobs that train the runs, and of the ledgers' jobs that may not have ended.

    Raises:
        UserError: Slurm does not answer.
    """
    records = training_jobs(runs)
    for ledger in ledgers:
        open_entries = (e for e in ledger.entries().values() if e.kind is None)
        records += [entry.job for entry in open_entries if entry.job]
    return Survey(asked=frozenset(map(job_key, records)), states=states_of(records))


def training_jobs(runs: Sequence[Path]) -> list[Record]:
    """The records of the jobs that train the runs."""
    return [record for run in runs if (record := _training_job(run))]


def _training_job(run: Path) -> Record | None:
    """The newest job that trains the run. No other can be live."""
    return next((r for r in reversed(list(jobs_of(run))) if r["verb"] in TRAINING_VERBS), None)


def training_of(run: Path, survey: Survey) -> Training:
    """The state of a run's training: not begun, live, done, or stopped before it was done."""
    record = _training_job(run)
    if record and survey.live(job_key(record)):
        return "live"
    if RunDirectory(run).done:
        return "done"
    if _owner_lives(run, survey):
        return "live"
    return "dead" if record or RunDirectory(run).begun else "none"


def _owner_lives(run: Path, survey: Survey) -> bool:
    """Whether a process trains the run, in a job or not."""
    owner = living_owner(run)
    if owner is None:
        return False
    job = ("slurm", str(owner.get("job")), None)
    # The process may not be visible from this machine. Its last beat counts for a minute.
    return job not in survey.asked or survey.live(job)


def settle(ledger: Ledger, survey: Survey) -> None:
    """Record the ends of the jobs that have ended.

    Raises:
        UserError: the ledger cannot be written.
    """
    if not any(_has_ended(entry, survey) for entry in ledger.entries().values()):
        return
    with ledger.locked():
        for entry in ledger.entries().values():
            if not _has_ended(entry, survey):
                continue
            kind, reason = _end(entry, survey)
            ledger.add(
                "ended",
                entry.key,
                attempt=entry.attempt,
                kind=kind,
                reason=reason,
                results=[ledger.relative(path) for path in _results(entry, ledger.base)],
            )


def _has_ended(entry: Entry, survey: Survey) -> bool:
    return (
        entry.kind is None
        and entry.job is not None
        and job_key(entry.job) in survey.asked
        and not survey.live(job_key(entry.job))
    )


def _end(entry: Entry, survey: Survey) -> tuple[str, str]:
    assert entry.job is not None
    state = survey.states.get(job_key(entry.job))
    try:
        outcome = outcome_of(read_submission(entry.folder), 0, state.state if state else "gone")
    except (OSError, ValueError, LookupError, TypeError):
        return "failed", f"{entry.folder} does not tell how it ended"
    return outcome.kind, outcome.reason


def _results(entry: Entry, run: Path) -> list[Path]:
    """The result files that the entry's job wrote: they name it."""
    if "step" not in entry.facts:
        return []
    folder = Path(entry.facts.get("results") or RunDirectory(run).results)
    found = []
    for path in sorted(folder.glob(f"*-{entry.facts['step']:08d}-*.json")):
        try:
            if read_result(path).get("job") == entry.name:
                found.append(path)
        except (OSError, ValueError, TypeError):
            continue
    return found


def evaluate_landed(watched: Watched, survey: Survey, stop: Stop) -> Pass:
    """Submit the missing evaluations of the runs' exports, and print a line for each job."""
    result = Pass()
    ledgers = {run: evaluations_of(run) for run in watched.runs}
    for run, ledger in ledgers.items():
        result.live += live_jobs_of(ledger, survey)
        # Before the look at the exports: if a run has ended by now, all its exports are there.
        result.training = result.training or training_of(run, survey) == "live"
    result.finished = not result.training
    for run, ledger in ledgers.items():
        try:
            _evaluate_run(run, ledger, watched, survey, stop, result)
        except UserError as error:
            result.finished = False
            result.troubles.append(error)
    return result


def live_jobs_of(ledger: Ledger, survey: Survey) -> list[str]:
    """The ledger's jobs that run or wait."""
    jobs = [entry.job for entry in ledger.entries().values() if entry.job and entry.kind is None]
    return [job["job"] for job in jobs if survey.live(job_key(job))]


def _evaluate_run(
    run: Path, ledger: Ledger, watched: Watched, survey: Survey, stop: Stop, result: Pass
) -> None:
    entries = ledger.entries()
    for key, (export, evaluation) in wanted(run, watched, survey).items():
        if not is_open(entries.get(key)):
            continue
        full = watched.throttle is not None and len(result.live) >= watched.throttle
        if full or stop.requested:
            result.finished = False
            return
        said = hand_over(ledger, _order(key, run, export, evaluation, watched.cluster))
        entry = ledger.entries().get(key)
        if entry is None or entry.job is None:
            result.finished = False
            continue
        if said:
            print(f"{said}: {evaluation.line} on {export.folder}", flush=True)
        result.live.append(entry.job["job"])


def _order(
    key: str, run: Path, export: Export, evaluation: Evaluation, cluster: SubmitConfig
) -> Order:
    config = {**evaluation.config, "checkpoint": str(export.folder)}

    def task() -> Task:
        return Task(
            words=[*evaluation.words, "--checkpoint", str(export.folder)],
            run=str(run),
            config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        )

    return Order(
        key=key,
        task=task,
        home=RunDirectory(run).jobs,
        config=replace(cluster, wait=False, sweep=[], name=None, dependency=None),
        prefix="eval",
        facts={
            "evaluation": evaluation.line,
            "step": export.step,
            "results": evaluation.config.get("results"),
        },
    )


def failure_of(run: Path) -> str:
    """The reason why a stopped run is not done, as far as its files tell."""
    try:
        return RunDirectory(run).failed_mark.read_text().strip()
    except OSError:
        pass
    stopped = [e for e in RunDirectory(run).events() if e["event"] in ("started", "stopped")]
    if stopped and stopped[-1]["event"] == "stopped":
        return f"it was stopped at step {stopped[-1].get('step')}"
    return "it ended without a word" if stopped else "it never began"


def missing_results(entry: Entry) -> list[Path]:
    """The result files that an evaluation wrote and that are gone."""
    return [path for path in entry.results if not path.is_file()]
