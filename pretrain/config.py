"""The config of a pretraining run. Every key of a YAML file and of the command line is a field here."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from peerlearn.compute.device_names import require_device
from peerlearn.compute.optimizers import OptimizerConfig
from peerlearn.compute.schedules import ScheduleConfig
from peerlearn.config import added, changeable, require
from peerlearn.data.published import DatasetName
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation
from peerlearn.data.views_config import ViewsConfig, recipes_of
from peerlearn.runs.save_config import SaveConfig
from pretrain.cohort_config import CohortConfig
from pretrain.method_config import PrototypicalConfig, QueueConfig, SupervisedConfig
from pretrain.parallel_config import ParallelConfig

Backend = Literal["memory", "folder", "ffcv"]
Term = Literal["scl_hard", "scl_soft", "icl_hard", "icl_soft"]

# The class of every method (`pretrain.method`), by name: --help must not wait for torch, which they need.
METHODS = {
    "moco": "pretrain.methods:MoCo",
    "simclr": "pretrain.methods:SimCLR",
    "supervised": "pretrain.supervised:Supervised",
    "prototypical": "pretrain.prototypical:Prototypical",
}
if TYPE_CHECKING:
    AugmentationName = str
    MethodName = str
else:
    AugmentationName = Literal[tuple(AUGMENTATIONS)]
    MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images and how they are read and augmented.

    Attributes:
        name: name of the dataset; folder = images of one's own, in data.root.
        root: folder of the dataset; null = the usual places, then a download where one exists.
        split: split to train on: train; for stl10 also unlabeled and train+unlabeled.
        fallback: dataset to take where `name` is not to be had, with a line that says so; null = stop. A root that is
            given, and a name that is given on the command line, make it null.
        backend: place that the images of a batch come from: memory (images decoded once), folder (files decoded by
            workers) or ffcv (a packed file, decoded by threads); null = ffcv where `packed` is given, else memory for
            images of one size that take at most 2 GiB, else folder.
        packed: packed file of the split, which `peerlearn data build` makes; null = none.
        limit: number of training images, the first ones; null = all.
        validation_percent: percentage of every class that is held out, drawn by the seed. The method supervised is
            watched on it, so that the test split is looked at once, at the end; 0 = none.
        shots: number of training images of every class, drawn by the seed; null = all.
        augmentation: recipe of the random views, of which `data.views` may change every value: moco_v1, moco_v2,
            moco_cifar, byol (two unlike views), crop_flip, supervised_cifar (pad, crop, flip), supervised_imagenet
            (crop of 8 to 100 % of the area, flip) or none (the largest centred square).
        crop_scale: smallest and largest share of the image's area that a crop keeps; null = the recipe's own.
        views: values in the place of the recipe's.
        image_size: side of the views in pixels; null = the dataset's own; for image files the usual length of their
            shorter side, but at most 224.
        workers: number of processes that read images; of threads with the backend ffcv.
        max_unreadable_percent: largest percentage of the images that may be unreadable before the run stops. Another
            image takes the place of an unreadable one, and events.jsonl lists it.
    """

    name: DatasetName = "fashion_mnist"
    root: str | None = changeable(None)
    split: str = "train"
    fallback: DatasetName | None = changeable(None, voided_by=("name", "root"))
    backend: Backend | None = None
    packed: str | None = changeable(None, is_added=True)
    limit: int | None = None
    validation_percent: float = 0.0
    shots: int | None = None
    augmentation: AugmentationName = "moco_v2"
    crop_scale: list[float] | None = None
    views: ViewsConfig = added(default_factory=ViewsConfig)
    image_size: int | None = None
    workers: int = changeable(2)
    max_unreadable_percent: float = changeable(1.0)

    def __post_init__(self) -> None:
        require(
            self.backend != "ffcv" or self.packed is not None,
            "data.backend ffcv needs data.packed: the file that `peerlearn data build` makes",
        )
        require(
            self.packed is None or self.backend in (None, "ffcv"),
            f"data.packed is for data.backend ffcv, and data.backend is {self.backend}: leave one of them out",
        )
        scale = self.crop_scale
        require(
            scale is None or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1),
            f"data.crop_scale must be two rising shares within 0..1, got {scale}",
        )
        self.recipes()
        for name in ("limit", "shots"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} must be at least 1, got {value}")
        require(
            0 <= self.validation_percent < 100,
            f"data.validation_percent must be within 0..100, got {self.validation_percent}",
        )
        require(
            self.image_size is None or self.image_size >= 1,
            f"data.image_size must be at least 1, got {self.image_size}",
        )
        require(self.workers >= 0, f"data.workers must be at least 0, got {self.workers}")
        require(
            0 <= self.max_unreadable_percent <= 100,
            f"data.max_unreadable_percent must be within 0..100, got {self.max_unreadable_percent}",
        )

    def recipes(self) -> tuple[Augmentation, Augmentation]:
        """The recipes of the first and of the second view."""
        return recipes_of(self.augmentation, self.crop_scale, self.views)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(SaveConfig):
    """When the state of training is saved and the networks are exported.

    Attributes:
        every_steps: number of steps between two saves; null = one save after every epoch. The last step is always
            saved.
        keep_last: number of the newest saves that stay.
        keep_every_steps: step numbers whose multiples stay too, however old; null = none.
        max_missed: number of saves in a row that the disk may refuse before the run stops.
        max_seconds: longest time in seconds for a save; one that takes longer hangs, and the process ends itself, so
            that a supervisor can start it anew.
        export_every_epochs: number of epochs between two exports of the networks. The last step is always exported.
        export_key_networks: whether the momentum networks are exported too.
    """

    export_every_epochs: int = 10
    export_key_networks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.export_every_epochs >= 1,
            f"checkpoint.export_every_epochs must be at least 1, got {self.export_every_epochs}",
        )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is watched while training, on the dataset's own train and test splits, never used for training.

    Attributes:
        every_epochs: number of epochs between two measurements: kNN and representation figures, or accuracies with the
            method supervised; 0 = never.
        k: number of neighbours of the weighted kNN.
        temperature: temperature of the kNN's weights exp(cosine / temperature).
        train_limit: number of training images that are the kNN's neighbours, the first ones; null = all.
        test_limit: number of test images, the first ones; null = all. Held-out images (data.validation_percent) are all
            watched.
        key_networks: whether the momentum networks are watched too (moco).
        linear: whether a linear classifier of each network's features learns beside it from the labels, without any
            effect on the networks, and is measured with kNN (moco and simclr).
        log_every_steps: number of steps between two rows of losses in metrics.jsonl.
    """

    every_epochs: int = changeable(1)
    k: int = 200
    temperature: float = 0.1
    train_limit: int | None = None
    test_limit: int | None = None
    key_networks: bool = False
    linear: bool = added(False)
    log_every_steps: int = changeable(10)

    def __post_init__(self) -> None:
        for name in ("k", "train_limit", "test_limit", "log_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"monitor.{name} must be at least 1, got {value}")
        require(
            self.every_epochs >= 0,
            f"monitor.every_epochs must be at least 0, got {self.every_epochs}",
        )
        require(
            self.temperature > 0, f"monitor.temperature must be positive, got {self.temperature}"
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run.

    Attributes:
        run: directory of the run; null = runs/ and the config's name.
        seed: seed of everything random in the run.
        epochs: number of passes over the training images.
        method: pretraining method: moco (queue, momentum networks), simclr (the batch is its own negatives), supervised
            (labels) or prototypical (few-shot episodes of labelled images).
        batch_size: number of images per optimiser step, over all processes. Episodes have a size of their own.
        accumulation_steps: number of parts of a batch that are computed one after another, to save memory (moco only).
        base_lr: learning rate at `base_lr_batch_size` images per step; lr = base_lr * batch_size / base_lr_batch_size,
            or base_lr itself where a step is an episode.
        base_lr_batch_size: batch size that `base_lr` was published for.
        alpha: weight of the self-contrastive terms (Eq. 6).
        beta: weight of the interactive terms (Eq. 6).
        mutual_warmup_epochs: number of epochs over which the weight of the terms between networks (scl_soft, icl_hard,
            icl_soft) rises linearly from 0 to its own; 0 = its own from the start.
        temperature: temperature of the contrastive softmax, tau.
        soft_temperature: temperature of the soft terms, T.
        same_sample_positive: whether the peer's embedding of the same view counts as a second positive (Eq. 4); with
            moco, the only candidate from a query network, which anchors can learn to tell from keys.
        terms: loss terms that train; the others are only logged.
        symmetric: whether the views are swapped too and both losses added (moco only).
        device: device to compute on: auto (a GPU where there is one), cpu, cuda, cuda:1, ...; several GPUs take one
            process each, by torchrun or `peerlearn submit`.
        precision: number format of the networks' passes: fp32, bf16 or fp16 (with loss scaling); losses are always
            fp32.
        tf32: whether CUDA may multiply float32 with 10-bit mantissas.
        compile: whether torch.compile makes the networks' passes faster in training; the first step takes a minute or
            more then, and the last bits differ.
        max_skipped_steps: number of steps with NaN or Inf in a row, each of them skipped, after which the run goes back
            to the save before them. The second time it stops.
        rank_timeout_seconds: longest time in seconds for which a process waits for the others.
    """

    run: str | None = changeable(None)
    seed: int = 0
    epochs: int = changeable(200, to_more=True)
    method: MethodName = "moco"
    batch_size: int = 256
    accumulation_steps: int = 1
    base_lr: float = 0.03
    base_lr_batch_size: int = 256
    alpha: float = 0.5
    beta: float = 0.1
    mutual_warmup_epochs: float = added(0.0)
    temperature: float = 0.07
    soft_temperature: float = 1.0
    same_sample_positive: bool = True
    terms: list[Term] = field(
        default_factory=lambda: ["scl_hard", "scl_soft", "icl_hard", "icl_soft"]
    )
    symmetric: bool = False
    device: str = changeable("auto")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False
    compile: bool = added(False)
    max_skipped_steps: int = 3
    rank_timeout_seconds: float = changeable(600.0)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    parallel: ParallelConfig = changeable(default_factory=ParallelConfig, is_added=True)
    queue: QueueConfig = field(default_factory=QueueConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    prototypical: PrototypicalConfig = field(default_factory=PrototypicalConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = changeable(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "accumulation_steps",
            "base_lr_batch_size",
            "max_skipped_steps",
        ):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        require(-(2**63) <= self.seed < 2**63, f"seed must fit 64 bits, got {self.seed}")
        require(
            self.batch_size >= 2,
            f"batch_size must be at least 2, for batch norm, got {self.batch_size}",
        )
        for name in ("base_lr", "temperature", "soft_temperature", "rank_timeout_seconds"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be positive and finite, got {value}")
        for name in ("alpha", "beta", "mutual_warmup_epochs"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")
        require_device(self.device)
        require(
            not (self.compile and self.cohort.sync_batch_norm),
            "compile must be false with cohort.sync_batch_norm, whose processes talk in the middle of a pass",
        )
        self._check_terms()
        parts = self.accumulation_steps * self.cohort.batch_norm_splits
        require(
            self.images_per_step % parts == 0 and self.images_per_step // parts >= 2,
            f"{self.step_in_words} must divide into accumulation_steps x "
            f"cohort.batch_norm_splits = {parts} parts of at least 2 images",
        )
        if self.method != "moco":
            require(
                self.accumulation_steps == 1,
                f"accumulation_steps must be 1 with method {self.method}: its batch is its negatives, "
                "so parts of it would be another loss",
            )
            require(
                not self.symmetric,
                f"symmetric must be false with method {self.method}: only moco has two sides",
            )
        if self.monitor.linear:
            self._check_probe()
        self._check_groups()
        if self.parallel.is_split:
            self._check_split()
        if self.method == "supervised":
            self._check_supervised()
        elif self.method == "prototypical":
            self._check_prototypical()
        if self.method != "supervised":
            require(
                self.data.validation_percent == 0,
                f"data.validation_percent must be 0 with method {self.method}, which would not look at "
                "what is held out",
            )

    def _check_probe(self) -> None:
        require(
            self.method not in ("supervised", "prototypical"),
            f"monitor.linear must be false with method {self.method}, which is watched by accuracies of its own",
        )
        require(
            self.data.split != "test",
            "data.split must not be test with monitor.linear: accuracy is measured on it",
        )

    def _check_split(self) -> None:
        """What cannot be parted between processes that hold different networks."""
        wish = f"parallel.cohort must be 1, got {self.parallel.cohort}"
        require(
            self.cohort.networks > 1,
            f"{wish}: with cohort.networks 1 there is nothing to share out; more processes take parts of the batch as "
            "it is",
        )
        require(
            self.method != "prototypical",
            f"{wish}: method prototypical chooses its networks together on one process",
        )
        require(
            self.supervised.teaching in ("none", "dml", "ensemble_teaching"),
            f"{wish}: supervised.teaching {self.supervised.teaching} learns a part that all networks share",
        )
        require(
            self.cohort.share_stages in (None, 0),
            f"{wish}: networks that share stages (cohort.share_stages {self.cohort.share_stages}) train on the same "
            "processes; or set cohort.share_stages to 0",
        )
        require(
            self.precision != "fp16",
            f"{wish}: precision fp16 scales the losses of each process by its own gradients; take bf16",
        )

    def _check_groups(self) -> None:
        """Keys of a method's own must not wait for a method that is not asked for."""
        for group, plain in (
            ("supervised", SupervisedConfig()),
            ("prototypical", PrototypicalConfig()),
        ):
            for key, value in vars(getattr(self, group)).items():
                require(
                    self.method == group or value == getattr(plain, key),
                    f"{group}.{key} is for method {group}, and method is {self.method}: change one of them",
                )

    def _check_terms(self) -> None:
        # Cross-entropy, or prototypes, train what the contrastive terms, all switched off, do not.
        labelled = self.method == "supervised" or self.draws_episodes
        if labelled and self.alpha == 0 and self.beta == 0:
            return
        require(bool(self.terms), "terms must name at least one loss term")
        require(
            self.cohort.networks > 1 or "scl_hard" in self.terms,
            f"terms must hold scl_hard where cohort.networks is 1: the others need peers, got {self.terms}",
        )
        require(
            self.contrastive,
            f"alpha {self.alpha}, beta {self.beta} and terms {self.terms} leave nothing to train "
            f"{self.cohort.networks} networks by",
        )

    def _check_supervised(self) -> None:
        m, teaching = self.supervised.images_per_class, self.supervised.teaching
        require(
            self.data.split != "test",
            "data.split must not be test with method supervised: accuracy is measured on it",
        )
        require(
            m is None or self.batch_size % m == 0,
            f"batch_size {self.batch_size} must be a multiple of supervised.images_per_class {m}",
        )
        require(
            self.supervised.num_negatives is None or m is not None,
            "supervised.num_negatives needs supervised.images_per_class: how many negatives an anchor has is else "
            "left to chance",
        )
        fewest = 3 if teaching == "okddip" else 1 if teaching == "none" else 2
        require(
            self.cohort.networks >= fewest,
            f"supervised.teaching {teaching} needs cohort.networks of at least {fewest}, got {self.cohort.networks}",
        )

    def _check_prototypical(self) -> None:
        settings = self.prototypical
        require(
            self.data.split == "train",
            f"data.split must be train with method prototypical: validation and test have classes of their own, got "
            f"{self.data.split}",
        )
        if not self.draws_episodes:
            m = settings.images_per_class
            require(
                self.batch_size % m == 0,
                f"batch_size {self.batch_size} must be a multiple of prototypical.images_per_class {m}",
            )
            return
        for key, given in (
            ("batch_size", self.batch_size),
            ("base_lr_batch_size", self.base_lr_batch_size),
        ):
            default = getattr(PretrainConfig, key)
            require(
                given == default,
                f"{key} must stay {default} where a step is an episode of prototypical.ways x (shots + queries) = "
                f"{settings.images_per_episode} images, got {given}: set those, or prototypical.batches "
                "images_per_class",
            )

    @property
    def draws_episodes(self) -> bool:
        """Whether a step is an episode, and not a batch of ``batch_size`` images."""
        return self.method == "prototypical" and self.prototypical.batches == "episodes"

    @property
    def images_per_step(self) -> int:
        """Number of images of an optimiser step, over all processes."""
        return self.prototypical.images_per_episode if self.draws_episodes else self.batch_size

    @property
    def step_in_words(self) -> str:
        """The keys that make up `images_per_step`, for messages."""
        if not self.draws_episodes:
            return f"batch_size {self.batch_size}"
        return f"prototypical.ways x (shots + queries) = {self.prototypical.images_per_episode} images of an episode"

    def steps_per_epoch(self, images: int) -> int:
        """Number of optimiser steps in an epoch of so many training images."""
        own = self.prototypical.steps_per_epoch
        if self.draws_episodes:
            return own
        batches = images // self.batch_size
        return min(own, batches) if self.method == "prototypical" else batches

    @property
    def contrastive(self) -> bool:
        """Whether alpha, beta and terms leave any contrastive term to train by."""
        weights = {"scl": self.alpha, "icl": self.beta if self.cohort.networks > 1 else 0.0}
        return any(weights[term[:3]] > 0 for term in self.terms)

    @property
    def lr(self) -> float:
        """The peak learning rate, `base_lr` scaled linearly to the batch size (Goyal et al. 2017), if there is one."""
        if self.draws_episodes:
            return self.base_lr
        return self.base_lr * self.batch_size / self.base_lr_batch_size
