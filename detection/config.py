"""The config of a detection transfer. Every key of a YAML file and of the command line is a field here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import changeable, require
from peerlearn.evaluation.evaluator import EvaluatorConfig

Weights = Literal["export", "random"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector, a Faster R-CNN. Sizes are in pixels of the resized image.

    Attributes:
        detector: kind of the detector: d2_fpn (Detectron2's with a feature pyramid), d2_c4 (Detectron2's on the last
            stage but one of a ResNet, whose last stage is the head) or torchvision_fpn (torchvision's as it comes).
        norm: batch norm of the network and of the pyramid: sync (statistics over all processes), batch (each process's
            own) or frozen (as exported, and none in the pyramid).
        trainable_stages: number of a ResNet's five stages that train, from the last; 5 = all, with the stem.
        short_sides: lengths of an image's short side in training, one drawn for each image; tests use the last one.
        longest_side: largest length of an image's long side; the short side shrinks with it.
        anchor_sizes: square roots of the anchors' areas, one for each map of a pyramid, finest first.
        fpn_channels: number of channels of the feature pyramid's maps.
        head_features: number of features of the two layers above a pooled region.
        anchors_per_image: number of anchors of an image that train.
        regions_per_image: number of regions of an image that train.
        rpn_candidates_train: number of best anchors of each map before non-maximum suppression, in training.
        rpn_candidates_test: number of best anchors of each map before non-maximum suppression, in tests.
        rpn_proposals_train: number of regions of an image that are left after non-maximum suppression, in training.
        rpn_proposals_test: number of regions of an image that are left after non-maximum suppression, in tests.
        box_loss_beta: width of the quadratic middle of the box losses; 0 = L1, as in Detectron2.
    """

    detector: Literal["d2_fpn", "d2_c4", "torchvision_fpn"] = "d2_fpn"
    norm: Literal["sync", "batch", "frozen"] = "sync"
    trainable_stages: int = 5
    short_sides: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))
    longest_side: int = 1333
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    fpn_channels: int = 256
    head_features: int = 1024
    anchors_per_image: int = 256
    regions_per_image: int = 512
    rpn_candidates_train: int = 2000
    rpn_candidates_test: int = 1000
    rpn_proposals_train: int = 1000
    rpn_proposals_test: int = 1000
    box_loss_beta: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            *("longest_side", "fpn_channels", "head_features", "anchors_per_image"),
            *("regions_per_image", "rpn_candidates_train", "rpn_candidates_test"),
            *("rpn_proposals_train", "rpn_proposals_test"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} must be at least 1, got {value}")
        for name in ("short_sides", "anchor_sizes"):
            values = getattr(self, name)
            require(
                bool(values) and min(values) >= 1 and values == sorted(set(values)),
                f"model.{name} must be rising numbers of at least 1, got {values}",
            )
        require(
            self.short_sides[-1] <= self.longest_side,
            f"model.longest_side {self.longest_side} is below the short side {self.short_sides[-1]}: raise it",
        )
        require(
            1 <= self.trainable_stages <= 5,
            f"model.trainable_stages must be within 1..5, got {self.trainable_stages}",
        )
        require(
            0 <= self.box_loss_beta < math.inf,
            f"model.box_loss_beta must be at least 0 and finite, got {self.box_loss_beta}",
        )
        require(
            self.detector != "torchvision_fpn"
            or (self.head_features == 1024 and self.box_loss_beta == 0),
            "model.head_features and model.box_loss_beta are torchvision's own with model.detector torchvision_fpn: "
            "leave them out, or choose d2_fpn",
        )


