"""docs/scaling.md: what cohorts cost on many processes, measured on two and computed for many.

python -m benchmarks.scaling_page [--tflops 70] [--gigabytes_per_second 40] > docs/scaling.md
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.performance import markdown_table
from benchmarks.timing import times_as_fast
from peerlearn.backbones import create_backbone
from pretrain.preview import bytes_kept_for_backward

RESULTS = Path(__file__).parent / "results" / "scaling.json"
_MIB, _GB = 2**20, 1e9
_FLOAT = 4
# Weights, gradients, the optimiser's momentum, and the momentum network.
_COPIES = 4
# Forward and backward of the queries, and the forward of the keys.
_PASSES = 4
# Weights, momentum and the momentum network.
_SAVED_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class Network:
    """What one network costs.

    Attributes:
        parameters: W.
        flops_per_image: operations of a forward pass, F.
        activation_bytes_per_image: bytes kept for backward, in numbers of 32 bits.
    """

    parameters: int
    flops_per_image: int
    activation_bytes_per_image: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A cohort on many processes.

    Attributes:
        network: each of its networks.
        networks: M.
        processes: P, one per GPU.
        teams: T; 1 = data parallelism, M = one network per team.
        images_per_process: B / P.
        queue: K.
        dim: D.
        tflops: sustained speed of a GPU in 10^12 operations per second.
        gigabytes_per_second: sustained speed of a GPU's way to the others.
        activation_share: share of 32 bits that an activation takes.
    """

    network: Network
    networks: int
    processes: int
    teams: int
    images_per_process: int = 32
    queue: int = 65536
    dim: int = 128
    tflops: float
    gigabytes_per_second: float
    activation_share: float = 0.5

    @property
    def batch(self) -> int:
        """B."""
        return self.images_per_process * self.processes

    @property
    def networks_here(self) -> int:
        """Networks of a process."""
        return self.networks // self.teams

    @property
    def compute_seconds(self) -> float:
        """Of the networks and of the loss: the same in every layout."""
        networks = self.networks * self.images_per_process * _PASSES * self.network.flops_per_image
        # Logits once, and twice more for the gradient.
        logits = self.networks**2 * self.images_per_process * self.queue
        return (networks + 3 * 2 * logits * self.dim) / (self.tflops * 1e12)

    @property
    def gradient_bytes(self) -> float:
        """That a process sends and receives: an all-reduce in a ring over its team."""
        ring = self.processes // self.teams
        own = self.networks_here * self.network.parameters * _FLOAT
        return 2 * (ring - 1) / ring * own

    @property
    def exchange_bytes(self) -> float:
        """Keys of all networks come to every process; with teams embeddings too, and their gradients are summed."""
        whole = (
            self.networks * self.batch * self.dim * _FLOAT * (self.processes - 1) / self.processes
        )
        return whole if self.teams == 1 else 4 * whole

    @property
    def traffic_seconds(self) -> float:
        """All that travels, were nothing hidden behind the computation."""
        return (self.gradient_bytes + self.exchange_bytes) / (self.gigabytes_per_second * _GB)

    @property
    def memory_bytes(self) -> float:
        """Of a process: networks, queue, and activations."""
        weights = self.networks_here * self.network.parameters * _COPIES * _FLOAT
        queue = self.networks * self.queue * self.dim * _FLOAT
        kept = self.networks * self.images_per_process * self.network.activation_bytes_per_image
        return weights + queue + self.activation_share * kept

    @property
    def checkpoint_bytes(self) -> float:
        """Of a save: the same in every layout."""
        weights = self.networks * self.network.parameters * _SAVED_COPIES * _FLOAT
        return weights + self.networks * self.queue * self.dim * _FLOAT


