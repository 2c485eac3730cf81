"""What the monitor costs: its seconds of an epoch in percent of the epoch's, for recipes as they are shipped.

    python benchmarks/monitor.py [--recipes NAME ...] [--steps 50] [--images 2048] [--output FILE]

An epoch is scaled up from some steps, each with the reading of its views. A measurement is whatever the recipe watches,
shared by the epochs between two of them. Where that is kNN on CIFAR it takes minutes, and is put together from two
parts: the encoding of images, scaled up from some of them, and all else, with random numbers in the place of the
features of all images. Parts take turns. Fashion-MNIST is Debian's; CIFAR is random images of its size and number.
Times are CPU seconds of one thread.
"""

import argparse
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cifar_images import write_cifar
from benchmarks.timing import alternate, write_results
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.memory import keep_freed_memory
from peerlearn.config import parse_config
from peerlearn.data.datasets import ImageDataset, first_images, load_dataset
from peerlearn.evaluation.features import extract_features
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from pretrain import monitor
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig
from pretrain.state import Training, build
from pretrain.train import train_step

RECIPES = [
    "mcl_fashion_mnist_demo",
    "supervised_fashion_mnist",
    "prototypical_fashion_mnist",
    "moco_cifar10_resnet18",
    "mcl_x2_cifar100_resnet110",
    "supervised_cifar100",
]


def load(recipe: str, root: Path) -> Training:
    """The training of a recipe at its first step."""
    words = [str(SHIPPED / f"{recipe}.yaml"), "--device", "cpu"]
    for name in ("cifar10", "cifar100"):
        if name in recipe.split("_"):
            write_cifar(root / name, name)
            words += ["--data.root", str(root / name)]
    config, _ = parse_config(PretrainConfig, words, verb="pretrain", description="", example="")
    return build(config, RunDirectory(root / "run"), Ranks(torch.device("cpu")))


def steps(training: Training, count: int) -> Callable[[], None]:
    """So many steps, views included."""
    attempt = Attempt(training, 1, Stop())
    epochs = iter(range(1_000_000))

    def run() -> None:
        training.cohort.train()
        for batch in islice(training.loader.epoch(next(epochs)), count):
            train_step(attempt, batch)
            training.step += 1

    return run


def encoding(training: Training, images: int) -> Callable[[], object]:
    """The features of so many images of every network."""
    dataset = first_images(training.dataset, images)

    def encode() -> None:
        extract_features(
            list(training.cohort.backbones),
            dataset,
            device=training.device,
            image_size=training.data.image_size,
            batch_size=training.config.batch_size,
            workers=0,
        )

    return encode


def figures(training: Training) -> Callable[[], object]:
    """Everything of a measurement but the features."""

    def random_features(
        backbones: Sequence[Any], dataset: ImageDataset, **_: object
    ) -> list[Tensor]:
        return [torch.rand(len(dataset), int(each.num_features)) for each in backbones]

    def measured() -> None:
        assert training.watch is not None
        with mock.patch.object(monitor, "extract_features", random_features):
            training.watch(False)

    return measured


def whole(training: Training) -> Callable[[], object]:
    """A measurement as it is."""
    watch = training.watch
    assert watch is not None
    return lambda: watch(False)


def measure(recipe: str, count: int, images: int, rounds: int) -> dict[str, Any]:
    """The seconds of an epoch and of a measurement, and the share of the one in the other."""
    with tempfile.TemporaryDirectory() as place:
        training = load(recipe, Path(place))
        settings = training.config.monitor
        count = min(count, training.steps_per_epoch)
        calls: dict[str, Callable[[], object]] = {"steps": steps(training, count)}
        # How many times each part is contained in an epoch, or in a measurement.
        scales = {"steps": training.steps_per_epoch / count}
        if training.config.method == "moco" and training.dataset.name.startswith("cifar"):
            calls |= {"encoding": encoding(training, images), "all else": figures(training)}
            scales |= {"encoding": watched(training) / images, "all else": 1.0}
        else:
            calls["measurement"] = whole(training)
            scales["measurement"] = 1.0
        # Kernels are chosen, and memory taken, when a shape first comes.
        for call in (steps(training, 1), *list(calls.values())[1:]):
            call()
        taken = alternate(calls, rounds)
    seconds = {name: [s * scales[name] for s in each] for name, each in taken.items()}
    epochs = seconds.pop("steps")
    measured = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    every = settings.every_epochs
    shares = [100 * a / every / b for a, b in zip(measured, epochs, strict=True)]
    return {
        "recipe": recipe,
        "steps_measured": count,
        "steps_of_epoch": training.steps_per_epoch,
        "rounds": rounds,
        "every_epochs": every,
        "epoch_seconds": round(statistics.median(epochs), 1),
        "measurement_seconds": round(statistics.median(measured), 2),
        "parts_of_measurement": {
            name: round(statistics.median(each), 2) for name, each in seconds.items()
        },
        "percent_of_epochs": round(statistics.median(shares), 2),
        "range": [round(min(shares), 2), round(max(shares), 2)],
    }


def watched(training: Training) -> int:
    """The number of images that a measurement encodes."""
    limits = training.config.monitor
    sizes = [
        len(load_dataset(training.dataset.name, split, root=training.data.root))
        for split in ("train", "test")
    ]
    pairs = zip(sizes, (limits.train_limit, limits.test_limit), strict=True)
    return sum(min(size, limit or size) for size, limit in pairs)


def main() -> None:
    """Print a line for each recipe, and write the figures to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=2048, help="images that are encoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    results = []
    for recipe in options.recipes:
        result = measure(recipe, options.steps, options.images, options.rounds)
        results.append(result)
        low, high = result["range"]
        print(
            f"{recipe:28} epoch {result['epoch_seconds']:8,.1f} s   measurement "
            f"{result['measurement_seconds']:6.1f} s every {result['every_epochs']} epochs: "
            f"{result['percent_of_epochs']:.2f} % ({low:.2f} .. {high:.2f})",
            flush=True,
        )
    write_results(options.output, "monitor", results)


if __name__ == "__main__":
    main()
