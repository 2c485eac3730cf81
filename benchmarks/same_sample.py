"""Cosines of anchors with what a peer's query and key networks make, in the MoCo runs of ssl_fashion_mnist.

    python -m benchmarks.same_sample [--output benchmarks/results/same_sample.json]

The runs of `peerlearn study ssl_fashion_mnist` are there; what is not done is left out. Of each, the first step after
the save before the last is computed again (`peerlearn replay`), and the embeddings of its batch are compared: the
anchor of network 0 with candidates of network 1, or of itself where it is alone. Means over the batch.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.timing import write_results
from peerlearn.cli import main as peerlearn
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.json_files import read_json_object
from studies.study import plan_study
from studies.study_command import SHIPPED
from studies.study_file import read_study

STUDY = "ssl_fashion_mnist"
FIRST, OTHER = "MoCo, with and without peers", "same image of the peer as a positive"
WITHOUT = "MCL (x2), same_sample_positive false"


def measure(run: RunDirectory) -> dict[str, float]:
    """The cosines in one run, and the hard loss of its lowest and its last epoch."""
    saves = sorted(
        int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*")
    )
    step = saves[-2] + 1
    code = peerlearn(["replay", str(run.root), "--step", str(step)])
    if code:
        raise SystemExit(code)
    folder = run.replays / f"step-{step:08d}"
    outputs = {
        name: each.flatten(0, -2)
        for name, each in load_file(folder / "outputs.safetensors").items()
    }
    query = outputs["net/0/embedding"]
    peer = 1 if "net/1/embedding" in outputs else 0
    found = {
        "lr": read_json_object(folder / "step.json")["lr"],
        **cosines("queries", query, outputs[f"net/{peer}/embedding"]),
        **cosines("keys", query, outputs[f"net/key-{peer}/embedding"]),
    }
    means = hard_loss_by_epoch(run, peers=sum(name.startswith("net/key-") for name in outputs) - 1)
    return found | {"loss_lowest": min(means), "loss_last": means[-1]}


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


def main() -> None:
    """Measure all runs that are done, and print the means over seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="file for the results")
    output = parser.parse_args().output
    study = plan_study(read_study(SHIPPED / f"{STUDY}.yaml"), [FIRST, OTHER])
    measured: dict[str, dict[str, Any]] = {}
    for cell in study.cells:
        label = study.compared_label(cell)
        if cell.grid == OTHER:
            if label == "true":  # MCL (x2), which the first grid has
                continue
            label = WITHOUT
        runs = [study.run_of(cell.variant, seed) for seed in study.config.seeds]
        done = [RunDirectory(run.folder) for run in runs if RunDirectory(run.folder).done]
        found = [measure(run) for run in done]
        if found:
            values = {key: [round(each[key], 4) for each in found] for key in found[0]}
            measured[label] = values
            told = ", ".join(f"{key} {statistics.fmean(each):.3f}" for key, each in values.items())
            print(f"{label} ({len(found)} seeds): {told}", flush=True)
    write_results(output, "same_sample", measured)


if __name__ == "__main__":
    main()