@dataclass(frozen=True, kw_only=True)
class DetectDataConfig:
    """The images with boxes.

    Attributes:
        name: format of the data: voc (a Pascal VOC devkit), coco (JSON files in COCO's format) or mini_voc (a devkit
            drawn from Fashion-MNIST).
        root: folder of the data: VOCdevkit for voc, the images for coco; null = the usual place, for mini_voc alone.
        train: split to learn from, or JSON file of coco; null = trainval07+12 for voc, train for mini_voc.
        test: split to score on, or JSON file of coco; null = test2007 for voc, test for mini_voc.
        validation: split, or JSON file of coco, by which the best detector is chosen and kept beside the last; null =
            none.
        classes: names of the classes of a devkit that has others than Pascal VOC's; null = those of the data.
        difficult: whether training keeps the objects that are marked as difficult: keep or drop; null = keep for voc
            and mini_voc, as Detectron2 does, and drop for coco, whose crowds they are.
        train_percent: percentage of the training images that is used, drawn at random; several are trained one after
            another.
        subset_seed: seed by which train_percent draws; each trial adds its number.
        limit: number of images of each split, the first ones; null = all.
        leakage: what is done where test images are training images, or look like them: warn, refuse or ignore (they
            are not looked for); null = warn for coco, ignore for voc and mini_voc.
        max_unreadable_percent: largest percentage of the training images that may be unreadable before the training
            stops. Another image takes the place of an unreadable one, and events.jsonl lists it.
        workers: number of processes that read image files.
    """

    name: Literal["voc", "coco", "mini_voc"] = "voc"
    root: str | None = changeable(None)
    train: str | None = None
    test: str | None = changeable(None)
    validation: str | None = None
    classes: list[str] | None = None
    difficult: Literal["keep", "drop"] | None = None
    train_percent: float | list[float] = 100.0
    subset_seed: int = 0
    limit: int | None = None
    leakage: Literal["warn", "refuse", "ignore"] | None = changeable(None)
    max_unreadable_percent: float = changeable(1.0)
    workers: int = changeable(2)

    def __post_init__(self) -> None:
        percents = self.percents
        require(
            bool(percents) and all(0 < each <= 100 for each in percents),
            f"data.train_percent must be within 0..100, got {self.train_percent}",
        )
        require(
            len(set(percents)) == len(percents),
            f"data.train_percent holds a number twice: {percents}",
        )
        require(
            self.limit is None or self.limit >= 1,
            f"data.limit must be at least 1, got {self.limit}",
        )
        require(
            0 <= self.max_unreadable_percent <= 100,
            f"data.max_unreadable_percent must be within 0..100, got {self.max_unreadable_percent}",
        )
        require(self.workers >= 0, f"data.workers must be at least 0, got {self.workers}")
        require(
            -(2**63) <= self.subset_seed < 2**62,
            f"data.subset_seed must fit 64 bits, got {self.subset_seed}",
        )
        require(
            self.classes is None or self.name == "voc",
            f"data.classes is for data.name voc; {self.name} has its own classes: leave it out",
        )

    @property
    def percents(self) -> list[float]:
        """One percentage of the training images or several."""
        given = self.train_percent
        return given if isinstance(given, list) else [given]


