"""Which exported networks `--checkpoint` and `--network` mean."""

import json
import re
from collections.abc import Sequence
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
        exports: the folder that holds them.
        run: the run directory they come from, None for an export that stands alone.
        step: the training step they were exported at, 0 if unknown.
    """

    folders: dict[str, Path]
    ensemble: bool
    alone: bool
    exports: Path
    run: Path | None
    step: int

    def wants(self, name: str) -> bool:
        """Whether a score of that name is asked for: one network's, or that of several together."""
        return self.alone or name not in self.folders


def check_network(network: str, *, ensembles: bool) -> None:
    """Refuse an ensemble where there are none.

    Raises:
        UsageError: it is asked for.
    """
    if network == ENSEMBLE and not ensembles:
        raise UsageError(
            f"--network {ENSEMBLE}: networks are scored one by one here: choose all, or one of 0, 1, ..., key-0, ..."
        )


def select_networks(checkpoint: Path, network: str, *, ensembles: bool = True) -> Selection:
    """Resolve a run, a step's exports or one export, and a network's name.

    Args:
        checkpoint: RUN (its latest exports), RUN/export/step-N, or the folder of one export.
        network: 0, 1, ..., key-0, ..., all (each query network, and their ensemble if there are several), or
            ensemble.
        ensembles: whether networks can be scored together; where they cannot, `all` is each network alone.

    Raises:
        UserError: nothing is exported there.
        UsageError: no such network; the message lists those there are. Or an ensemble where there are none.
    """
    check_network(network, ensembles=ensembles)
    checkpoint = checkpoint.resolve()
    if (checkpoint / "model.safetensors").is_file():
        return _select_export(checkpoint, network)
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
        known = ", ".join([*everything, "all", *([ENSEMBLE] if ensembles else [])])
        raise UsageError(f"--network {network}: not in {exports}; choose from {known}")
    return Selection(
        folders={name: folder for name, folder in chosen.items() if folder},
        ensemble=network == ENSEMBLE or (ensembles and network == "all" and len(cohort) > 1),
        alone=network != ENSEMBLE,
        exports=exports,
        run=_run_of(exports),
        step=_step(exports),
    )


def select_runs(
    checkpoints: Sequence[str], network: str, *, ensembles: bool = True
) -> list[Selection]:
    """`select_networks` of one checkpoint, or of several whose scores are to be averaged network by network.

    Raises:
        UsageError: two of them are the same, or do not have the same networks.
    """
    selections = [
        select_networks(Path(checkpoint), network, ensembles=ensembles)
        for checkpoint in checkpoints
    ]
    named = dict(zip(checkpoints, selections, strict=True))
    places = [tuple(each.folders.values()) for each in selections]
    if len(set(places)) < len(places):
        raise UsageError(f"--checkpoint: two of {', '.join(checkpoints)} are the same networks")
    if len({tuple(each.folders) for each in selections}) > 1:
        have = "; ".join(f"{name} has {', '.join(each.folders)}" for name, each in named.items())
        raise UsageError(
            f"--checkpoint: only networks that all have can be averaged: {have}: choose one of those by --network"
        )
    return selections


def _select_export(folder: Path, network: str) -> Selection:
    """One export; its folder tells the network, and its run and step where it lies in a run."""
    name = _network_name(folder.name) or "0"
    if network not in ("all", name):
        raise UsageError(f"--network {network}: {folder} is network {name} alone; leave it out")
    exports = folder.parent
    return Selection(
        folders={name: folder},
        ensemble=False,
        alone=True,
        exports=exports,
        run=_run_of(exports),
        step=_step(exports),
    )


def _run_of(exports: Path) -> Path | None:
    run = exports.parent.parent
    return run if (run / "config.yaml").is_file() else None


def _latest(run: Path) -> Path:
    """The folder that `latest` names, or the newest where that file is missing or spoilt."""
    exports = run / "export"
    steps = {folder.name: folder for folder in exports.glob("step-*") if _step(folder)}
    if not steps:
        raise UserError(f"{run}: nothing has been exported yet")
    try:
        named = (exports / "latest").read_text().strip()
    except (OSError, ValueError):
        named = ""
    return steps.get(named) or max(steps.values(), key=_step)


def _named_exports(folder: Path) -> dict[str, Path]:
    """The exports by their networks' names; query networks first, by number."""
    found = {
        name: path
        for path in folder.glob("net-*")
        if (name := _network_name(path.name)) and (path / "model.safetensors").is_file()
    }
    return dict(
        sorted(found.items(), key=lambda item: (item[0].startswith("key-"), len(item[0]), item[0]))
    )


def _network_name(folder_name: str) -> str | None:
    """net-0 is "0", net-0-key is "key-0"; None for other folders."""
    match = re.fullmatch(r"net-(\d+)(-key)?", folder_name)
    return f"{'key-' if match[2] else ''}{match[1]}" if match else None


def _step(exports: Path) -> int:
    digits = exports.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def results_folder(asked: str | None, selection: Selection) -> Path:
    """Where result files go: the folder asked for, else the run's, else results/ here."""
    return Path(asked) if asked else (selection.run or Path()) / "results"


def run_setting(run: Path | None, name: str, default: Any) -> Any:
    """A fact of the run's env.json that evaluators need: dataset, data_root, seed."""
    if run is None:
        return default
    try:
        return json.loads((run / "env.json").read_text())["training"][name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'env.json'} does not tell the run's {name}") from error
