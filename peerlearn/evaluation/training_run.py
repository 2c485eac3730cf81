"""What an evaluator that trains needs beside its training: a run directory of its own, and a way to go on after a stop.

The run directory lies beside the result files, and its name tells the training. So the same command finds what it has
begun, and another is never refused for it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peerlearn.compute.trainer import check_stays
from peerlearn.config import fixed_values, load_config, without
from peerlearn.errors import DONE, SavedError, UserError
from peerlearn.evaluation.evaluator import Config, Evaluator
from peerlearn.evaluation.evaluator import run as evaluate
from peerlearn.evaluation.results import short_hash
from peerlearn.evaluation.selection import Selection, results_folder
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import step_folders
from peerlearn.runs.stop import STOP_SIGNALS, StoppedError, stop_signals
from peerlearn.runs.terminal import say
from peerlearn.runs.text import listed
from peerlearn.runs.training_facts import training_verb

if TYPE_CHECKING:
    from peerlearn.compute.attempt import Attempt
    from peerlearn.compute.dist import Ranks
    from peerlearn.compute.program import Program
    from peerlearn.compute.resumable import Resumable

Training = TypeVar("Training", bound="Resumable")

# The event that holds a training's identity.
_IDENTITY = "identity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The run directory of an evaluator's training.

    Attributes:
        verb: verb of the evaluator.
        directory: run directory; if it is there already, the training in it is continued.
        identity: all that decides what is learned.
    """

    verb: str
    directory: RunDirectory
    identity: Mapping[str, Any]


def training_run(
    verb: str,
    config: Config,
    selection: Selection,
    protocol: Mapping[str, Any],
    ranks: "Ranks",
    *,
    prefix: str,
    folder: str | None = None,
    leaves: str | None = None,
) -> TrainingRun:
    """The run directory of a training: ``<prefix>-<hash>`` in the folder of the result files, or the folder asked for.

    The hash is of all that decides what is learned and of every key that may not change on the way. All ranks call it
    together.

    Args:
        verb: verb of the evaluator.
        config: config of the evaluation.
        selection: networks to train.
        protocol: protocol of the scores.
        ranks: processes that train together.
        prefix: begin of the folder's name.
        folder: folder that the user asks for by --run.
        leaves: name of what a training leaves in its directory. A training that came to its end, has dropped its saves
            and left nothing, is begun anew.

    Raises:
        UserError: the folder asked for holds another training, or something else.
    """
    from peerlearn.export import export_hash

    def find() -> tuple[str, dict[str, Any]]:
        identity = {
            "config": fixed_values(config),
            "exports": {name: export_hash(export) for name, export in selection.folders.items()},
            "processes": ranks.world_size,
            "protocol": protocol,
        }
        if folder is not None:
            run = RunDirectory(Path(folder))
            _check_own(run, verb, identity)
        else:
            results = results_folder(config.results, selection)
            run = RunDirectory(results / f"{prefix}-{short_hash(identity)}")
            left = leaves is not None and (run.root / leaves).exists()
            if run.done and not left and not step_folders(run.checkpoints):
                shutil.rmtree(run.root)
        return str(run.root), identity

    root, identity = ranks.from_main(find)
    return TrainingRun(verb=verb, directory=RunDirectory(Path(root)), identity=identity)


def _check_own(run: RunDirectory, verb: str, identity: Mapping[str, Any]) -> None:
    """Make sure that a folder is free, or holds this training."""
    from peerlearn.compute.resume import config_changes

    if not run.begun:
        run.check_new()
    elif (trained_by := training_verb(run.env)) != verb:
        raise UserError(
            f"{run.root} holds a run of `peerlearn {trained_by}`: choose another folder by --run"
        )
    # In the form that an event holds.
    now = json.loads(json.dumps(identity))
    # Where it was not noted yet, nothing has been trained.
    before = next((event for event in run.events() if event["event"] == _IDENTITY), now)
    for part in now:
        changes = config_changes({part: before.get(part)}, {part: now[part]})
        if changed := [key for key, _ in changes]:
            raise UserError(
                f"{run.root} holds another training, which differs in {listed(changed)}: "
                "choose another folder by --run"
            )


