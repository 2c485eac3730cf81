"""Detectors trained on one checkpoint's networks, and their average precision on the test images."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from detection.measure import Measured, measure
from detection.saved import LAST, load_detector
from detection.scores import detection_score
from detection.train import detection_program
from peerlearn.compute.dist import Ranks
from peerlearn.compute.precision import Precision
from peerlearn.config import fixed_values
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.errors import UsageError, UserError
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.selection import Selection, run_setting
from peerlearn.evaluation.training_run import own_config, scored_again, trained, training_run
from peerlearn.runs.export_folders import is_detector


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
    return detection_score(network, ", ".join(variant), data.test, trials, protocol)


def _train_and_test(
    config: DetectConfig, selection: Selection, data: Data, ranks: Ranks
) -> Measured:
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
    return detection_score(network, folder.name, test, [tested], protocol)


def _named(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _test(
    config: DetectConfig,
    detector: nn.Module,
    model: ModelConfig,
    channels: int,
    test: DetectionDataset,
    ranks: Ranks,
) -> Measured:
    precision = Precision(config.precision, ranks.device)
    return measure(
        *(config, detector, test), model=model, channels=channels, precision=precision, ranks=ranks
    )


def _measured_by(config: DetectConfig, test: DetectionDataset) -> dict[str, Any]:
    return {
        "rule": config.chosen_rule,
        "round_like_detectron2": config.round_like_detectron2,
        "test_split": test.split,
        "test_fingerprint": test.fingerprint(),
    }
