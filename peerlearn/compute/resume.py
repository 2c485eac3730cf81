"""Resuming: the save that a run continues from, and the check that it is still the same run."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from peerlearn.compute.resumable import Resumable
from peerlearn.config import load_config, may_change, with_added
from peerlearn.errors import UserError
from peerlearn.runs.checkpoint import (
    DamagedSaveError,
    check_whole,
    load_checkpoint,
    remove_stumps,
    saved_steps,
    saves_set_aside,
    set_aside,
)
from peerlearn.runs.environment import environment
from peerlearn.runs.generators import load_generator_states
from peerlearn.runs.step_folders import LATEST_FILE, step_folders

logger = logging.getLogger(__name__)


class RefusedResumeError(UserError):
    """The run is sound, but the new config, data or processes would make it another run."""


def resume_latest(training: Resumable, *, allow_elastic: bool = False) -> None:
    """Continue from the newest whole save, or from step 0 if nothing was ever saved.

    A damaged save is set aside with a warning and an event. Rows of metrics.jsonl after the step are cut.

    Raises:
        UserError: there were saves, but none is whole.
        RefusedResumeError: the config, the data or the number of processes has changed.
    """
    run, ranks = training.run, training.ranks
    name = ranks.from_main(lambda: _newest_whole_save(training))
    if name is None:
        # Before the first save only config.yaml tells which run this is.
        ranks.from_main(
            lambda: _check_config(training, _plain(load_config(type(training.config), run.config)))
        )
        ranks.from_main(lambda: run.cut_metrics(0))
        return
    rows = _restore(training, run.checkpoints / name, allow_elastic=allow_elastic)
    ranks.from_main(lambda: _cut_metrics(training, rows))


def _plain(config: Any) -> dict[str, Any]:
    """The value in the form that a save holds."""
    return dict(json.loads(json.dumps(asdict(config))))


def _cut_metrics(training: Resumable, rows: int) -> None:
    """Cut the rows that are written anew, and say so if rows from before the save are missing."""
    found = training.run.cut_metrics(training.step, rows)
    if found < rows:
        logger.warning(
            "%s has lost %d of the %d rows up to step %d",
            training.run.metrics,
            rows - found,
            rows,
            training.step,
        )
        training.run.event("metrics_missing", step=training.step, rows=rows, found=found)


def roll_back(training: Resumable, *, before_step: int, reason: str) -> None:
    """Go back to the newest save of a step up to ``before_step``. Later saves are set aside.

    Raises:
        UserError: there is no such save; the message begins with the reason.
    """
    run, ranks = training.run, training.ranks

    def choose() -> str:
        for step, folder in step_folders(run.checkpoints):
            if step > before_step:
                set_aside(folder)
        name = _newest_whole_save(training) if saved_steps(run.checkpoints) else None
        if name is None:
            raise UserError(f"{reason}; there is no save from before to go back to: lower base_lr")
        return name

    # Whether other processes may go on has been decided at the start.
    rows = _restore(training, run.checkpoints / ranks.from_main(choose), allow_elastic=True)
    ranks.from_main(lambda: run.cut_metrics(training.step, rows))
    if ranks.main:
        run.event("rolled_back", step=training.step, before_step=before_step, reason=reason)


def _newest_whole_save(training: Resumable) -> str | None:
    """The name of the newest whole save's folder; None if this run has never saved. Damaged saves are set aside."""
    run = training.run
    remove_stumps(run.checkpoints)
    for folder in saved_steps(run.checkpoints):
        try:
            check_whole(folder)
        except DamagedSaveError as error:
            bad = set_aside(folder)
            logger.warning("set aside a damaged checkpoint as %s: %s", bad.name, error)
            run.event(
                "checkpoint_damaged", folder=folder.name, moved_to=bad.name, reason=str(error)
            )
        else:
            return folder.name
    if _has_ever_saved(training):
        raise UserError(
            f"{run.checkpoints}: no checkpoint is whole: restore one from a backup, or start a new run"
        )
    return None


def _has_ever_saved(training: Resumable) -> bool:
    """Whether the run has ever saved, by its events, the file `latest`, saves set aside and rows of later steps."""
    run = training.run
    events = {event["event"] for event in run.events()}
    if events & {"saved", "checkpoint_damaged"}:
        return True
    left = (run.checkpoints / LATEST_FILE, *saves_set_aside(run.checkpoints))
    if any(path.exists() for path in left):
        return True
    first_save = training.saves.every_steps or training.steps_per_epoch
    last_row = max((row["step"] for row in run.metric_rows()), default=0)
    return last_row > first_save and "save_missed" not in events


