"""A bound on what cannot be interrupted: a call that waits for storage which hangs."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Kill this process if the block takes longer, so that a supervisor can start it anew.

    Args:
        seconds: how long it may take, by a clock that nobody sets.
        what: for the last line on stderr, the only place that need not hang too.
    """

    def give_up() -> None:
        os.write(2, f"{what} has hung for {seconds:g} s, giving up\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
