"""The exports of a run that have landed: they are whole, and an evaluation should see them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from peerlearn.errors import UserError

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
    folders = run.glob("export/step-*") if networks else ()
    found = [export for folder in folders if (export := _export(folder, networks))]
    found.sort(key=lambda export: export.step)
    if training == "live":
        latest = _latest_step(run)
        found = [export for export in found if export.step <= latest]
    if every_epochs is None or not found:
        return found
    steps = every_epochs * _steps_per_epoch(run)
    last = found[-1] if training == "done" else None
    return [export for export in found if export is last or export.step % steps == 0]


def _networks(run: Path) -> int:
    """The number of networks that the run trains; 0 while it has not begun."""
    try:
        return int(yaml.safe_load((run / "config.yaml").read_text())["cohort"]["networks"])
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return 0


def _export(folder: Path, networks: int) -> Export | None:
    """The export in a folder; None if it is not whole. The folders of its networks appear one after the other."""
    digits = folder.name.removeprefix("step-")
    if not digits.isdigit():
        return None
    seals: list[Any] = []
    try:
        for network in range(networks):
            export = folder / f"net-{network}"
            seals.append(json.loads((export / "config.json").read_text())["sha256"])
            if not isinstance(seals[-1], dict) or not (export / "model.safetensors").is_file():
                return None
    except (OSError, ValueError, TypeError, LookupError):
        return None
    digest = hashlib.sha256(json.dumps(seals, sort_keys=True).encode()).hexdigest()
    return Export(folder=folder, step=int(digits), sha256=digest)


def _latest_step(run: Path) -> int:
    try:
        return int((run / "export" / "latest").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return -1


def _steps_per_epoch(run: Path) -> int:
    """The number of steps in an epoch. Training leaves out the last incomplete batch.

    Raises:
        UserError: the files of the run do not tell it.
    """
    try:
        images = json.loads((run / "env.json").read_text())["training"]["images"]
        batch = yaml.safe_load((run / "config.yaml").read_text())["batch_size"]
        return max(1, int(images) // int(batch))
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, yaml.YAMLError) as error:
        raise UserError(
            f"{run}: its env.json and config.yaml do not tell the steps of an epoch, which every_epochs needs"
        ) from error
