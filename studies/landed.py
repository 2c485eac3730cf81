"""The exports of a run that have landed: they are whole, and an evaluation should see them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import network_folder, read_seal
from peerlearn.runs.step_folders import best_step, latest_step, step_folders
from peerlearn.runs.training_facts import TrainingFacts

Training = Literal["none", "live", "done", "dead"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """All networks of one step.

    Attributes:
        folder: folder of the export, RUN/export/step-N.
        step: number of the step, N.
        sha256: hash over the hashes of its networks.
    """

    folder: Path
    step: int
    sha256: str


def landed_exports(run: Path, *, training: Training, every_epochs: int | None) -> list[Export]:
    """The whole exports to evaluate, by step.

    While a run goes on, an export counts once export/latest names it, which is written after all networks.
    """
    networks = _networks(run)
    exports = RunDirectory(run).exports
    folders = reversed(step_folders(exports)) if networks else ()
    found = [e for step, folder in folders if (e := _export(folder, step, networks))]
    if training == "live":
        latest = latest_step(exports)
        found = [export for export in found if latest is not None and export.step <= latest]
    if every_epochs is None or not found:
        return found
    steps = every_epochs * _steps_per_epoch(run)
    kept = {found[-1].step, best_step(exports)} if training == "done" else set()
    return [export for export in found if export.step in kept or export.step % steps == 0]


def _networks(run: Path) -> int:
    """The number of networks that the run trains; 0 while it has not begun."""
    try:
        return int(
            yaml.safe_load(RunDirectory(run).config.read_text(encoding="utf-8"))["cohort"][
                "networks"
            ]
        )
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return 0


def _export(folder: Path, step: int, networks: int) -> Export | None:
    """The export in a folder; None while a network is missing. Its networks appear one after the other."""
    seals = [read_seal(folder / network_folder(str(network))) for network in range(networks)]
    if None in seals:
        return None
    digest = hashlib.sha256(json.dumps(seals, sort_keys=True).encode()).hexdigest()
    return Export(folder=folder, step=step, sha256=digest)


def _steps_per_epoch(run: Path) -> int:
    """The number of steps in an epoch. Training leaves out the last incomplete batch.

    Raises:
        UserError: the files of the run do not tell it.
    """
    try:
        facts = TrainingFacts.read(RunDirectory(run).env)
        if facts.steps_per_epoch is not None:
            return max(1, int(facts.steps_per_epoch))
        batch = yaml.safe_load(RunDirectory(run).config.read_text(encoding="utf-8"))["batch_size"]
        return max(1, int(facts.images) // int(batch))
    except (
        UserError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        yaml.YAMLError,
    ) as error:
        raise UserError(
            f"{run}: its env.json and config.yaml do not tell the steps of an epoch, which every_epochs needs"
        ) from error
