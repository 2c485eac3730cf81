"""What all tests share: reproducible properties, Ctrl-C, and a disk that takes no more."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from hypothesis import settings

# The same examples on every machine, however busy it is.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

# A shell without job control has what it runs in the background ignore SIGINT, and programs inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """Within ``files_up_to(size)`` no file of this process grows beyond so many bytes: a write that
    would stops there, in the middle, and the next fails with an OSError, as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