def own_config(config: Config, selection: Selection) -> Config:
    """The config for these networks alone, where it was for those of several checkpoints, and from any folder."""
    results = str(results_folder(config.results, selection).resolve())
    if len(selection.folders) == 1:
        (export,) = selection.folders.values()
        return dataclasses.replace(config, checkpoint=str(export), network="all", results=results)
    return dataclasses.replace(config, checkpoint=str(selection.exports), results=results)


def whole_path(path: str | None) -> str | None:
    """The path from the root of the file system, so that `peerlearn resume` finds from any folder what lies there."""
    return None if path is None else str(Path(path).resolve())


@contextmanager
def trained(
    place: TrainingRun,
    program: "Program[Training]",
    config: Config,
    ranks: "Ranks",
    *,
    keeps_saves: bool,
) -> Iterator[Training]:
    """Train, or go on with what the place holds. Then the block scores what was trained. All ranks call it together.

    Args:
        place: run directory of the training.
        program: functions that train.
        config: config of these networks.
        ranks: processes that train together.
        keeps_saves: whether the saves stay once the scores are there.

    Yields:
        The training at its end. A signal interrupts the block.

    Raises:
        SavedError: a signal asked to stop; the training is saved.
        UserError: the training failed.
    """
    from peerlearn.compute.program import run_training

    run = place.directory

    def train(attempt: "Attempt[Training]") -> bool:
        ranks.from_main(lambda: _note_identity(place))
        return program.train(attempt)

    try:
        with stop_signals(STOP_SIGNALS, "saving after this step") as stop:
            training = run_training(
                dataclasses.replace(program, train=train),
                verb=place.verb,
                config=config,
                run=run,
                ranks=ranks,
                stop=stop,
                resumes=ranks.from_main(run.config.exists),
            )
            if training is None:
                raise _saved(run)
            with stop.at_once():
                yield training
    except StoppedError as stopped:
        raise _saved(run) from stopped
    if not keeps_saves:
        _drop_saves(run, ranks)


@contextmanager
def scored_again(place: TrainingRun, ranks: "Ranks") -> Iterator[None]:
    """Say that a training is done already. Then the block scores what it has left. All ranks call it together.

    Raises:
        SavedError: a signal asked to stop.
    """
    run = place.directory
    if ranks.main:
        say(f"{run.root} is done already: what it has learned is scored")
    try:
        yield
    except StoppedError as stopped:
        raise _saved(run) from stopped
    # Where it was stopped before its first score, they are still there.
    _drop_saves(run, ranks)


def _saved(run: RunDirectory) -> SavedError:
    return SavedError(f"saved in {run.root}: the same command continues")


def _note_identity(place: TrainingRun) -> None:
    run = place.directory
    if not any(event["event"] == _IDENTITY for event in run.events()):
        run.event(_IDENTITY, **place.identity)


def _drop_saves(run: RunDirectory, ranks: "Ranks") -> None:
    """Remove the saves of a training that is done and scored: what is left tells how it went, they only take room."""

    def drop() -> None:
        # All of them at once: what a kill leaves of them is not taken for a damaged run.
        dropped = run.checkpoints.with_name(f".{run.checkpoints.name}")
        shutil.rmtree(dropped, ignore_errors=True)
        if run.checkpoints.exists():
            run.checkpoints.rename(dropped)
            shutil.rmtree(dropped, ignore_errors=True)

    ranks.from_main(drop)


def resume(evaluator: Evaluator[Config], argv: Sequence[str]) -> int:
    """`peerlearn resume RUN [--key value ...]` of an evaluator's training. Returns the exit code.

    Raises:
        UserError: the folder is no run; or whatever `evaluator.run` raises.
    """
    run, words = RunDirectory(Path(argv[0])), argv[1:]
    run.check_exists()
    check_stays(words)
    config = load_config(evaluator.config, run.config)
    root = run.root.resolve()
    # A folder that the user asked for may lie elsewhere than the results.
    named = getattr(config, "run", None) is not None
    folders = ["--run", str(root)] if named else ["--results", str(root.parent)]
    if run.done and not step_folders(run.checkpoints):
        print(
            f"{run.root} is done already; its results are in "
            f"{config.results if named else run.root.parent}"
        )
        return DONE
    return evaluate(evaluator, [str(run.config), *without(folders, words), *words])
