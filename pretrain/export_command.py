"""`peerlearn export`: any network of a run, or an export, as files for timm, torchvision or Detectron2."""

import argparse
import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from peerlearn.config import ArgumentParser, load_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.evaluation.selection import ENSEMBLE, select_networks
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import CARD_FILE, KEY_PREFIX, is_key_network, network_folder
from peerlearn.runs.model_card import with_figures
from peerlearn.runs.step_folders import step_folder, step_folders
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """`peerlearn export CHECKPOINT [--format F] [--network N] [--step N] [--output DIR [--results DIR]]`.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    checkpoint: Path = arguments.checkpoint
    if arguments.network == ENSEMBLE:
        raise UsageError(
            "--network ensemble: an export is one network: choose 0, key-0, ... or all"
        )
    if arguments.results is not None and arguments.output is None:
        raise UsageError(
            "--results needs --output: the cards of a run's own exports stay as training wrote them"
        )
    if arguments.results is not None and not arguments.results.is_dir():
        raise UsageError(f"--results {arguments.results}: no such folder")
    # Imported here: --help should not wait for torch.
    from peerlearn.exchange.export_formats import convert_export, how_to_load, write_export

    with tempfile.TemporaryDirectory() as scratch:
        if RunDirectory(checkpoint).begun:
            exports = _rebuild_exports(checkpoint, arguments.network, arguments.step, Path(scratch))
            home = RunDirectory(checkpoint).exports / exports[0].parent.name
        else:
            exports = _select_exports(checkpoint, arguments.network, arguments.step)
            home = exports[0].parent
        # All of them before anything is written.
        converted = {export.name: convert_export(export, arguments.format) for export in exports}
        if arguments.results is not None:
            for export in exports:
                _add_results(converted[export.name], export, arguments.results)
    suffix = "" if arguments.format == "timm" else f"-{arguments.format}"
    folders = [(arguments.output or home) / f"{name}{suffix}" for name in converted]
    for folder, files in zip(folders, converted.values(), strict=True):
        try:
            written = write_export(folder, files, renews_card=arguments.results is not None)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}): choose another place by --output"
            ) from error
        print(f"{folder}{'' if written else ': is there already, the same'}")
    print(f"to load one: {how_to_load(folders[0], arguments.format)}")
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn export",
        description="Write networks as files for timm, torchvision or Detectron2, each with a model card. "
        "Example: peerlearn export runs/demo --format timm --network key-0",
    )
    parser.add_argument("checkpoint", type=Path, help="a run, a folder of exports, or one export")
    parser.add_argument("--format", choices=("timm", "torchvision", "detectron2"), default="timm")
    parser.add_argument(
        "--network",
        default="all",
        help="0, 1, ..., key-0 (momentum network of 0), ..., or all query networks (default)",
    )
    parser.add_argument("--step", type=int, help="of the save (default: the newest whole one)")
    parser.add_argument(
        "--output", type=Path, help="folder to write into (default: RUN/export/step-N, or beside)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of result files, such as RUN/results: the model cards tell what they hold of these weights too; "
        "needs --output (default: what training measured alone)",
    )
    return parser.parse_args(argv)


def _add_results(files: dict[str, bytes], export: Path, results: Path) -> None:
    """Add what evaluators have measured of an export to the card among its files, in place."""
    from peerlearn.evaluation.measured import measured_figures
    from peerlearn.export import export_hash

    figures = measured_figures(results, export_hash(export))
    if not figures:
        logger.warning("%s holds no result of %s: its card stays as it is", results, export.name)
    card = files.get(CARD_FILE, b"").decode(errors="replace")
    files[CARD_FILE] = with_figures(card, figures).encode()


def _select_exports(checkpoint: Path, network: str, step: int | None) -> list[Path]:
    if step is not None:
        raise UsageError(f"--step {step}: {checkpoint} is no run, and only runs have steps")
    return list(select_networks(checkpoint, network).folders.values())


def _rebuild_exports(run: Path, network: str, step: int | None, scratch: Path) -> list[Path]:
    """Write the exports of a save's networks below ``scratch``, as training would.

    Returns:
        ``scratch/step-N/net-M``, or ``net-M-key``, of the networks asked for.

    Raises:
        UserError: no such save, or none that is whole, or it is not of the run's networks.
        UsageError: no such network.
    """
    from pretrain.cohort import build_networks, load_named_state
    from pretrain.exports import TrainingImages, export_cohort, measured_row
    from pretrain.initial_weights import initial_weights_of

    save, tensors, state = _read_save(run, step)
    # config.yaml may have been changed since.
    config = _saved_config(state, save, scratch)
    names, group = _find_networks(config, run, network)
    # How training parts its batches for batch norm is not part of the networks.
    cohort_config = dataclasses.replace(config.cohort, batch_norm_splits=1)
    try:
        images = TrainingImages(**state["images"])
        cohort = build_networks(
            dataclasses.replace(config, cohort=cohort_config),
            in_chans=images.channels,
            image_size=images.image_size,
            num_classes=images.num_classes,
        )
        load_named_state(cohort, tensors[group])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{save} lacks what an export needs ({error}): is it of this run?"
        ) from error
    except ValueError as error:
        raise UserError(f"{save}: {error}") from error
    folder = scratch / step_folder(state["step"])
    prefix = KEY_PREFIX if is_key_network(names[0]) else ""
    export_cohort(
        cohort,
        folder,
        config=config,
        images=images,
        step=state["step"],
        initial=initial_weights_of(state),
        prefix=prefix,
        row=measured_row(RunDirectory(run), state["step"]),
    )
    return [folder / network_folder(name) for name in names]


def _saved_config(state: dict[str, Any], save: Path, scratch: Path) -> PretrainConfig:
    """The config that the save's networks were trained by."""
    file = RunDirectory(scratch).config
    try:
        file.write_text(yaml.safe_dump(state["config"]))
        return load_config(PretrainConfig, file)
    except (KeyError, UserError) as error:
        raise UserError(
            f"{save}: holds no config of this version of peerlearn ({error})"
        ) from error


