"""Ledgers: the submitted jobs and their purposes, so that nothing is submitted twice.

RUN/slurm/evaluations.jsonl (evaluations), PIPELINE/slurm/pipeline.jsonl (pretraining, watching, summaries). Lines:
  intent    key, attempt, name, folder, ...: written before the job is submitted
  job       the job's number: written after it is submitted
  refused   no job came of the intent
  ended     how the job ended, and the result files it left
  again     another attempt is wanted
If a submitter dies between `intent` and `job`, the job can be found by its name or by the folder of its submission.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peerlearn.errors import UserError
from peerlearn.evaluation.results import JOB_VARIABLE
from peerlearn.runs.directory import JOBS_FOLDER, PIPELINE_FILE
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line, read_json_lines
from slurm.config import SubmitConfig
from slurm.outcome import Kind
from slurm.submission import (
    Task,
    create_submission,
    job_numbers,
    jobs_of,
    local_identity,
    read_submission,
    record_jobs,
)

EVALUATIONS = Path(JOBS_FOLDER) / "evaluations.jsonl"
PIPELINE = Path(JOBS_FOLDER) / "pipeline.jsonl"
_LOCK_SECONDS = 120.0
# How long it may take until the job of an sbatch is visible whose caller was killed.
_IN_FLIGHT_SECONDS = {"slurm": 60.0}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The newest attempt at a key.

    Attributes:
        key: name of the work that is to be done once.
        attempt: number of the attempt, from 1.
        name: name of the job, which no other job has.
        folder: folder of the submission.
        executor: place of the job: slurm, local or debug.
        begun_seconds: time of the intent, in seconds since 1970.
        facts: further facts of the intent; for an evaluation its line and step.
        job: record of the job for `slurm.jobs.states_of`; None while no job is known.
        refused: reason why no job came of the intent; None if one may have.
        kind: kind of the job's end; None while it is not known.
        reason: reason of the job's end, in one line.
        results: result files that the job left.
        again: whether another attempt is wanted.
    """

    key: str
    attempt: int
    name: str
    folder: Path
    executor: str
    begun_seconds: float
    facts: dict[str, Any]
    job: dict[str, Any] | None = None
    refused: str | None = None
    kind: Kind | None = None
    reason: str = ""
    results: list[Path] = field(default_factory=list)
    again: bool = False

    @property
    def in_doubt(self) -> bool:
        """Whether it is unknown if a job exists: its submitter died after `intent` and before `job` or `refused`."""
        return self.job is None and self.refused is None

    @property
    def due(self) -> bool:
        """Whether a new job is to be submitted."""
        return self.refused is not None or self.again


class Ledger:
    """The lines of one file, FOLDER/slurm/NAME.jsonl. Paths in them are relative to FOLDER.

    Attributes:
        file: file with the lines.
        base: folder that paths are relative to, FOLDER.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.base = file.parent.parent

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the ledger for as long as the block lasts.

        Raises:
            UserError: another process keeps the lock, or the folder cannot be written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self.file.with_suffix(".lock"))
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise UserError(
                f"{self.file}: another process has held its lock for {_LOCK_SECONDS:.0f} s"
            ) from error
        except OSError as error:
            raise UserError(f"{self.file}: cannot be locked ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def add(self, event: str, key: str, **fields: Any) -> None:
        """Append a line, and wait until it is on the disk. The caller must hold the lock.

        Raises:
            UserError: the disk does not take the line.
        """
        try:
            row = {"event": event, "key": key, **fields, "time": now_text()}
            append_json_line(self.file, row, durable=True)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written ({error.strerror})") from error

    def entries(self) -> dict[str, Entry]:
        """The newest attempt at every key, oldest key first. Lines that cannot be read are left out."""
        found: dict[str, Entry] = {}
        for content in read_json_lines(self.file):
            try:
                key, event = content.pop("key"), content.pop("event")
                if event == "intent":
                    found[key] = self._begun(key, content)
                elif key in found:
                    found[key] = self._changed(found[key], event, content)
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def _begun(self, key: str, content: dict[str, Any]) -> Entry:
        return Entry(
            key=key,
            attempt=content["attempt"],
            name=content["name"],
            folder=self.base / content["folder"],
            executor=content["executor"],
            begun_seconds=content["begun_seconds"],
            facts=content["facts"],
        )

    def _changed(self, entry: Entry, event: str, content: dict[str, Any]) -> Entry:
        if event == "job":
            return replace(entry, job=content["job"])
        if event == "refused":
            return replace(entry, refused=content["reason"])
        if event == "again":
            return replace(entry, again=True)
        if event == "ended":
            results = [self.base / name for name in content["results"]]
            return replace(entry, kind=content["kind"], reason=content["reason"], results=results)
        return entry

    def relative(self, path: Path) -> str:
        """A path in the form of the lines. They stay true if the folder is moved."""
        return os.path.relpath(path.resolve(), self.base.resolve())


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job to be submitted.

    Attributes:
        key: name of the work that is to be done once.
        task: function that makes the job's task, called just before the submission.
        home: folder for the submission.
        config: place and manner of the job.
        prefix: beginning of the job's name.
        facts: further facts for the ledger.
    """

    key: str
    task: Callable[[], Task]
    home: Path
    config: SubmitConfig
    prefix: str
    facts: dict[str, Any] = field(default_factory=dict)