def network_of(name: str, pixels: int, *, small_images: bool = False) -> Network:
    """Counted on the device "meta"."""
    with torch.device("meta"):
        backbone = create_backbone(name, small_images=small_images, image_size=pixels).train()
        images = torch.zeros(2, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter:
        kept = bytes_kept_for_backward(backbone, lambda: backbone(images))
    return Network(
        parameters=sum(p.numel() for p in backbone.parameters()),
        flops_per_image=counter.get_total_flops() // len(images),
        activation_bytes_per_image=kept // len(images),
    )


def page(tflops: float = 70.0, gigabytes_per_second: float = 40.0) -> str:
    """The page."""
    parts = [
        _INTRODUCTION,
        _WHAT_TRAVELS,
        _measured(),
        _computed(tflops, gigabytes_per_second),
        _LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


_INTRODUCTION = """
# Cohorts on many processes

Two ways share the work of a cohort of M networks among P processes, and they combine:

| `--parallel.cohort` | each process has | batch of a network on a process |
|---|---|---|
| `1` (data parallelism) | all M networks | B / P images |
| `2` on four processes | M / 2 networks | B / 2 images |
| `0:0-2 1:3` (NETWORKS:PROCESSES) | network 0 on three processes, network 1 on the fourth | B / 3 and B images |

```bash
torchrun --nproc_per_node 2 -m -- peerlearn pretrain mcl_fashion_mnist_demo --parallel.cohort 2 --run runs/apart
```

The losses, queues, weights and exports are those of one process with all networks, to the rounding of sums: in float64
to 1e-9 (`pytest tests/e2e/test_cohort_parallel.py`). Plain batch norm sees the batch of a process, as ever; with
`cohort.sync_batch_norm`, or `cohort.batch_norm_splits` that each team can share, the layout does not show. Dropout and
stochastic depth draw other masks on another process. An image that one team alone cannot read has a substitute there
alone.

Saves know no layout: `peerlearn resume RUN --parallel.cohort 1 --allow_elastic` goes on with another one.
`parallel.cohort 1` is needed by networks that share stages (three or more that are alike do, unless
`cohort.share_stages` is 0), by the methods `prototypical`, `one`, `cl_ilr` and `okddip`, by fp16 and by `replay`.
"""

_WHAT_TRAVELS = """
## What travels

Rank r computes the losses of part r of P of the batch, for all networks, whatever the layout: that keeps the losses'
work even, and their code the same. For that, once for each part of a batch (`accumulation_steps`), every process gets
the keys and the embeddings of all networks, (M, B, D), and the embeddings' gradients are summed, (M, B, D). Gradients
of weights are averaged within the processes of a network, and so are batch-norm statistics. Weights and queues never
travel in a step. Images do within a team of several processes where keys are shuffled between them, as in MoCo, and
nowhere else: `cohort.sync_batch_norm` needs no shuffling. Measurements, exports and saves bring the networks to
process 0.

Every process holds all queues, M x K x D numbers. The soft terms need the distributions of all peers over all queues.
The other layout keeps each queue where its keys are made: then every process needs all M x B embeddings against its own
queue, and the sums of M x M x B rows travel back, and for the soft terms, two sums for each pair of networks more. For
M = 8, K = 65,536, D = 128 all queues take 256 MiB of a GPU: less than the copies of one ResNet-50 (391 MiB). So the
first layout is the one that is built.

`metrics.jsonl` has the bytes of each step: `exchange_bytes_per_rank` and `gradient_bytes_per_rank`.
"""

_LIMITS = """
## Where each stops, and what then

- **Data parallelism** holds all M networks everywhere. Its memory for weights and its gradient traffic grow with M,
  and hardly with the number of GPUs.
- **Cohort parallelism** divides both by the number of teams. Its exchange grows with M x B, and so with the number of
  GPUs where the batch does: each GPU receives the keys and embeddings of all. One network per team sends less in all
  than data parallelism as long as 12 M B D is less than 8 W (M - 1).
- **Both** end where one network no longer fits one GPU, or where the batch no longer helps learning: that is a
  question of the optimiser, and of no layout.
- **Then** help, and are not built: optimiser state in parts within a team (saves momentum, a quarter of the weights'
  memory); saves written by each team beside training (the time of a save is that of one disk now, and training waits);
  gradients summed within a machine first and then between machines (where the way between machines is slower than
  inside); embeddings in 16 bits (half the exchange, at the loss of equality to one process).
"""


def _measured() -> str:
    if not RESULTS.exists():
        return "## Measured on two processes\n\nUnmeasured: `python -m benchmarks.scaling --output FILE` measures it."
    found = json.loads(RESULTS.read_text())
    head = ["M", "layout", "seconds of a step", "times as fast", "memory by the formula", "memory"]
    rows = [[*head, "weights", "gradients sent", "exchange sent"]]
    processes = found["processes"]
    base = Setting(
        network=network_of(found["backbone"], found["pixels"], small_images=True),
        networks=1,
        processes=processes,
        teams=1,
        images_per_process=found["batch_size"] // processes,
        queue=found["queue"],
        dim=found["dim"],
        tflops=1.0,
        gigabytes_per_second=1.0,
        activation_share=1.0,
    )
    for result in found["measured"]:
        layouts = result["layouts"]
        for name, each in layouts.items():
            teams = 1 if name == "data" else processes
            formula = replace(base, networks=result["networks"], teams=teams)
            rows.append(
                [
                    str(result["networks"]),
                    name,
                    _spread(each["seconds"]),
                    times_as_fast(layouts["data"]["seconds"], each["seconds"])
                    if name != "data"
                    else "1",
                    f"{formula.memory_bytes / _MIB:,.0f} MiB",
                    *(f"{mib:,.1f} MiB" for mib in _mib(each)),
                ]
            )
    where = f"{found['machine']}, {processes} processes of one thread on as many cores"
    sizes = f"B {found['batch_size']}, K {found['queue']:,}, D {found['dim']}"
    what = f"{found['backbone']} at {found['pixels']} px, {sizes}"
    return f"""
## Measured on two processes

`python -m benchmarks.scaling --rounds {found["rounds"]} --output benchmarks/results/scaling.json`
({where}, Python {found["python"]}, torch {found["torch"]}, gloo)

MoCo with peers, {what}.
Seconds are medians of {found["rounds"]} rounds, with their range. Memory is the peak of a process beyond what it had
before; the formula is that of the next section, with activations in 32 bits, and knows nothing of what libraries keep
and of what a step frees at once. What data parallelism exchanges here is mostly the views that MoCo shuffles.

{markdown_table(rows[0], rows[1:])}
"""


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} .. {max(seconds):.2f})"


