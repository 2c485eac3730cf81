"""Stopping by a signal: the signal becomes a request, which long work looks for where it can stop."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether a signal has asked the work to stop."""

    requested: bool = False


@contextmanager
def stop_signals(numbers: Sequence[signal.Signals], answer: str) -> Iterator[Stop]:
    """Turn these signals into a request for as long as the block lasts. A second SIGINT interrupts.

    Args:
        numbers: signals to take.
        answer: words that are printed at the first signal: what the work will do.
    """
    stop = Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.requested:
            # No logging here: the signal may have interrupted the logger itself.
            os.write(2, f"{signal.Signals(number).name}: {answer}\n".encode())
        stop.requested = True

    earlier = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
