"""One checkpoint's networks, scored by a linear protocol."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from linear_eval.classifiers import (
    Classified,
    Problem,
    classify_by_logistic_regression,
    classify_by_sgd,
    kept_batches,
    mean_of_logits,
)
from linear_eval.config import LinearConfig
from linear_eval.finetune import finetune
from linear_eval.pictures import plot_candidates
from linear_eval.streams import streamed_batches
from peerlearn.compute.dist import Ranks
from peerlearn.data.augment import EVALUATION_VIEW
from peerlearn.data.datasets import ImageDataset, select_images
from peerlearn.data.subsets import hold_out
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import classification_scores
from peerlearn.evaluation.confusion import plot_confusion
from peerlearn.evaluation.data import Splits, load_splits
from peerlearn.evaluation.feature_cache import Extraction
from peerlearn.evaluation.feature_sets import load_feature_sets
from peerlearn.evaluation.networks import frozen, load_backbones
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.selection import ENSEMBLE, Selection
from peerlearn.evaluation.training_run import own_config, training_run, whole_path

# The mean of the networks' logits, beside ENSEMBLE, one classifier on the features of all.
ENSEMBLE_LOGITS = "ensemble-logits"


def score(config: LinearConfig, selection: Selection, ranks: Ranks) -> Iterator[Score]:
    """Classify the images to score on by every selected network: accuracies, each with its confusion matrix.

    All ranks call it together; the main one yields the scores.

    Raises:
        UserError: a dataset or an export that cannot be had, or that do not fit each other; a classifier that diverges.
    """
    splits = load_splits(config.data, selection, ranks)
    protocol = _protocol(config, splits)
    classified = _classify(config, selection, splits.train, splits.test, protocol, ranks)
    if not ranks.main:
        return
    if selection.ensemble:
        cohort = {name: each for name, each in classified.items() if name != ENSEMBLE}
        classified[ENSEMBLE_LOGITS] = Classified(logits=mean_of_logits(cohort), choice={})
    for name in filter(selection.wants, classified):
        yield _score(name, classified[name], splits, protocol)


def _score(name: str, classified: Classified, splits: Splits, protocol: dict[str, Any]) -> Score:
    test = splits.test
    assert test.labels is not None
    scores = classification_scores(classified.logits, test.labels)
    about = f"{splits.title}, network {name}, {protocol['method'].replace('_', ' ')}"
    low, high = scores.metrics()["top1_wilson95"]
    title = f"{about}: top-1 {scores.top1:.2f} % (95 %: {low:.2f} .. {high:.2f}), n = {scores.n:,}"
    pictures: dict[str, Callable[[Path], object]] = {
        "": partial(
            plot_confusion,
            confusion=scores.confusion,
            class_names=test.class_names,
            title=title,
        )
    }
    if classified.choice:
        pictures["-candidates"] = partial(plot_candidates, choice=classified.choice, title=about)
    return Score(
        network=name,
        dataset=splits.title,
        metrics={
            **scores.metrics(),
            "per_class_top1": dict(zip(test.class_names, scores.per_class_top1, strict=True)),
            **classified.choice,
        },
        protocol=protocol,
        pictures=pictures,
    )


def _classify(
    config: LinearConfig,
    selection: Selection,
    train: ImageDataset,
    test: ImageDataset,
    protocol: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Classified]:
    load = partial(load_backbones, selection.folders, train.channels, images=train.name)
    if config.method == "finetune":
        prefix = f"finetune-{selection.step:08d}"
        place = training_run("linear", config, selection, protocol, ranks, prefix=prefix)
        data = replace(config.data, root=whole_path(config.data.root))
        own = replace(own_config(config, selection), data=data)
        return finetune(own, place, load(), train, test, ranks)
    how = Extraction(
        ranks=ranks,
        batch_size=config.encoding_batch_size,
        workers=config.data.workers,
        cached=config.cache,
    )
    fit_index, problem = _build_problem(config, selection, train, test, how)
    quiet = not ranks.main
    if config.method == "logistic_regression":
        if not ranks.main:
            return {}
        return classify_by_logistic_regression(config, problem, device=ranks.device, quiet=quiet)
    if config.augmentation == "none":
        if not ranks.main:
            return {}
        batches = kept_batches(
            problem.fit,
            batch_size=min(config.batch_size, len(problem.fit.labels)),
            seed=config.seed,
            device=ranks.device,
        )
        return classify_by_sgd(config, problem, batches, device=ranks.device, quiet=quiet)
    backbones = {name: backbone.to(ranks.device) for name, backbone in load().items()}
    images = train if fit_index is None else select_images(train, fit_index)
    with frozen(list(backbones.values())):
        batches = streamed_batches(config, images, backbones, ranks, ensemble=selection.ensemble)
        return classify_by_sgd(config, problem, batches, device=ranks.device, quiet=quiet)


def _build_problem(
    config: LinearConfig,
    selection: Selection,
    train: ImageDataset,
    test: ImageDataset,
    how: Extraction,
) -> tuple[Tensor | None, Problem]:
    """The features of both splits; and which training images are not held out, None for all."""
    train_set, test_set = load_feature_sets(selection, (train, test), how)
    fit_index = None
    fit, held_out = train_set, None
    if config.candidates > 1:
        fit_index, held_index = hold_out(
            train_set.labels, config.held_out_percent, seed=config.seed
        )
        if len(held_index) == 0:
            raise how.ranks.told_once(_nothing_to_choose_by(config, train))
        fit, held_out = train_set.part(fit_index), train_set.part(held_index)
    return fit_index, Problem(
        train=train_set, fit=fit, held_out=held_out, test=test_set, classes=train.num_classes
    )


def _nothing_to_choose_by(config: LinearConfig, train: ImageDataset) -> UserError:
    keys = "penalties_c" if config.method == "logistic_regression" else "base_lr"
    return UserError(
        f"{len(train)} training images of {train.num_classes} classes leave none to hold out, by which to choose among "
        f"{config.candidates} candidates: take more (data.shots, data.train_percent), or leave one number in {keys} "
        "and one kind in inputs"
    )


# What a method does not use is no part of its protocol.
_SGD_KEYS = (
    *("epochs", "batch_size", "base_lr", "base_lr_batch_size", "momentum", "nesterov"),
    *("weight_decay", "schedule"),
)
_METHOD_KEYS = {
    "sgd": (*_SGD_KEYS, "augmentation"),
    "finetune": (*_SGD_KEYS, "crop_scale"),
    "logistic_regression": ("penalties_c", "max_iterations", "tolerance"),
}


def _protocol(config: LinearConfig, splits: Splits) -> dict[str, Any]:
    """All that decides a score beside the networks."""
    every, train = asdict(config), splits.train
    protocol = {
        key: every[key] for key in ("method", "inputs", "seed", *_METHOD_KEYS[config.method])
    }
    if config.method == "sgd" and config.augmentation == "crop_flip":
        protocol["crop_scale"] = config.crop_scale
    fitted = len(train)
    if config.candidates > 1:
        assert train.labels is not None
        protocol["held_out_percent"] = config.held_out_percent
        fitted = len(hold_out(train.labels, config.held_out_percent, seed=config.seed)[0])
    if config.method != "logistic_regression":
        size = min(config.batch_size, fitted)
        protocol["lrs"] = [base * size / config.base_lr_batch_size for base in config.base_lrs]
    return {
        **protocol,
        "features": "pooled backbone output",
        "test_view": EVALUATION_VIEW,
        "shots": config.data.shots,
        "train_percent": config.data.train_percent,
        "subset_seed": config.data.subset_seed,
        **splits.protocol(),
    }
