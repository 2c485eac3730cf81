"""Linear evaluation: 13 learning rates in one pass against one, and logistic regression against scikit-learn's.

    python benchmarks/linear_probe.py [--rounds 5]

Each pair alternates within one run. Times are CPU seconds of one thread. Ratios are those of medians.
"""

import argparse
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import sklearn
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.timing import alternate
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


def _compare(first: Callable[[], object], second: Callable[[], object], rounds: int) -> str:
    """Print the medians of a pair and their ratio, after one round to warm up."""
    rivals = {"first": first, "second": second}
    alternate(rivals, 1)
    sides = alternate(rivals, rounds).values()
    one, other = (statistics.median(side) for side in sides)
    spread = [b / a for a, b in zip(*sides, strict=True)]
    return f"{one:.2f} s and {other:.2f} s, ratio {other / one:.2f} ({min(spread):.2f} .. {max(spread):.2f})"


def _sweep(rounds: int) -> None:
    """One epoch of augmented Fashion-MNIST images through a network, and of kept features alone."""
    config = LinearConfig(checkpoint="none", epochs=1, base_lr=LRS)
    ranks = Ranks(CPU)
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
            print(f"{name}, {label}: 1 and 13 learning rates in one pass: ", end="", flush=True)
            one, many = (_run(config, kept, batches, lrs) for lrs in (LRS[-1:], LRS))
            print(_compare(one, many, rounds))
            if name == "resnet18":
                continue
            print(f"{name}, {label}: one pass for 13, and 13 passes: ", end="", flush=True)
            each = [_run(config, kept, batches, [lr]) for lr in LRS]
            print(_compare(many, lambda each=each: [run() for run in each], max(rounds // 2, 1)))


def _run(
    config: LinearConfig, kept: FeatureSet, batches: Batches, lrs: list[float]
) -> Callable[[], object]:
    few = kept.part(torch.arange(64))
    held_out = few if len(lrs) > 1 else None
    problem = Problem(train=kept, fit=kept, held_out=held_out, test=few, classes=CLASSES)
    chosen = replace(config, base_lr=lrs)
    return lambda: classify_by_sgd(chosen, problem, batches, device=CPU, quiet=True)


def _logistic(rounds: int) -> None:
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

    print(
        f"logistic regression, {IMAGES:,} x {FEATURES}, {len(GRID)} C: ours and scikit-learn's: ",
        end="",
        flush=True,
    )
    print(_compare(ours, one_by_one, max(rounds // 2, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        f"{platform.machine()}, one thread, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"{options.rounds} rounds"
    )
    _sweep(options.rounds)
    _logistic(options.rounds)


if __name__ == "__main__":
    main()
