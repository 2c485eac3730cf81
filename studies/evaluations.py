"""Evaluations of the exports of runs: which are due, what each is named by, and how each ended.

RUN/evaluations/KEY/  order.json (what to measure)   outcome.json (how it ended, its result files)
                      log.txt   .lock, owner.json (the process that measures now)   measure-N/ (its jobs)
"""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from peerlearn.commands.verbs import VERBS
from peerlearn.config import nearest
from peerlearn.errors import UsageError, UserError
from peerlearn.evaluation.results import read_result
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from peerlearn.runs.export_folders import network_folder, read_seal, why_not_whole
from peerlearn.runs.export_log import export_log, last_steps, trained_networks
from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.step_folders import latest_step, step_folder, step_folders
from peerlearn.runs.text import printable
from peerlearn.runs.training_facts import TrainingFacts
from slurm.plan import plan_task
from slurm.submission import NUMBERS_FILE
from studies.config import check_words

_ORDER, _OUTCOME = "order.json", "outcome.json"
# Types of what these files hold; the others are texts.
_TYPES = {"step": int, "config": dict, "results": list}
_NO_EVALUATION = ("pretrain", "resume", "study")
_PLACEHOLDER = "RUN/export/step-N"
# Errors of reading a YAML file, whatever it holds.
_DAMAGE = (OSError, ValueError, RecursionError, yaml.YAMLError)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation of exports.

    Attributes:
        line: verb and words, as the user wrote them.
        config: resolved config, without its checkpoint.
    """

    line: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One evaluation of one export.

    Attributes:
        line: command line of the evaluation, without its checkpoint.
        config: resolved config of the evaluation, without its checkpoint.
        step: step of the export.
        export: folder of the export, relative to the run.
        sha256: hash over the hashes of the export's networks.
    """

    line: str
    config: dict[str, Any]
    step: int
    export: str
    sha256: str

    @property
    def verb(self) -> str:
        return shlex.split(self.line)[0]

    @property
    def key(self) -> str:
        """The name of what is measured: the same weights by the same words have the same."""
        content = f"{self.step} {self.sha256} {self.line}"
        return hashlib.sha256(content.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an evaluation ended.

    Attributes:
        line: command line of the evaluation, without its checkpoint.
        step: step of the export.
        kind: kind of the end.
        reason: reason of a failure, in one line.
        results: result files, relative to the run.
    """

    line: str
    step: int
    kind: Literal["done", "failed"]
    reason: str = ""
    results: list[str]

    def files(self, run: Path) -> list[Path]:
        """The paths of the result files."""
        return [run / name for name in self.results]


_Content = TypeVar("_Content", Order, Outcome)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A score that is missing.

    Attributes:
        run: name of the run directory.
        what: the pretraining, or the line and step of an evaluation.
        why: reason in one line.
    """

    run: str
    what: str
    why: str


def resolve_evaluation(line: str) -> Evaluation:
    """Check a command line and resolve its config.

    Raises:
        UsageError: the verb or a key is unknown, a word has no place here, or the verb evaluates nothing.
    """
    try:
        words = check_words("evaluate", f"evaluate: {line!r}", line)
    except ValueError as error:
        raise UsageError(str(error)) from error
    verb = words[0] if words else ""
    if verb not in VERBS:
        raise UsageError(f"evaluate: {line!r}: unknown verb {verb!r}{nearest(verb, VERBS)}")
    no_evaluation = UsageError(f"evaluate: {line!r}: {verb} is no evaluation of a checkpoint")
    if not _evaluates(verb):
        raise no_evaluation
    try:
        _, task = plan_task([*words, "--checkpoint", _PLACEHOLDER], to_come=True)
    except UserError as error:
        raise UsageError(f"evaluate: {line!r}: {error}") from error
    config = yaml.safe_load(task.config_yaml or "")
    if not isinstance(config, dict) or config.pop("checkpoint", None) != _PLACEHOLDER:
        raise no_evaluation
    return Evaluation(line=line, config=config)


def _evaluates(verb: str) -> bool:
    """Whether the verb may be one that evaluates checkpoints."""
    return verb in VERBS and VERBS[verb].dry_run and verb not in _NO_EVALUATION


def fixed_evaluations(root: Path, lines: list[str]) -> list[Evaluation]:
    """The evaluations of a study as they were resolved when it was made; new lines are resolved now.

    Raises:
        UsageError: a new line is wrong.
        UserError: a file of the study is damaged.
    """
    found = []
    for line in lines:
        file = _evaluation_file(root, line)
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            found.append(Evaluation(line=line, config=dict(config)))
        except FileNotFoundError:
            found.append(resolve_evaluation(line))
        except (*_DAMAGE, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file} is damaged: remove it ({reason})") from error
    return found


def keep_evaluations(root: Path, evaluations: list[Evaluation]) -> None:
    """Write the resolved evaluations of a study. Later changes of shipped configs do not change the study.

    Raises:
        OSError: the folder cannot be written.
    """
    for each in evaluations:
        text = yaml.safe_dump(each.config, sort_keys=False, allow_unicode=True)
        write_text(_evaluation_file(root, each.line), f"# {each.line}\n{text}")


def _evaluation_file(root: Path, line: str) -> Path:
    digest = hashlib.sha256(line.encode()).hexdigest()[:8]
    return root / "configs" / f"{shlex.split(line)[0]}-{digest}.yaml"


def orders(
    run: Path, evaluations: list[Evaluation], exports: str | int, *, live: bool
) -> tuple[list[Order], dict[int, str]]:
    """The evaluations of the exports that have landed so far, by step; and what keeps others from it.

    Args:
        run: folder of the run.
        evaluations: evaluations of each export.
        exports: exports to evaluate: last, all, or an interval in epochs.
        live: whether the run goes on, so that further exports may come.

    Returns:
        The orders; and of the exports that ought to be there, by step, why one is not: it is gone or damaged, or the
        disk did not take it. None is replaced by another.

    Raises:
        UserError: the files of the run do not tell the steps of an epoch, which an interval needs, or the best export.
    """
    directory, networks = RunDirectory(run), trained_networks(run)
    if not networks:
        return [], {}
    log = export_log(directory)
    found: list[Order] = []
    missing: dict[int, str] = {}
    for step in _wanted(run, log, exports, live=live):
        folder = directory.exports / step_folder(step)
        export = os.path.relpath(folder, run)
        if digest := _digest(folder, networks):
            found += [
                Order(line=each.line, config=each.config, step=step, export=export, sha256=digest)
                for each in evaluations
            ]
        elif log.get(step):
            missing[step] = f"{export} was never written ({log[step]})"
        else:
            missing[step] = why_not_whole(folder, networks).removeprefix(f"{run}/")
    return found, missing


def check_export(run: Path, order: Order) -> None:
    """Make sure that the export is the one that was ordered.

    Raises:
        UserError: it is gone or damaged, or other networks have taken its place.
    """
    folder, networks = run / order.export, trained_networks(run)
    why = why_not_whole(folder, networks)
    if not why and _digest(folder, networks) != order.sha256:
        why = f"{folder} holds other networks than were ordered"
    if why:
        raise UserError(f"{why}: nothing is measured in its place")


def _wanted(run: Path, log: Mapping[int, str], exports: str | int, *, live: bool) -> list[int]:
    """The steps whose exports are to be evaluated, whether they are there or not."""
    directory = RunDirectory(run)
    steps = {step for step, _ in step_folders(directory.exports)} | log.keys()
    last: set[int] = set()
    if live:
        # `latest` is written after all networks of an export.
        newest = latest_step(directory.exports)
        steps = {step for step in steps if newest is not None and step <= newest}
    elif directory.done:
        last.update(last_steps(directory))
    if exports == "all":
        return sorted(steps | last)
    every = exports * _steps_per_epoch(run) if isinstance(exports, int) and steps else None
    return sorted({step for step in steps if every and step % every == 0} | last)


def _digest(folder: Path, networks: int) -> str | None:
    """The hash of an export; None while a network is missing. Its networks appear one after the other."""
    seals = [read_seal(folder / network_folder(str(network))) for network in range(networks)]
    if None in seals:
        return None
    return hashlib.sha256(json.dumps(seals, sort_keys=True).encode()).hexdigest()


def _steps_per_epoch(run: Path) -> int:
    try:
        return max(1, TrainingFacts.read(RunDirectory(run).env).steps_per_epoch or 0)
    except UserError as error:
        raise UserError(
            f"{run}: its env.json does not tell the steps of an epoch, which exports needs"
        ) from error


def order_folder(run: Path, order: Order) -> Path:
    """The folder of an evaluation."""
    return RunDirectory(run).evaluations / order.key


def job_name(run: Path, order: Order) -> str:
    """The name of the evaluation's jobs, which no other evaluation's have."""
    place = hashlib.sha256(str(order_folder(run.resolve(), order)).encode()).hexdigest()
    return f"{order.verb}-{place[:16]}"


def write_order(run: Path, order: Order) -> Path:
    """Write what to measure. Returns the folder, which `peerlearn measure` takes.

    Raises:
        UserError: it cannot be written.
    """
    folder = order_folder(run, order)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(folder / _ORDER, json.dumps(asdict(order), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def read_order(folder: Path) -> Order:
    """What `write_order` wrote.

    Raises:
        UserError: the folder holds no order, or the file is damaged.
    """
    try:
        order = _read(Order, folder / _ORDER)
        # Jobs run the verb, and a file must not have them run any other.
        if not _evaluates(order.verb):
            raise ValueError(f"{order.verb!r} evaluates nothing")
        return order
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{folder} is no evaluation that a study ordered: {error}") from error


def read_outcomes(run: Path) -> list[Outcome]:
    """The ends of the evaluations of a run, by step. A damaged file is left out: that evaluation counts as not done."""
    folders = sorted(RunDirectory(run).evaluations.glob("*"))
    found = (read_outcome(folder) for folder in folders)
    return sorted((each for each in found if each), key=lambda each: (each.step, each.line))


def read_outcome(folder: Path) -> Outcome | None:
    """The end of an evaluation; None if it has not ended or the file is damaged."""
    try:
        found = _read(Outcome, folder / _OUTCOME)
        sound = found.kind in ("done", "failed") and all(isinstance(f, str) for f in found.results)
        return found if sound else None
    except (OSError, ValueError, TypeError):
        return None


def _read(kind: type[_Content], file: Path) -> _Content:
    """What a file of an evaluation holds.

    Raises:
        OSError, ValueError, TypeError: it cannot be read, or is damaged.
    """
    found = kind(**read_json_object(file))
    for key, value in vars(found).items():
        if type(value) is not _TYPES.get(key, str):
            raise ValueError(f"{key} is {value!r}")
    return found


def read_result_of(run: Path, file: Path) -> dict[str, Any]:
    """A result file of a run.

    Raises:
        UserError: it is gone or damaged.
    """
    name = printable(os.path.relpath(file, run))
    try:
        return read_result(file)
    except FileNotFoundError as error:
        raise UserError(f"its result {name} is gone") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is damaged: restore or remove it") from error


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write how an evaluation ended.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        write_text(folder / _OUTCOME, json.dumps(asdict(outcome), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def write_failure(folder: Path, order: Order, reason: str) -> None:
    """Write that an evaluation has failed.

    Raises:
        UserError: the disk does not take it.
    """
    write_outcome(
        folder, Outcome(line=order.line, step=order.step, kind="failed", reason=reason, results=[])
    )


def forget_outcome(folder: Path) -> None:
    """Have an evaluation done again: as if it had neither an outcome nor a job."""
    for file in (*folder.glob(f"measure-*/{NUMBERS_FILE}"), folder / _OUTCOME):
        file.unlink(missing_ok=True)


def study_of(run: Path) -> Path | None:
    """The folder of the study that a run belongs to; None if it belongs to none."""
    parent = run.resolve().parent
    return parent if (parent / STUDY_FILE).is_file() else None
