"""Ledgers: which job was handed over for what, so that nothing is handed over twice.

RUN/slurm/evaluations.jsonl (evaluations), PIPELINE/slurm/pipeline.jsonl (pretraining, watching, summaries). Lines:
  intent    key, attempt, name, folder, ...: on the disk before the job is handed over
  job       its number: after it
  refused   no job came of the intent
  ended     how the job ended, and the result files it left
  again     the next attempt is asked for
By its name, or its submission's folder, a job is found whose submitter died before it could write the second line.
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
# An sbatch whose caller was killed may need so long until its job is to be seen.
_IN_FLIGHT_SECONDS = {"slurm": 60.0}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The newest attempt at a key.

    Attributes:
        key: what is to be done once.
        attempt: counted from 1.
        name: the job's, like no other's.
        folder: the submission's.
        executor: slurm, local or debug.
        begun_seconds: when it was about to be handed over, since 1970.
        facts: what else its intent tells: of an evaluation its line and step.
        job: the record that `slurm.jobs.states_of` takes; None while no job is known.
        refused: why no job came of it.
        kind: how its job ended; None while that is not known.
        reason: of that, in one line.
        results: the result files it left.
        again: the next attempt is asked for.
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
        """Whoever was handing it over did not come to say whether a job came of it."""
        return self.job is None and self.refused is None

    @property
    def due(self) -> bool:
        """To be handed over anew."""
        return self.refused is not None or self.again


class Ledger:
    """The lines of one file, FOLDER/slurm/NAME.jsonl; what they name is relative to FOLDER.

    Attributes:
        file: the lines.
        base: FOLDER.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.base = file.parent.parent

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else write meanwhile.

        Raises:
            UserError: somebody else does not let go, or the folder cannot be written.
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
        """Append a line, and wait until it is on the disk; the lock must be held.

        Raises:
            UserError: the disk does not take it.
        """
        try:
            row = {"event": event, "key": key, **fields, "time": now_text()}
            append_json_line(self.file, row, durable=True)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written ({error.strerror})") from error

    def entries(self) -> dict[str, Entry]:
        """The newest attempt at every key, oldest key first; lines that cannot be read are left out."""
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
        """How a path stands in the lines: they stay true where the folder is moved."""
        return os.path.relpath(path.resolve(), self.base.resolve())


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job to be handed over.

    Attributes:
        key: what it does, to be done once.
        task: what it runs; made when its turn has come.
        home: where its submission goes.
        config: where and how.
        prefix: what its name begins with.
        facts: for the ledger's readers.
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
    """Submit, unless that was done: at most one job for each attempt, whoever else tries and whenever one is killed.

    Args:
        ledger: of the key.
        order: what to submit.
        due: whether an entry whose job is known asks for another attempt; None = those marked `again` do.

    Returns:
        ``job 123``, or ``job 123, found again`` where a killed predecessor had submitted it; None if there is
        nothing to do, or it cannot be told yet.

    Raises:
        UserError: it is refused, or the ledger cannot be written.
    """
    with ledger.locked():
        entry = ledger.entries().get(order.key)
        if entry is not None and entry.in_doubt:
            if job := _find_job(entry):
                _note(ledger, entry, job)
                return f"job {job}, found again"
            if _may_be_in_flight(entry):
                return None
            # So that a job that comes after all has nothing to run.
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
    """Write down the job of an intent, wherever it belongs and is not yet."""
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
    """The job of an intent whose submitter died; None if there is none that could do anything."""
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
    """The process that works on a submission, or has worked: by its files, else by its words."""
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
    """Give the job the file it waits for, by the name it looks for, where submitit had no time to."""
    if not (folder / f"{job}_submitted.pkl").exists():
        for file in folder.glob("*.pkl"):
            if len(file.stem) == 32:  # uuid4().hex: not yet anybody's.
                file.rename(folder / f"{job}_submitted.pkl")
                return


def _may_be_in_flight(entry: Entry) -> bool:
    if not entry.folder.is_dir():
        return False
    age = time.time() - entry.begun_seconds
    return age < _IN_FLIGHT_SECONDS.get(entry.executor, 1.0)


def jobs_without_a_run(folders: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the job of whatever a pipeline has handed over that is no run's and has not ended: its watching
    and summing up. Folders that hold no pipeline give none."""
    for folder in folders:
        if (folder / PIPELINE_FILE).is_file():
            for entry in Ledger(folder / PIPELINE).entries().values():
                if entry.job is not None and entry.kind is None:
                    yield folder, {**entry.job, "verb": entry.key.split()[0]}