@dataclass(frozen=True, kw_only=True)
class DetectConfig(EvaluatorConfig):
    """A Faster R-CNN trained on exported networks; the defaults are Detectron2's FPN recipe with MoCo's changes.

    Attributes:
        checkpoint: a run (its latest exports, or those that its validation chose), RUN/export/step-N, one export, or a
            detector that was trained here, or the directory of its training, which is scored once more; several are
            averaged.
        network: the networks to train a detector on, one after another: 0, 1, ..., key-0, ..., or all.
        run: directory of the training; null = a folder beside the results, named by its settings. For a single
            training.
        seed: seed of initial weights, order, views and samplers, to which each trial adds its number; null = that of
            the run that pretrained the network, or 0.
        trials: number of trainings of each network with seeds of their own, of which mean and deviation are told.
        backbone_weights: weights that the network starts from: export, or random (the same network anew); both are
            trained one after the other.
        iterations: number of steps of training at base_batch_size images; more for smaller batches, in proportion.
        milestones: iterations, at base_batch_size, after which the learning rate falls to a tenth.
        warmup_iterations: iterations, at base_batch_size, of the linear rise from a thousandth of the learning rate.
        batch_size: number of images per step, over all processes.
        base_batch_size: batch size that base_lr and the numbers of iterations were published for.
        accumulation_steps: number of parts of a batch that are computed one after another, to save memory; batch norm
            takes the statistics of each part.
        base_lr: learning rate at base_batch_size images per step; lr = base_lr * batch_size / base_batch_size.
        momentum: momentum factor of SGD, without Nesterov.
        weight_decay: factor of the L2 penalty.
        norm_weight_decay: factor of the L2 penalty on the weights and biases of norm layers.
        precision: number format of the networks' passes: fp32 or bf16; losses and boxes are always fp32.
        precise_bn_iterations: number of training batches over which the statistics of batch norm are measured anew
            before each test; 0 = the running ones.
        rule: average precision: voc07 (11 points), voc10 (area) or coco (101 points); null = voc07 for voc and
            mini_voc, coco for coco.
        round_like_detectron2: whether scores are rounded to 3 and corners to 1 decimals, as in Detectron2's files.
        validate_every: number of steps, at this batch size, from one test on data.validation to the next.
        save_every: number of steps, at this batch size, from one save of the training to the next.
        max_skipped_steps: number of steps with NaN or Inf in a row, each of them skipped, after which the training goes
            back to the save before them. The second time it stops.
        model: the detector.
        data: images to learn from and images to score on.
    """

    run: str | None = changeable(None)
    seed: int | None = None
    trials: int = 1
    backbone_weights: Weights | list[Weights] = "export"
    iterations: int = 18_000
    milestones: list[int] = field(default_factory=lambda: [12_000, 16_000])
    warmup_iterations: int = 100
    batch_size: int = 16
    base_batch_size: int = 16
    accumulation_steps: int = 1
    base_lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    precise_bn_iterations: int = 200
    rule: Literal["voc07", "voc10", "coco"] | None = changeable(None)
    round_like_detectron2: bool = changeable(False)
    validate_every: int = 1000
    save_every: int = changeable(1000)
    max_skipped_steps: int = 3
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DetectDataConfig = field(default_factory=DetectDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("trials", "iterations", "batch_size", "base_batch_size", "accumulation_steps"),
            *("validate_every", "save_every", "max_skipped_steps"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("warmup_iterations", "precise_bn_iterations"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0, got {value}")
        require(
            self.seed is None or -(2**63) <= self.seed < 2**62,
            f"seed must fit 64 bits, got {self.seed}",
        )
        weights = self.weights
        require(
            bool(weights) and len(set(weights)) == len(weights),
            f"backbone_weights must name each kind once, and at least one, got {weights}",
        )
        require(
            self.milestones == sorted(self.milestones) and all(m >= 1 for m in self.milestones),
            f"milestones must be rising numbers of at least 1, got {self.milestones}",
        )
        require(
            self.batch_size % self.accumulation_steps == 0,
            f"batch_size {self.batch_size} must divide into accumulation_steps {self.accumulation_steps} equal parts",
        )
        require(
            0 < self.base_lr < math.inf, f"base_lr must be positive and finite, got {self.base_lr}"
        )
        require(0 <= self.momentum < 1, f"momentum must be within 0..1, got {self.momentum}")
        for name in ("weight_decay", "norm_weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")

    @property
    def weights(self) -> list[Weights]:
        """One kind of initial weights or several."""
        given = self.backbone_weights
        return given if isinstance(given, list) else [given]

    @property
    def lr(self) -> float:
        """The learning rate of this batch size."""
        return self.base_lr * self.batch_size / self.base_batch_size

    def steps(self, iterations: int) -> int:
        """The number of steps of this batch size that see as many images as that many iterations."""
        return round(iterations * self.base_batch_size / self.batch_size)

    @property
    def total_steps(self) -> int:
        """The number of steps of the training."""
        return max(self.steps(self.iterations), 1)

    def scaling(self) -> str:
        """The learning rate and the steps that follow from the batch size, in words."""
        steps = self.total_steps
        falls = [f"{fall:,}" for fall in map(self.steps, self.milestones) if fall < steps]
        falling = f"/ 10 after steps {' and '.join(falls)}" if falls else "the same to the end"
        return (
            f"lr {self.lr:g} (base_lr {self.base_lr:g} x {self.batch_size}/{self.base_batch_size}), {falling}, "
            f"{steps:,} steps of {self.batch_size} images "
            f"({self.iterations:,} iterations of {self.base_batch_size})"
        )

    @property
    def chosen_rule(self) -> Literal["voc07", "voc10", "coco"]:
        """The rule of the average precision."""
        return self.rule or ("coco" if self.data.name == "coco" else "voc07")


def learning_rate(step: int, config: DetectConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up from 1/1000, then a tenth after each milestone.

    As Detectron2's WarmupMultiStepLR, which warms up the rate that the milestones leave.
    """
    lr = config.lr * 0.1 ** sum(step >= config.steps(each) for each in config.milestones)
    warmup = config.steps(config.warmup_iterations)
    if step >= warmup:
        return lr
    share = step / warmup
    return lr * (share + (1 - share) / 1000)
