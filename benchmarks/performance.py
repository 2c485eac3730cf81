"""docs/performance.md from the result files of the benchmarks.

python -m benchmarks.performance > docs/performance.md
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import times_as_fast

RESULTS = Path(__file__).parent / "results"


def page() -> str:
    """The page."""
    parts = [_INTRODUCTION, _loss(), _steps(), _monitor(), _views(), _evaluators(), _knn(), _GPU]
    return "\n\n".join(part.strip() for part in parts) + "\n"


_INTRODUCTION = """
# How fast it is

`python -m benchmarks.performance > docs/performance.md` prints this page from the files in `benchmarks/results/`, which
the command above each table has written. Rivals take turns within one run on one machine. Times are CPU seconds of one
thread; ratios are those of medians, and in brackets stands the range over rounds. Absolute times of these virtual
machines mean little. Nothing here was measured on a GPU.
"""

_GPU = """
## On a GPU

Unmeasured. One command measures there, in at most 20 minutes, and leaves a page and a JSON file in OUT:

```bash
sh scripts/gpu_check.sh OUT
```

It runs the tests that need a GPU, the loss (the authors' way, clean, compiled, in tiles, in Triton), steps of
ResNet-32 and ResNet-50 for 1, 2 and 4 networks in all number formats with images per second, memory and MFU, kNN, a
run that is stopped and resumed, and the wait for data. `sh scripts/gpu_check.sh --wheels DIR` collects what a machine
without a network lacks. The Triton kernels of the loss are tested in Triton's interpreter and compiled for a GPU, and
were never run on one: no size chooses them by itself. `queue_terms(..., backend="triton")` does.
"""


def _loss() -> str:
    found = _read("loss")
    rows = []
    for result in found["measured"]:
        seconds = result["seconds"]
        floor = statistics.median(seconds["floor"])
        for name in ("reference", "flat", "flat, tiles kept"):
            memory = result["grown_mib"]
            rows.append(
                [
                    result["size"],
                    result["allocator"],
                    name,
                    times_as_fast(seconds["obvious"], seconds[name]),
                    f"{statistics.median(seconds[name]) / floor:.1f}",
                    f"{memory[name]:,.0f} MiB, {memory['obvious'] / memory[name]:.0f}x less"
                    if memory
                    else "",
                ]
            )
    head = ["B,K,M", "malloc", "ours", "times as fast as the authors' way", "x floor", "memory"]
    return f"""
## The loss

`python -m benchmarks.loss --rounds {found["rounds"]} --output benchmarks/results/loss.json` ({_where(found)})

The queue form with its gradient, D 128, tau 0.07, T 3, `.total(1, 1)`, no same-sample positive. The authors' way
clones the queue for each ordered pair of networks and concatenates logits. `reference` is the readable form; `flat`
makes passes over tiles of logits and computes exponentials again for the gradient; with `tile_bytes` of 1 GiB they
are kept. `auto` takes `flat` from 2^15 logits on. The floor is two matrix products: the logits once, the gradient
once. An allocator that recycles shows the algorithms alone; the default one clears the pages of every large
temporary.

{markdown_table(head, rows)}
"""


def _steps() -> str:
    found = _read("step")
    rows = [
        [
            f"{each['of']} / {each['to']}",
            f"{result['queue']:,}",
            result["malloc_of_peers"],
            each["goal"],
            f"{each['ratio']:.2f} ({each['range'][0]:.2f} .. {each['range'][1]:.2f})",
        ]
        for result in found["measured"]
        for each in result["ratios"]
    ]
    batch = found["measured"][0]["batch_size"]
    return f"""
## A step

`python -m benchmarks.step --output benchmarks/results/step.json` ({_where(found)})

A whole training step of {found["backbone"]} at 32 pixels, B {batch}. A run of ours keeps freed memory (mallopt),
which the peers do not; with "freed memory kept" all do, and that is the comparison of like with like. Compiled steps
were measured in a run of their own, with an earlier form of the loss.

{markdown_table(["time of / to", "K", "malloc of the peers", "goal", "ratio"], rows)}
"""


def _monitor() -> str:
    found = _read("monitor")
    rows = [
        [
            f"`{each['recipe']}`",
            str(each["every_epochs"]),
            f"{each['percent_of_epochs']:.1f} %",
            str(each["rounds"]),
        ]
        for each in found["measured"]
    ]
    return f"""
## What watching costs

`python -m benchmarks.monitor --output benchmarks/results/monitor.json` ({_where(found)})

kNN and the other figures, in percent of the time of the epochs between two measurements, scaled up from some steps.
The method prototypical chooses its networks by what is measured, so it measures after every epoch whatever that
costs.

{markdown_table(["recipe", "measured every n epochs", "share", "rounds"], rows)}
"""


def _views() -> str:
    parts = []
    for name in ("augment", "folder"):
        found = _read(name)
        for measured in found["measured"]:
            rows = [
                [
                    rival,
                    f"{each['images_per_second']:,.0f}",
                    f"{each['ratio_median_of_rounds']:.2f} ({each['ratio_least']:.2f} .. {each['ratio_most']:.2f})",
                ]
                for rival, each in measured["rivals"].items()
            ]
            command = f"python -m benchmarks.{name} --output benchmarks/results/{name}.json"
            parts.append(
                f"`{command}` ({_where(found)}, {measured['rounds']} rounds): {measured['title']}\n\n"
                + markdown_table(["", "images/s per core", "times as fast"], rows)
            )
    return f"""
## Views

The chain of MoCo's repository, rebuilt from torchvision's transforms, against ours. The goal of 15 times for small
images in memory is not reached: products of 32 x 32 matrices take about three tenths of the time, and their bits are
fixed by older runs. From files, nearly all of the gain is that colours and blur are left to the device: decoding and
cropping alone are hardly faster than Pillow's. [Which backend when](data.md) has the three places that batches come
from.

{(chr(10) * 2).join(parts)}
"""


def _evaluators() -> str:
    rows, commands = [], []
    for name in ("features", "linear_probe", "few_shot", "detection_metric"):
        found = _read(name)
        commands.append(
            f"`python -m benchmarks.{name} --rounds {found['rounds']} --output benchmarks/results/{name}.json`"
        )
        for each in found["measured"]:
            ours, *rivals = each["seconds"]
            for rival in rivals:
                ratio = times_as_fast(each["seconds"][rival], each["seconds"][ours])
                rows.append([each["title"], rival, ratio])
    return f"""
## Evaluators

{", ".join(commands)} ({_where(found)})

Against the loop that one would write, or the named library. Features: Pillow, torchvision and a DataLoader for each
network. A sweep of 13 learning rates in one pass against a pass for one rate shows what the other twelve cost.

{markdown_table(["", "rival", "time of the rival / ours"], rows)}
"""


def _knn() -> str:
    found = _read("knn")
    searches = [
        [
            f"{each['train']:,}",
            f"{each['queries']:,}",
            str(each["size"]),
            times_as_fast(each["seconds"]["faiss"], each["seconds"]["torch"]),
        ]
        for each in found["measured"]["searches"]
    ]
    scores = [
        [
            each["features"],
            f"{each['train']:,}",
            f"{each['queries']:,}",
            str(each["size"]),
            times_as_fast(each["seconds"]["ours"], each["seconds"]["plain"]),
            f"{100 * each['searched_again']:.1f} %",
        ]
        for each in found["measured"]["scores"]
    ]
    return f"""
## kNN

`python -m benchmarks.knn --rounds {found["rounds"]} --output benchmarks/results/knn.json` ({_where(found)}, faiss
{found["faiss"]}, k {found["k"]})

The search alone, by torch, which takes the place of faiss where that is missing. On this CPU faiss is the faster one,
and is taken.

{markdown_table(["N", "Q", "D", "torch, times as fast as faiss"], searches)}

`knn_scores`, as exact as a search in float64: how many times the plain float32 search takes its time, and the share
of queries that float32 leaves in doubt.

{markdown_table(["features", "N", "Q", "D", "times the plain search", "in doubt"], scores)}
"""


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _where(found: dict[str, Any]) -> str:
    threads = found["threads"]
    return (
        f"{found['machine']}, {threads} thread{'s' if threads > 1 else ''}, Python {found['python']}, torch "
        f"{found['torch']}"
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with these headings."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mean_and_spread(mean: float, std: float | None, runs: int) -> str:
    """A mean over runs as tables have it, with the standard deviation if there is one, and how many runs."""
    spread = "" if std is None else f" ± {std:.2f}"
    return f"{mean:.2f}{spread} ({runs})"


if __name__ == "__main__":
    print(page(), end="")
