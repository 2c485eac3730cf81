"""One run directory, one live process: a lock file, and a record of its owner.

    RUN/.lock   owner.json {"host", "pid", "job", "since", "time_seconds"}

The lock (flock) ends with its process, however the process dies. Some network file systems do not show the lock to
other machines. There the record decides, which the owner renews every 5 seconds: an owner lives whose record changes
while this process looks. The time in it is by the owner's clock, and is no measure.
"""

import contextlib
import json
import logging
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
from peerlearn.runs.heartbeat import Sightings, process_exists, process_started_at

LOCK_FILES = (".lock", "owner.json")
_BEAT_SECONDS = 5.0
# An owner on another machine whose record stays the same for so long is dead. Network file systems may show a change
# late, and two processes in one run directory would spoil it.
_DEAD_SECONDS = 30.0
# How long is looked where nothing can be spoiled.
_LOOK_SECONDS = 12.0
_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class InUseError(UserError):
    """A live process holds the folder."""


@contextmanager
def run_lock(root: Path) -> Iterator[str | None]:
    """Hold the run directory for as long as the block lasts.

    Yields:
        The dead owner from whom the lock was taken over, in words; None if the directory was free.

    Raises:
        InUseError: a live process holds it.
        UserError: the folder cannot be written.
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
        if owner and _alive_elsewhere(root, owner):
            raise _in_use(root, owner)
        with _recorded(root):
            yield _name(owner) if owner else None
    finally:
        lock.release()


def living_owner(root: Path) -> dict[str, Any] | None:
    """The record of the live process that holds the run directory; None if owner.json and this machine show none.

    An owner on another machine is looked at for a while, unless this process has seen its record change just before.
    """
    owner = _look(root)
    pid, beat = owner.get("pid"), owner.get("time_seconds")
    if not isinstance(pid, int) or not isinstance(beat, int | float):
        return None
    if owner.get("host") == socket.gethostname():
        return owner if process_exists(pid) and not _started_after(pid, beat) else None
    return _sees_change(root)


def look_at_owner(root: Path) -> bool:
    """Look at an owner before `living_owner` is asked: where many are looked at first, it waits once, not for each.

    Returns:
        Whether there is an owner's record.
    """
    return bool(_look(root))


# Of the owners' records, by run directory.
_sightings = Sightings()


def _look(root: Path) -> dict[str, Any]:
    owner = _read_owner(root)
    _sightings.look(root, owner)
    return owner


def _sees_change(root: Path) -> dict[str, Any] | None:
    """The owner once its record is seen to change; None if it stays the same, or goes."""
    while owner := _read_owner(root):
        seconds, moved = _sightings.look(root, owner)
        if seconds >= _LOOK_SECONDS:
            return None
        if moved:
            return owner
        time.sleep(_POLL_SECONDS)
    return None


def _started_after(pid: int, time_seconds: float) -> bool:
    """Whether the process started after that time: then it is another process with the same number."""
    ticks = process_started_at(pid)
    if ticks is None:
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age > time_seconds + 1


@contextmanager
def _recorded(root: Path) -> Iterator[None]:
    """Keep owner.json up to date from a thread, and remove it at the end."""
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
        # Anything else that now lies in its place stays.
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
        # The disk is full. The lock itself still holds.
        return


def _read_owner(root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((root / LOCK_FILES[1]).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _alive_elsewhere(root: Path, owner: dict[str, Any]) -> bool:
    """Whether an owner lives on another machine, whose lock this machine may not see: whether its record changes."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and owner.get("job") == job:
        # SLURM has requeued this very job, so its former process is dead.
        return False
    if owner.get("host") == socket.gethostname():
        return False
    logger.warning(
        "%s was held by %s: looking for up to %.0f s whether it lives",
        root,
        _name(owner),
        _DEAD_SECONDS,
    )
    begun = time.monotonic()
    while time.monotonic() - begun < _DEAD_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = _read_owner(root)
        if now != owner:
            # What an owner leaves behind that comes to its end is no record.
            return bool(now)
    return False


def _name(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"


def _in_use(root: Path, owner: dict[str, Any]) -> InUseError:
    holder = _name(owner) if owner else "another process"
    return InUseError(f"{root} is in use by {holder}: wait for it, or stop it first")
