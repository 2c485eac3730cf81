"""Which exported networks `--checkpoint` and `--network` mean."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlearn.errors import UsageError, UserError

ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Exported networks to evaluate.

    Attributes:
        folders: the export folder of each network, by its name: "0", "1", "key-0", ...
        ensemble: also (or only) score the networks together.
        alone: score each network on its own.
        run: the run directory they come from, None for an export that stands alone.
        step: the training step they were exported at, 0 if unknown.
    """

    folders: dict[str, Path]
    ensemble: bool
    alone: bool
    run: Path | None
    step: int


def select_networks(checkpoint: Path, network: str) -> Selection:
    """Resolve a run, a step's exports or one export, and a network's name.

    Args:
        checkpoint: RUN (its latest exports), RUN/export/step-N, or the folder of one export.
        network: 0, 1, ..., key-0, ..., all (each query network, and their ensemble if there are several), or
            ensemble.

    Raises:
        UserError: nothing is exported there.
        UsageError: no such network; the message lists those there are.
    """
    if (checkpoint / "model.safetensors").is_file():
        return Selection(folders={"0": checkpoint}, ensemble=False, alone=True, run=None, step=0)
    exports = checkpoint
    if (checkpoint / "config.yaml").is_file():
        exports = _latest(checkpoint)
    everything = _named_exports(exports)
    if not everything:
        raise UserError(
            f"{checkpoint}: no exported networks here; give a run, RUN/export/step-N or one export"
        )
    cohort = {name: folder for name, folder in everything.items() if not name.startswith("key-")}
    chosen = cohort if network in ("all", ENSEMBLE) else {network: everything.get(network)}
    if None in chosen.values():
        known = ", ".join([*everything, "all", ENSEMBLE])
        raise UsageError(f"--network {network}: not in {exports}; choose from {known}")
    run = exports.parent.parent
    return Selection(
        folders={name: folder for name, folder in chosen.items() if folder},
        ensemble=network == ENSEMBLE or (network == "all" and len(cohort) > 1),
        alone=network != ENSEMBLE,
        run=run if (run / "config.yaml").is_file() else None,
        step=_step(exports),
    )


def _latest(run: Path) -> Path:
    try:
        return run / "export" / (run / "export" / "latest").read_text().strip()
    except OSError as error:
        raise UserError(f"{run}: nothing has been exported yet") from error


def _named_exports(folder: Path) -> dict[str, Path]:
    """net-0 is "0", net-0-key is "key-0"; query networks first, by number."""
    found = {}
    for path in folder.glob("net-*"):
        number, _, kind = path.name.removeprefix("net-").partition("-")
        if (path / "model.safetensors").is_file():
            found[(kind, int(number))] = path
    return {f"{kind}-{n}" if kind else str(n): found[kind, n] for kind, n in sorted(found)}


def _step(exports: Path) -> int:
    digits = exports.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def run_setting(run: Path | None, name: str, default: Any) -> Any:
    """A fact of the run's env.json that evaluators need: dataset, data_root, seed."""
    if run is None:
        return default
    try:
        return json.loads((run / "env.json").read_text())["training"][name]
    except (OSError, KeyError) as error:
        raise UserError(f"{run / 'env.json'} does not tell the run's {name}") from error
