"""Classifiers on frozen features: trained, the best of each network's candidates chosen, test images classified.

Dimension letters: N images, B batch, D feature dimensions, C classes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_eval.config import Inputs, LinearConfig
from linear_eval.heads import LinearHeads
from linear_eval.logistic import LogisticFit, fit_logistic
from peerlearn.compute.schedules import learning_rate
from peerlearn.counter_random import PERMUTATION, permutation
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import top1
from peerlearn.evaluation.feature_sets import FeatureSet
from peerlearn.knn import unit_rows
from peerlearn.runs.progress import progress

# A loss is read from the device only now and then.
_LOSS_EVERY_STEPS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What classifiers learn from, are chosen by and are tested on.

    Attributes:
        train: every training image.
        fit: those of them to train on.
        held_out: those of them to choose by; None where there is one candidate, which is trained on all.
        test: asked once, of the chosen.
        classes: C.
    """

    train: FeatureSet
    fit: FeatureSet
    held_out: FeatureSet | None
    test: FeatureSet
    classes: int


# From the number of an epoch to its batches: features (B, D) by network, and labels (B,).
Epoch = Callable[[int], Iterator[tuple[Mapping[str, Tensor], Tensor]]]


class Batches(NamedTuple):
    """Where a step's features come from.

    epoch: the batches of each epoch.
    batch_size: of a whole batch; the last of an epoch may be smaller.
    steps_per_epoch: how many there are.
    """

    epoch: Epoch
    batch_size: int
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What the chosen classifier of a network says of the test images.

    Attributes:
        logits: (N, C).
        choice: the chosen candidate, and every candidate's accuracy on the held-out images; empty if there was one.
    """

    logits: Tensor
    choice: dict[str, Any]


class _Candidate(NamedTuple):
    """A trained classifier: its settings, and its function from features (N, D) to logits (N, C)."""

    settings: dict[str, Any]
    classify: Callable[[Tensor], Tensor]


class InputTransform:
    """What a classifier sees of a network's features. Both kinds that change them do so in float64."""

    def __init__(self, kind: Inputs, features: Tensor) -> None:
        """``features`` (N, D): of the training images, by whose mean and deviation features are standardised."""
        self._kind = kind
        if kind == "standardised":
            wide = features.double()
            self._mean = wide.mean(dim=0)
            deviation = wide.std(dim=0, correction=0)
            # A feature that varies by no more than its rounding tells nothing, and stays 0.
            rounding = torch.finfo(torch.float32).eps * wide.abs().amax(dim=0)
            self._scale = torch.where(deviation > rounding, 1 / deviation, 0)

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        if self._kind == "unit":
            return unit_rows(features)
        if self._kind == "standardised":
            mean, scale = (each.to(features.device) for each in (self._mean, self._scale))
            return (features.double() - mean) * scale
        return features


