"""A time limit for calls that nothing else can interrupt, such as one that waits for hanging storage."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Kill this process if the block takes longer than ``seconds``, so that a supervisor can start it anew.

    Args:
        seconds: time that the block may take, by a clock that nobody can set.
        what: name of the block's work, for a last line on stderr. A log file might hang as well.
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