def _find_networks(config: PretrainConfig, run: Path, network: str) -> tuple[list[str], str]:
    """The names of the networks, and the group of the save's tensors that holds them."""
    count = config.cohort.networks
    if network == "all":
        return [str(number) for number in range(count)], "networks"
    if is_key_network(network) and config.method != "moco":
        raise UsageError(
            f"--network {network}: {run} was trained by {config.method}, which has no momentum networks"
        )
    groups = {str(number): "networks" for number in range(count)}
    if config.method == "moco":
        groups |= {f"{KEY_PREFIX}{number}": "key_networks" for number in range(count)}
    if network not in groups:
        raise UsageError(
            f"--network {network}: {run} has no such network; choose from {', '.join(groups)}, all"
        )
    return [network], groups[network]


def _read_save(
    run: Path, step: int | None
) -> tuple[Path, dict[str, dict[str, "Tensor"]], dict[str, Any]]:
    """The save of a step, or the newest that is whole: its folder, tensors and state."""
    from peerlearn.runs.checkpoint import load_checkpoint

    directory = RunDirectory(run)
    saves = step_folders(directory.checkpoints)
    if step is not None:
        steps = ", ".join(str(saved) for saved, _ in saves)
        saves = [save for save in saves if save[0] == step]
        if not saves:
            exported = directory.exports / step_folder(step)
            instead = f"; its exports can be given instead: {exported}" if exported.is_dir() else ""
            raise UsageError(
                f"--step {step}: no such save in {directory.checkpoints}, which has {steps or 'none'}{instead}"
            )
    for _, folder in saves:
        try:
            return folder, *load_checkpoint(folder)
        except UserError as error:
            if step is not None:
                raise
            logger.warning("passed over a damaged checkpoint: %s", error)
    raise UserError(
        f"{directory.checkpoints}: no checkpoint is whole; exports can be given instead, as {run}/export/step-N"
    )
