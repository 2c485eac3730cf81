"""The score of a detector: figures, precision over recall of each class, and a sheet of detections."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detection.measure import Measured
from detection.pictures import MOST_IMAGES, draw_sheet, plot_precision_recall
from detection.voc import outcomes_by_image, precision_recall
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.uncertainty import spread_over_runs


def detection_score(
    network: str,
    variant: str,
    test: DetectionDataset,
    trials: Sequence[Measured],
    protocol: Mapping[str, Any],
) -> Score:
    """The score of one or several trials: their mean, and the pictures of the first.

    Args:
        network: name of the network that the detectors stand on.
        variant: what tells its scores apart.
        test: images that it is of.
        trials: what was measured in each trial.
        protocol: all that decides the score beside the network.
    """
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
    about = ", ".join(filter(None, [test.title, f"network {network}", variant]))
    of_trials = f", trial 1 of {len(trials)}" if len(trials) > 1 else ""
    title = f"{about}: AP50 {first.result.ap50:.2f} % by rule {first.rule}, n = {len(test):,} images{of_trials}"
    return Score(
        network=network,
        dataset=test.title,
        metrics=metrics,
        protocol=protocol,
        variant=variant,
        pictures={
            "": partial(_plot_curves, measured=first, test=test, title=title),
            "-detections": partial(_draw_detections, measured=first, test=test, title=title),
        },
    )


def _plot_curves(file: Path, *, measured: Measured, test: DetectionDataset, title: str) -> None:
    curves = precision_recall(*measured.compared, num_classes=test.num_classes, rule=measured.rule)
    per_class = measured.result.per_class_ap50.tolist()
    plot_precision_recall(file, curves, test.class_names, per_class, title=title)


def _draw_detections(file: Path, *, measured: Measured, test: DetectionDataset, title: str) -> None:
    """The first test images that have objects."""
    filled = [number for number, labels in enumerate(test.labels) if len(labels)]
    numbers = filled[:MOST_IMAGES]
    outcomes = outcomes_by_image(
        *measured.compared, num_classes=test.num_classes, rule=measured.rule
    )
    draw_sheet(
        file,
        [test.read(number) for number in numbers],
        [measured.detections[number] for number in numbers],
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
