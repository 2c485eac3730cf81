"""Processes that work through jobs in order, and outlive the signals that end or requeue a run."""

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
    """A DataLoader's "dataset": each index is a job, each item what the function makes of it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, job: Any) -> Any:
        try:
            return self._function(job)
        except UserError as error:
            # Returned: of what is raised here, DataLoader makes a message with a traceback in it.
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
    """Iterates over function(job) in the order of the jobs; read it through ``results``.

    ``function`` and the jobs are pickled to ``workers`` processes; 0: all is done in this one.
    What it returns lies in pinned memory where ``device`` is CUDA. ``persistent`` processes live as
    long as the pool, others as long as one iteration.
    """
    if workers:
        _start_forkserver(preload=_module_of(function))
    return DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        # Each iteration draws a number; without a generator, from the global stream.
        generator=torch.Generator(),
        # A fork of a process that has threads or has touched CUDA may hang.
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_job_signals,
    )


def results(pool: DataLoader[Any]) -> Iterator[Any]:
    """One iteration of the pool.

    Raises the UserError of a job, and RuntimeError if a process exits that should not.
    """
    try:
        for result in pool:
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield result
    except (OSError, EOFError) as error:
        # Met where a result lies in the memory of a worker that is no more; elsewhere DataLoader
        # itself raises a RuntimeError that says so.
        raise RuntimeError("a worker of the loader exited unexpectedly") from error


# SLURM and terminals send these to every process of a job. The main process answers them, by
# saving; workers that died of them meanwhile would make it fail.
_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _module_of(function: Callable[[Any], Any]) -> str:
    return (function.func if isinstance(function, partial) else function).__module__


def _start_forkserver(preload: str) -> None:
    """Start the process that forks the workers with the signals of a job blocked."""
    # First, because starting the tracker unblocks signals.
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
    """Do not outlive the main process, however it dies.

    DataLoader's own watch looks at a worker's parent, which is the process that forks the workers; and that one lives
    as long as a worker does.
    """
    main.join()
    os._exit(1)


def _exit_when_told_by(process_id: int) -> None:
    """Obey a SIGTERM from that process, with which it ends its workers, and no other."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != process_id:
        pass
    os._exit(0)
