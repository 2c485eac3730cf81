"""One run directory, one live process: a lock file, and a record of who holds it.

    RUN/.lock   owner.json {"host", "pid", "job", "since", "time_seconds"}

The lock (flock) ends with its process, however that dies, but some network file systems keep it from other machines:
there the record's beat decides.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peerlearn.errors import UserError
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import write_text
from peerlearn.runs.heartbeat import process_exists, process_started_at

LOCK_FILES = (".lock", "owner.json")
_BEAT_SECONDS = 10.0
# An owner on another machine who has not beaten for so long is dead.
_DEAD_SECONDS = 60.0


@contextmanager
def run_lock(root: Path) -> Iterator[str | None]:
    """Hold the run directory for as long as the block lasts.

    Yields:
        Who held it last and is dead, if the lock was taken over; None if it was free.

    Raises:
        UserError: a live process holds it, or the folder cannot be written.
    """
    lock = FileLock(root / LOCK_FILES[0])
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise _in_use(root, _read_owner(root)) from error
    except OSError as error:
        raise UserError(f"{root}: cannot be locked ({error.strerror}): is it writable?") from error
    try:
        owner = _read_owner(root)
        if owner and _alive_elsewhere(owner):
            raise _in_use(root, owner)
        with _recorded(root):
            yield _name(owner) if owner else None
    finally:
        lock.release()


def living_owner(root: Path) -> dict[str, Any] | None:
    """Who holds the run directory, as far as owner.json and this machine can tell; None if nobody alive does."""
    owner = _read_owner(root)
    pid, beat = owner.get("pid"), owner.get("time_seconds")
    if not isinstance(pid, int) or not isinstance(beat, int | float):
        return None
    if owner.get("host") == socket.gethostname():
        return owner if process_exists(pid) and not _started_after(pid, beat) else None
    return owner if time.time() - beat < _DEAD_SECONDS else None


def _started_after(pid: int, time_seconds: float) -> bool:
    """Whether the process is a later one that was given the same number, as in containers."""
    ticks = process_started_at(pid)
    if ticks is None:
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age > time_seconds + 1


@contextmanager
def _recorded(root: Path) -> Iterator[None]:
    """Keep owner.json up to date from a thread, and take it away at the end."""
    file = root / LOCK_FILES[1]
    ended = threading.Event()
    since = now_text()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            _write_owner(file, since)

    _write_owner(file, since)
    thread = threading.Thread(target=beat, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        # What stands in its place by somebody else's doing may stay.
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _write_owner(file: Path, since: str) -> None:
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": since,
        "time_seconds": time.time(),
    }
    try:
        write_text(file, json.dumps(record) + "\n", durable=False)
    except OSError:
        # A full disk: the lock itself still holds.
        return


def _read_owner(root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((root / LOCK_FILES[1]).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _alive_elsewhere(owner: dict[str, Any]) -> bool:
    """Whether an owner that our lock did not notice lives on another machine."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and owner.get("job") == job:
        # SLURM has requeued this very job: its former process is dead.
        return False
    if owner.get("host") == socket.gethostname():
        return False
    beat = owner.get("time_seconds")
    return isinstance(beat, int | float) and time.time() - beat < _DEAD_SECONDS


def _name(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"


def _in_use(root: Path, owner: dict[str, Any]) -> UserError:
    holder = _name(owner) if owner else "another process"
    return UserError(f"{root} is in use by {holder}: wait for it, or stop it first")
