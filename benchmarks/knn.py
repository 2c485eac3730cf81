"""What exactness costs kNN: `knn_scores` against the same votes after one plain float32 search of the cosines.

    python -m benchmarks.knn [--rounds 5] [--output benchmarks/results/knn.json]

And the search alone, by faiss and by torch, which searches where faiss is missing and on GPUs.

Each pair alternates within one run. Times are CPU seconds of one thread. Ratios are those of medians. "Searched again"
is the share of queries that float32 left in doubt. The last two figures are top-1 of either.
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import torch
from torch import Tensor

from benchmarks.timing import alternate, write_results
from peerlearn import knn
from peerlearn.knn import knn_scores, knn_top1

CLASSES, K, TEMPERATURE = 10, 200, 0.1
SIZES = [(10_000, 2_000, 512), (50_000, 10_000, 512), (20_000, 5_000, 2048)]


def _plain(train: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    rows, asked = (torch.nn.functional.normalize(each, dim=1) for each in (train, queries))
    cosines, neighbours = faiss.knn(
        asked.numpy(), rows.numpy(), K, metric=faiss.METRIC_INNER_PRODUCT
    )
    weights = (torch.from_numpy(cosines).double() / TEMPERATURE).exp_()
    votes = torch.zeros(len(queries), CLASSES, dtype=torch.float64)
    return votes.scatter_add_(1, labels[torch.from_numpy(neighbours)], weights)


def _ours(train: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    return knn_scores(train, labels, queries, k=K, temperature=TEMPERATURE, num_classes=CLASSES)


def _features(n: int, d: int, *, offset: float, within: float) -> tuple[Tensor, Tensor]:
    """Ten classes: their centres one apart, images ``within`` of them, all of it beside a common direction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, d, generator=generator)[labels]
    common = torch.randn(d, generator=generator)
    return offset * common + centres + within * torch.randn(n, d, generator=generator), labels


def _share_searched_again(run: Callable[[], Tensor]) -> float:
    with mock.patch.object(knn, "_search_in_float64", side_effect=knn._search_in_float64) as again:
        queries = len(run())
    return sum(len(call.args[3]) for call in again.call_args_list) / queries


def _compare(first: str, second: str, sides: dict[str, list[float]]) -> tuple[float, str]:
    """How many times the second takes the first's time, and the same with its range over rounds."""
    ratios = [b / a for a, b in zip(sides[first], sides[second], strict=True)]
    ratio = statistics.median(sides[second]) / statistics.median(sides[first])
    return ratio, f"{ratio:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def _searches(rounds: int) -> list[dict[str, Any]]:
    """The search of torch beside that of faiss."""
    results = []
    search_with_faiss = knn._faiss_search()
    assert search_with_faiss is not None
    for n, q, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        train, asked = (torch.randn(rows, d + 1, generator=generator) for rows in (n, q // 5))
        calls = {
            "faiss": partial(search_with_faiss, train, asked, K + knn._RUNNERS_UP),
            "torch": partial(knn._search_with_torch, train, asked, K + knn._RUNNERS_UP),
        }
        for call in calls.values():
            call()
        sides = alternate(calls, rounds)
        _, text = _compare("torch", "faiss", sides)
        print(
            f"search alone   N {n:6,} Q {q // 5:6,} D {d:5,}: torch is {text} times as fast as faiss"
        )
        results.append({"train": n, "queries": q // 5, "size": d, "seconds": sides})
    return results


def main() -> None:
    """Print a line per size and kind of features."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print(
        f"{platform.machine()}, one thread, torch {torch.__version__}, faiss {faiss.__version__}, "
        f"k {K}, {options.rounds} rounds"
    )
    scores = []
    for kind, offset, within in (
        ("spread out", 0.0, 3.0),
        ("trained", 0.0, 0.5),
        ("barely trained", 1000.0, 1.0),
    ):
        for n, q, d in SIZES:
            features, labels = _features(n + q, d, offset=offset, within=within)
            problem = features[:n], labels[:n], features[n:]
            plain, ours = partial(_plain, *problem), partial(_ours, *problem)
            again = _share_searched_again(ours)
            top1 = ", ".join(f"{knn_top1(run(), labels[n:]):.2f}" for run in (plain, ours))
            sides = alternate({"plain": plain, "ours": ours}, options.rounds)
            _, text = _compare("plain", "ours", sides)
            print(
                f"{kind:14} N {n:6,} Q {q:6,} D {d:5,}: ours takes {text} times as long as plain, searched again "
                f"{100 * again:.1f} %, top-1 {top1}"
            )
            scores.append(
                {
                    "features": kind,
                    "train": n,
                    "queries": q,
                    "size": d,
                    "seconds": sides,
                    "searched_again": again,
                }
            )
    searches = _searches(options.rounds)
    write_results(
        options.output,
        "knn",
        {"searches": searches, "scores": scores},
        faiss=faiss.__version__,
        k=K,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
