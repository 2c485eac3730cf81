"""Detectors trained on one checkpoint's networks, and their average precision on the test images."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from detection.config import DetectConfig, ModelConfig, Weights
from detection.data import (
    Data,
    from_anywhere,
    leakage,
    load_data,
    read_test_images,
    training_images,
)
from detection.inference import Detections, detect, for_rule
from detection.pictures import MOST_IMAGES, draw_sheet, plot_precision_recall
from detection.saved import LAST, load_detector
from detection.train import detection_program
from detection.voc import Rule, VOCResult, evaluate, outcomes_by_image, precision_recall
from peerlearn.compute.dist import Ranks
from peerlearn.compute.precision import Precision
from peerlearn.config import fixed_values
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.errors import UsageError, UserError
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.selection import Selection, run_setting
from peerlearn.evaluation.training_run import own_config, scored_again, trained, training_run
from peerlearn.evaluation.uncertainty import spread_over_runs
from peerlearn.runs.export_folders import is_detector


class Tested(NamedTuple):
    """A detector's detections in the test images, and its average precision.

    Attributes:
        detections: what `detect` returned.
        compared: detections and targets, as the rule compares them.
        rule: rule of the average precision.
        result: average precision.
    """

    detections: Detections
    compared: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    rule: Rule
    result: VOCResult


def score(config: DetectConfig, selection: Selection, ranks: Ranks) -> Iterator[Score]:
    """Train a detector on every selected network, and score it; a detector that was trained here is only scored.

    All ranks call it together; the main one yields the scores: one for each network, kind of weights and share of the
    training images.

    Raises:
        UserError: data or an export that cannot be had, or that do not fit each other; a training that diverges.
        SavedError: a signal asked to stop; the training is saved.
    """
    _check_single(config, selection)
    ((network, folder), *others) = selection.folders.items()
    if not others and is_detector(folder):
        if config.run is not None:
            raise UsageError(
                f"--run is the directory of a training, and {folder} is a detector, which is only scored: leave it out"
            )
        test = ranks.main_first(partial(read_test_images, config.data))
        yield _score_again(config, network, folder, test, ranks)
        return
    data = load_data(config.data, ranks)
    leaks = leakage(config.data, data, ranks)
    for network, folder in selection.folders.items():
        own = dataclasses.replace(selection, folders={network: folder})
        for weights in config.weights:
            for percent in config.data.percents:
                yield _score_trained(config, own, data, weights, percent, leaks, ranks)


def _check_single(config: DetectConfig, selection: Selection) -> None:
    """Refuse to keep several trainings in the folder of one."""
    number = math.prod(
        [
            *(len(config.checkpoints()), len(selection.folders), len(config.weights)),
            *(len(config.data.percents), config.trials),
        ]
    )
    if config.run is not None and number > 1:
        raise UsageError(
            f"--run is the directory of one training, and these are {number}: leave it out, or choose one by "
            "--checkpoint, --network, --backbone_weights, --data.train_percent and --trials 1"
        )


def _score_trained(
    config: DetectConfig,
    selection: Selection,
    data: Data,
    weights: Weights,
    percent: float,
    leaks: Mapping[str, Any],
    ranks: Ranks,
) -> Score:
    """The score of one network, kind of weights and share of the training images, over all trials."""
    (network,) = selection.folders
    trials, images = [], 0
    usual = int(run_setting(selection.run, "seed", 0))
    seed = usual if config.seed is None else config.seed
    for trial in range(config.trials):
        own = dataclasses.replace(
            own_config(config, selection),
            seed=seed + trial,
            trials=1,
            backbone_weights=weights,
            data=dataclasses.replace(
                from_anywhere(config.data),
                train_percent=percent,
                subset_seed=config.data.subset_seed + trial,
            ),
        )
        train = ranks.main_first(partial(training_images, own.data, data.train))
        images = len(train)
        trials.append(_train_and_test(own, selection, data._replace(train=train), ranks))
    protocol = {
        **fixed_values(config),
        # A training that goes on has its seed spelled out, and its score is the same one.
        "seed": config.seed if seed != usual or len(config.checkpoints()) > 1 else None,
        "backbone_weights": weights,
        "data.train_percent": percent,
        "lr": config.lr,
        "steps": config.total_steps,
        "train_images": images,
        "train_split": data.train.split,
        "train_fingerprint": data.train.fingerprint(),
        **leaks,
        **_measured_by(config, data.test),
    }
    variant = ["random weights"] if weights == "random" else []
    if percent < 100 or len(config.data.percents) > 1:
        variant.append(f"{percent:g} % of the images")
    return _to_score(network, ", ".join(variant), data.test, trials, protocol)


def _train_and_test(config: DetectConfig, selection: Selection, data: Data, ranks: Ranks) -> Tested:
    """One training, or the detector that it has left, on the test images."""
    ((network, export),) = selection.folders.items()
    place = training_run(
        "detect",
        config,
        selection,
        {"train": data.train.fingerprint()},
        ranks,
        prefix=f"detect-{selection.step:08d}-{network}",
        folder=config.run,
        leaves=LAST,
    )
    run = place.directory
    if ranks.from_main(lambda: run.done and is_detector(run.root / LAST)):
        detector, about = ranks.main_first(lambda: load_detector(run.root / LAST))
        with scored_again(place, ranks):
            return _test(config, detector, about.model, about.image_channels, data.test, ranks)
    program = detection_program(export, network, data)
    with trained(place, program, config, ranks, keeps_saves=False) as training:
        channels = training.body.image_channels
        return _test(config, training.detector, config.model, channels, data.test, ranks)


def _score_again(
    config: DetectConfig, network: str, folder: Path, test: DetectionDataset, ranks: Ranks
) -> Score:
    """The score of a detector that was trained before."""
    detector, about = ranks.main_first(lambda: load_detector(folder))
    if list(about.class_names) != list(test.class_names):
        raise ranks.told_once(
            UserError(
                f"{folder} tells apart {_named(about.class_names)}, and {test.title} {test.split} has "
                f"{_named(test.class_names)}: choose the data that it was trained on"
            )
        )
    tested = _test(config, detector, about.model, about.image_channels, test, ranks)
    protocol = {"detector": dataclasses.asdict(about), **_measured_by(config, test)}
    return _to_score(network, folder.name, test, [tested], protocol)


def _named(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _test(
    config: DetectConfig,
    detector: nn.Module,
    model: ModelConfig,
    channels: int,
    test: DetectionDataset,
    ranks: Ranks,
) -> Tested:
    detections = detect(
        detector.to(ranks.device),
        test,
        model,
        channels=channels,
        precision=Precision(config.precision, ranks.device),
        workers=config.data.workers,
        ranks=ranks,
    )
    rule = config.chosen_rule
    found, targets = for_rule(detections, test, rule=rule, rounded=config.round_like_detectron2)
    result = evaluate(found, targets, num_classes=test.num_classes, rule=rule)
    return Tested(detections, (found, targets), rule, result)


def _measured_by(config: DetectConfig, test: DetectionDataset) -> dict[str, Any]:
    return {
        "rule": config.chosen_rule,
        "round_like_detectron2": config.round_like_detectron2,
        "test_split": test.split,
        "test_fingerprint": test.fingerprint(),
    }


def _to_score(
    network: str,
    variant: str,
    test: DetectionDataset,
    trials: Sequence[Tested],
    protocol: Mapping[str, Any],
) -> Score:
    metrics: dict[str, Any] = {"n": len(test), "trials": len(trials)}
    for name in ("ap", "ap50", "ap75"):
        values = [getattr(each.result, name) for each in trials]
        spread = spread_over_runs(values)
        metrics[name] = spread.mean
        if len(trials) > 1:
            metrics |= {f"{name}_std": spread.std, f"{name}_trials": values}
    per_class = zip(*(each.result.per_class_ap50.tolist() for each in trials), strict=True)
    metrics["per_class_ap50"] = {
        name: _number(sum(values) / len(values))
        for name, values in zip(test.class_names, per_class, strict=True)
    }
    metrics["per_class_objects"] = dict(zip(test.class_names, _counted_objects(test), strict=True))
    first = trials[0]
    title = f"{test.title}, network {network}{f', {variant}' if variant else ''}: AP50 {first.result.ap50:.2f} %"
    return Score(
        network=network,
        dataset=test.title,
        metrics=metrics,
        protocol=protocol,
        variant=variant,
        pictures={
            ".png": partial(_plot_curves, tested=first, test=test, title=title),
            "-detections.png": partial(_draw_detections, tested=first, test=test, title=title),
        },
    )


def _plot_curves(file: Path, *, tested: Tested, test: DetectionDataset, title: str) -> None:
    curves = precision_recall(*tested.compared, num_classes=test.num_classes, rule=tested.rule)
    per_class = tested.result.per_class_ap50.tolist()
    plot_precision_recall(file, curves, test.class_names, per_class, title=title)


def _draw_detections(file: Path, *, tested: Tested, test: DetectionDataset, title: str) -> None:
    """The first test images that have objects."""
    filled = [number for number, labels in enumerate(test.labels) if len(labels)]
    numbers = filled[:MOST_IMAGES]
    outcomes = outcomes_by_image(*tested.compared, num_classes=test.num_classes, rule=tested.rule)
    draw_sheet(
        file,
        [test.read(number) for number in numbers],
        [tested.detections[number] for number in numbers],
        test.class_names,
        title=title,
        targets=[
            {"boxes": test.boxes[number], "labels": test.labels[number]} for number in numbers
        ],
        outcomes=[outcomes[number] for number in numbers],
    )


def _counted_objects(test: DetectionDataset) -> list[int]:
    """The number of each class's objects, without the difficult ones."""
    counted = torch.cat(test.labels)[~torch.cat(test.difficult)]
    return counted.bincount(minlength=test.num_classes).tolist()


def _number(value: float) -> float | None:
    """NaN, of a class without objects, is none that JSON knows."""
    return None if value != value else value