def hand_over(
    ledger: Ledger, order: Order, *, due: Callable[[Entry], bool] | None = None
) -> str | None:
    """Submit a job, unless that was done already.

    There is at most one job for each attempt, even if several processes try and any of them is killed at any moment.

    Args:
        ledger: ledger that holds the key.
        order: job to submit.
        due: whether an entry with a known job needs another attempt; None = the entries marked `again` do.

    Returns:
        ``job 123``, or ``job 123, found again`` if a killed process had submitted it; None if there is nothing to do,
        or if it cannot be known yet.

    Raises:
        UserError: the job is refused, or the ledger cannot be written.
    """
    with ledger.locked():
        entry = ledger.entries().get(order.key)
        if entry is not None and entry.in_doubt:
            if job := _find_job(entry):
                _note(ledger, entry, job)
                return f"job {job}, found again"
            if _may_be_in_flight(entry):
                return None
            # If the job exists after all, it will find nothing to run.
            shutil.rmtree(entry.folder, ignore_errors=True)
            ledger.add("refused", entry.key, reason="its submitter died before it was handed over")
        elif entry is not None and not (entry.due or (due is not None and due(entry))):
            return None
        attempt = entry.attempt + 1 if entry else 1
        return f"job {_submit(ledger, order, attempt)}"


def _submit(ledger: Ledger, order: Order, attempt: int) -> str:
    from slurm.executors import submit

    name = f"{order.prefix}-{secrets.token_hex(6)}"
    variables = [*order.config.environment, f"{JOB_VARIABLE}={name}"]
    config = replace(order.config, environment=variables)
    submission = create_submission(order.home, [order.task()], config)
    ledger.add(
        "intent",
        order.key,
        attempt=attempt,
        name=name,
        folder=ledger.relative(submission.folder),
        executor=config.executor,
        begun_seconds=time.time(),
        facts=order.facts,
    )
    try:
        job = submit(submission, name)[0]
    except UserError as error:
        ledger.add("refused", order.key, reason=str(error))
        raise
    except OSError as error:
        raise UserError(f"{submission.folder}: {error.strerror}: {error.filename}") from error
    _note(ledger, ledger.entries()[order.key], job)
    return job


def _note(ledger: Ledger, entry: Entry, job: str) -> None:
    """Record the job of an intent in the run, in the submission and in the ledger, where it is missing."""
    submission = read_submission(entry.folder)
    run, folder = submission.tasks[0].run, str(entry.folder.resolve())
    listed = jobs_of(Path(run)) if run else ()
    if run and (job, folder) not in [(record["job"], record["folder"]) for record in listed]:
        record_jobs(submission, [job])
    record: dict[str, Any] = {"job": job, "executor": entry.executor}
    if entry.executor == "local":
        record |= local_identity(int(job))
    ledger.add("job", entry.key, job=record)


def _find_job(entry: Entry) -> str | None:
    """The job of an intent whose submitter died; None if there is no job that could run."""
    if not entry.folder.is_dir():
        return None
    try:
        return job_numbers(entry.folder)[0]
    except (OSError, ValueError, LookupError):
        pass
    job = _job_named(entry.name) if entry.executor == "slurm" else _local_job(entry.folder)
    if job is not None:
        _complete(entry.folder, job)
    return job


def _job_named(name: str) -> str | None:
    from slurm.client import jobs_named

    jobs = jobs_named(name)
    return jobs[-1] if jobs else None


def _local_job(folder: Path) -> str | None:
    """The process that works or worked on a submission: found by its files, else by its command line."""
    for pattern in ("_submitted.pkl", "_0_log.out"):
        for file in folder.glob(f"*{pattern}"):
            return file.name.removesuffix(pattern)
    wanted = [b"submitit.local._local", os.fsencode(folder.resolve())]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[2:4] == wanted:
            return process.name
    return None


def _complete(folder: Path, job: str) -> None:
    """Rename submitit's file to the name that the job waits for, if submitit was killed before it could."""
    if not (folder / f"{job}_submitted.pkl").exists():
        for file in folder.glob("*.pkl"):
            if len(file.stem) == 32:  # uuid4().hex: the file belongs to no job yet.
                file.rename(folder / f"{job}_submitted.pkl")
                return


def _may_be_in_flight(entry: Entry) -> bool:
    if not entry.folder.is_dir():
        return False
    # It may have been begun by another machine, whose clock may be wrong.
    age = abs(time.time() - entry.begun_seconds)
    return age < _IN_FLIGHT_SECONDS.get(entry.executor, 1.0)


def jobs_without_a_run(folders: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The jobs of pipelines that belong to no run and have not ended, each with its folder: watching and summing up.

    Folders without a pipeline have none.
    """
    for folder in folders:
        if (folder / PIPELINE_FILE).is_file():
            for entry in Ledger(folder / PIPELINE).entries().values():
                if entry.job is not None and entry.kind is None:
                    yield folder, {**entry.job, "verb": entry.key.split()[0]}
