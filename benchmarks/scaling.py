"""Steps of cohorts of 1, 2, 4 and 8 networks on two processes: cohort parallelism beside data parallelism.

    python -m benchmarks.scaling [--networks 1 2 4 8] [--backbone resnet18] [--rounds 5] [--output FILE]

In data parallelism each process has all networks and half the batch; in cohort parallelism it has half the networks
and the whole batch (`--parallel.cohort 2`). Every step is `pretrain.train.train_step`, of MoCo with peers, on views of
32 px that are there; processes talk by gloo. Both layouts take turns, each in processes of its own with one thread per
process. Seconds are those of the slower process by the clock, so nothing else may run beside. Memory is the peak of a
process beyond what it had before the networks were built. Bytes are counted by the program: gradients that a process
hands to sums, and embeddings, keys and their gradients that it hands to the other networks.
"""

import argparse
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar_images import write_cifar
from benchmarks.timing import write_results
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import joined_ranks
from peerlearn.compute.memory import keep_freed_memory
from peerlearn.config import parse_config
from peerlearn.data.loader import ViewBatch
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.state import Training, build
from pretrain.train import train_step

PROCESSES, QUEUE, DIM, PIXELS = 2, 4096, 128, 32
LAYOUTS = {"data": 1, "cohort": PROCESSES}
_MIB = 2**20


def config_of(
    root: Path, backbone: str, networks: int, batch_size: int, teams: int
) -> PretrainConfig:
    """The config of a run with so many networks in so many teams."""
    words = {
        "data.name": "cifar10",
        "data.root": str(root),
        "batch_size": str(batch_size),
        "cohort.networks": str(networks),
        "cohort.backbones": backbone,
        "cohort.small_images": "true",
        "cohort.share_stages": "0",
        "cohort.embedding_dim": str(DIM),
        "queue.size": str(QUEUE),
        "monitor.every_epochs": "0",
        "device": "cpu",
        "parallel.cohort": str(teams),
    }
    argv = [word for key, value in words.items() for word in (f"--{key}", value)]
    config, _ = parse_config(PretrainConfig, argv, verb="pretrain", description="", example="")
    return config


def batch_of(training: Training) -> ViewBatch:
    """This process's part of a batch of noise."""
    team = training.method.exchange.team
    size = training.config.batch_size // team.world_size
    generator = torch.Generator().manual_seed(team.rank)
    first, second = (torch.randn(size, 3, PIXELS, PIXELS, generator=generator) for _ in range(2))
    return ViewBatch(index=torch.arange(size), labels=None, views=(first, second), unreadable=())


def serve(backbone: str, networks: int, batch_size: int, teams: int) -> None:
    """Run a step for every line that comes in, and tell its seconds; at the end memory and bytes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as place, joined_ranks("cpu", timeout_seconds=600) as ranks:
        root = Path(place)
        write_cifar(root, "cifar10", share=0.01)
        before = _peak_mib()
        config = config_of(root, backbone, networks, batch_size, teams)
        training = build(config, RunDirectory(root / "run"), ranks)
        training.cohort.train()
        attempt, batch = Attempt(training, 1, Stop()), batch_of(training)

        def step() -> float:
            start = time.perf_counter()
            assert not train_step(attempt, batch).skipped
            training.step += 1
            return time.perf_counter() - start

        # The state of the optimiser, and kernels chosen by size.
        for _ in range(2):
            step()
        print("ready", flush=True)
        for _ in iter(sys.stdin.readline, "end\n"):
            print(step(), flush=True)
        weights = sum(p.nbytes for p in training.cohort.parameters() if not p.is_meta)
        exchanged = training.method.exchange.bytes_sent
        print(
            _peak_mib() - before,
            weights,
            training.gradient_average.bytes_sent,
            exchanged,
            flush=True,
        )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Job:
    """The processes of one layout."""

    def __init__(self, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scaling", "--serve", *words],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(PROCESSES),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(PROCESSES)
        ]
        for process in self._processes:
            while self._line(process) != "ready\n":
                pass

    def seconds(self) -> float:
        """Of one more step, by the slower process."""
        return max(float(line) for line in self._ask("go\n"))

    def end(self) -> list[list[float]]:
        """MiB of memory, and bytes of weights, gradients and exchange, of each process."""
        found = [[float(word) for word in line.split()] for line in self._ask("end\n")]
        for process in self._processes:
            process.communicate()
        return found

    def _ask(self, word: str) -> list[str]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(word)
            process.stdin.flush()
        return [self._line(process) for process in self._processes]

    def _line(self, process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process has failed, see above")
        return line


def measure(backbone: str, networks: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Both layouts of a cohort; one network has only the first."""
    layouts = {name: teams for name, teams in LAYOUTS.items() if networks % teams == 0}
    jobs = {
        name: Job(
            *("--backbone", backbone, "--networks", str(networks)),
            *("--batch_size", str(batch_size), "--teams", str(teams)),
        )
        for name, teams in layouts.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(round(job.seconds(), 4))
    keys = ("memory_mib", "weight_bytes", "gradient_bytes", "exchange_bytes")
    ended = {name: job.end() for name, job in jobs.items()}
    return {
        "networks": networks,
        "layouts": {
            name: {
                "seconds": seconds[name],
                **{key: max(each[i] for each in ended[name]) for i, key in enumerate(keys)},
            }
            for name in jobs
        },
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The figures of a cohort, a line for each layout."""
    return [
        f"M {result['networks']}  {name:7} {statistics.median(found['seconds']):7.3f} s "
        f"({min(found['seconds']):.3f} .. {max(found['seconds']):.3f})  {found['memory_mib']:7,.0f} MiB  weights "
        f"{found['weight_bytes'] / _MIB:7.1f} MiB  gradients {found['gradient_bytes'] / _MIB:7.1f} MiB  exchange "
        f"{found['exchange_bytes'] / _MIB:6.2f} MiB"
        for name, found in result["layouts"].items()
    ]


def main() -> None:
    """Print what was measured, and write it to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--teams", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.backbone, options.networks[0], options.batch_size, options.teams)
        return
    print(
        f"{platform.machine()}, {PROCESSES} processes of one thread, torch {torch.__version__}, {options.rounds} rounds"
    )
    results = []
    for networks in options.networks:
        results.append(measure(options.backbone, networks, options.batch_size, options.rounds))
        print("\n".join(lines(results[-1])), flush=True)
    write_results(
        options.output,
        "scaling",
        results,
        backbone=options.backbone,
        batch_size=options.batch_size,
        queue=QUEUE,
        dim=DIM,
        pixels=PIXELS,
        processes=PROCESSES,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
