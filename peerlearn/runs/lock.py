"""One run directory, one live process: a lock file, and a record of its owner.

    RUN/.lock   owner.json {"host", "pid", "started", "job", "since", "time_seconds", "beats"}

The lock (flock) ends with its process, however the process dies. Some network file systems do not show the lock to
other machines. There the record decides, which the owner renews every 5 seconds: an owner lives whose record changes
while this process looks. The times in it are by the owner's clock, and for people alone.
"""

import contextlib
import itertools
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

from peerlearn.errors import CrashError, UserError
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import write_text
from peerlearn.runs.heartbeat import Sightings, process_exists, process_started_at
from peerlearn.runs.json_files import read_json_object

LOCK_FILES = (".lock", "owner.json")
_BEAT_SECONDS = 5.0
# An owner on another machine whose record stays the same for so long is dead. Network file systems may show a change
# late, and two processes in one run directory would spoil it.
_DEAD_SECONDS = 30.0
# How long a requeued job waits for its former self on another machine to die.
_FORMER_SELF_SECONDS = 300.0
# How long is looked where nothing can be spoiled.
_LOOK_SECONDS = 12.0
_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class InUseError(CrashError):
    """A live process holds the folder: a later start may have it."""


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
    host, pid, started = owner.get("host"), owner.get("pid"), owner.get("started")
    if not isinstance(host, str) or not isinstance(pid, int):
        return None
    if host == socket.gethostname():
        if not process_exists(pid):
            return None
        if isinstance(started, int):
            return owner if process_exists(pid, started) else None
        # Earlier versions wrote no start, and the number alone may be that of a later process.
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


@contextmanager
def _recorded(root: Path) -> Iterator[None]:
    """Keep owner.json up to date from a thread, and remove it at the end."""
    file = root / LOCK_FILES[1]
    ended = threading.Event()
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_started_at(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": now_text(),
    }

    def beat() -> None:
        for number in itertools.count(2):
            if ended.wait(_BEAT_SECONDS):
                return
            _write_owner(file, own, number)

    _write_owner(file, own, 1)
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


def _write_owner(file: Path, own: dict[str, Any], beats: int) -> None:
    # Whatever the clock does, the number makes it another record than the last.
    record = {**own, "time_seconds": time.time(), "beats": beats}
    try:
        write_text(file, json.dumps(record) + "\n", durable=False)
    except OSError:
        # The disk is full. The lock itself still holds.
        return


def _read_owner(root: Path) -> dict[str, Any]:
    try:
        return read_json_object(root / LOCK_FILES[1])
    except (OSError, ValueError):
        return {}


def _alive_elsewhere(root: Path, owner: dict[str, Any]) -> bool:
    """Whether an owner lives on another machine, whose lock this machine may not see: whether its record changes."""
    if owner.get("host") == socket.gethostname():
        return False
    logger.warning(
        "%s was held by %s: looking for up to %.0f s whether it lives",
        root,
        _name(owner),
        _DEAD_SECONDS,
    )
    job = os.environ.get("SLURM_JOB_ID")
    # Slurm has requeued this very job, and is ending its former processes: it is theirs to come to their end.
    patience = _FORMER_SELF_SECONDS if job is not None and owner.get("job") == job else 0.0
    begun, sightings = time.monotonic(), Sightings()
    # What an owner leaves behind that comes to its end is no record.
    while record := _read_owner(root):
        seconds, moved = sightings.look(root, record)
        if seconds >= _DEAD_SECONDS:
            return False
        if moved and time.monotonic() - begun >= patience:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _name(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"


def _in_use(root: Path, owner: dict[str, Any]) -> InUseError:
    holder = _name(owner) if owner else "another process"
    return InUseError(f"{root} is in use by {holder}: wait for it, or stop it first")
