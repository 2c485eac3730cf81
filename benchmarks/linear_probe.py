"""Linear evaluation: 13 learning rates in one pass against one, and logistic regression against scikit-learn's.

    python -m benchmarks.linear_probe [--rounds 5] [--output benchmarks/results/linear_probe.json]

Each pair alternates within one run. Times are CPU seconds of one thread. Ratios are those of medians.
"""

import argparse
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sklearn
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.timing import alternate, times_as_fast, write_results
from linear_eval.classifiers import Batches, Problem, classify_by_sgd, kept_batches
from linear_eval.config import LinearConfig
from linear_eval.logistic import fit_logistic
from linear_eval.streams import streamed_batches
from peerlearn.backbones import create_backbone
from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import load_dataset
from peerlearn.evaluation.feature_sets import FeatureSet
from peerlearn.export import load_export, save_export

CPU = torch.device("cpu")
LRS = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
IMAGES, FEATURES, CLASSES = 60_000, 512, 10
GRID = [1e-4, 1e-3, 1e-2, 1e-1]


Measured = dict[str, Any]


def _compare(title: str, sides: dict[str, Callable[[], object]], rounds: int) -> Measured:
    """Measure a pair, ours first, after one round to warm up, and print the ratio."""
    print(f"{title}: ", end="", flush=True)
    alternate(sides, 1)
    seconds = alternate(sides, rounds)
    ours, rival = sides
    print(f"{rival} takes {times_as_fast(seconds[rival], seconds[ours])} times the time of {ours}")
    return {"title": title, "seconds": seconds}


def _sweep(rounds: int) -> list[Measured]:
    """One epoch of augmented Fashion-MNIST images through a network, and of kept features alone."""
    config = LinearConfig(checkpoint="none", epochs=1, base_lr=LRS)
    ranks, measured = Ranks(CPU), []
    for name, limit in (("conv4", 2048), ("resnet18", 512)):
        images = load_dataset("fashion_mnist", "train", limit=limit)
        assert images.labels is not None
        with tempfile.TemporaryDirectory() as scratch:
            backbone = create_backbone(name, in_chans=1, small_images=True, image_size=28)
            save_export(
                backbone,
                Path(scratch) / "net-0",
                architecture=name,
                in_chans=1,
                small_images=name == "resnet18",
                image_size=28,
                mean=images.mean,
                std=images.std,
                provenance={},
            )
            networks = {"0": load_export(Path(scratch) / "net-0")}
        width: int = networks["0"].num_features  # type: ignore[assignment]
        kept = FeatureSet(features={"0": torch.randn(len(images), width)}, labels=images.labels)
        streamed = streamed_batches(config, images, networks, ranks)
        for label, batches in (
            ("augmented images", streamed),
            ("kept features", kept_batches(kept, batch_size=256, seed=0, device=CPU)),
        ):
            one, many = (_run(config, kept, batches, lrs) for lrs in (LRS[-1:], LRS))
            sides = {"13 rates": many, "1 rate": one}
            measured.append(_compare(f"{name}, {label}, one pass", sides, rounds))
            if name == "resnet18":
                continue
            each = [_run(config, kept, batches, [lr]) for lr in LRS]
            sides = {"one pass": many, "13 passes": partial(_run_all, each)}
            title = f"{name}, {label}, 13 learning rates"
            measured.append(_compare(title, sides, max(rounds // 2, 1)))
    return measured


def _run(
    config: LinearConfig, kept: FeatureSet, batches: Batches, lrs: list[float]
) -> Callable[[], object]:
    few = kept.part(torch.arange(64))
    held_out = few if len(lrs) > 1 else None
    problem = Problem(train=kept, fit=kept, held_out=held_out, test=few, classes=CLASSES)
    chosen = replace(config, base_lr=lrs)
    return lambda: classify_by_sgd(chosen, problem, batches, device=CPU, quiet=True)


def _run_all(runs: Iterable[Callable[[], object]]) -> None:
    for run in runs:
        run()


def _logistic(rounds: int) -> Measured:
    """A grid of C on features of ten overlapping clusters, 60,000 x 512."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    centres = 0.15 * torch.randn(CLASSES, FEATURES, generator=generator)
    features = centres[labels] + torch.randn(IMAGES, FEATURES, generator=generator)

    def ours() -> None:
        fit_logistic(
            features, labels, classes=CLASSES, penalties_c=GRID, max_iterations=1000, tolerance=1e-4
        )

    def one_by_one() -> None:
        for c in GRID:
            LogisticRegression(C=c, tol=1e-4, max_iter=1000).fit(features.double(), labels)

    title = f"logistic regression, {IMAGES:,} x {FEATURES}, {len(GRID)} C"
    return _compare(title, {"ours": ours, "scikit-learn": one_by_one}, max(rounds // 2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        f"{platform.machine()}, one thread, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"{options.rounds} rounds"
    )
    measured = [*_sweep(options.rounds), _logistic(options.rounds)]
    write_results(options.output, "linear_probe", measured, rounds=options.rounds)


if __name__ == "__main__":
    main()
