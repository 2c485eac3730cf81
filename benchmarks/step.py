"""Whole training steps of ResNet-32 at 32 px, ours beside lightly's MoCo and the authors' way of MCL; one CPU thread.

    python benchmarks/step.py [--batch_size 64] [--rounds 5] [--groups small_queue large_queue ...] [--output FILE]

Every step gets the same two views of each image. Ours are `pretrain.train.train_step`, with all that a run does in it:
buffers remembered against NaN, finite checks, the optimiser; not the reading of images. Lightly's MoCo is put together
from lightly's own modules as in its tutorial, with the same backbone, head, queue and optimiser, without batch shuffle.
The authors' way of MCL is written from the facts: networks one after another, momentum tensor by tensor, a queue for
each network that is cloned for each ordered pair, logits concatenated (`benchmarks.loss.obvious`), images NCHW.

The rivals of a group take turns, each in a process of its own, so that none works on memory that another has freed.
Times are CPU seconds; ratios are those of medians, with the range over rounds. A run of ours keeps freed memory
(`peerlearn.compute.memory`). The peers have the default malloc, as their users do; then all of a group once more with
freed memory kept, which shows the algorithms alone. Compiled: the same with `compile: true`.
"""

import argparse
import copy
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar_images import write_cifar
from benchmarks.loss import SOFT_TEMPERATURE, TAU, obvious
from benchmarks.timing import cpu_seconds, write_results
from peerlearn.backbones import create_backbone
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.memory import keep_freed_memory
from peerlearn.config import parse_config
from peerlearn.data.loader import ViewBatch
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.state import build
from pretrain.train import train_step

BACKBONE, DIM, LR, SGD_MOMENTUM, DECAY, KEY_MOMENTUM = "resnet32", 128, 0.06, 0.9, 5e-4, 0.999
SMALL_QUEUE, LARGE_QUEUE = 4096, 65536
LIGHTLY, AUTHORS = "lightly MoCo", "authors' MCL x2"
# By group: rows of the queue, and what is compared: two rivals and the goal of the ratio of their times.
GROUPS = {
    "small_queue": (
        SMALL_QUEUE,
        [("MCL x2", "MoCo", "at most 2.05"), (LIGHTLY, "MoCo", "at least 1.15")],
    ),
    "large_queue": (LARGE_QUEUE, [(AUTHORS, "MCL x2", "at least 1.3")]),
    "small_queue_compiled": (
        SMALL_QUEUE,
        [
            (LIGHTLY, "MoCo, compiled", "more"),
            ("MCL x2, compiled", "MoCo, compiled", "at most 2.05"),
        ],
    ),
    "large_queue_compiled": (LARGE_QUEUE, [(AUTHORS, "MCL x2, compiled", "more")]),
}
Views = tuple[Tensor, Tensor]


def our_step(
    views: Views, root: Path, *, networks: int, queue: int, more: Sequence[str] = ()
) -> Callable[[], object]:
    """A step of a run with this config."""
    batch_size = len(views[0])
    words = {
        "data.name": "cifar10",
        "data.root": str(root),
        "batch_size": str(batch_size),
        "base_lr_batch_size": str(batch_size),
        "base_lr": str(LR),
        "temperature": str(TAU),
        "soft_temperature": str(SOFT_TEMPERATURE),
        "same_sample_positive": "false",
        "alpha": "1",
        "beta": "1",
        "cohort.networks": str(networks),
        "cohort.backbones": BACKBONE,
        "cohort.projection": "mlp",
        "cohort.embedding_dim": str(DIM),
        "queue.size": str(queue),
        "queue.momentum": str(KEY_MOMENTUM),
        "optimizer.weight_decay": str(DECAY),
        "monitor.every_epochs": "0",
        "device": "cpu",
    }
    argv = [word for key, value in words.items() for word in (f"--{key}", value)]
    config, _ = parse_config(
        PretrainConfig, [*argv, *more], verb="pretrain", description="", example=""
    )
    training = build(config, RunDirectory(root / "run"), Ranks(torch.device("cpu")))
    training.cohort.train()
    _fill(training.method.queue.keys)  # type: ignore[attr-defined]
    training.method.queue.filled = queue  # type: ignore[attr-defined]
    batch = ViewBatch(index=torch.arange(batch_size), labels=None, views=views, unreadable=())
    attempt = Attempt(training, 1, Stop())

    def step() -> None:
        done = train_step(attempt, batch)
        assert not done.skipped
        training.step += 1

    return step


