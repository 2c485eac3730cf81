"""The queue form of the loss by the obvious way, the reference and passes over tiles; forward and backward, one thread.

    python benchmarks/loss.py [--rounds 5] [--sizes 256,16384,2 ...] [--output benchmarks/results/loss.json]

"Obvious" is the authors' way: the queue cloned for each ordered pair of networks, the logits of an anchor concatenated,
cross-entropies and KL divergences of them. All compute `.total(1, 1)` at tau 0.07, T 3, without the same-sample
positive. They alternate within one run. Times are CPU seconds; ratios are those of medians, with the range over rounds.
The floor is two matrix products: of the logits once, and of the gradient once.

An allocator that gives freed memory back to the system pays for every large temporary anew; one that keeps it shows the
algorithms alone. Each is measured in a process of its own. Memory is the growth of the peak resident size in one call.
"""

import argparse
import ctypes
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternate, write_results
from pretrain.losses import queue_terms

SIZES = ["256,16384,2", "256,65536,2", "128,65536,4"]
DIM, TAU, SOFT_TEMPERATURE = 128, 0.07, 3.0
KEPT_BYTES = 2**30
# glibc's own numbers for mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def obvious(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """The sum of the four terms as a user would write it."""
    networks = range(len(query))
    target = torch.zeros(query.shape[1], dtype=torch.long, device=query.device)
    logits = {}
    for a in networks:
        for b in networks:
            positive = torch.einsum("bd,bd->b", query[a], key[b]).unsqueeze(-1)
            negative = torch.einsum("bd,dk->bk", query[a], queue[b].T.clone().detach())
            logits[a, b] = torch.cat([positive, negative], dim=1) / TAU

    return _terms(logits, target)


def clean(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """The same without copies of the queue: all logits by one product."""
    negative = torch.einsum("abd,ckd->acbk", query, queue)
    positive = torch.einsum("abd,cbd->acb", query, key).unsqueeze(-1)
    every = torch.cat([positive, negative], dim=-1) / TAU
    networks = range(len(query))
    target = torch.zeros(query.shape[1], dtype=torch.long, device=query.device)
    return _terms({(a, b): every[a, b] for a in networks for b in networks}, target)


def _terms(logits: dict[tuple[int, int], Tensor], target: Tensor) -> Tensor:
    """The sum of the four terms from the logits (B, 1 + K) of each ordered pair of networks."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student / SOFT_TEMPERATURE, dim=1)
        p = F.softmax(teacher.detach() / SOFT_TEMPERATURE, dim=1)
        return F.kl_div(log_q, p, reduction="batchmean") * SOFT_TEMPERATURE**2

    total = sum(F.cross_entropy(each, target) for each in logits.values())
    for a, b in logits:
        if a != b:
            total = total + divergence(logits[a, a], logits[b, b])
            total = total + divergence(logits[a, b], logits[b, a])
    return torch.as_tensor(total)


def ours(query: Tensor, key: Tensor, queue: Tensor, **keys: Any) -> Tensor:
    """The same by `queue_terms`."""
    terms = queue_terms(
        query,
        key,
        queue,
        temperature=TAU,
        soft_temperature=SOFT_TEMPERATURE,
        same_sample_positive=False,
        **keys,
    )
    return terms.total(1.0, 1.0)


RIVALS: dict[str, Callable[..., Tensor]] = {
    "obvious": obvious,
    "reference": partial(ours, backend="reference"),
    "flat": partial(ours, backend="flat"),
    "flat, tiles kept": partial(ours, backend="flat", tile_bytes=KEPT_BYTES),
}


def gradient(loss: Callable[..., Tensor], query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Forward and backward."""
    query = query.clone().requires_grad_()
    loss(query, key, queue).backward()
    assert query.grad is not None
    return query.grad


def floor(query: Tensor, queue: Tensor) -> None:
    """The two matrix products, by tiles."""
    flat = query.flatten(0, 1)
    logits, result = flat.new_empty(len(flat), 512), torch.zeros_like(flat)
    for own in queue:
        for rows in own.split(512):
            torch.mm(flat, rows.T, out=logits[:, : len(rows)])
            result.addmm_(logits[:, : len(rows)], rows)


def grown_mib(call: Callable[[], object]) -> float:
    """The growth of the peak resident size in a call, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_kib("VmRSS")
    # Linux: the peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


def measure(size: str, rounds: int, *, recycling: bool) -> dict[str, Any]:
    """All rivals on one size, in this process."""
    torch.set_num_threads(1)
    if recycling:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    batch, rows, networks = map(int, size.split(","))
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (
        F.normalize(torch.randn(networks, n, DIM, generator=generator), dim=-1)
        for n in (batch, batch, rows)
    )
    calls: dict[str, Callable[[], object]] = {
        name: partial(gradient, loss, query, key, queue) for name, loss in RIVALS.items()
    }
    grown = {} if recycling else {name: round(grown_mib(call), 1) for name, call in calls.items()}
    calls["floor"] = partial(floor, query, queue)
    for call in calls.values():
        call()
    seconds = alternate(calls, rounds)
    return {
        "size": size,
        "allocator": "recycling" if recycling else "default",
        "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "grown_mib": grown,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """A line for each rival: how many times as fast as the obvious way, and how far from the floor."""
    seconds, printed = result["seconds"], []
    for name in RIVALS:
        ratios = [a / b for a, b in zip(seconds["obvious"], seconds[name], strict=True)]
        median = {key: statistics.median(each) for key, each in seconds.items()}
        memory = result["grown_mib"]
        peak = (
            f", {memory[name]:,.0f} MiB ({memory['obvious'] / max(memory[name], 0.1):.0f}x less)"
            if memory
            else ""
        )
        printed.append(
            f"B,K,M {result['size']:12} {result['allocator']:9} {name:17} {median['obvious'] / median[name]:5.2f}x "
            f"({min(ratios):.2f} .. {max(ratios):.2f}), {median[name] / median['floor']:.1f} x floor{peak}"
        )
    return printed


def main() -> None:
    """Print a line per size, allocator and rival."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="B,K,M")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=("default", "recycling"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        recycling = options.one == "recycling"
        print(json.dumps(measure(options.sizes[0], options.rounds, recycling=recycling)))
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    results = []
    for size in options.sizes:
        for allocator in ("recycling", "default"):
            words = ["--one", allocator, "--sizes", size, "--rounds", str(options.rounds)]
            found = subprocess.run(
                [sys.executable, "-m", "benchmarks.loss", *words],
                stdout=subprocess.PIPE,
                check=True,
            )
            results.append(json.loads(found.stdout))
            print("\n".join(lines(results[-1])), flush=True)
    write_results(options.output, "loss", results, rounds=options.rounds)


if __name__ == "__main__":
    main()
