"""Which exported networks `--checkpoint` and `--network` mean."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peerlearn.errors import UsageError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import (
    detector_in,
    exported_networks,
    is_export,
    is_key_network,
    network_folder,
    network_in,
)
from peerlearn.runs.export_log import last_steps, trained_networks
from peerlearn.runs.score_names import ENSEMBLE as ENSEMBLE
from peerlearn.runs.step_folders import step_folder, step_of
from peerlearn.runs.training_facts import TrainingFacts

_ANY_STEP = "step-N"


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
        chosen_by_validation: whether they are those of the epoch that the run's validation chose, not the latest.
    """

    folders: dict[str, Path]
    ensemble: bool
    alone: bool
    exports: Path
    run: Path | None
    step: int
    chosen_by_validation: bool = False

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
        checkpoint: RUN (its best exports where validation chose some, else its latest), RUN/export/step-N, or the
            folder of one export.
        network: 0, 1, ..., key-0, ..., all (each query network, and their ensemble if there are several), or
            ensemble.
        ensembles: whether networks can be scored together; where they cannot, `all` is each network alone.

    Raises:
        UserError: nothing is exported there, or what `best` or `latest` names is gone, or a network.
        UsageError: no such network; the message lists those there are. Or an ensemble where there are none.
    """
    check_network(network, ensembles=ensembles)
    checkpoint = checkpoint.resolve()
    # Of a detector's training, the detector.
    checkpoint = detector_in(checkpoint) or checkpoint
    if is_export(checkpoint):
        return _select_export(checkpoint, network)
    exports, is_best = checkpoint, False
    if RunDirectory(checkpoint).begun:
        exports, is_best = _exports_of(checkpoint)
    everything = exported_networks(exports)
    if not everything:
        raise UserError(
            f"{checkpoint}: no exported networks here; give a run, RUN/export/step-N or one export"
        )
    cohort = {name: folder for name, folder in everything.items() if not is_key_network(name)}
    chosen = cohort if network in ("all", ENSEMBLE) else {network: everything.get(network)}
    if None in chosen.values():
        known = ", ".join([*everything, "all", *([ENSEMBLE] if ensembles else [])])
        raise UsageError(f"--network {network}: not in {exports}; choose from {known}")
    if network in ("all", ENSEMBLE):
        _check_all_there(exports, cohort)
    return Selection(
        folders={name: folder for name, folder in chosen.items() if folder},
        ensemble=network == ENSEMBLE or (ensembles and network == "all" and len(cohort) > 1),
        alone=network != ENSEMBLE,
        exports=exports,
        run=_run_of(exports),
        step=step_of(exports.name) or 0,
        chosen_by_validation=is_best,
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


def differences(selections: Sequence[Selection]) -> list[str]:
    """What differs, beside seeds, between trainings whose scores are to be averaged: ``step (9, 15)``, say.

    Exports that belong to no run are compared by their steps alone.
    """
    facts: list[dict[str, Any]] = [
        {
            # Validation may well choose another step for every seed.
            **({} if each.chosen_by_validation else {"step": each.step}),
            **(training_config(each.run) if each.run else {}),
        }
        for each in selections
    ]
    differing = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each[name] for each in facts if name in each]
        shown = list(dict.fromkeys(str(value) for value in values))
        if len(shown) > 1:
            differing.append(f"{name} ({', '.join(shown)})")
    return differing


def training_config(run: Path) -> dict[str, Any]:
    """The run's config by dotted keys, without those that tell runs of one kind apart."""
    import yaml

    content = yaml.safe_load(RunDirectory(run).config.read_text(encoding="utf-8"))
    values = dict(_leaves(content or {}, ""))
    return {key: value for key, value in values.items() if key not in ("run", "seed")}


def _leaves(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _select_export(folder: Path, network: str) -> Selection:
    """One export; its folder tells the network, and its run and step where it lies in a run."""
    name = network_in(folder.name) or "0"
    if network not in ("all", name):
        raise UsageError(f"--network {network}: {folder} is network {name} alone; leave it out")
    exports = folder.parent
    return Selection(
        folders={name: folder},
        ensemble=False,
        alone=True,
        exports=exports,
        run=_run_of(exports),
        step=step_of(exports.name) or 0,
    )


def _run_of(exports: Path) -> Path | None:
    run = exports.parent.parent
    return run if RunDirectory(run).begun else None


def _exports_of(run: Path) -> tuple[Path, bool]:
    """The folder of the best exports where validation chose some, or else of the last; and whether it is the best.

    Nothing stands for exports that are gone: those of another step would be scored in silence.

    Raises:
        UserError: nothing has been exported yet, or the exports are gone.
    """
    exports = RunDirectory(run).exports
    others = f"or name others by --checkpoint {exports / _ANY_STEP}"
    try:
        steps = last_steps(RunDirectory(run))
    except UserError as error:
        raise UserError(f"{error}, {others}") from error
    if not steps:
        raise UserError(f"{run}: nothing has been exported yet")
    is_best = len(steps) > 1
    folder = exports / step_folder(steps[-1])
    if not folder.is_dir():
        raise UserError(
            f"{folder} is gone, the {'best' if is_best else 'last'} exports of the run: restore it, or "
            f"`peerlearn resume {run}` writes it again, {others}"
        )
    return folder, is_best


def _check_all_there(exports: Path, cohort: Mapping[str, Path]) -> None:
    """Make sure that no network of the run is missing where all are scored.

    Raises:
        UserError: one is.
    """
    run = _run_of(exports)
    networks = trained_networks(run) if run else 0
    for number in range(networks):
        if str(number) not in cohort:
            raise UserError(
                f"{exports / network_folder(str(number))} is missing, one of {networks} networks of {run}: "
                f"restore it, or choose by --network: {', '.join(cohort)}"
            )


def results_folder(asked: str | None, selection: Selection) -> Path:
    """Where result files go: the folder asked for, else the run's, else results/ here."""
    return Path(asked) if asked else RunDirectory(selection.run or Path()).results


def run_setting(
    run: Path | None, name: Literal["dataset", "data_root", "seed"], default: Any
) -> Any:
    """A fact of the run's training; the default for exports that belong to no run."""
    return default if run is None else getattr(TrainingFacts.read(RunDirectory(run).env), name)
