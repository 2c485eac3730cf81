"""A study on a SLURM cluster: its pretraining as one array, each evaluation as a job of its own, a job that watches.

Nothing is measured twice. An evaluation's job is named by what it measures. Under the folder's lock it is submitted
unless its outcome is there or a job of that name waits or runs. If a submitter is killed before anyone knows its job, a
second job of the name may come of it: Slurm starts that after the first (``singleton``), and it finds the outcome.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peerlearn.config import config_to_yaml
from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.file_ages import FileAges
from peerlearn.runs.files import numbered_files
from slurm.client import own_jobs
from slurm.config import SubmitConfig
from slurm.executors import adopt, submit
from slurm.jobs import job_key, may_appear, records_of, states_of, submission_of
from slurm.outcome import MissingJobs, is_decided, outcome_of
from slurm.submission import (
    NUMBERS_FILE,
    Submission,
    Task,
    create_submission,
    job_numbers,
    locked_home,
    read_submission,
)
from studies.due import (
    Jobs,
    Look,
    Ordered,
    Work,
    drop_bulk,
    look,
    newest_training,
    to_train,
    training_of,
)
from studies.evaluations import job_name, read_outcome, write_failure, write_order
from studies.study import StudyRun

_PATIENCE_SECONDS = 300.0
# Of evaluations' jobs that Slurm does not know, over the looks of this process.
_missing = MissingJobs()


def submit_pretraining(
    root: Path,
    runs: Sequence[StudyRun],
    cluster: SubmitConfig,
    *,
    at_once: int | None,
    again: bool,
) -> list[str]:
    """Submit the runs that are not done and have no job, as one array. The caller holds the lock.

    Args:
        root: folder of the study.
        runs: runs of the study.
        cluster: profile of the jobs.
        at_once: largest number of the runs that train at once; None = no limit.
        again: whether runs that have failed are tried again.

    Returns:
        The jobs; none if nothing is to be done.

    Raises:
        UserError: the jobs are refused, or Slurm does not answer.
    """
    adopt(root / JOBS_FOLDER)
    known = _jobs([run.folder for run in runs], patience_seconds=_PATIENCE_SECONDS)
    due = [run for run in runs if to_train(training_of(run.folder, known), again=again)]
    tasks = list(map(_pretraining, due))
    if not tasks:
        return []
    return _submit(root / JOBS_FOLDER, tasks, cluster, at_once=at_once)


def _jobs(
    runs: Sequence[Path], *, patience_seconds: float = 0.0, missing: MissingJobs | None = None
) -> Jobs:
    """The jobs that wait or run. A listing may lag, so each run's job that is not in it is asked about by its number.

    Args:
        runs: runs that the jobs may train.
        patience_seconds: how long Slurm is asked again while it cannot be reached.
        missing: memory of this process's looks; with it a job counts as live until it is known to have ended.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = Jobs.of(own_jobs(patience_seconds=patience_seconds))
    newest = {run: record for run in runs if (record := newest_training(run))}
    records = {
        run: record
        for run, record in newest.items()
        if record["executor"] == "slurm" and record["job"] not in jobs.numbers
        if not RunDirectory(run).done
    }
    states = states_of(records.values(), patience_seconds=patience_seconds)
    live, ages = set(), FileAges()
    for run, record in records.items():
        job, state = record["job"], states.get(job_key(record))
        decided = is_decided(submission_of(run, record), job)
        if (
            (state is not None and state.live)
            or (not decided and may_appear(run, record, state, ages))
            or (missing is not None and not missing.has_ended(job, state, decided=decided))
        ):
            live.add(job)
    return replace(jobs, numbers=jobs.numbers | live)


def _pretraining(run: StudyRun) -> Task:
    config = replace(run.variant.config, seed=run.seed, run=str(run.folder))
    return Task(
        words=["pretrain", *run.variant.words, *run.own_words],
        run=str(run.folder),
        config_yaml=config_to_yaml(config),
    )


