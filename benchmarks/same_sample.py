"""Cosines of anchors with what a peer's query and key networks make, in the MoCo runs of ssl_fashion_mnist.

    python -m benchmarks.same_sample [--output benchmarks/results/same_sample.json]

The runs of `peerlearn study ssl_fashion_mnist` are there; what is not done is left out. Of each, the first step after
the save before the last is computed again (`peerlearn replay`), and the embeddings of its batch are compared: the
anchor of network 0 with candidates of network 1, or of itself where it is alone. Means over the batch.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.performance import markdown_table, mean_and_spread
from benchmarks.timing import write_results
from peerlearn.cli import main as peerlearn
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import step_folder, step_folders
from studies.study import plan_study
from studies.study_command import SHIPPED
from studies.study_file import read_study

STUDY = "ssl_fashion_mnist"
GRIDS = ("MoCo, with and without peers", "same image of the peer as a positive")


def measure(run: RunDirectory) -> dict[str, float]:
    """The cosines in one run, and the hard loss of its lowest and its last epoch."""
    saves = [step for step, _ in step_folders(run.checkpoints)]
    if len(saves) < 2:
        sys.exit(
            f"{run.checkpoints} has fewer than two saves, from which a step can be computed again"
        )
    step = saves[1] + 1
    if code := peerlearn(["replay", str(run.root), "--step", str(step)]):
        sys.exit(code)
    outputs = {
        name: each.flatten(0, -2)
        for name, each in load_file(run.replays / step_folder(step) / "outputs.safetensors").items()
    }
    query, peers = (
        outputs["net/0/embedding"],
        sum(name.startswith("net/key-") for name in outputs) - 1,
    )
    peer = min(peers, 1)
    means = hard_loss_by_epoch(run, peers)
    return {
        **cosines("queries", query, outputs[f"net/{peer}/embedding"]),
        **cosines("keys", query, outputs[f"net/key-{peer}/embedding"]),
        "loss_lowest": min(means),
        "loss_last": means[-1],
    }


def hard_loss_by_epoch(run: RunDirectory, peers: int) -> list[float]:
    """Network 0: its mean ``icl_hard`` with one peer; alone: its ``scl_hard``."""
    name = "net/0/icl_hard" if peers else "net/0/scl_hard"
    by_epoch: dict[int, list[float]] = {}
    for row in run.metric_rows():
        if name in row:
            by_epoch.setdefault(math.ceil(row["epoch"]), []).append(row[name] / max(peers, 1))
    return [statistics.fmean(values) for _, values in sorted(by_epoch.items())]


def cosines(name: str, anchors: Tensor, candidates: Tensor) -> dict[str, float]:
    """Mean cosine with the candidate of the same image, and with those of other images."""
    products = anchors @ candidates.T
    others = ~torch.eye(len(products), dtype=torch.bool)
    return {
        f"{name}_same": products.diag().mean().item(),
        f"{name}_other": products[others].mean().item(),
    }


def section(found: Mapping[str, Any]) -> str:
    """The part of docs/study.md that shows the results."""
    versions = f"{found['machine']}, Python {found['python']}, torch {found['torch']}"
    command = "python -m benchmarks.same_sample --output benchmarks/results/same_sample.json"
    rows = [
        [label, *(_told(values[key]) for key in _COLUMNS)]
        for label, values in found["measured"].items()
    ]
    table = markdown_table(["method", *_COLUMNS.values()], rows)
    return f"{_TEXT.strip()}\n\n`{command}` ({versions}):\n\n{table}"


def _told(values: list[float]) -> str:
    std = statistics.stdev(values) if len(values) > 1 else None
    return mean_and_spread(statistics.fmean(values), std, len(values))


_COLUMNS = {
    "queries_same": "query, same image",
    "queries_other": "query, other images",
    "keys_same": "key, same image",
    "keys_other": "key, other images",
    "loss_lowest": "hard loss, lowest epoch",
    "loss_last": "hard loss, last epoch",
}
_TEXT = """
## With MoCo, the peer's query betrays itself

Eq. 4 has two positives: the peer's embedding of the other view, and that of the anchor's own view
(`same_sample_positive`). With MoCo, the peer's key network makes the first and all negatives. Its query network, which
is ahead of the key network, makes the second. So a candidate can be known by its maker, whatever is in the image. The
networks learn that, as the table tells of the runs of ssl_fashion_mnist:

- With that positive, queries of *other* images lie much closer to the anchor than keys of other images do. Without it
  (`same_sample_positive false`, the weights of the authors' code, and MoCo) they lie where the keys lie, or nearly so.
- The lead of the query networks ends as the learning rate falls to 0. The loss that it had lowered rises again.

`--same_sample_positive false` leaves that positive out, as the authors' code does. All scores are higher without it
(grids "same image of the peer as a positive"): on the characters kNN gains 1.97 and linear probes gain 2.52; on
Fashion-MNIST no gain is shown. With SimCLR one network makes all candidates of a peer: this sign is not there.

Columns: mean cosine of the anchors of network 0 with the embeddings that the query and the key network of network 1 (a
lone network: its own) make of a batch, at the first step of the last epoch; `icl_hard` for one peer (a lone network:
`scl_hard`), mean of an epoch. `same_sample_positive false` is MCL (x2) but for that. Mean ± standard deviation over
seeds, and in brackets how many seeds.
"""


def main() -> None:
    """Measure all runs that are done, and print the means over seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="file for the results")
    output = parser.parse_args().output
    study = plan_study(read_study(SHIPPED / f"{STUDY}.yaml"), list(GRIDS))
    measured: dict[str, dict[str, list[float]]] = {}
    for variant in dict.fromkeys(cell.variant.name for cell in study.cells):
        # By its first cell: a config may be in both grids.
        cell = next(cell for cell in study.cells if cell.variant.name == variant)
        axis, label = study.config.compared_axis(cell.grid), study.compared_label(cell)
        label = label if axis == "method" else f"{axis} {label}"
        runs = [
            RunDirectory(study.run_of(cell.variant, seed).folder) for seed in study.config.seeds
        ]
        found = [measure(run) for run in runs if run.done]
        if found:
            measured[label] = {key: [round(each[key], 4) for each in found] for key in found[0]}
            means = (f"{key} {statistics.fmean(each):.3f}" for key, each in measured[label].items())
            print(f"{label} ({len(found)} seeds): {', '.join(means)}", flush=True)
    if not measured:
        sys.exit(f"no run in {study.root} is done: `peerlearn study {STUDY}` makes them")
    write_results(output, "same_sample", measured)


if __name__ == "__main__":
    main()
