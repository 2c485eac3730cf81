"""Worker processes that do jobs in order, and that survive the signals which end or requeue a run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from peerlearn.errors import UserError


class _Calls(Dataset[Any]):
    """A DataLoader's "dataset": each index is a job, and each item is the function's result for it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, job: Any) -> Any:
        try:
            return self._function(job)
        except UserError as error:
            # Returned and not raised: DataLoader would put a traceback into the message.
            return _Failure(str(error))


class _Failure(NamedTuple):
    message: str


class Jobs:
    """A DataLoader's "sampler": the jobs of the next iteration."""

    def __init__(self, pending: Iterable[Any]) -> None:
        self.pending = pending

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pending)


def worker_pool(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    device: torch.device,
    persistent: bool = False,
) -> DataLoader[Any]:
    """A pool that iterates over function(job) in the order of the jobs. Read it through ``results``.

    Args:
        function: function to call; it is pickled to the workers.
        jobs: arguments of the calls; they are pickled to the workers.
        workers: number of processes; 0 = all work is done in this one.
        device: device that the results go to; for CUDA they lie in pinned memory.
        persistent: whether the processes live as long as the pool, and not only for one iteration.
    """
    if workers:
        _start_forkserver(preload=_module_of(function))
    return DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        # Each iteration draws a number. Without a generator it would come from the global stream.
        generator=torch.Generator(),
        # A fork of a process that has threads or has used CUDA may hang.
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_job_signals,
    )


def results(pool: DataLoader[Any]) -> Iterator[Any]:
    """One iteration of the pool.

    Raises:
        UserError: a job raised it.
        RuntimeError: a worker process has exited unexpectedly.
    """
    try:
        for result in pool:
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield result
    except (OSError, EOFError) as error:
        # This happens if a result lies in the memory of a worker that is gone. In other cases
        # DataLoader itself raises such a RuntimeError.
        raise RuntimeError("a worker of the loader exited unexpectedly") from error


# SLURM and terminals send these signals to every process of a job. The main process answers them by
# a save. If the workers died of them meanwhile, the save would fail.
_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _module_of(function: Callable[[Any], Any]) -> str:
    return (function.func if isinstance(function, partial) else function).__module__


def _start_forkserver(preload: str) -> None:
    """Start the process that forks the workers, with the signals of a job blocked."""
    # The tracker comes first, because its start unblocks signals.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        multiprocessing.set_forkserver_preload([__name__, preload])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _outlive_job_signals(worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    main = multiprocessing.parent_process()
    assert main is not None
    threading.Thread(target=_exit_when_told_by, args=(main.pid,), daemon=True).start()
    threading.Thread(target=_exit_after, args=(main,), daemon=True).start()


def _exit_after(main: Any) -> None:
    """End this worker when the main process has died, for any reason.

    DataLoader's own watch looks at the parent of a worker. That is the process that forks the workers, which lives as
    long as any worker does.
    """
    main.join()
    os._exit(1)


def _exit_when_told_by(process_id: int) -> None:
    """End this worker at a SIGTERM from that process, which ends its workers so, and at no other SIGTERM."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != process_id:
        pass
    os._exit(0)
