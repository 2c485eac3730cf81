"""What a run holds in memory: how it is built, what of it is saved, and how it is exported."""

import logging
import math
import shutil
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.compute.gradient_average import GradientAverage
from peerlearn.compute.guards import StepGuard, require_finite_weights
from peerlearn.compute.optimizers import (
    build_optimizer,
    bytes_to_come,
    load_optimizer_tensors,
    optimizer_tensors,
)
from peerlearn.compute.precision import Precision
from peerlearn.compute.resumable import Resumable
from peerlearn.data.bad_images import UnreadableImages
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.export import check_classifier, is_whole
from peerlearn.runs.deadline import deadline
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import KEY_PREFIX, network_folder
from peerlearn.runs.export_log import EXPORTED, MISSED
from peerlearn.runs.step_folders import (
    best_step,
    latest_step,
    step_folder,
    write_best,
    write_latest,
)
from peerlearn.runs.terminal import say
from pretrain.cohort import Cohort, build_networks, load_named_state, named_state
from pretrain.compiled import Compiled
from pretrain.config import PretrainConfig
from pretrain.exchange import Exchange
from pretrain.exports import TrainingImages, export_cohort, measured_row
from pretrain.initial_weights import (
    InitialWeights,
    check_alike,
    check_unchanged,
    initial_weights_of,
    load_initial_weights,
    remarks,
)
from pretrain.method import Method, Watch, build_method, method_class, networks_of
from pretrain.online_probe import build_probe
from pretrain.teams import check_not_shared, check_share, placement, teams_of
from pretrain.terms import mutual_weight
from pretrain.training_data import (
    TrainingData,
    load_training_data,
    view_recipes,
)
from pretrain.whole_cohort import whole_on_main

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training(Resumable):
    """Everything a run holds in memory.

    Attributes:
        step: number of optimiser steps done.
        watch: what is measured after epochs, on the main rank where the config asks for it.
        results: final accuracies by network, of methods that measure some.
        unwritten_row: row of the newest step, which still lacks what the monitor measures; None once it is written.
        initial_weights: what the networks started from, of each that did not start from random weights.
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
    gradient_average: GradientAverage
    precision: Precision
    guard: StepGuard
    unreadable: UnreadableImages
    watch: Watch | None
    step: int = 0
    results: dict[str, ClassificationScores] = field(default_factory=dict)
    unwritten_row: dict[str, float] | None = None
    initial_weights: list[InitialWeights] = field(default_factory=list)

    @property
    def dataset(self) -> ImageDataset:
        """The images that are trained on."""
        return self.data.train

    @property
    def dataset_name(self) -> str:
        return self.dataset.title

    @cached_property
    def fingerprint(self) -> str:
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

    @property
    def mutual_weight(self) -> float:
        """Factor of the terms between networks in the next step."""
        return mutual_weight(self.step, self.config, steps_per_epoch=self.steps_per_epoch)

    def measurings_left(self, step: int) -> int:
        every, epochs = self.config.monitor.every_epochs, self.config.epochs
        if not every:
            return 0
        done = step // self.steps_per_epoch
        # After every so many epochs, and after the last.
        return math.ceil(epochs / every) - done // every if done < epochs else 0

    def headline(self) -> str:
        """What is trained on what, for people."""
        config = self.config
        return (
            f"{config.method}, {config.cohort.networks} x {config.cohort.backbones} on "
            f"{len(self.dataset):,} images of {self.dataset.title}"
        )

    def initialise(self) -> None:
        config, images = self.config.cohort, self.images
        self.initial_weights = load_initial_weights(
            self.cohort, config, in_chans=images.channels, image_size=images.image_size
        )
        check_alike(self.initial_weights, self.ranks)
        self.ranks.from_main(lambda: check_unchanged(self.initial_weights, self.run))
        if self.method.peers is not None:
            load_named_state(self.method.peers, named_state(self.cohort))
        if self.ranks.main:
            for line in remarks(self.cohort, self.initial_weights):
                say(line)

    def how_to_look(self, step: int) -> str:
        if self.config.parallel.is_split:
            return ""
        return f"`peerlearn replay {self.run.root} --step {step + 1} --anomaly` shows where"

    def trained(self) -> nn.Module:
        return self.cohort

    @property
    def layout(self) -> str:
        return self.config.parallel.layout(self.config.cohort.networks, self.ranks.world_size)

    def whole(self) -> AbstractContextManager[None]:
        probe, config = self.method.probe, self.config
        peers = config.monitor.key_networks or config.checkpoint.export_key_networks
        return whole_on_main(
            networks_of(self.method) if peers else [self.cohort],
            [probe.module] if probe else [],
            self.method.exchange,
        )

    def whole_tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors, exchange = self.tensors(), self.method.exchange
        if not exchange.is_split:
            return tensors
        own = {
            f"{group}/{name}": tensor
            for group, named in tensors.items()
            for name, tensor in named.items()
            if exchange.team.main and not tensor.is_meta
        }
        whole: dict[str, dict[str, Tensor]] = {group: {} for group in tensors}
        for key, tensor in self.ranks.to_main(own).items():
            group, _, name = key.partition("/")
            whole[group][name] = tensor
        return whole

    def bytes_to_come(self) -> int:
        probe = self.method.probe
        return bytes_to_come(self.optimizer) + (probe.bytes_to_come() if probe else 0)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        probe = self.method.probe
        return {
            "networks": named_state(self.cohort),
            "optimizer": optimizer_tensors(self.optimizer),
            **self.method.state_tensors(),
            **(probe.state_tensors() if probe else {}),
        }

    def state(self) -> dict[str, Any]:
        return {
            "images": self.images.as_json(),
            "loss_scaling": self.precision.state(),
            "unreadable": self.unreadable.state(),
            "unwritten_row": self.unwritten_row,
            "initial_weights": [each.as_json() for each in self.initial_weights],
        }

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        load_named_state(self.cohort, tensors["networks"])
        self.method.load_state_tensors(dict(tensors))
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        if self.method.probe is not None:
            self.method.probe.load_state_tensors(dict(tensors))
        self.precision.load_state(state["loss_scaling"])
        self.unreadable.load_state(state["unreadable"])
        self.unwritten_row = state.get("unwritten_row")
        self.initial_weights = initial_weights_of(state)


def build(config: PretrainConfig, run: RunDirectory, ranks: Ranks) -> Training:
    """Load the data and create the networks of a run, at step 0.

    Raises:
        UserError: data, device or networks that cannot be had as the config asks.
    """
    device = ranks.device
    check_share(config, ranks.world_size)
    teams = teams_of(config, ranks.world_size)
    exchange = Exchange(ranks, teams)
    kind = method_class(config.method)
    data = ranks.main_first(lambda: load_training_data(config, ranks, kind.labels))
    dataset = data.train
    augmentation = view_recipes(config, kind.views)
    image_size = data.image_size
    num_classes = dataset.num_classes if kind.labels == "classified" else 0
    loader = ViewLoader(
        dataset,
        augmentation,
        sampler=kind.sampler(config, dataset),
        backend=data.backend,
        image_size=image_size,
        seed=config.seed,
        device=device,
        views=kind.views,
        rank=exchange.team.rank,
        world_size=exchange.team.world_size,
        workers=config.data.workers,
        quiet=not ranks.main,
        max_unreadable_percent=config.data.max_unreadable_percent,
    )
    kind.check(config, data)
    cohort = build_networks(
        config,
        in_chans=dataset.channels,
        image_size=image_size,
        num_classes=num_classes,
        ranks=exchange.team,
    )
    check_not_shared(cohort.shared_stages, config)
    if exchange.is_split:
        cohort.keep(exchange.networks)
        hosts = ranks.collect(socket.gethostname())
        for line in placement(teams, hosts) if ranks.main else ():
            say(line)
    cohort.to_device(device)
    for backbone in cohort.backbones if num_classes else ():
        # Before training, not at the first export.
        check_classifier(backbone, num_classes, in_chans=dataset.channels, image_size=image_size)
    if config.compile:
        # The method's copies of the cohort share it.
        cohort.compiled = Compiled()
        if ranks.main:
            print("the first step compiles the networks, which takes a minute or more")
    method = build_method(
        cohort, config, ranks, steps_per_epoch=loader.steps_per_epoch, exchange=exchange
    )
    if config.monitor.linear:
        method.probe = build_probe(cohort, dataset, exchange.team, main=ranks.main)
    watch = None
    if config.monitor.every_epochs and ranks.main:
        watch = method.build_monitor(data, augmentation=augmentation, image_size=image_size)
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
        gradient_average=GradientAverage(
            (p for p in cohort.parameters() if not p.is_meta), exchange.team
        ),
        precision=Precision(config.precision, device, tf32=config.tf32),
        guard=StepGuard(networks_of(method), max_skipped_in_a_row=config.max_skipped_steps),
        unreadable=UnreadableImages(len(dataset), config.data.max_unreadable_percent),
        watch=watch,
    )


def export_last_again(training: Training) -> None:
    """Where a run that was killed, or tampered with, lacks exports of its last or best step, or they are damaged."""
    best, exports = training.method.best, training.run.exports
    named = [(training.step, latest_step(exports))]
    if best and best.step:
        named.append((best.step, best_step(exports)))
    if not all(step == pointed and _is_exported(training, step) for step, pointed in named):
        export(training, must=True)


def _is_exported(training: Training, step: int) -> bool:
    folder = training.run.exports / step_folder(step)
    networks = range(training.config.cohort.networks)
    return all(is_whole(folder / network_folder(str(m))) for m in networks)


def export(training: Training, *, must: bool) -> None:
    """Write every network's backbone as a folder that timm loads, then ``export/latest``.

    Where the method chooses by validation, the networks of the best epoch so far are written too, then
    ``export/best``. A disk that does not take it costs this export, unless there ``must`` be one; a line and an event
    say so.

    Raises:
        NonFiniteError: a network holds NaN or Inf.
        UserError: the disk did not take an export that must be.
    """
    require_finite_weights(training.cohort)
    run, config = training.run, training.config
    run.check_there()
    folder = run.exports / step_folder(training.step)
    best, peers = training.method.best, training.method.peers
    write = partial(
        export_cohort, config=config, images=training.images, initial=training.initial_weights
    )
    try:
        with deadline(config.checkpoint.max_seconds, f"{folder}: the export"):
            row = measured_row(run, training.step)
            write(training.cohort, folder, step=training.step, row=row)
            if config.checkpoint.export_key_networks and peers is not None:
                write(peers, folder, step=training.step, prefix=KEY_PREFIX, row=row)
            write_latest(folder)
            run.event(EXPORTED, step=training.step)
            if best is not None and best.step:
                chosen = run.exports / step_folder(best.step)
                if not _is_exported(training, best.step):
                    row = measured_row(run, best.step)
                    write(best.cohort, chosen, step=best.step, row=row)
                write_best(chosen)
                run.event(EXPORTED, step=best.step, best=True)
    except OSError as error:
        # What `latest` names by now is whole. Then it was the best one that the disk did not take.
        if latest_step(run.exports) != training.step:
            shutil.rmtree(folder, ignore_errors=True)
        message = f"{folder} could not be written ({error.strerror})"
        if must:
            raise UserError(
                f"{message}: make room, then `peerlearn resume {run.root}` writes it"
            ) from error
        logger.warning("%s: training goes on without this export", message)
        run.event(MISSED, step=training.step, reason=error.strerror)
