"""Being told to stop, by SIGINT, SIGTERM or SIGUSR2.

Work that has nothing to save is interrupted where it stands (`interrupted_by_signals`, `Stop.at_once`). Work that has
is asked, and looks for the request where it can save (`stop_signals`, `Stop.requested`).
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peerlearn.runs.terminal import say_at_once

# SIGUSR2 is SLURM's, near the time limit, where a job asks for it.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StoppedError(KeyboardInterrupt):
    """A signal has stopped the work. As Ctrl-C does, it passes by every `except Exception`. The message says which."""


@dataclass
class Stop:
    """Whether a signal has asked the work to stop.

    Attributes:
        requested: whether one has.
        name: name of the first that has; "" before.
    """

    requested: bool = False
    name: str = ""
    _interrupts: bool = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Interrupt the block wherever it stands: it has nothing to save.

        Raises:
            StoppedError: a signal has asked to stop, now or before.
        """
        with self._interrupting(True):
            self.check()
            yield

    def check(self) -> None:
        """Raise if the work is to be interrupted."""
        if self.requested and self._interrupts:
            raise StoppedError(f"stopped by {self.name}")

    @contextmanager
    def _interrupting(self, value: bool) -> Iterator[None]:
        before, self._interrupts = self._interrupts, value
        try:
            yield
        finally:
            self._interrupts = before


# Of the blocks that take signals, the innermost last.
_stops: list[Stop] = []


@contextmanager
def stop_signals(numbers: Sequence[signal.Signals], answer: str) -> Iterator[Stop]:
    """Turn these signals into a request for as long as the block lasts. A second SIGINT interrupts.

    Args:
        numbers: signals to take.
        answer: words that are printed at the first signal: what the work will do; "" = nothing is printed.
    """
    stop = Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested, stop.name = True, signal.Signals(number).name
            if answer:
                said = "stopping" if stop._interrupts else answer
                # No logging here: the signal may have interrupted the logger itself.
                say_at_once(f"{stop.name}: {said}")
            stop.check()

    earlier = {number: signal.signal(number, request) for number in numbers}
    _stops.append(stop)
    try:
        yield stop
    finally:
        _stops.remove(stop)
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Interrupt the block by any of `STOP_SIGNALS`, wherever it stands: it has nothing to save.

    Raises:
        StoppedError: one of them came.
    """
    # The interruption itself says enough.
    with stop_signals(STOP_SIGNALS, "") as stop, stop.at_once():
        yield


def check_stop() -> None:
    """For loops, between batches: a library may have swallowed the interruption.

    Raises:
        StoppedError: a signal has asked to stop, and the work has nothing to save.
    """
    if _stops:
        _stops[-1].check()


def is_stopping() -> bool:
    """Whether a signal interrupts, or has interrupted, the work."""
    return bool(_stops) and _stops[-1].requested and _stops[-1]._interrupts


@contextmanager
def not_interrupted() -> Iterator[None]:
    """Finish the block before a signal interrupts: what others count on happens as a whole.

    Raises:
        StoppedError: at the end of the block: a signal came, and the work around it has nothing to save.
    """
    if not _stops:
        yield
        return
    stop = _stops[-1]
    with stop._interrupting(False):
        yield
    stop.check()
