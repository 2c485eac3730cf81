"""The commands of a submission: configs are resolved now, where a mistake costs seconds, and sweeps are expanded."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from peerlearn.cli import dispatch
from peerlearn.commands.verbs import VERBS
from peerlearn.config import nearest, without
from peerlearn.errors import DONE, NotThereYetError, UsageError, UserError
from peerlearn.runs.directory import JOBS_FOLDER, PIPELINE_FILE, RunDirectory, default_run
from slurm.submission import Task

# The variable by which launchers tell a command the number of its processes.
_PROCESSES = "WORLD_SIZE"
_NOT_AS_JOBS = ("submit", "status", "cancel", "logs", "pipeline")


def plan_tasks(
    words: Sequence[str], sweep: Sequence[str], *, to_come: bool = False, processes: int = 1
) -> tuple[Path, list[Task]]:
    """Resolve a command, or each command of a sweep.

    Args:
        words: a verb and its words.
        sweep: KEY=V1,V2,... for each key that varies; the key `config` stands for the word after the verb.
        to_come: whether the checkpoints to evaluate need not be there yet.
        processes: number of processes of each job.

    Returns:
        The folder for the submission, and its tasks.

    Raises:
        UsageError: the verb is unknown, or a key is wrong.
        UserError: a run cannot be started in its folder; or images, networks or a checkpoint cannot be had.
    """
    with _launched(processes):
        return _plan(words, sweep, to_come)


@contextlib.contextmanager
def _launched(processes: int) -> Iterator[None]:
    """Where commands look for the number of processes that they run as, there are as many as the job will start."""
    before = os.environ.get(_PROCESSES)
    os.environ[_PROCESSES] = str(processes)
    try:
        yield
    finally:
        os.environ.pop(_PROCESSES)
        if before is not None:
            os.environ[_PROCESSES] = before


def _plan(words: Sequence[str], sweep: Sequence[str], to_come: bool) -> tuple[Path, list[Task]]:
    if words and words[0] in _NOT_AS_JOBS:
        raise UsageError(f"{words[0]} is done here and now, not as a job: leave out submit")
    if not words or words[0] not in VERBS:
        verb = words[0] if words else ""
        raise UsageError(
            f"after -- comes a verb to run as a job, got {verb!r}{nearest(verb, VERBS)}: "
            "peerlearn submit --cluster local -- pretrain mcl_fashion_mnist_demo --run runs/a"
        )
    if words[0] == "sweep":
        return _runs_of_sweep(words, sweep)
    if not sweep:
        task = _task(list(words), to_come)
        return _home(task), [task]
    if words[0] == "resume" or not VERBS[words[0]].dry_run:
        raise UsageError(f"sweep: {words[0]} has no keys that could vary")
    varies_config = any(word.startswith("config=") for word in sweep)
    if varies_config and (len(words) < 2 or words[1].startswith("-")):
        raise UsageError(f"sweep: config stands for the word after {words[0]}, which is not there")
    tasks = []
    root = _sweep_root(words)
    for chosen in itertools.product(*map(_values, sweep)):
        name = "_".join(f"{key.rsplit('.', 1)[-1]}-{_short(value)}" for key, value in chosen)
        varied, own = list(words), [] if root is None else ["--run", str(root / name)]
        for key, value in chosen:
            if key == "config":
                varied[1:2] = [value]
            else:
                own += [f"--{key}", value]
        tasks.append(_task([*without(varied, own), *own], to_come))
    runs = [str(task.run) for task in tasks if task.trains]
    if len(set(runs)) < len(runs):
        raise UsageError(f"sweep: two of its runs have the same name: {sorted(runs)}")
    return (root / JOBS_FOLDER if root else _home(tasks[0])), tasks


def _runs_of_sweep(words: Sequence[str], sweep: Sequence[str]) -> tuple[Path, list[Task]]:
    """A task for each run of `peerlearn sweep FILE` that is not done."""
    if sweep:
        raise UsageError("sweep: what varies stands in the file that `sweep` is given, not here")
    if "--table" in words:
        raise UsageError("sweep --table is done here and now, not as a job: leave out submit")
    listing = json.loads(_printed([*words, "--commands"]))
    tasks = [_task(command) for command in listing["commands"]]
    if not tasks:
        raise UserError(f"{listing['folder']}: all its runs are done: add --table, without submit")
    return Path(listing["folder"]) / JOBS_FOLDER, tasks


def _values(word: str) -> list[tuple[str, str]]:
    key, _, values = word.partition("=")
    return [(key, value) for value in values.split(",")]


def _short(value: str) -> str:
    """A value as a part of a folder's name."""
    stem = Path(value).stem if value.endswith((".yaml", ".yml")) else value
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)


def _sweep_root(words: Sequence[str]) -> Path | None:
    """The folder of a sweep's runs; None for verbs that make no runs."""
    if words[0] != "pretrain":
        return None
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--run="):
            return Path(word.partition("=")[2])
        if word == "--run":
            if not value or value.startswith("--"):
                raise UsageError("--run: the folder is missing")
            return Path(value)
    return default_run(words[1:])


def _task(words: list[str], to_come: bool = False) -> Task:
    verb = words[0]
    if verb == "resume":
        if len(words) > 1 and (Path(words[1]) / PIPELINE_FILE).is_file():
            raise UsageError(
                f"{words[1]} is a pipeline, which submits its jobs itself: `peerlearn resume {words[1]}`"
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
    return _printed([*words, "--dry_run"], to_come)


def _printed(words: list[str], to_come: bool = False) -> str:
    printed, code = io.StringIO(), DONE
    try:
        with contextlib.redirect_stdout(printed):
            code = dispatch(words)
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


def _home(task: Task) -> Path:
    return Path(task.run or "runs") / JOBS_FOLDER
