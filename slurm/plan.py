"""The command of a submission: its config is resolved now, where a mistake costs seconds."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from peerlearn.cli import dispatch
from peerlearn.commands.verbs import VERBS
from peerlearn.config import nearest
from peerlearn.errors import DONE, NotThereYetError, UsageError, UserError
from peerlearn.runs.directory import JOBS_FOLDER, STUDY_FILE, RunDirectory, default_run
from slurm.submission import Task

# The variable by which launchers tell a command the number of its processes.
_PROCESSES = "WORLD_SIZE"
_NOT_AS_JOBS = ("submit", "status", "cancel", "logs", "study", "table")


def plan_task(
    words: Sequence[str], *, to_come: bool = False, processes: int = 1
) -> tuple[Path, Task]:
    """Resolve a command.

    Args:
        words: a verb and its words.
        to_come: whether the checkpoints to evaluate need not be there yet.
        processes: number of processes of the job.

    Returns:
        The folder for the submission, and its task.

    Raises:
        UsageError: the verb is unknown, or a key is wrong.
        UserError: a run cannot be started in its folder; or images, networks or a checkpoint cannot be had.
    """
    if words and words[0] in _NOT_AS_JOBS:
        raise UsageError(f"{words[0]} is done here and now, not as a job: leave out submit")
    if not words or words[0] not in VERBS:
        verb = words[0] if words else ""
        raise UsageError(
            f"after -- comes a verb to run as a job, got {verb!r}{nearest(verb, VERBS)}: "
            "peerlearn submit --cluster local -- pretrain mcl_fashion_mnist_demo --run runs/a"
        )
    with launched(processes):
        task = _task(list(words), to_come)
    return Path(task.run or "runs") / JOBS_FOLDER, task


@contextlib.contextmanager
def launched(processes: int) -> Iterator[None]:
    """Where commands look for the number of processes that they run as, there are as many as the job will start."""
    before = os.environ.get(_PROCESSES)
    os.environ[_PROCESSES] = str(processes)
    try:
        yield
    finally:
        os.environ.pop(_PROCESSES)
        if before is not None:
            os.environ[_PROCESSES] = before


def _task(words: list[str], to_come: bool = False) -> Task:
    verb = words[0]
    if verb == "resume":
        if len(words) > 1 and (Path(words[1]) / STUDY_FILE).is_file():
            raise UsageError(
                f"{words[1]} is a study, which submits its jobs itself: `peerlearn resume {words[1]}`"
            )
        _dry_run(words)
        return Task(words=words, run=words[1])
    if not VERBS[verb].dry_run:
        return Task(words=words)
    text = _dry_run(words, to_come)
    config: dict[str, Any] = yaml.safe_load(text)
    if verb != "pretrain":
        return Task(words=words, run=_run_of(config.get("checkpoint")), config_yaml=text)
    run = Path(config["run"] or default_run(words[1:]))
    RunDirectory(run).check_new()
    return Task(words=words, run=str(run), config_yaml=text)


def _dry_run(words: list[str], to_come: bool = False) -> str:
    printed, code = io.StringIO(), DONE
    try:
        with contextlib.redirect_stdout(printed):
            code = dispatch([*words, "--dry_run"])
    except NotThereYetError as error:
        if not to_come:
            raise UserError(f"{error} (with --dependency it need not be yet)") from error
    if code != DONE:
        raise UserError(f"`peerlearn {' '.join(words)}` ends with {code}")
    return printed.getvalue()


def _run_of(checkpoint: str | list[str] | None) -> str | None:
    """The run directory that holds a checkpoint."""
    first = checkpoint[0] if isinstance(checkpoint, list) else checkpoint
    if first is None:
        return None
    for folder in (Path(first), *Path(first).parents):
        run = RunDirectory(folder)
        if run.begun and run.attempts.is_dir():
            return str(folder)
    return None
