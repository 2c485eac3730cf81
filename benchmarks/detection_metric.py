"""Average precision of detections: batched, against a loop over boxes (the VOC rules) and pycocotools (the COCO rule).

    pip install -e '.[benchmarks]'
    python -m benchmarks.detection_metric [--rounds 3] [--images 200] [--detections 100] [--alone] [--output FILE]

Both sides take the same boxes and alternate within one run. Times are CPU seconds of one thread. Ratios are those of
medians. The figures in brackets are AP of either.
"""

import argparse
import platform
import resource
import statistics
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.timing import alternate, write_results
from detection.voc import Rule, evaluate
from tests.detection.oracles import plain_devkit, pycocotools

CLASSES = 20
Boxes = list[dict[str, torch.Tensor]]


def _images(images: int, per_image: int) -> tuple[Boxes, Boxes]:
    """Three objects an image, as in VOC, one in ten difficult; each detection near one of them, half of its class."""
    generator = np.random.default_rng(0)
    detections: Boxes = []
    targets: Boxes = []
    for _ in range(images):
        corners = generator.uniform(0, 300, (3, 2))
        boxes = np.hstack([corners, corners + generator.uniform(20, 200, (3, 2))])
        labels = generator.integers(0, CLASSES, 3)
        near = generator.integers(0, 3, per_image)
        moved = boxes[near] + generator.normal(0, 15, (per_image, 4))
        any_label = generator.integers(0, CLASSES, per_image)
        detection = {
            "boxes": np.sort(moved.reshape(-1, 2, 2), axis=1).reshape(-1, 4),
            "scores": generator.random(per_image),
            "labels": np.where(generator.random(per_image) < 0.5, labels[near], any_label),
        }
        target = {"boxes": boxes, "labels": labels, "difficult": generator.random(3) < 0.1}
        for each, kept in ((detection, detections), (target, targets)):
            kept.append({key: torch.from_numpy(values) for key, values in each.items()})
    return detections, targets


def _batched(detections: Boxes, targets: Boxes, rule: Rule) -> float:
    return evaluate(detections, targets, num_classes=CLASSES, rule=rule).ap


def _rival(detections: Boxes, targets: Boxes, rule: Rule) -> float:
    if rule == "coco":
        return float(np.nanmean(pycocotools(detections, targets, CLASSES)))
    return float(np.nanmean(plain_devkit(detections, targets, CLASSES, rule)))


def main() -> None:
    """Print a line per rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    parser.add_argument("--alone", action="store_true", help="no rival is run")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, one thread, torch {torch.__version__}, numpy {np.__version__}, "
        f"{options.rounds} rounds, {options.images:,} images of {options.detections} detections, {CLASSES} classes"
    )
    detections, targets = _images(options.images, options.detections)
    measured = []
    for rule in get_args(Rule):
        sides = {"batched": partial(_batched, detections, targets, rule)}
        if not options.alone:
            sides["pycocotools" if rule == "coco" else "loop over boxes"] = partial(
                _rival, detections, targets, rule
            )
        found = {name: run() for name, run in sides.items()}
        seconds = alternate(sides, options.rounds)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        told = ", ".join(
            f"{name} {medians[name]:.2f} s ({medians[name] / medians['batched']:.1f} times; {found[name]:.6f} %)"
            for name in sides
        )
        print(f"{rule}: {told}", flush=True)
        title = f"rule {rule}, {options.images:,} images of {options.detections} detections"
        measured.append({"title": title, "seconds": seconds})
    write_results(options.output, "detection_metric", measured, rounds=options.rounds)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"highest memory of the process {highest:.2f} GiB")


if __name__ == "__main__":
    main()