def lightly_step(views: Views, *, queue: int) -> Callable[[], object]:
    """MoCo from lightly's modules (its tutorial on MoCo)."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    backbone = create_backbone(BACKBONE)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    head = MoCoProjectionHead(width, width, DIM)
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(key_backbone)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(temperature=TAU, memory_bank_size=(queue, DIM))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=SGD_MOMENTUM, weight_decay=DECAY)

    def step() -> None:
        update_momentum(backbone, key_backbone, m=KEY_MOMENTUM)
        update_momentum(head, key_head, m=KEY_MOMENTUM)
        query = head(backbone(views[0]).flatten(start_dim=1))
        with torch.no_grad():
            key = key_head(key_backbone(views[1]).flatten(start_dim=1)).detach()
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def authors_step(views: Views, *, networks: int, queue: int) -> Callable[[], object]:
    """MCL in the authors' way."""
    encoders = [_encoder() for _ in range(networks)]
    key_encoders = [copy.deepcopy(each).requires_grad_(False) for each in encoders]
    queues = torch.empty(networks, queue, DIM)
    _fill(queues)
    own_queues, cursors = list(queues), [0] * networks
    parameters = [p for each in encoders for p in each.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=SGD_MOMENTUM, weight_decay=DECAY)

    def step() -> None:
        queries = [F.normalize(each(views[0]), dim=1) for each in encoders]
        with torch.no_grad():
            for encoder, key_encoder in zip(encoders, key_encoders, strict=True):
                pairs = zip(encoder.parameters(), key_encoder.parameters(), strict=True)
                for own, key in pairs:
                    key.data = key.data * KEY_MOMENTUM + own.data * (1.0 - KEY_MOMENTUM)
            keys = [F.normalize(each(views[1]), dim=1) for each in key_encoders]
        loss = obvious(torch.stack(queries), torch.stack(keys), queues)
        for network, newest in enumerate(keys):
            start = cursors[network]
            own_queues[network][start : start + len(newest)] = newest
            cursors[network] = (start + len(newest)) % queue
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _encoder() -> nn.Module:
    backbone = create_backbone(BACKBONE)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    return nn.Sequential(
        backbone, nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, DIM)
    )


def _fill(queue: Tensor) -> None:
    """Random keys in (M, K, D): a queue that is full."""
    generator = torch.Generator().manual_seed(0)
    queue.copy_(F.normalize(torch.randn(queue.shape, generator=generator), dim=-1))


def make(rival: str, queue: int, batch_size: int, root: Path) -> Callable[[], object]:
    """The step of one rival."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(batch_size, 3, 32, 32, generator=generator) for _ in range(2))
    views = (first, second)
    if rival == LIGHTLY:
        return lightly_step(views, queue=queue)
    if rival == AUTHORS:
        return authors_step(views, networks=2, queue=queue)
    name, _, compiled = rival.partition(", ")
    networks = 2 if name == "MCL x2" else 1
    more = ("--compile", "true") if compiled else ()
    return our_step(views, root, networks=networks, queue=queue, more=more)


def serve(rival: str, queue: int, batch_size: int, *, keeps_memory: bool) -> None:
    """Run a step for every line that comes in, and tell its CPU seconds."""
    torch.set_num_threads(1)
    if keeps_memory:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        write_cifar(Path(place), "cifar10", share=0.01)
        step = make(rival, queue, batch_size, Path(place))
        for _ in range(2):
            # Compilation, state of the optimiser, kernels chosen by size.
            step()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(cpu_seconds(step), flush=True)


class Rival:
    """A process that runs steps."""

    def __init__(self, rival: str, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", "--serve", rival, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        """The next line that it prints, of those that are answers."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "ready" or line[0].isdigit():
                return line
        raise RuntimeError("a rival has failed, see above")

    def seconds(self) -> float:
        """CPU seconds of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()


def measure(group: str, batch_size: int, rounds: int, *, all_keep_memory: bool) -> dict[str, Any]:
    """The steps of all rivals of a group, and what is compared."""
    queue, compared = GROUPS[group]
    names = list(dict.fromkeys(name for pair in compared for name in pair[:2]))
    rivals = {}
    for name in names:
        words = ["--queue", str(queue), "--batch_size", str(batch_size)]
        if all_keep_memory or name not in (LIGHTLY, AUTHORS):
            words.append("--keeps_memory")
        rivals[name] = Rival(name, *words)
        rivals[name].answer()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, rival in rivals.items():
            seconds[name].append(rival.seconds())
    for rival in rivals.values():
        rival.end()
    return {
        "group": group,
        "batch_size": batch_size,
        "queue": queue,
        "rounds": rounds,
        "malloc_of_peers": "freed memory kept" if all_keep_memory else "default",
        "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "ratios": [ratio(seconds, *pair) for pair in compared],
    }


def ratio(seconds: dict[str, list[float]], slow: str, fast: str, goal: str) -> dict[str, Any]:
    """The ratio of the medians, and its range over the rounds."""
    rounds = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return {
        "of": slow,
        "to": fast,
        "goal": goal,
        "ratio": round(statistics.median(seconds[slow]) / statistics.median(seconds[fast]), 3),
        "range": [round(min(rounds), 3), round(max(rounds), 3)],
    }


def show(result: dict[str, Any]) -> None:
    """Print the medians and the ratios of a group."""
    print(
        f"{result['group']}, B {result['batch_size']}, K {result['queue']}, malloc of the peers: "
        f"{result['malloc_of_peers']}"
    )
    for name, each in result["seconds"].items():
        median = statistics.median(each)
        print(f"  {name:18} {median:7.3f} s  ({min(each):.3f} .. {max(each):.3f})")
    for each in result["ratios"]:
        low, high = each["range"]
        compared = f"{each['of']} / {each['to']}"
        print(
            f"  {compared:36} {each['ratio']:.2f} ({low:.2f} .. {high:.2f}), goal {each['goal']}",
            flush=True,
        )


def main() -> None:
    """Print the medians and the ratios, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    for hidden in ("--serve", "--queue"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--keeps_memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(
            options.serve,
            int(options.queue),
            options.batch_size,
            keeps_memory=options.keeps_memory,
        )
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    results = []
    for group in options.groups:
        for kept in (False, True):
            results.append(measure(group, options.batch_size, options.rounds, all_keep_memory=kept))
            show(results[-1])
    write_results(options.output, "step", results, backbone=BACKBONE)


if __name__ == "__main__":
    main()
