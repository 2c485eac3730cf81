"""What a pipeline has to do next, and whether it is done: pretraining, its watch, evaluations, the summary."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from peerlearn.errors import UserError
from peerlearn.evaluation.results import JOB_VARIABLE
from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.stop import Stop
from slurm.jobs import job_key
from slurm.plan import plan_tasks
from slurm.submission import Task
from studies.ledger import Entry, Ledger, Order, hand_over
from studies.pipeline import Pipeline, PlannedRun, own_words
from studies.watch import (
    Pass,
    Survey,
    evaluate_landed,
    evaluations_of,
    is_open,
    missing_results,
    settle,
    training_of,
    wanted,
)


def advance(pipeline: Pipeline, stop: Stop) -> Pass:
    """Look at everything once, and submit what is due: pretraining, evaluations, at last the summary.

    Raises:
        UserError: Slurm does not answer, or a ledger cannot be written.
    """
    survey = pipeline.survey()
    for ledger in pipeline.ledgers():
        settle(ledger, survey)
    troubles, all_begun = _pretrain(pipeline, survey, stop)
    found = evaluate_landed(pipeline.watched, survey, stop)
    found.troubles = troubles + found.troubles
    found.finished = found.finished and all_begun and not stop.requested
    if not found.finished:
        return found
    executors = {key: profile.executor for key, profile in pipeline.clusters.items()}
    if found.live and executors["evaluation_cluster"] != "slurm":
        found.finished = False
        return found
    if executors["watch_cluster"] != "slurm":
        found.finished = not found.live
        if found.finished:
            _summarise_here(pipeline)
        return found
    try:
        found.finished = _submit_summary(pipeline, found.live)
    except UserError as error:
        found.finished = False
        found.troubles.append(error)
    return found


def _pretrain(pipeline: Pipeline, survey: Survey, stop: Stop) -> tuple[list[UserError], bool]:
    """Submit the pretraining that is due; what could not be, and whether none is left."""
    troubles: list[UserError] = []
    ledger, throttle = pipeline.ledger, pipeline.config.throttle
    running = sum(training_of(run.folder, survey) == "live" for run in pipeline.runs)
    for run in pipeline.runs:
        entry = ledger.entries().get(_key(run))
        if not is_open(entry):
            continue
        if stop.requested or (throttle is not None and running >= throttle):
            return troubles, False
        try:
            said = hand_over(ledger, _order(pipeline, run))
        except UserError as error:
            troubles.append(error)
            continue
        if said:
            print(f"{said}: {run.folder}", flush=True)
            running += 1
    entries = ledger.entries()
    return troubles, not any(is_open(entries.get(_key(run))) for run in pipeline.runs)


def _key(run: PlannedRun) -> str:
    return f"pretrain {run.folder.name}"


def _order(pipeline: Pipeline, run: PlannedRun) -> Order:
    return Order(
        key=_key(run),
        task=lambda: _pretraining_task(pipeline, run),
        home=RunDirectory(run.folder).jobs,
        config=pipeline.clusters["cluster"],
        prefix=f"pretrain-{run.folder.name}",
        facts={"variant": run.variant, "seed": run.seed},
    )


def _pretraining_task(pipeline: Pipeline, run: PlannedRun) -> Task:
    """Begin it, or go on with it."""
    if RunDirectory(run.folder).begun:
        return plan_tasks(["resume", str(run.folder)], [])[1][0]
    resolved = pipeline.root / "configs" / f"pretrain-{run.variant}.yaml"
    return plan_tasks(["pretrain", str(resolved), *own_words(run)], [])[1][0]


def submit_watch(pipeline: Pipeline) -> str | None:
    """Have the pipeline watched by a job, unless one does; the job as `studies.ledger.hand_over` names it.

    Raises:
        UserError: it is refused, or Slurm does not answer.
    """
    survey = pipeline.survey()
    order = Order(
        key="watch",
        task=lambda: Task(words=["watch", str(pipeline.root)]),
        home=pipeline.root / JOBS_FOLDER,
        config=pipeline.clusters["watch_cluster"],
        prefix="watch",
    )

    def has_ended(entry: Entry) -> bool:
        return entry.job is None or entry.kind is not None or not survey.live(job_key(entry.job))

    return hand_over(pipeline.ledger, order, due=has_ended)


def end_watch(pipeline: Pipeline) -> bool:
    """Let the watch end, unless more has been asked for since it looked; the next `submit_watch` starts another.

    Raises:
        UserError: Slurm does not answer, or the ledger cannot be written.
    """
    with pipeline.ledger.locked():
        survey = pipeline.survey()
        own_entries = pipeline.ledger.entries()
        for run in pipeline.runs:
            if is_open(own_entries.get(_key(run))) or training_of(run.folder, survey) == "live":
                return False
            entries = evaluations_of(run.folder).entries()
            if any(
                is_open(entries.get(key)) for key in wanted(run.folder, pipeline.watched, survey)
            ):
                return False
        own = own_entries.get("watch")
        if own and own.kind is None and own.name == os.environ.get(JOB_VARIABLE):
            facts = {"kind": "done", "reason": "done", "results": []}
            pipeline.ledger.add("ended", "watch", attempt=own.attempt, **facts)
    return True


def _submit_summary(pipeline: Pipeline, live: Sequence[str]) -> bool:
    """Submit the job that comes after all evaluations. Whether it is submitted."""
    evaluated = "".join(
        entry.name
        for run in pipeline.runs
        for entry in evaluations_of(run.folder).entries().values()
    )
    key = f"summary {hashlib.sha256(evaluated.encode()).hexdigest()[:12]}"
    order = Order(
        key=key,
        task=lambda: Task(words=["summary", str(pipeline.root)]),
        home=pipeline.root / JOBS_FOLDER,
        config=replace(
            pipeline.clusters["watch_cluster"],
            dependency=f"afterany:{':'.join(live)}" if live else None,
        ),
        prefix="summary",
    )

    def is_lost(entry: Entry) -> bool:
        return entry.kind is not None and not (pipeline.root / "summary.json").is_file()

    said = hand_over(pipeline.ledger, order, due=is_lost)
    if said:
        print(f"{said}: summary of {pipeline.root}", flush=True)
    entry = pipeline.ledger.entries().get(key)
    return entry is not None and entry.job is not None


def _summarise_here(pipeline: Pipeline) -> None:
    from studies.summary_command import summarise

    summarise(pipeline)


def ask_again(pipeline: Pipeline) -> None:
    """Mark what has failed or is missing to be done again; what is done, waits or runs is left alone.

    Raises:
        UserError: Slurm does not answer, or a ledger cannot be written.
    """
    survey = pipeline.survey()
    for ledger in pipeline.ledgers():
        settle(ledger, survey)
    ledger = pipeline.ledger
    with ledger.locked():
        entries = ledger.entries()
        for run in pipeline.runs:
            ended = training_of(run.folder, survey) in ("none", "dead")
            if ended and not is_open(entries.get(_key(run))):
                ledger.add("again", _key(run))
    for run in pipeline.runs:
        keys = wanted(run.folder, pipeline.watched, survey)
        _ask_evaluations_again(evaluations_of(run.folder), keys)


def _ask_evaluations_again(ledger: Ledger, keys: Iterable[str]) -> None:
    if not any(map(_is_lost, ledger.entries().values())):
        return
    with ledger.locked():
        entries = ledger.entries()
        for key in keys:
            if key in entries and _is_lost(entries[key]):
                ledger.add("again", key)


def _is_lost(entry: Entry) -> bool:
    if entry.kind is None or entry.again:
        return False
    return entry.kind != "done" or bool(missing_results(entry))