def _submit(
    home: Path, tasks: list[Task], cluster: SubmitConfig, *, at_once: int | None = None
) -> list[str]:
    submission = create_submission(home, tasks, cluster)
    name = cluster.name or _array_name(submission)
    return submit(submission, name, at_once=at_once)


def _array_name(submission: Submission) -> str:
    return f"{submission.tasks[0].words[0]}-{_digest(submission.folder)}"


def _digest(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def submit_watch(root: Path, words: list[str], cluster: SubmitConfig) -> str | None:
    """Submit a job that watches the study, unless one waits. The caller holds the lock.

    One that runs may be about to end. The new job then starts after it, and ends at once if nothing is left to do.

    Returns:
        The job; None if one waits already.

    Raises:
        UserError: the job is refused, or Slurm does not answer.
    """
    name = f"watch-{_digest(root)}"
    jobs = own_jobs(patience_seconds=_PATIENCE_SECONDS)
    waiting = [job for job in jobs if job.name == name and job.state == "PENDING"]
    if waiting:
        return None
    task = Task(words=words, run=str(root))
    config = replace(cluster, name=name, dependency="singleton")
    return _submit(root / JOBS_FOLDER, [task], config)[0]


def submit_background(root: Path, words: list[str], cluster: SubmitConfig) -> str | None:
    """Start the study in the background of this machine, unless it goes on there.

    Returns:
        The job; None if there is one already.

    Raises:
        UserError: it cannot be started.
    """
    with locked_home(root / JOBS_FOLDER):
        if states_of(record for record in records_of(root) if record["executor"] == "local"):
            return None
        return _submit(root / JOBS_FOLDER, [Task(words=words, run=str(root))], cluster)[0]


def advance(work: Work, cluster: SubmitConfig, *, at_once: int | None) -> Look:
    """Look at everything once, submit the evaluations that are due, and note those whose jobs are gone.

    Raises:
        UserError: Slurm does not answer, a job is refused, or the folder cannot be written.
    """
    with locked_home(work.root / JOBS_FOLDER):
        adopt(work.root / JOBS_FOLDER)
        found = look(work, _jobs(work.runs, missing=_missing))
        live = len(found.with_standing("live"))
        submitted = 0
        for each in found.with_standing("due"):
            if submission := _newest_submission(each):
                _note_loss(each, submission)
                continue
            if at_once is not None and live + submitted >= at_once:
                break
            job = submit_evaluation(each, cluster)
            print(f"job {job}: {each.title}", flush=True)
            submitted += 1
        drop_bulk(work, found)
    return found


def submit_evaluation(each: Ordered, cluster: SubmitConfig) -> str:
    """Submit the job of an evaluation. The caller holds the lock.

    Raises:
        UserError: the job is refused.
    """
    folder = write_order(each.run, each.order)
    task = Task(words=["measure", str(folder)], run=str(each.run))
    config = replace(cluster, name=job_name(each.run, each.order), dependency="singleton")
    return _submit(folder, [task], config)[0]


def _newest_submission(each: Ordered) -> Path | None:
    """The folder of the evaluation's newest job that is known; None if it has none."""
    folders = numbered_files(each.folder, "measure-")
    known = [number for number, folder in folders.items() if (folder / NUMBERS_FILE).is_file()]
    return folders[max(known)] if known else None


def _note_loss(each: Ordered, folder: Path) -> None:
    """Write that an evaluation has failed whose job is gone without an outcome."""
    if read_outcome(each.folder) is not None:
        return  # It has ended since the look.
    try:
        submission, (job,) = read_submission(folder), job_numbers(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        write_failure(each.folder, each.order, f"{folder} does not tell its job: {error}")
        return
    state = states_of([{"job": job, "executor": "slurm"}]).get(("slurm", job, None))
    if not _missing.has_ended(job, state, decided=is_decided(folder, job)):
        return
    reason = outcome_of(submission, 0, state).reason
    write_failure(each.folder, each.order, f"job {job}: {reason}")