def _restore(training: Resumable, folder: Path, *, allow_elastic: bool) -> int:
    """Restore a save of the same run.

    Returns:
        The number of rows that metrics.jsonl had at the save.
    """
    state = restore(
        training,
        folder,
        lambda state: _check_same_run(training, folder, state, allow_elastic=allow_elastic),
    )
    rows: int = state["metrics_rows"]
    return rows


def restore(
    training: Resumable, folder: Path, check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Restore a save. All ranks call it together.

    Args:
        training: training to restore.
        folder: folder of the save.
        check: function that refuses the save by its state, on the main rank; nothing is restored then.

    Returns:
        The state of the save.

    Raises:
        DamagedSaveError: a file of the save is missing or damaged.
        UserError: the check refuses the save, or another version wrote it.
    """
    tensors, state = load_checkpoint(folder)
    try:
        training.ranks.from_main(lambda: check(state))
        training.load(tensors, state)
        training.guard.load_state(state["guard"])
        if state["world_size"] == training.ranks.world_size:
            _restore_generators(training, tensors["rng"])
        training.step = state["step"]
        return {**state, "metrics_rows": int(state["metrics_rows"])}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} was written by another version of peerlearn, or by no peerlearn at all ({error!r})"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _check_same_run(
    training: Resumable, folder: Path, state: Mapping[str, Any], *, allow_elastic: bool
) -> None:
    _check_config(training, state["config"])
    check_images(training, folder, state)
    _check_layout(training, state, allow_elastic=allow_elastic)
    _note_environment(training, state["environment"])


def check_images(training: Resumable, folder: Path, state: Mapping[str, Any]) -> None:
    """Make sure that a save was trained on the training's images.

    Raises:
        RefusedResumeError: it was trained on others.
    """
    if state["dataset"] != training.fingerprint:
        raise RefusedResumeError(
            f"{folder}: was trained on other images than {training.dataset_name} holds now: "
            "restore the data, or start a new run"
        )


def _restore_generators(training: Resumable, tensors: Mapping[str, Tensor]) -> None:
    own = f"rank-{training.ranks.rank}."
    states = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
    load_generator_states(states, training.ranks.device)


def _check_config(training: Resumable, saved: Mapping[str, Any]) -> None:
    """Refuse a config that would make this another run, and record changes that are safe."""
    if changes := safe_changes(training.config, saved, training.run.config):
        logger.warning("the config has changed: %s", _listed(changes))
        training.run.event("config_changed", changes={k: list(v) for k, v in changes.items()})


def safe_changes(config: Any, saved: Mapping[str, Any], file: Path) -> dict[str, tuple[Any, Any]]:
    """Every dotted key in which a config differs from that of a save, with the old and the new value.

    Args:
        config: the config.
        saved: values of the save's config.
        file: file of the config, for the message.

    Raises:
        RefusedResumeError: a key differs that would make it another run.
    """
    changes = dict(config_changes(with_added(type(config), saved), asdict(config)))
    unsafe = {
        key: change for key, change in changes.items() if not may_change(type(config), key, *change)
    }
    if unsafe:
        raise RefusedResumeError(
            f"{file}: changed since the last save: {_listed(unsafe)}; "
            "change it back, or start a new run with it"
        )
    return changes


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every dotted key whose value differs, with the old and the new value; None for a missing value."""
    for name in dict.fromkeys([*old, *new]):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from config_changes(before, after, key + ".")
        elif before != after:
            yield key, (before, after)


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())


def _check_layout(training: Resumable, state: Mapping[str, Any], *, allow_elastic: bool) -> None:
    saved, now = state["world_size"], training.ranks.world_size
    # Saves of earlier versions know no layout.
    before, layout = state.get("layout", ""), training.layout
    if (saved, before) == (now, layout):
        return
    if not allow_elastic:
        raise RefusedResumeError(
            f"{training.run.root} was trained by {_processes(saved, before)}, and now there are "
            f"{_processes(now, layout)}: start as many, with the same --parallel.cohort, or "
            "accept a valid run that is not bit for bit the same with `peerlearn resume --allow_elastic`"
        )
    logger.warning(
        "%s go on with what %s began", _processes(now, layout), _processes(saved, before)
    )
    training.run.event("world_size_changed", before=saved, now=now)


def _processes(number: int, layout: str) -> str:
    return f"{number} processes{f' ({layout})' if layout else ''}"


def _note_environment(training: Resumable, saved: Mapping[str, Any]) -> None:
    """Warn if code, libraries or machine have changed. Equality bit for bit is not promised then."""
    changes = dict(config_changes(saved, environment()))
    if changes:
        logger.warning("resumed in another environment: %s", _listed(changes))
        training.run.event("environment_changed", changes={k: list(v) for k, v in changes.items()})
