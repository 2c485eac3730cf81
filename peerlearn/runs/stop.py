"""Being told to stop: a signal becomes a request, which long work answers where it can."""

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
    """Take these signals for as long as the block lasts; a second SIGINT interrupts.

    Args:
        numbers: the signals.
        answer: what is printed at the first: what the work does about it.
    """
    stop = Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.requested:
            # No logging here: it may be what the signal has interrupted.
            os.write(2, f"{signal.Signals(number).name}: {answer}\n".encode())
        stop.requested = True

    earlier = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
