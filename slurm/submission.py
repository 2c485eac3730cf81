"""A submission: one folder that holds all that its jobs need, even if the checkout changes after it.

FOLDER/  (mode 0700: files here are run as the user who owns them; docs/security.md)
  submission.json    the tasks (words, run), the cluster's settings, the place of submission, the code's revision
  code/              a copy of the program, which the jobs run, also after every requeue
  configs/task-0.yaml    the resolved config of task 0, which its command reads
  batch-ID.sh, start.sh  what sbatch is given, and what each start runs
  outcomes/, outcomes-0.jsonl    how each start ended, and the decision after it
  JOB_RANK_log.out   the output of each process; for jobs of this machine submitit's files lie beside it
RUN/slurm/jobs.jsonl   one line for each job that works on RUN
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peerlearn import HOME, PACKAGES
from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import (
    PRIVATE,
    append_json_line,
    changed_by_owner_alone,
    read_json_lines,
    write_text,
)
from peerlearn.runs.heartbeat import process_started_at
from slurm.config import SubmitConfig
from slurm.private_folder import check_private, root_of, warn_of_parents, warn_of_python

# Verbs whose jobs own the run directory. The jobs of other verbs only read it.
TRAINING_VERBS = ("pretrain", "resume")
JOBS_FILE = Path(JOBS_FOLDER) / "jobs.jsonl"
OUTCOMES_FOLDER = "outcomes"
BATCH_SCRIPTS, START_SCRIPT = "batch-*.sh", "start.sh"
# The key of a job's record that tells how many starts the run had when the job was submitted.
STARTS_BEFORE = "starts_before"
_SUBMISSION_FILE = "submission.json"
NUMBERS_FILE = "jobs.json"
_CODE_FOLDER, _CONFIGS_FOLDER = "code", "configs"
# What is run of a submission, and what decides what is run.
EXECUTED = (_CODE_FOLDER, _CONFIGS_FOLDER, OUTCOMES_FOLDER, _SUBMISSION_FILE, START_SCRIPT)
_LOCK_SECONDS = 120.0
# Number of digits.
_LONGEST_PROCESS_NUMBER = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command of a submission.

    Attributes:
        words: words after `peerlearn`.
        run: run directory that the command works on; None if it works on none.
        config_yaml: resolved config of the command; None for a verb without a config.
        starts_before: number of the run's newest start when the command was submitted; None if unknown. Which came
            first, a job or a start, cannot be told by their times: they are of two machines.
    """

    words: list[str]
    run: str | None = None
    config_yaml: str | None = None
    starts_before: int | None = None

    @property
    def trains(self) -> bool:
        """Whether the command trains the run, so that the end of the command is the end of the run."""
        return self.run is not None and self.words[0] in TRAINING_VERBS


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The content of submission.json.

    Attributes:
        folder: folder of the submission.
        tasks: commands to run, one for each job; several are a job array.
        config: place and manner of the jobs.
        working_directory: working directory of the commands, so that relative paths keep their meaning.
        made: folders that were made for the submission, innermost first; empty after `read_submission`.
    """

    folder: Path
    tasks: list[Task]
    config: SubmitConfig
    working_directory: str
    made: tuple[Path, ...] = ()

    @property
    def code(self) -> Path:
        """The copy of the program."""
        return self.folder / _CODE_FOLDER

    @property
    def outcomes(self) -> Path:
        """How each start of its jobs ended, and what its processes tell each other."""
        return self.folder / OUTCOMES_FOLDER

    def config_file(self, task: int) -> Path:
        """The file with the resolved config of a task."""
        return self.folder / _CONFIGS_FOLDER / f"task-{task}.yaml"

    def trained_run(self, task: int) -> RunDirectory | None:
        """The run directory that a task trains; None for other verbs."""
        chosen = self.tasks[task]
        run = Path(self.working_directory, chosen.run or "")
        return RunDirectory(run) if chosen.trains else None

    def command(self, task: int) -> list[str]:
        """The words of a task, with the path of its resolved config."""
        chosen = self.tasks[task]
        if chosen.config_yaml is None:
            return chosen.words
        config = [chosen.words[0], str(self.config_file(task))]
        if chosen.words[0] == "pretrain":
            return [*config, "--run", str(chosen.run), "--auto_resume"]
        return config


@contextmanager
def locked_home(home: Path) -> Iterator[None]:
    """Keep other submissions out of this folder for as long as the block lasts. A failure leaves nothing behind.

    Some network file systems do not keep the lock between machines. Nothing is spoiled then: the run's own lock and
    owner let one training in, and Slurm runs jobs of one name one after another.

    Raises:
        UserError: another submission does not end, or the folder cannot be written.
    """
    missing = [folder for folder in (home, *home.parents) if not folder.exists()]
    lock = FileLock(home / ".submit.lock")
    try:
        with changed_by_owner_alone():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise UserError(f"{home}: another submission goes on there: wait for it") from error
    except OSError as error:
        raise _unwritable(home, error) from error
    try:
        yield
    except BaseException:
        if missing:
            Path(lock.lock_file).unlink(missing_ok=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        lock.release()


def _unwritable(home: Path, error: OSError) -> UserError:
    return UserError(
        f"{home}: cannot be written ({error.strerror}): choose another folder for the run by --run"
    )


def create_submission(home: Path, tasks: list[Task], config: SubmitConfig) -> Submission:
    """Write a new submission folder, HOME/<verb>-<n>.

    Raises:
        UserError: the folder cannot be written or could be changed by others, or the code cannot be copied. Nothing
            is left behind.
    """
    with changed_by_owner_alone():
        return _create(home, tasks, config)


def _create(home: Path, tasks: list[Task], config: SubmitConfig) -> Submission:
    missing = [folder for folder in (home, *home.parents) if not folder.exists()]
    folder = _new_folder(home, tasks[0].words[0])
    submission = Submission(
        folder=folder,
        tasks=[replace(task, starts_before=_starts(task)) for task in tasks],
        config=config,
        working_directory=str(Path.cwd()),
        made=(folder, *missing),
    )
    try:
        check_private(folder.resolve(), EXECUTED)
        _copy_code(submission.code)
        _write(submission)
    except OSError as error:
        remove_submission(submission)
        raise UserError(
            f"{folder}: the submission cannot be written there ({error.strerror}: {error.filename})"
        ) from error
    except UserError:
        remove_submission(submission)
        raise
    warn_of_parents(root_of(folder.resolve()))
    warn_of_python()
    return submission


def _starts(task: Task) -> int | None:
    return RunDirectory(Path(task.run)).newest_attempt() if task.run else None


def remove_submission(submission: Submission) -> None:
    """Remove what `create_submission` made, up to the first folder that now holds anything else."""
    shutil.rmtree(submission.folder, ignore_errors=True)
    for folder in submission.made[1:]:
        try:
            folder.rmdir()
        except OSError:
            return


def read_submission(folder: Path) -> Submission:
    """The submission that `create_submission` wrote."""
    content = json.loads((folder / _SUBMISSION_FILE).read_text())
    return Submission(
        folder=folder,
        tasks=[Task(**task) for task in content["tasks"]],
        config=SubmitConfig(**content["config"]),
        working_directory=content["working_directory"],
    )


def submission_to_run(folder: Path) -> Submission:
    """The same, for those who run what it says.

    Raises:
        UserError: another account could have changed it.
    """
    check_private(folder, EXECUTED)
    return read_submission(folder)


def record_jobs(submission: Submission, jobs: list[str]) -> None:
    """Record the job of each task in the run that it works on, and then in the submission: there all are recorded.

    A record that is there already stays the only one.
    """
    for task, job in zip(submission.tasks, jobs, strict=True):
        if task.run is None:
            continue
        record = {
            "job": job,
            "verb": task.words[0],
            "executor": submission.config.executor,
            "folder": str(submission.folder.resolve()),
            "time": now_text(),
            STARTS_BEFORE: task.starts_before,
        }
        if submission.config.executor == "local":
            record |= local_identity(int(job))
        file = Path(task.run) / JOBS_FILE
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = ((each["job"], each["folder"]) for each in jobs_of(Path(task.run)))
        if (job, record["folder"]) not in known:
            append_json_line(file, record)
    write_text(submission.folder / NUMBERS_FILE, json.dumps(jobs) + "\n")


def job_numbers(folder: Path) -> list[str]:
    """The job of each task of a submission.

    Raises:
        OSError: nothing has been noted, or it cannot be read.
        ValueError: it is not what `record_jobs` wrote.
    """
    numbers = json.loads((folder / NUMBERS_FILE).read_text())
    if not isinstance(numbers, list):
        raise ValueError(f"{folder / NUMBERS_FILE} holds no list")
    return list(map(str, numbers))


def local_identity(pid: int) -> dict[str, Any]:
    """Facts that identify the process of a local job, also after another process gets its number."""
    return {"host": socket.gethostname(), "started": process_started_at(pid)}


def jobs_of(run: Path) -> Iterator[dict[str, Any]]:
    """The records of the jobs that work or worked on a run, oldest first. Incomplete records are left out."""
    for record in read_json_lines(run / JOBS_FILE):
        texts = all(isinstance(record.get(k), str) for k in ("job", "verb", "executor", "folder"))
        sound = texts and isinstance(record.get("started"), int | None)
        if sound and (record["executor"] != "local" or _is_process_number(record["job"])):
            yield record


def _is_process_number(job: str) -> bool:
    return job.isdecimal() and len(job) <= _LONGEST_PROCESS_NUMBER


def _new_folder(home: Path, verb: str) -> Path:
    number = 1
    while True:
        folder = home / f"{verb}-{number}"
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not home.is_dir():
                raise UserError(f"{home}: a file stands where submissions go") from None
            number += 1
        except OSError as error:
            raise _unwritable(home, error) from error
        else:
            return folder


def _copy_code(target: Path) -> None:
    try:
        for package in PACKAGES:
            shutil.copytree(
                HOME / package, target / package, ignore=shutil.ignore_patterns("__pycache__")
            )
    except shutil.Error as error:
        # The error holds a list of (source, target, reason).
        source, _, reason = error.args[0][0]
        raise OSError(0, reason, source) from error
    # The copies have the modes of a checkout, in which a group may write.
    for path in target.rglob("*"):
        path.chmod(0o700 if path.is_dir() else PRIVATE)


def _write(submission: Submission) -> None:
    submission.config_file(0).parent.mkdir()
    submission.outcomes.mkdir()
    for number, task in enumerate(submission.tasks):
        if task.config_yaml is not None:
            write_text(submission.config_file(number), task.config_yaml)
    content = {
        "tasks": [asdict(task) for task in submission.tasks],
        "config": asdict(submission.config),
        "working_directory": submission.working_directory,
        "time": now_text(),
        "git": _revision(),
    }
    write_text(
        submission.folder / _SUBMISSION_FILE, json.dumps(content, indent=2) + "\n", mode=PRIVATE
    )


def _revision() -> dict[str, Any] | None:
    """The commit of the copied code, and whether the code differs from it; None outside a checkout."""
    git = ("git", "-C", str(HOME))
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        commit, changes = (
            subprocess.run(
                [*git, *words], capture_output=True, text=True, check=True, env=environment
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", *PACKAGES))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changes)}
