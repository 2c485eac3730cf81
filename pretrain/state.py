"""What a run holds in memory: how it is built, saved, restored and exported."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peerlearn.augment import AUGMENTATIONS, Augmentation
from peerlearn.checkpoint import (
    drop_old_checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_steps,
    step_folder,
)
from peerlearn.datasets import ImageDataset, load_dataset
from peerlearn.device import choose_device
from peerlearn.errors import UserError
from peerlearn.export import save_export
from peerlearn.loader import ViewLoader
from peerlearn.run_dir import RunDirectory, write_text
from pretrain.cohort import Cohort, build_cohort, load_named_state, named_state
from pretrain.config import DataConfig, PretrainConfig
from pretrain.losses import NonFiniteError
from pretrain.methods import Method, build_method
from pretrain.monitor import Monitor
from pretrain.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors

# The side of the views of image files, unless the config says otherwise.
IMAGE_FILE_SIZE = 224

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """Everything a run holds in memory. ``step`` counts the optimiser steps done."""

    config: PretrainConfig
    run: RunDirectory
    device: torch.device
    dataset: ImageDataset
    data_root: str | None
    image_size: int
    loader: ViewLoader
    cohort: Cohort
    method: Method
    optimizer: torch.optim.Optimizer
    monitor: Monitor | None
    step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch


def build(config: PretrainConfig, run: RunDirectory) -> Training:
    """Load the data and create the networks of a run, at step 0.

    Raises:
        UserError: data, device or networks that cannot be had as the config asks.
    """
    device = choose_device(config.device)
    dataset, data_root = load_training_images(config.data)
    augmentation = _augmentation(config.data)
    image_size = config.data.image_size or native_size(dataset)
    loader = ViewLoader(
        dataset,
        augmentation,
        backend=config.data.backend,
        image_size=image_size,
        batch_size_global=config.batch_size,
        seed=config.seed,
        device=device,
        workers=config.data.workers,
    )
    cohort = build_cohort(
        config.cohort, in_chans=dataset.channels, image_size=image_size, seed=config.seed
    ).to(device)
    monitor = None
    if config.monitor.every_epochs:
        monitor = Monitor(
            config,
            dataset,
            data_root,
            augmentation=augmentation,
            image_size=image_size,
            device=device,
        )
    return Training(
        config=config,
        run=run,
        device=device,
        dataset=dataset,
        data_root=data_root,
        image_size=image_size,
        loader=loader,
        cohort=cohort,
        method=build_method(cohort, config, device),
        optimizer=build_optimizer(cohort, config.optimizer, lr=config.lr),
        monitor=monitor,
    )


def load_training_images(data: DataConfig) -> tuple[ImageDataset, str | None]:
    """The dataset of the config, or its fallback with a line that says so; and the root it was read from.

    Raises:
        UserError: neither can be had.
    """
    try:
        return load_dataset(data.name, data.split, root=data.root, limit=data.limit), data.root
    except UserError as error:
        if data.fallback is None:
            raise
        print(f"{data.name} cannot be had ({error}): training on {data.fallback} instead")
        return load_dataset(data.fallback, data.split, limit=data.limit), None


def _augmentation(data: DataConfig) -> Augmentation:
    recipe = AUGMENTATIONS[data.augmentation]
    if data.crop_scale is None:
        return recipe
    smallest, largest = data.crop_scale
    return dataclasses.replace(recipe, crop_scale=(smallest, largest))


def native_size(dataset: ImageDataset) -> int:
    """The side of images held in memory, 224 for image files."""
    return dataset.images.shape[-1] if isinstance(dataset.images, Tensor) else IMAGE_FILE_SIZE


def save(training: Training) -> None:
    """Save everything a later start needs to go on as if nothing had happened.

    Raises:
        NonFiniteError: a network holds NaN or Inf; nothing poisoned is saved.
    """
    _require_finite_weights(training.cohort)
    tensors = {
        "networks": named_state(training.cohort),
        "optimizer": optimizer_tensors(training.optimizer),
        **training.method.state_tensors(),
    }
    state = {"step": training.step, "dataset": training.dataset.fingerprint()}
    save_checkpoint(training.run.checkpoints, training.step, tensors, state)
    drop_old_checkpoints(training.run.checkpoints, training.config.checkpoint.keep_last)


def resume_latest(training: Training) -> None:
    """Continue from the newest save that is whole, from step 0 if nothing was ever saved.

    A damaged save is passed over with a warning and an event. Rows of metrics.jsonl after the step are cut.

    Raises:
        UserError: there are saves, but none is whole; or they are of other networks or data.
    """
    folders = saved_steps(training.run.checkpoints)
    for folder in folders:
        try:
            content = load_checkpoint(folder)
        except UserError as error:
            logger.warning("passed over a damaged checkpoint: %s", error)
            training.run.event("checkpoint_damaged", folder=folder.name, reason=str(error))
            continue
        _restore(training, folder, *content)
        break
    else:
        if folders:
            raise UserError(
                f"{training.run.checkpoints}: no checkpoint is whole: restore one from a backup, "
                "or start a new run"
            )
    training.run.cut_metrics(training.step)


def _restore(
    training: Training, folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    if state["dataset"] != training.dataset.fingerprint():
        raise UserError(
            f"{folder}: was trained on other images than {training.dataset.name} holds now: "
            "restore the data, or start a new run"
        )
    try:
        load_named_state(training.cohort, tensors["networks"])
        training.method.load_state_tensors(tensors)
        load_optimizer_tensors(training.optimizer, tensors["optimizer"])
    except KeyError as error:
        raise UserError(
            f"{folder} lacks {error}: is config.yaml that of another method?"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    training.step = state["step"]


def _require_finite_weights(cohort: Cohort) -> None:
    for name, parameter in cohort.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"{name} holds NaN or Inf: lower base_lr, and look at the losses in metrics.jsonl"
            )


def export(training: Training) -> None:
    """Write every network's backbone as a folder that timm loads, then ``export/latest``.

    Raises:
        NonFiniteError: a network holds NaN or Inf.
    """
    _require_finite_weights(training.cohort)
    folder = training.run.exports / step_folder(training.step)
    config = training.config
    groups = {"": training.cohort}
    if config.checkpoint.export_key_networks and training.method.peers is not None:
        groups["-key"] = training.method.peers
    for suffix, cohort in groups.items():
        for m, (backbone, name) in enumerate(
            zip(cohort.backbones, config.cohort.architectures(), strict=True)
        ):
            save_export(
                backbone,
                folder / f"net-{m}{suffix}",
                architecture=name,
                in_chans=training.dataset.channels,
                small_images=config.cohort.small_images,
                image_size=training.image_size,
                mean=training.dataset.mean,
                std=training.dataset.std,
                provenance=_provenance(training, m),
            )
    write_text(training.run.exports / "latest", folder.name + "\n")


def _provenance(training: Training, network: int) -> dict[str, Any]:
    config = training.config
    return {
        "method": config.method,
        "networks": config.cohort.networks,
        "network": network,
        "dataset": training.dataset.name,
        "split": training.dataset.split,
        "images": len(training.dataset),
        "step": training.step,
        "epochs": config.epochs,
        "seed": config.seed,
    }
