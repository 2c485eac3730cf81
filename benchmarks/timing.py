"""How long rivals take, in CPU seconds of one thread, taking turns within one run."""

import time
from collections.abc import Callable, Mapping


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
