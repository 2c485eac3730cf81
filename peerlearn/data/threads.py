"""Work that threads of this process do ahead, in order."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from peerlearn.errors import CrashError
from peerlearn.runs.stop import check_stop

Job = TypeVar("Job")
Result = TypeVar("Result")

# How long one job may take. Storage that hangs would hold a thread for ever.
_PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 1.0


def ahead(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, threads: int
) -> Generator[Result, None, None]:
    """function(job) in the order of the jobs, computed up to ``threads`` + 1 jobs ahead of who asks.

    The threads end with the iterator: at its end, at an error, or when it is closed.

    Args:
        function: function to call; it may wait for disks or run code that needs no interpreter.
        jobs: its arguments, which are asked for by the caller's thread.
        threads: number of threads; 0 = all work is done when it is asked for.

    Raises:
        CrashError: a job takes too long.
        StoppedError: a signal has asked to stop, and the work has nothing to save.
    """
    if not threads:
        for job in jobs:
            check_stop()
            yield function(job)
        return
    tasks: SimpleQueue[tuple[Future[Result], Job] | None] = SimpleQueue()
    # Not an executor's: Python waits for those at its end, for ever where a disk hangs.
    workers = [
        threading.Thread(target=_work, args=(function, tasks), daemon=True) for _ in range(threads)
    ]
    for worker in workers:
        worker.start()
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(Future())
            tasks.put((pending[-1], job))
            if len(pending) > threads + 1:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        for future in pending:
            future.cancel()
        for _ in workers:
            tasks.put(None)
        for worker in workers:
            worker.join(timeout=_LOOK_SECONDS)


def _work(
    function: Callable[[Job], Result], tasks: "SimpleQueue[tuple[Future[Result], Job] | None]"
) -> None:
    while (task := tasks.get()) is not None:
        future, job = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(job))
        except BaseException as error:
            # It is raised where the result is asked for: nobody looks at this thread.
            future.set_exception(error)
        # What this thread holds on to, nobody can free.
        del task, future, job


def _result(future: "Future[Result]") -> Result:
    begun = time.monotonic()
    while True:
        check_stop()
        try:
            return future.result(timeout=_LOOK_SECONDS)
        except TimeoutError as error:
            if future.done():
                # Just now, or the job itself has raised it.
                return future.result()
            if time.monotonic() - begun > _PATIENCE_SECONDS:
                raise CrashError(
                    f"a thread that reads images has handed over nothing for {_PATIENCE_SECONDS:.0f} s: does the disk "
                    "answer?"
                ) from error
