"""What a run holds in memory: how it is built, saved and exported."""

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peerlearn.augment import AUGMENTATIONS, Augmentation
from peerlearn.checkpoint import (
    drop_old_checkpoints,
    save_checkpoint,
    saved_steps,
    step_folder,
)
from peerlearn.datasets import ImageDataset, load_dataset
from peerlearn.dist import Ranks
from peerlearn.errors import UserError
from peerlearn.export import is_whole
from peerlearn.loader import ViewLoader
from peerlearn.run_dir import RunDirectory, environment, write_text
from pretrain.bad_images import UnreadableImages
from pretrain.cohort import Cohort, build_cohort, named_state
from pretrain.config import DataConfig, PretrainConfig
from pretrain.deadline import deadline
from pretrain.exports import TrainingImages, export_cohort
from pretrain.generators import generator_states, seed_generators
from pretrain.guards import StepGuard, require_finite_weights
from pretrain.methods import Method, build_method
from pretrain.monitor import Monitor
from pretrain.optimizers import build_optimizer, optimizer_tensors
from pretrain.precision import Precision

# The side of the views of image files, unless the config says otherwise.
IMAGE_FILE_SIZE = 224

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """Everything a run holds in memory.

    Attributes:
        step: the optimiser steps done.
        missed_saves: how many saves in a row the disk did not take.
        monitor: on the main rank, where the config asks for one.
    """

    config: PretrainConfig
    run: RunDirectory
    ranks: Ranks
    dataset: ImageDataset
    data_root: str | None
    images: TrainingImages
    loader: ViewLoader
    cohort: Cohort
    method: Method
    optimizer: torch.optim.Optimizer
    precision: Precision
    guard: StepGuard
    unreadable: UnreadableImages
    monitor: Monitor | None
    step: int = 0
    missed_saves: int = 0

    @cached_property
    def dataset_fingerprint(self) -> str:
        """Of the images as they were at the start; it takes seconds for gigabytes."""
        return self.dataset.fingerprint()

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch


def build(config: PretrainConfig, run: RunDirectory, ranks: Ranks) -> Training:
    """Load the data and create the networks of a run, at step 0.

    Raises:
        UserError: data, device or networks that cannot be had as the config asks.
    """
    device = ranks.device
    _check_share(config, ranks)
    dataset, data_root = ranks.main_first(lambda: load_training_images(config.data, ranks))
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
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
        max_unreadable_percent=config.data.max_unreadable_percent,
    )
    cohort = build_cohort(
        config.cohort,
        in_chans=dataset.channels,
        image_size=image_size,
        seed=config.seed,
        ranks=ranks,
    ).to(device)
    monitor = None
    if config.monitor.every_epochs and ranks.main:
        monitor = Monitor(
            config,
            dataset,
            data_root,
            augmentation=augmentation,
            image_size=image_size,
            device=device,
        )
    method = build_method(cohort, config, ranks)
    if config.method == "moco" and config.queue.size >= len(dataset):
        logger.warning(
            "queue.size %d is more than the other images of %s there are (%d in all): images will meet keys of "
            "their own as negatives; lower queue.size",
            config.queue.size,
            dataset.name,
            len(dataset),
        )
    seed_generators(config.seed, ranks.rank)
    return Training(
        config=config,
        run=run,
        ranks=ranks,
        dataset=dataset,
        data_root=data_root,
        images=TrainingImages.of(dataset, image_size),
        loader=loader,
        cohort=cohort,
        method=method,
        optimizer=build_optimizer(cohort, config.optimizer, lr=config.lr),
        precision=Precision(config, device),
        guard=StepGuard(
            [cohort, *([method.peers] if method.peers else [])],
            max_skipped_in_a_row=config.max_skipped_steps,
        ),
        unreadable=UnreadableImages(len(dataset), config.data.max_unreadable_percent),
        monitor=monitor,
    )


def _check_share(config: PretrainConfig, ranks: Ranks) -> None:
    """Each rank's part of a micro-batch must give batch norm something to normalise."""
    parts = ranks.world_size * config.accumulation_steps
    if config.batch_size % parts or config.batch_size // parts < 2:
        raise UserError(
            f"batch_size {config.batch_size} must divide into {ranks.world_size} processes x accumulation_steps "
            f"{config.accumulation_steps} = {parts} parts of at least 2 images"
        )


def load_training_images(data: DataConfig, ranks: Ranks) -> tuple[ImageDataset, str | None]:
    """The dataset of the config, or its fallback with a line that says so; and the root it was read from.

    Raises:
        UserError: neither can be had.
    """
    try:
        return load_dataset(data.name, data.split, root=data.root, limit=data.limit), data.root
    except UserError as error:
        if data.fallback is None:
            raise
        if ranks.main:
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


