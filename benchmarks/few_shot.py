"""Few-shot evaluation: all episodes batched, against a loop over episodes, and easyfsl's networks in that loop.

    pip install -e '.[benchmarks]'
    python -m benchmarks.few_shot [--rounds 3] [--episodes 1000] [--output benchmarks/results/few_shot.json]

The three take the same features and episodes and alternate within one run. Times are CPU seconds of one thread. Ratios
are those of medians. Without easyfsl, the loop alone is compared.
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, cpu_seconds, write_results
from peerlearn.evaluation.episodes import Episodes, draw_episodes, nearest_centroid, score_episodes

try:
    from easyfsl.methods import PrototypicalNetworks
except ImportError:
    PrototypicalNetworks = None

CLASSES, OF_EACH, WAYS, QUERIES = 20, 600, 5, 15
CASES = [(1, 512), (5, 512), (5, 1600)]


def _batched(features: Tensor, episodes: Episodes) -> float:
    scorer = nearest_centroid(features, distance="sqeuclidean")
    return score_episodes(features.shape[1], episodes, scorer).mean


def _predict(support: Tensor, query: Tensor) -> Tensor:
    return torch.cdist(query, support.mean(dim=1)).argmin(dim=1)


def _predict_with_easyfsl(support: Tensor, query: Tensor) -> Tensor:
    model = PrototypicalNetworks(backbone=nn.Identity())
    labels = torch.arange(WAYS).repeat_interleave(support.shape[1])
    model.process_support_set(support.flatten(0, 1), labels)
    predicted: Tensor = model(query).argmax(dim=1)
    return predicted


def _looped(
    predict: Callable[[Tensor, Tensor], Tensor], features: Tensor, episodes: Episodes
) -> float:
    truth = torch.arange(WAYS).repeat_interleave(QUERIES)
    shares = [
        float((predict(features[support], features[query.flatten()]) == truth).double().mean())
        for support, query in zip(episodes.support, episodes.query, strict=True)
    ]
    return 100 * statistics.fmean(shares)


def main() -> None:
    """Print a line per number of shots and dimensions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    labels = torch.arange(CLASSES).repeat_interleave(OF_EACH)
    drawing = cpu_seconds(
        lambda: draw_episodes(
            labels, ways=WAYS, shots=5, queries=QUERIES, episodes=options.episodes, seed=0
        )
    )
    print(f"drawing {options.episodes:,} episodes of 5 shots: {drawing:.2f} s")
    measured = []
    for shots, d in CASES:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(CLASSES, d, generator=generator)
        features = 0.2 * centres[labels] + torch.randn(len(labels), d, generator=generator)
        episodes = draw_episodes(
            labels, ways=WAYS, shots=shots, queries=QUERIES, episodes=options.episodes, seed=0
        )
        rivals = {
            "batched": partial(_batched, features, episodes),
            "loop": partial(_looped, _predict, features, episodes),
        }
        if PrototypicalNetworks is not None:
            rivals["easyfsl"] = partial(_looped, _predict_with_easyfsl, features, episodes)
        means = {name: run() for name, run in rivals.items()}
        seconds = alternate(rivals, options.rounds)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        told = ", ".join(
            f"{name} {medians[name]:.2f} s"
            f" ({medians[name] / medians['batched']:.1f} times; {means[name]:.2f} %)"
            for name in rivals
        )
        title = f"{options.episodes:,} episodes of {shots} shots, D {d:,}"
        print(f"{title}: {told}")
        measured.append({"title": title, "seconds": seconds})
    write_results(options.output, "few_shot", measured, rounds=options.rounds)


if __name__ == "__main__":
    main()
