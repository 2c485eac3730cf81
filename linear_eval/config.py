"""The config of a linear evaluation. Every key of a YAML file and of the command line is a field here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.compute.schedules import ScheduleConfig
from peerlearn.config import changeable, require
from peerlearn.evaluation.data import EvaluationDataConfig
from peerlearn.evaluation.evaluator import EvaluatorConfig

Inputs = Literal["raw", "standardised", "unit"]


def _moco_schedule() -> ScheduleConfig:
    return ScheduleConfig(name="step", milestones_epochs=[60, 80])


@dataclass(frozen=True, kw_only=True)
class LinearConfig(EvaluatorConfig):
    """A classifier on exported networks; the defaults are MoCo's linear protocol.

    Attributes:
        network: the networks to score: 0, 1, ..., key-0, ..., all, or ensemble (one classifier on all networks'
            features, and the mean of the networks' logits).
        method: kind of classifier: sgd (linear heads), logistic_regression (the same by L-BFGS, with an L2 penalty),
            or finetune (the whole network learns).
        inputs: kind of features that linear heads see: raw, standardised by their mean and deviation over the training
            images, or of unit length; several are all tried.
        epochs: number of passes over the training images (sgd, finetune).
        batch_size: number of images per step, over all processes; all of them where there are fewer.
        base_lr: learning rate at `base_lr_batch_size` images per step; lr = base_lr * batch_size / that. For several
            numbers as many heads are trained at once.
        base_lr_batch_size: batch size that `base_lr` was published for.
        momentum: momentum of sgd and finetune.
        nesterov: whether sgd and finetune take Nesterov's momentum.
        weight_decay: L2 penalty of sgd and finetune.
        schedule: course of the learning rate.
        augmentation: augmentation of the training images: crop_flip (random resized crop and flip, each epoch anew),
            or none, when sgd trains on kept features.
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        penalties_c: inverse strengths C of logistic_regression's penalty, as in scikit-learn; several are all tried.
        max_iterations: largest number of iterations of logistic_regression, for each C.
        tolerance: largest entry of the mean loss's gradient at which logistic_regression has converged.
        held_out_percent: percentage of each class's training images by which the best of several base_lr, inputs or C
            is chosen; with a single candidate none are held out.
        seed: seed of initial weights, order, crops and what is held out.
        encoding_batch_size: number of images encoded at once for kept features.
        cache: whether features are kept on disk, and those that are there are taken.
        data: images to learn from and images to score on.
    """

    method: Literal["sgd", "logistic_regression", "finetune"] = "sgd"
    inputs: list[Inputs] = field(default_factory=lambda: ["raw"])
    epochs: int = 100
    batch_size: int = 256
    base_lr: float | list[float] = 30.0
    base_lr_batch_size: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: ScheduleConfig = field(default_factory=_moco_schedule)
    augmentation: Literal["crop_flip", "none"] = "crop_flip"
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    penalties_c: list[float] = field(default_factory=lambda: [1.0])
    max_iterations: int = 1000
    tolerance: float = 1e-4
    held_out_percent: float = 10.0
    seed: int = 0
    encoding_batch_size: int = changeable(256)
    cache: bool = changeable(True)
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "epochs",
            "batch_size",
            "base_lr_batch_size",
            "max_iterations",
            "encoding_batch_size",
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        for name, values in (("base_lr", self.base_lrs), ("penalties_c", self.penalties_c)):
            require(bool(values), f"{name} must hold at least one number")
            require(
                all(0 < value < math.inf for value in values),
                f"{name} must be positive and finite, got {values}",
            )
            require(len(set(values)) == len(values), f"{name} holds a number twice: {values}")
        require(
            bool(self.inputs) and len(set(self.inputs)) == len(self.inputs),
            f"inputs must name each kind once, and at least one, got {self.inputs}",
        )
        require(-(2**63) <= self.seed < 2**63, f"seed must fit 64 bits, got {self.seed}")
        require(self.tolerance > 0, f"tolerance must be positive, got {self.tolerance}")
        require(0 <= self.momentum < 1, f"momentum must be within 0..1, got {self.momentum}")
        require(
            not self.nesterov or self.momentum > 0,
            "nesterov needs a momentum above 0: set momentum, or nesterov to false",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay must be at least 0 and finite, got {self.weight_decay}",
        )
        scale = self.crop_scale
        require(
            len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
            f"crop_scale must be two rising shares within 0..1, got {scale}",
        )
        require(
            0 < self.held_out_percent < 100,
            f"held_out_percent must be within 0..100, got {self.held_out_percent}",
        )
        require(
            self.method != "finetune" or (len(self.base_lrs) == 1 and self.inputs == ["raw"]),
            "method finetune takes one learning rate and raw inputs: leave a single number in base_lr, and inputs raw",
        )

    @property
    def base_lrs(self) -> list[float]:
        """One or several."""
        return self.base_lr if isinstance(self.base_lr, list) else [self.base_lr]

    @property
    def candidates(self) -> int:
        """How many classifiers are trained on each network's features, of which the best is chosen."""
        settings = self.penalties_c if self.method == "logistic_regression" else self.base_lrs
        return len(settings) * len(self.inputs)
