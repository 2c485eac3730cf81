"""The cost of training a supervised cohort, relative to one network: the last columns of the paper's Table 1.

    python benchmarks/cohort_cost.py [--backbones resnet32 wrn_16_2] [--batch_size 128] [--rounds 5] [--device cpu]

Counted: floating-point operations of one training step, forward and backward, by torch's counter of convolutions and
matrix products (the solver of EnsTeach's weights is not among them; its time is), and bytes: what autograd keeps for
the backward pass plus weights, gradients and momentum. Measured: seconds of a step, all variants in alternation, as
ratios of medians; on a GPU the peak memory too.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peerlearn.compute.dist import Ranks
from peerlearn.compute.optimizers import build_optimizer
from peerlearn.config import load_config
from pretrain.cohort import Cohort, build_networks
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig
from pretrain.method import Method, build_method
from pretrain.terms import objective

CLASSES = 100
NO_MCL = {"alpha": 0.0, "beta": 0.0}


def variants(base: PretrainConfig) -> dict[str, PretrainConfig]:
    """The columns of Table 1; the first is a single network."""

    def but(networks: int, teaching: Any, **settings: Any) -> PretrainConfig:
        return dataclasses.replace(
            base,
            cohort=dataclasses.replace(base.cohort, networks=networks),
            supervised=dataclasses.replace(base.supervised, teaching=teaching),
            **settings,
        )

    return {
        "vanilla, 1 network": but(1, "none", **NO_MCL),
        "vanilla": but(2, "none", **NO_MCL),
        "DML": but(2, "dml", **NO_MCL),
        "MCL": but(2, "none"),
        "DML + MCL": but(2, "dml"),
        "EnsTeach + MCL": but(2, "ensemble_teaching"),
    }


class Step:
    """One training step of a variant, which can be repeated on the same batch."""

    def __init__(self, config: PretrainConfig, images: Tensor, labels: Tensor) -> None:
        device = images.device
        size = images.shape[-1]
        self.config = config
        self.cohort: Cohort = build_networks(
            config, in_chans=3, image_size=size, num_classes=CLASSES
        ).to(device)
        self.method: Method = build_method(self.cohort, config, Ranks(device), steps_per_epoch=390)
        self.optimizer = build_optimizer(self.cohort, config.optimizer, lr=1e-3)
        self.images, self.labels = images, labels
        self.number = 0

    def __call__(self) -> None:
        self.number += 1
        self.method.begin_step(self.number)
        self.optimizer.zero_grad(set_to_none=True)
        objective(self.method.terms((self.images,), self.labels), self.config).backward()
        self.optimizer.step()
        self.method.end_step()

    def seconds(self) -> float:
        """The seconds of one step."""
        if self.images.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def flops(self) -> int:
        """The floating-point operations of one step, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self()
        return int(counter.get_total_flops())

    def bytes(self) -> int:
        """The bytes that autograd keeps after one forward pass, plus weights, gradients and momentum."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.method.begin_step(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective(self.method.terms((self.images,), self.labels), self.config)
        parameters = list(self.cohort.parameters())
        for shared in (*parameters, self.images):
            kept.pop(shared.untyped_storage().data_ptr(), None)
        del loss
        self.method.drop_step()
        return sum(kept.values()) + 3 * sum(p.nbytes for p in parameters)

    def peak_bytes(self) -> int | None:
        """The peak memory of one step on a GPU."""
        if not self.images.is_cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated()


def measure(
    backbone: str, *, batch_size: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each variant; its numbers are relative to those of the first variant."""
    base = load_config(PretrainConfig, SHIPPED / "supervised_cifar100.yaml")
    base = dataclasses.replace(
        base,
        batch_size=batch_size,
        cohort=dataclasses.replace(base.cohort, backbones=backbone),
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = (torch.arange(batch_size, device=device) // 2) % CLASSES
    steps = {name: Step(config, images, labels) for name, config in variants(base).items()}
    peaks = {}
    for name, step in steps.items():
        step()
        # Only one variant is on the GPU at a time, so that the weights of the others do not count.
        peaks[name] = step.peak_bytes()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step.seconds())
    first, *_ = steps
    rows = []
    for name, step in steps.items():
        rounds_ratio = [b / a for a, b in zip(times[first], times[name], strict=True)]
        rows.append(
            {
                "backbone": backbone,
                "variant": name,
                "flops": step.flops(),
                "bytes": step.bytes(),
                "seconds_ratio": statistics.median(times[name]) / statistics.median(times[first]),
                "seconds_ratio_range": [min(rounds_ratio), max(rounds_ratio)],
                "peak_bytes": peaks[name],
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print("| network | variant | computation | memory | time (range over rounds) |")
    print("|---|---|---|---|---|")
    for row in rows:
        base = next(other for other in rows if other["backbone"] == row["backbone"])
        flops, size = (row[key] / base[key] for key in ("flops", "bytes"))
        low, high = row["seconds_ratio_range"]
        print(
            f"| {row['backbone']} | {row['variant']} | {flops:.3f}x | {size:.3f}x | "
            f"{row['seconds_ratio']:.2f}x ({low:.2f} .. {high:.2f}) |"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet32", "wrn_16_2"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    rows = []
    for backbone in arguments.backbones:
        rows += measure(
            backbone,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            device=device,
        )
    show(rows)
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, 1 thread"
    )
    print(
        f"batch {arguments.batch_size}, {arguments.rounds} rounds, {hardware}, torch {torch.__version__}"
    )
    if arguments.output:
        facts = {
            "hardware": hardware,
            "torch": torch.__version__,
            "batch_size": arguments.batch_size,
        }
        arguments.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
