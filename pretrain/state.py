"""What a run holds in memory: how it is built, saved and exported."""

import dataclasses
import logging
import math
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.compute.optimizers import build_optimizer, optimizer_tensors
from peerlearn.compute.precision import Precision
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader
from peerlearn.errors import UserError
from peerlearn.export import check_classifier, is_whole
from peerlearn.runs.checkpoint import drop_old_checkpoints, save_checkpoint, saved_steps
from peerlearn.runs.deadline import deadline
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.environment import environment
from peerlearn.runs.export_folders import KEY_PREFIX, network_folder
from peerlearn.runs.generators import generator_states, seed_generators
from peerlearn.runs.step_folders import step_folder, write_latest
from pretrain.accuracy import AccuracyMonitor
from pretrain.bad_images import UnreadableImages
from pretrain.cohort import Cohort, build_networks, named_state
from pretrain.config import PretrainConfig
from pretrain.exports import TrainingImages, export_cohort
from pretrain.guards import StepGuard, require_finite_weights
from pretrain.methods import Method, build_method
from pretrain.monitor import Monitor
from pretrain.training_data import (
    TrainingData,
    augmentation_of,
    load_training_data,
    native_size,
)

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
    data: TrainingData
    images: TrainingImages
    loader: ViewLoader
    cohort: Cohort
    method: Method
    optimizer: torch.optim.Optimizer
    precision: Precision
    guard: StepGuard
    unreadable: UnreadableImages
    monitor: Monitor | AccuracyMonitor | None
    step: int = 0
    missed_saves: int = 0

    @property
    def dataset(self) -> ImageDataset:
        """The images that are trained on."""
        return self.data.train

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
    data = ranks.main_first(lambda: load_training_data(config, ranks))
    dataset = data.train
    augmentation = augmentation_of(config.data)
    image_size = config.data.image_size or native_size(dataset)
    supervised = config.method == "supervised"
    num_classes = dataset.num_classes if supervised else 0
    if supervised:
        _check_negatives(config, dataset)
    loader = ViewLoader(
        dataset,
        augmentation,
        backend=config.data.backend,
        image_size=image_size,
        batch_size_global=config.batch_size,
        seed=config.seed,
        device=device,
        views=1 if supervised else 2,
        images_per_class=config.supervised.images_per_class if supervised else None,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
        max_unreadable_percent=config.data.max_unreadable_percent,
    )
    cohort = build_networks(
        config,
        in_chans=dataset.channels,
        image_size=image_size,
        num_classes=num_classes,
        ranks=ranks,
    ).to(device)
    for backbone in cohort.backbones if supervised else ():
        # Before training, not at the first export.
        check_classifier(backbone, num_classes, in_chans=dataset.channels, image_size=image_size)
    method = build_method(cohort, config, ranks, steps_per_epoch=loader.steps_per_epoch)
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
        data=data,
        images=TrainingImages.of(dataset, image_size, num_classes=num_classes),
        loader=loader,
        cohort=cohort,
        method=method,
        optimizer=build_optimizer(cohort, config.optimizer, lr=config.lr),
        precision=Precision(config.precision, device, tf32=config.tf32),
        guard=StepGuard(
            [cohort, *([method.peers] if method.peers else [])],
            max_skipped_in_a_row=config.max_skipped_steps,
        ),
        unreadable=UnreadableImages(len(dataset), config.data.max_unreadable_percent),
        monitor=_build_monitor(config, data, image_size, ranks),
    )


def _build_monitor(
    config: PretrainConfig, data: TrainingData, image_size: int, ranks: Ranks
) -> Monitor | AccuracyMonitor | None:
    if not config.monitor.every_epochs or not ranks.main:
        return None
    if config.method == "supervised":
        return AccuracyMonitor(config, data, image_size=image_size, device=ranks.device)
    return Monitor(
        config,
        data.train,
        data.root,
        augmentation=augmentation_of(config.data),
        image_size=image_size,
        device=ranks.device,
    )


def _check_negatives(config: PretrainConfig, dataset: ImageDataset) -> None:
    """Every anchor must have as many negatives as are to be drawn."""
    asked, m = config.supervised.num_negatives, config.supervised.images_per_class
    if asked is None or m is None or dataset.labels is None:
        return
    classes = len(dataset.labels.unique())
    largest = m * math.ceil(config.batch_size / m / classes)
    if asked > config.batch_size - largest:
        raise UserError(
            f"supervised.num_negatives {asked}: in a batch of {config.batch_size} images of {classes} classes an "
            f"anchor may have only {config.batch_size - largest} negatives: lower it, or raise batch_size"
        )


def _check_share(config: PretrainConfig, ranks: Ranks) -> None:
    """Each rank's part of a micro-batch must give batch norm something to normalise."""
    parts = ranks.world_size * config.accumulation_steps
    if config.batch_size % parts or config.batch_size // parts < 2:
        raise UserError(
            f"batch_size {config.batch_size} must divide into {ranks.world_size} processes x accumulation_steps "
            f"{config.accumulation_steps} = {parts} parts of at least 2 images"
        )


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
    if not all(is_whole(folder / network_folder(str(m))) for m in networks):
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
        groups[KEY_PREFIX] = training.method.peers
    try:
        for prefix, cohort in groups.items():
            export_cohort(
                cohort,
                folder,
                config=config,
                images=training.images,
                step=training.step,
                prefix=prefix,
            )
        write_latest(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        message = f"{folder} could not be written ({error.strerror})"
        if must:
            raise UserError(
                f"{message}: make room, then `peerlearn resume {run.root}` writes it"
            ) from error
        logger.warning("%s: training goes on without this export", message)
        run.event("export_missed", step=training.step, reason=error.strerror)
