"""Worker processes that do jobs in order, and that survive the signals which end or requeue a run."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.queues import Queue
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from peerlearn.errors import CrashError, UserError
from peerlearn.runs.stop import check_stop, is_stopping

# How long workers that live may need for one job. Storage that hangs would hold them for ever.
_PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 1.0
_SHARED_MEMORY = "/dev/shm"
# The address of a socket may have so many bytes; multiprocessing adds "/pymp-........" and "/listener-........".
_SOCKET_BYTES = 107 - len("/pymp-12345678/listener-12345678")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/run/shm", _SHARED_MEMORY)
_CANNOT_SEND = 3


class _Calls(Dataset[Any]):
    """A DataLoader's "dataset": each index is a job, and each item is the function's result for it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, job: Any) -> Any:
        try:
            result = self._function(job)
        except UserError as error:
            # Returned and not raised: DataLoader would put a traceback into the message.
            return _Failure(str(error))
        if get_worker_info() is not None:
            try:
                _share(result)
            except (RuntimeError, OSError) as error:
                # Here it can be told. In the thread that sends results it would be lost, and all would wait for ever.
                return _Failure(_cannot_hand_over(error))
        return result


class _Failure(NamedTuple):
    message: str


def _share(result: Any) -> None:
    """Move every tensor of a result into shared memory, as sending it does."""
    if isinstance(result, Tensor):
        result.share_memory_()
    elif isinstance(result, Mapping):
        _share(list(result.values()))
    elif isinstance(result, list | tuple):
        for part in result:
            _share(part)


def _cannot_hand_over(error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "Too many open files" in reason:
        return (
            f"a process that reads images has {reason}: lower --data.workers, or raise `ulimit -n`"
        )
    return (
        f"{_SHARED_MEMORY} ({_size_text(_SHARED_MEMORY)}) does not take the images that processes hand over "
        f"({reason}): make it larger (docker run --shm-size), or read images without processes, by --data.workers 0"
    )


def _size_text(folder: str) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return error.strerror or str(error)
    return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free"


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
        worker_init_fn=_prepare_worker,
    )


def results(pool: DataLoader[Any]) -> Iterator[Any]:
    """One iteration of the pool.

    Raises:
        UserError: a job raised it, or the workers cannot be started or cannot hand over what they made.
        CrashError: a worker has died, or the workers make nothing.
        StoppedError: a signal has asked to stop, and the work has nothing to save.
    """
    try:
        iterator: Any = iter(pool)
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"the processes that read images cannot be started ({error}): see that {_SHARED_MEMORY} "
            f"({_size_text(_SHARED_MEMORY)}) and {tempfile.gettempdir()} can be written, or set --data.workers 0"
        ) from error
    try:
        while True:
            check_stop()
            try:
                result = _next_result(iterator) if pool.num_workers else next(iterator)
            except StopIteration:
                return
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield result
    finally:
        if pool.num_workers and is_stopping():
            # DataLoader would wait for each of them to finish its job.
            for worker in iterator._workers:
                worker.terminate()


def _next_result(iterator: Any) -> Any:
    """The next of a DataLoader's iterator that has workers, within `_PATIENCE_SECONDS`."""
    begun = time.monotonic()
    # Set for this call alone: the iterator is also waited for elsewhere, where nobody asks it again.
    iterator._timeout = _LOOK_SECONDS
    try:
        while True:
            try:
                return next(iterator)
            # OSError and EOFError: a result lies in the memory of a worker that is gone.
            except (RuntimeError, OSError, EOFError) as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise _worker_failure(iterator, error) from error
                check_stop()
                if time.monotonic() - begun > _PATIENCE_SECONDS:
                    raise CrashError(
                        f"the processes that read images have handed over nothing for {_PATIENCE_SECONDS:.0f} s: "
                        "does the disk of data.root answer?"
                    ) from error
    finally:
        iterator._timeout = 0


def _worker_failure(iterator: Any, error: Exception) -> Exception:
    """What is to be raised for an error of a DataLoader: that of a worker that is dead, or else the error itself."""
    died = _exit_codes(iterator._workers)
    if not died:
        text = str(error)
        if "Too many open files" in text:
            return UserError(_cannot_hand_over(OSError("Too many open files")))
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in text:
            return error
        return CrashError("a process that reads images is gone: --data.workers 0 does without")
    if died[0] == _CANNOT_SEND:
        return CrashError(
            "a process that reads images could not hand them over: --data.workers 0 does without"
        )
    how = signal.Signals(-died[0]).name if died[0] < 0 else f"exit code {died[0]}"
    advice = {
        -signal.SIGKILL: "memory may have run out; lower --data.workers or --batch_size",
        -signal.SIGBUS: f"{_SHARED_MEMORY} ({_size_text(_SHARED_MEMORY)}) may be full; make it larger, or set "
        "--data.workers 0",
    }.get(died[0], "an image may crash its decoder; --data.workers 0 leaves the place in the log")
    return CrashError(f"a process that reads images died ({how}): {advice}")


# SLURM and terminals send these signals to every process of a job. The main process answers them by
# a save. If the workers died of them meanwhile, the save would fail.
_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _module_of(function: Callable[[Any], Any]) -> str:
    return (function.func if isinstance(function, partial) else function).__module__


def _start_forkserver(preload: str) -> None:
    """Start the process that forks the workers, with the signals of a job blocked."""
    _settle_sockets_folder()
    # The tracker comes first, because its start unblocks signals.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        multiprocessing.set_forkserver_preload([__name__, preload])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit_codes(processes: Iterable[Any]) -> list[int]:
    """The exit codes of the processes that have failed. It may take a moment until they are known."""
    until = time.monotonic() + _LOOK_SECONDS
    while True:
        codes = [process.exitcode for process in processes]
        failed = [code for code in codes if code not in (None, 0)]
        if failed or time.monotonic() > until:
            return failed
        time.sleep(_LOOK_SECONDS / 20)


def _settle_sockets_folder() -> None:
    """Have multiprocessing keep its sockets in a folder whose path is short enough, whatever TMPDIR says.

    Raises:
        UserError: there is none.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_BYTES:
        return
    long = tempfile.gettempdir()
    for folder in _SHORT_FOLDERS:
        tempfile.tempdir = folder
        try:
            # It makes a folder there once, and keeps to it.
            get_temp_dir()
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = long
    raise UserError(
        f"TMPDIR {long} is too long for a socket's address, and none of {', '.join(_SHORT_FOLDERS)} can be written: "
        f"set TMPDIR to a path of at most {_SOCKET_BYTES} bytes, or --data.workers 0"
    )


def _prepare_worker(worker: int) -> None:
    # By default the thread that sends results prints a traceback and goes on, and the main process waits for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    _outlive_job_signals()


def _end_unsent(error: Exception, result: object) -> None:
    os._exit(_CANNOT_SEND)


def _outlive_job_signals() -> None:
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