def kept_batches(
    images: FeatureSet, *, batch_size: int, seed: int, device: torch.device
) -> Batches:
    """Batches of features held in memory, every epoch in a random order of (seed, epoch)."""
    held = FeatureSet(
        features={name: found.to(device) for name, found in images.features.items()},
        labels=images.labels.to(device),
    )
    n = len(held.labels)

    def epoch(number: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for index in permutation(n, PERMUTATION, seed, number).to(device).split(batch_size):
            part = held.part(index)
            yield part.features, part.labels

    return Batches(epoch, batch_size, math.ceil(n / batch_size))


def classify_by_sgd(
    config: LinearConfig, problem: Problem, batches: Batches, *, device: torch.device, quiet: bool
) -> dict[str, Classified]:
    """Train heads for every network, kind of input and learning rate in one pass over the batches.

    Raises:
        UserError: the chosen head of a network has diverged.
    """
    fit = problem.fit.features
    keys: list[tuple[str, Inputs]] = [(name, kind) for name in fit for kind in config.inputs]
    transforms = {(name, kind): InputTransform(kind, fit[name]) for name, kind in keys}
    scale = batches.batch_size / config.base_lr_batch_size
    heads = {
        (name, kind): LinearHeads(
            fit[name].shape[1],
            problem.classes,
            lrs=[base_lr * scale for base_lr in config.base_lrs],
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            seed=config.seed,
            device=device,
        )
        for name, kind in keys
    }
    total_steps = config.epochs * batches.steps_per_epoch
    step, text = 0, ""
    with progress(total_steps, "step", quiet=quiet) as report:
        for epoch in range(config.epochs):
            for features, labels in batches.epoch(epoch):
                factor = learning_rate(
                    step,
                    lr=1.0,
                    schedule=config.schedule,
                    steps_per_epoch=batches.steps_per_epoch,
                    total_steps=total_steps,
                )
                losses = [
                    heads[key].step(
                        transforms[key](features[key[0]]).float(), labels, factor=factor
                    )
                    for key in keys
                ]
                if step % _LOSS_EVERY_STEPS == 0:
                    text = f"epoch {epoch}  lowest loss {float(torch.cat(losses).nan_to_num(math.inf).min()):.3f}"
                step += 1
                report.advance(1, text)
    classified = {}
    for name in fit:
        candidates = [
            _Candidate(
                {"inputs": kind, "base_lr": base_lr},
                partial(_by_head, heads[name, kind], number, transforms[name, kind]),
            )
            for kind in config.inputs
            for number, base_lr in enumerate(config.base_lrs)
        ]
        best, choice = _choose(candidates, problem.held_out, name)
        logits = best.classify(problem.test.features[name])
        if not logits.isfinite().all():
            raise UserError(
                f"the classifier of network {name} has diverged: lower base_lr ({config.base_lr}), or try "
                "inputs standardised"
            )
        classified[name] = Classified(logits=logits, choice=choice)
    return classified


def _by_head(
    heads: LinearHeads, number: int, transform: InputTransform, features: Tensor
) -> Tensor:
    inputs = transform(features.to(heads.weight.device)).float()
    return (inputs @ heads.weight[:, number] + heads.bias[number]).cpu()


def classify_by_logistic_regression(
    config: LinearConfig, problem: Problem, *, device: torch.device, quiet: bool
) -> dict[str, Classified]:
    """Fit every C for every network and kind of input, choose, and fit the chosen again on all training images."""
    chooses = problem.held_out is not None
    per_network = config.candidates + chooses
    classified = {}
    with progress(len(problem.fit.features) * per_network, "fit", quiet=quiet) as report:
        for name in problem.fit.features:
            report_fit = partial(report.advance, text=f"network {name}")
            fit = partial(_fit_candidates, config, problem.classes, device, report_fit)
            candidates = fit(problem.fit.features[name], problem.fit.labels)
            best, choice = _choose(candidates, problem.held_out, name)
            if chooses:
                kind, c = best.settings["inputs"], best.settings["c"]
                (best,) = fit(
                    problem.train.features[name],
                    problem.train.labels,
                    inputs=[kind],
                    penalties_c=[c],
                )
            logits = best.classify(problem.test.features[name])
            classified[name] = Classified(logits=logits, choice=choice)
    return classified


def _fit_candidates(
    config: LinearConfig,
    classes: int,
    device: torch.device,
    report_fit: Callable[[int], object],
    features: Tensor,
    labels: Tensor,
    *,
    inputs: Sequence[Inputs] = (),
    penalties_c: Sequence[float] = (),
) -> list[_Candidate]:
    """Of the config's inputs and C, or of those given, fitted on features (N, D)."""
    penalties_c = penalties_c or config.penalties_c
    candidates = []
    for kind in inputs or config.inputs:
        transform = InputTransform(kind, features)
        fits = fit_logistic(
            transform(features).to(device),
            labels.to(device),
            classes=classes,
            penalties_c=penalties_c,
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
            progress=report_fit,
        )
        for fit in fits:
            if not fit.converged:
                logger.warning(
                    "logistic regression has not converged at C %g in %d iterations: raise max_iterations",
                    fit.c,
                    config.max_iterations,
                )
        candidates += [
            _Candidate({"inputs": kind, "c": fit.c}, partial(_by_fit, fit, transform))
            for fit in fits
        ]
    return candidates


def _by_fit(fit: LogisticFit, transform: InputTransform, features: Tensor) -> Tensor:
    return fit.logits(transform(features).to(fit.weight.device)).cpu()


def _choose(
    candidates: Sequence[_Candidate], held_out: FeatureSet | None, name: str
) -> tuple[_Candidate, dict[str, Any]]:
    """The candidate that is best on the held-out images, of equals the first, and how all of them did."""
    if held_out is None:
        (only,) = candidates
        return only, {}
    scores = [top1(each.classify(held_out.features[name]), held_out.labels) for each in candidates]
    best = scores.index(max(scores))
    _warn_of_an_edge(candidates, scores, best, name)
    choice = {
        "chosen": candidates[best].settings,
        "held_out_top1": [
            {**each.settings, "top1": score} for each, score in zip(candidates, scores, strict=True)
        ],
    }
    return candidates[best], choice


def _warn_of_an_edge(
    candidates: Sequence[_Candidate], scores: Sequence[float], best: int, name: str
) -> None:
    """Say where the best number stands at the end of its grid, and is better than its neighbour there."""
    chosen = candidates[best].settings
    key = "c" if "c" in chosen else "base_lr"
    grid = sorted(
        (each.settings[key], score)
        for each, score in zip(candidates, scores, strict=True)
        if each.settings["inputs"] == chosen["inputs"]
    )
    for end, neighbour, side in (
        (grid[:1], grid[1:2], "smallest"),
        (grid[-1:], grid[-2:-1], "largest"),
    ):
        if neighbour and end[0] == (chosen[key], max(scores)) and end[0][1] > neighbour[0][1]:
            logger.warning(
                "network %s: the best %s is the %s of those tried, %g: one beyond it may be better still, so extend %s",
                *(name, key, side, chosen[key], "penalties_c" if key == "c" else "base_lr"),
            )


def mean_of_logits(cohort: Mapping[str, Classified]) -> Tensor:
    """The ensemble's logits (N, C): the mean over its networks."""
    return torch.stack([each.logits.double() for each in cohort.values()]).mean(dim=0)