def save(training: Training, *, attempt: int, must: bool) -> None:
    """Save everything a later start needs to go on as if nothing had happened. All ranks call it together.

    A disk that does not take the save costs this save only: the older ones stay, a line and an event say so.

    Args:
        training: what to save.
        attempt: which start of the run this is.
        must: there will be no later save.

    Raises:
        NonFiniteError: a network holds NaN or Inf; nothing poisoned is saved.
        UserError: too many saves in a row have failed, or the one that must not.
    """
    ranks, run, config = training.ranks, training.run, training.config
    require_finite_weights(training.cohort)
    rng = {
        f"rank-{rank}.{name}": state
        for name, tensor in generator_states(training.device).items()
        for rank, state in enumerate(ranks.gather(tensor.to(training.device).unsqueeze(0)))
    }
    unreadable = training.unreadable.state()

    def write() -> str | None:
        start = time.monotonic()
        run.check_there()
        try:
            with deadline(
                config.checkpoint.max_seconds,
                f"{run.checkpoints}: the save of step {training.step}",
            ):
                run.sync_metrics()
                save_checkpoint(
                    run.checkpoints,
                    training.step,
                    {**_tensors(training), "rng": rng},
                    {**_state(training), "attempt": attempt, "unreadable": unreadable},
                )
        except OSError as error:
            return error.strerror or str(error)
        run.event("saved", step=training.step, seconds=round(time.monotonic() - start, 3))
        drop_old_checkpoints(
            run.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
        )
        return None

    reason = ranks.from_main(write)
    if reason is None:
        training.missed_saves = 0
        return
    training.missed_saves += 1
    message = f"{run.checkpoints}: step {training.step} could not be saved ({reason})"
    if must or training.missed_saves >= config.checkpoint.max_missed:
        raise ranks.told_once(
            UserError(
                f"{message}, miss number {training.missed_saves} in a row: make room, then "
                f"`peerlearn resume {run.root}` goes on from the save before it"
            )
        )
    if ranks.main:
        logger.warning("%s: training goes on, the older saves stand", message)
        run.event("save_missed", step=training.step, reason=reason)


def check_room(training: Training) -> None:
    """Make sure that the disk has room for the next save, and at the start of a run for one more to stand beside it.

    Raises:
        UserError: it has not.
    """
    saves = 1 if saved_steps(training.run.checkpoints) else 2
    tensors = [t for group in _tensors(training).values() for t in group.values()]
    if training.step == 0:
        # The optimiser's state comes into being at the first step.
        parameters = list(training.cohort.parameters())
        tensors += parameters * (2 if training.config.optimizer.name == "adamw" else 1)
    size = sum(tensor.nbytes for tensor in tensors)
    root = training.run.root.absolute()
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    if free < saves * size:
        raise UserError(
            f"{training.run.root}: no space: {saves} x {size / 2**20:,.1f} MiB are needed for saves, "
            f"{free / 2**20:,.1f} MiB are free; make room, or choose another folder by --run"
        )


def _tensors(training: Training) -> dict[str, dict[str, Tensor]]:
    return {
        "networks": named_state(training.cohort),
        "optimizer": optimizer_tensors(training.optimizer),
        **training.method.state_tensors(),
    }


def _state(training: Training) -> dict[str, Any]:
    epoch, step_in_epoch = divmod(training.step, training.steps_per_epoch)
    return {
        "step": training.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "config": dataclasses.asdict(training.config),
        "dataset": training.dataset_fingerprint,
        "images": training.images.as_json(),
        "world_size": training.ranks.world_size,
        "environment": environment(),
        "loss_scaling": training.precision.state(),
        "guard": training.guard.state(),
        "metrics_rows": training.run.metrics_count,
    }


def export_last_again(training: Training) -> None:
    """Where a run that was killed, or tampered with, lacks the exports of its last step, or they are damaged."""
    folder = training.run.exports / step_folder(training.step)
    networks = range(training.config.cohort.networks)
    if not all(is_whole(folder / f"net-{m}") for m in networks):
        export(training, must=True)


def export(training: Training, *, must: bool) -> None:
    """Write every network's backbone as a folder that timm loads, then ``export/latest``.

    A disk that does not take it costs this export, unless there ``must`` be one; a line and an event say so.

    Raises:
        NonFiniteError: a network holds NaN or Inf.
        UserError: the disk did not take an export that must be.
    """
    require_finite_weights(training.cohort)
    run, config = training.run, training.config
    run.check_there()
    folder = run.exports / step_folder(training.step)
    groups = {"": training.cohort}
    if config.checkpoint.export_key_networks and training.method.peers is not None:
        groups["-key"] = training.method.peers
    try:
        for suffix, cohort in groups.items():
            export_cohort(
                cohort,
                folder,
                config=config,
                images=training.images,
                step=training.step,
                suffix=suffix,
            )
        write_text(run.exports / "latest", folder.name + "\n")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        message = f"{folder} could not be written ({error.strerror})"
        if must:
            raise UserError(
                f"{message}: make room, then `peerlearn resume {run.root}` writes it"
            ) from error
        logger.warning("%s: training goes on without this export", message)
        run.event("export_missed", step=training.step, reason=error.strerror)
