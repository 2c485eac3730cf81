"""Whole training steps of ResNet-32 at 32 px, ours beside lightly's MoCo and the authors' way of MCL; one CPU thread.

    python benchmarks/step.py [--batch_size 64] [--rounds 5] [--groups moco queue_65536 compile] [--output FILE]

Every step gets the same two views of each image. Ours are `pretrain.train.train_step`, with all that a run does in it:
buffers remembered against NaN, finite checks, the optimiser; not the reading of images. Lightly's MoCo is put together
from lightly's own modules as in its tutorial, with the same backbone, head, queue and optimiser, without batch shuffle.
The authors' way of MCL is written from the facts: networks one after another, momentum tensor by tensor, a queue for
each network that is cloned for each ordered pair, logits concatenated (`benchmarks.loss.obvious`), images NCHW.

The rivals of a group alternate within one process. Times are CPU seconds; ratios are those of medians, with the range
over rounds. Compiled: the same with `compile: true`.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar_images import write_cifar
from benchmarks.loss import SOFT_TEMPERATURE, TAU, obvious
from benchmarks.timing import alternate
from peerlearn.backbones import create_backbone
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.config import parse_config
from peerlearn.data.loader import ViewBatch
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.state import build
from pretrain.train import train_step

BACKBONE, DIM, LR, SGD_MOMENTUM, DECAY, KEY_MOMENTUM = "resnet32", 128, 0.06, 0.9, 5e-4, 0.999
SMALL_QUEUE, LARGE_QUEUE = 4096, 65536
# By group: pairs of rivals, slower first, whose ratio is printed, with the goal of the ratio.
RATIOS = {
    "moco": [("MCL x2", "MoCo", "at most 2.05"), ("lightly MoCo", "MoCo", "at least 1.15")],
    "queue_65536": [("authors' MCL x2", "MCL x2", "at least 1.3")],
    "compile": [
        ("lightly MoCo", "MoCo, compiled", "-"),
        ("MoCo", "MoCo, compiled", "-"),
        ("MCL x2", "MCL x2, compiled", "-"),
        ("MCL x2, compiled", "MoCo, compiled", "-"),
    ],
    "compile_65536": [("authors' MCL x2", "MCL x2, compiled", "-")],
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
        for network, key in enumerate(keys):
            start = cursors[network]
            own_queues[network][start : start + len(key)] = key
            cursors[network] = (start + len(key)) % queue
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


def rivals(group: str, batch_size: int, root: Path) -> dict[str, Callable[[], object]]:
    """The steps that a group compares."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(batch_size, 3, 32, 32, generator=generator) for _ in range(2))
    views = (first, second)
    compiled = ("--compile", "true")
    large = group.endswith(str(LARGE_QUEUE))
    queue = LARGE_QUEUE if large else SMALL_QUEUE
    ours = partial(our_step, views, root, queue=queue)
    every: dict[str, Callable[[], Callable[[], object]]] = {
        "MoCo": partial(ours, networks=1),
        "MCL x2": partial(ours, networks=2),
        "lightly MoCo": partial(lightly_step, views, queue=queue),
        "authors' MCL x2": partial(authors_step, views, networks=2, queue=queue),
        "MoCo, compiled": partial(ours, networks=1, more=compiled),
        "MCL x2, compiled": partial(ours, networks=2, more=compiled),
    }
    asked = {name for pair in RATIOS[group] for name in pair[:2]}
    return {name: make() for name, make in every.items() if name in asked}


def measure(group: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """All rivals of a group, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_cifar(Path(place), "cifar10", share=0.01)
        calls = rivals(group, batch_size, Path(place))
        for call in calls.values():
            # Compilation, buffers of the optimiser, kernels chosen by size.
            call()
            call()
        seconds = alternate(calls, rounds)
    return {
        "group": group,
        "batch_size": batch_size,
        "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
    }


def ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is compared in a group: ratio of the medians, and its range over the rounds."""
    seconds, found = result["seconds"], []
    for slow, fast, goal in RATIOS[result["group"]]:
        rounds = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        ratio = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
        found.append(
            {
                "of": slow,
                "to": fast,
                "goal": goal,
                "ratio": round(ratio, 3),
                "range": [round(min(rounds), 3), round(max(rounds), 3)],
            }
        )
    return found


def main() -> None:
    """Print the medians and the ratios, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.groups[0], options.batch_size, options.rounds)))
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    results = []
    for group in options.groups:
        words = ["--one", "--groups", group, "--batch_size", str(options.batch_size)]
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", *words, "--rounds", str(options.rounds)],
            stdout=subprocess.PIPE,
            check=True,
        )
        result = json.loads(found.stdout.splitlines()[-1])
        result["ratios"] = ratios(result)
        results.append(result)
        for name, each in result["seconds"].items():
            print(
                f"{group:14} {name:18} {statistics.median(each):7.3f} s  ({min(each):.3f} .. {max(each):.3f})"
            )
        for each in result["ratios"]:
            low, high = each["range"]
            print(
                f"{group:14} {each['of']} / {each['to']}: {each['ratio']:.2f} ({low:.2f} .. {high:.2f}), "
                f"goal {each['goal']}",
                flush=True,
            )
    if options.output:
        facts = {
            "benchmark": "step",
            "backbone": BACKBONE,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
            "rounds": options.rounds,
        }
        options.output.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