def _mib(measured: dict[str, float]) -> Iterator[float]:
    yield measured["memory_mib"]
    for key in ("weight_bytes", "gradient_bytes", "exchange_bytes"):
        yield measured[key] / _MIB


def _computed(tflops: float, gigabytes_per_second: float) -> str:
    network = network_of("resnet50", 224)
    base = Setting(
        network=network,
        networks=1,
        processes=1,
        teams=1,
        tflops=tflops,
        gigabytes_per_second=gigabytes_per_second,
    )
    rows = [
        [
            "M",
            "GPUs",
            "teams",
            "computing",
            "gradients",
            "exchange",
            "all traffic",
            "memory",
            "save",
        ]
    ]
    for networks in (2, 4, 8):
        for processes in (8, 64, 512):
            for teams in (1, networks):
                each = replace(base, networks=networks, processes=processes, teams=teams)
                rows.append(
                    [
                        *map(str, (networks, processes, teams)),
                        f"{each.compute_seconds * 1000:.0f} ms",
                        f"{each.gradient_bytes / _MIB:,.0f} MiB",
                        f"{each.exchange_bytes / _MIB:,.0f} MiB",
                        f"{each.traffic_seconds * 1000:.1f} ms",
                        f"{each.memory_bytes / 2**30:.1f} GiB",
                        f"{each.checkpoint_bytes / 2**30:.1f} GiB",
                    ]
                )
    counted = (
        f"{network.parameters:,} parameters, {network.flops_per_image / 1e9:.1f} x 10^9 operations of a forward pass "
        f"of an image, {network.activation_bytes_per_image / 2 / _MIB:.0f} MiB that an image keeps for backward in "
        "16 bits"
    )
    return f"""
## Computed for ResNet-50 at 224 px

Nothing in this table is measured. Counted from the program's own network: {counted}.
Assumed: a GPU that sustains {tflops:g} x 10^12 operations a second on it, and
{gigabytes_per_second:g} GB a second to the others; 32 images per GPU, so that B grows with the
GPUs; K 65,536, D 128; `cohort.sync_batch_norm`, so that no views are shuffled. With your own figures:
`python -m benchmarks.scaling_page --tflops 70 --gigabytes_per_second 40`.

With F operations a forward pass, W parameters, T teams and R = P / T processes of a network, a process has per step:

| part | amount |
|---|---|
| computing | 4 F M B / P (queries forward and backward, keys forward) + 6 M^2 K D B / P (losses) |
| gradients sent | 2 (R - 1) / R x 4 W M / T bytes |
| exchange received | (P - 1) / P x 4 M B D bytes of keys; with teams four times as much (embeddings, gradients) |
| memory | 16 W M / T (weights, gradients, momentum, key networks) + 4 M K D (queues) + activations of M B / P images |
| save | 12 W M + 4 M K D bytes |

{markdown_table(rows[0], rows[1:])}
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=70.0)
    parser.add_argument("--gigabytes_per_second", type=float, default=40.0)
    options = parser.parse_args()
    print(page(options.tflops, options.gigabytes_per_second), end="")


if __name__ == "__main__":
    main()
