"""A submission: one folder that holds all that its jobs need, whatever becomes of the checkout meanwhile.

FOLDER/  (0700: what lies here is run as the user who owns it)
  submission.json    the tasks (words, run), the cluster's settings, where it was submitted, the code's revision
  code/              a copy of the program; jobs run this one, after every requeue too
  configs/task-0.yaml    the resolved config that the job of task 0 is pointed to
  outcomes/, outcomes-0.jsonl    how each start ended, and what was made of it
  JOB_RANK_log.out   what each process printed; and submitit's own files
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peerlearn import HOME, PACKAGES
from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line, read_json_lines, write_text
from peerlearn.runs.heartbeat import process_started_at
from slurm.config import SubmitConfig

# Verbs whose jobs own the run directory; those of others only look at it.
TRAINING_VERBS = ("pretrain", "resume")
JOBS_FILE = Path(JOBS_FOLDER) / "jobs.jsonl"
OUTCOMES_FOLDER = "outcomes"
_SUBMISSION_FILE = "submission.json"
_NUMBERS_FILE = "jobs.json"
_LOCK_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command of a submission.

    Attributes:
        words: what `peerlearn` is given.
        run: the run directory it works on, if it is a run's.
        config_yaml: the resolved config that the command is pointed to; None for a verb without one.
    """

    words: list[str]
    run: str | None = None
    config_yaml: str | None = None

    @property
    def trains(self) -> bool:
        """Whether the run is the command's own, whose end is the run's."""
        return self.run is not None and self.words[0] in TRAINING_VERBS


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What submission.json holds.

    Attributes:
        folder: it lies in.
        tasks: one per job; several are a job array.
        config: where and how they run.
        working_directory: of the commands; relative paths in them mean what they meant at submission.
        made: the folders that were made for it, innermost first; known only to who made them.
    """

    folder: Path
    tasks: list[Task]
    config: SubmitConfig
    working_directory: str
    made: tuple[Path, ...] = ()

    @property
    def code(self) -> Path:
        """The copy of the program."""
        return self.folder / "code"

    @property
    def outcomes(self) -> Path:
        """How each start of its jobs ended, and what its processes tell each other."""
        return self.folder / OUTCOMES_FOLDER

    def config_file(self, task: int) -> Path:
        """The config that a task's command is pointed to."""
        return self.folder / "configs" / f"task-{task}.yaml"

    def trained_run(self, task: int) -> RunDirectory | None:
        """The run directory that a task trains; None for other verbs."""
        chosen = self.tasks[task]
        run = Path(self.working_directory, chosen.run or "")
        return RunDirectory(run) if chosen.trains else None

    def command(self, task: int) -> list[str]:
        """The words of a task, with its config by path."""
        chosen = self.tasks[task]
        if chosen.config_yaml is None:
            return chosen.words
        config = [chosen.words[0], str(self.config_file(task))]
        if chosen.words[0] == "pretrain":
            return [*config, "--run", str(chosen.run), "--auto_resume"]
        return config


@contextmanager
def locked_home(home: Path) -> Iterator[None]:
    """Let no other submission into this folder for as long as the block lasts; after a failure, leave nothing of it.

    Raises:
        UserError: another does not come to its end, or the folder cannot be written.
    """
    missing = [folder for folder in (home, *home.parents) if not folder.exists()]
    lock = FileLock(home / ".submit.lock")
    try:
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
        UserError: it cannot be written, or the code cannot be copied; nothing is left behind.
    """
    missing = [folder for folder in (home, *home.parents) if not folder.exists()]
    folder = _new_folder(home, tasks[0].words[0])
    submission = Submission(
        folder=folder,
        tasks=tasks,
        config=config,
        working_directory=str(Path.cwd()),
        made=(folder, *missing),
    )
    try:
        _copy_code(submission.code)
        _write(submission)
    except OSError as error:
        remove_submission(submission)
        raise UserError(
            f"{folder}: the submission cannot be written there ({error.strerror}: {error.filename})"
        ) from error
    return submission


def remove_submission(submission: Submission) -> None:
    """Take away what `create_submission` made, up to the first folder that holds anything else by now."""
    shutil.rmtree(submission.folder, ignore_errors=True)
    for folder in submission.made[1:]:
        try:
            folder.rmdir()
        except OSError:
            return


def read_submission(folder: Path) -> Submission:
    """What `create_submission` wrote."""
    content = json.loads((folder / _SUBMISSION_FILE).read_text())
    return Submission(
        folder=folder,
        tasks=[Task(**task) for task in content["tasks"]],
        config=SubmitConfig(**content["config"]),
        working_directory=content["working_directory"],
    )


def record_jobs(submission: Submission, jobs: list[str]) -> None:
    """Note the job of each task in the submission, and in the run it works on."""
    write_text(submission.folder / _NUMBERS_FILE, json.dumps(jobs) + "\n")
    for task, job in zip(submission.tasks, jobs, strict=True):
        if task.run is None:
            continue
        record = {
            "job": job,
            "verb": task.words[0],
            "executor": submission.config.executor,
            "folder": str(submission.folder.resolve()),
            "time": now_text(),
        }
        if submission.config.executor == "local":
            record |= local_identity(int(job))
        file = Path(task.run) / JOBS_FILE
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        append_json_line(file, record)


def job_numbers(folder: Path) -> list[str]:
    """The job of each task of a submission.

    Raises:
        OSError: nothing has been noted, or it cannot be read.
        ValueError: it is not what `record_jobs` wrote.
    """
    numbers = json.loads((folder / _NUMBERS_FILE).read_text())
    if not isinstance(numbers, list):
        raise ValueError(f"{folder / _NUMBERS_FILE} holds no list")
    return list(map(str, numbers))


def local_identity(pid: int) -> dict[str, Any]:
    """What tells a local job's process from another that is given its number later."""
    return {"host": socket.gethostname(), "started": process_started_at(pid)}


def jobs_of(run: Path) -> Iterator[dict[str, Any]]:
    """The records of the jobs that worked or work on a run, oldest first; what is not whole is left out."""
    for record in read_json_lines(run / JOBS_FILE):
        texts = all(isinstance(record.get(k), str) for k in ("job", "verb", "executor", "folder"))
        if texts and (record["executor"] != "local" or record["job"].isdecimal()):
            yield record


def _new_folder(home: Path, verb: str) -> Path:
    number = 1
    while True:
        folder = home / f"{verb}-{number}"
        try:
            home.mkdir(parents=True, exist_ok=True)
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
        # A list of (source, target, reason).
        source, _, reason = error.args[0][0]
        raise OSError(0, reason, source) from error


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
    write_text(submission.folder / _SUBMISSION_FILE, json.dumps(content, indent=2) + "\n")


def _revision() -> dict[str, Any] | None:
    """The commit that the copied code comes from, and whether it was changed since; None outside a checkout."""
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
