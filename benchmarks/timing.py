"""How long rivals take, in CPU seconds of one thread, taking turns within one run; and the files that keep it."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of one call, over all threads of the process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alternate(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The CPU seconds of every rival in each round; in a round each is called once, in this order."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            seconds[name].append(cpu_seconds(run))
    return seconds


def times_as_fast(slow: Sequence[float], fast: Sequence[float]) -> str:
    """The ratio of the medians, and its range over the rounds."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    median = statistics.median(slow) / statistics.median(fast)
    return f"{median:.2f} ({min(rounds):.2f} .. {max(rounds):.2f})"


def write_results(file: Path | None, benchmark: str, measured: Any, **facts: Any) -> None:
    """Write a result file, if one is asked for, with what it was measured by."""
    if file is None:
        return
    about = {
        "benchmark": benchmark,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }
    file.write_text(json.dumps(about | facts | {"measured": measured}, indent=2) + "\n")
