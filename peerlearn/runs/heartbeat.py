"""Heartbeats: one small file per rank that says it is alive, where it stands and, at its end, why it ended.

A collective that fails says only that some peer is gone. These files say which one.

    RUN/logs/attempt-K/rank-R.heartbeat.json
    {"rank", "host", "pid", "time_seconds", "step", "collectives", "waiting", "failed"}
    RUN/logs/attempt-K/rank-R.step      the step it is in, to the step: a beat is up to 2 s old when a rank dies
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from peerlearn.runs.files import numbered_files, write_text

INTERVAL_SECONDS = 2.0
# What stands before and after the rank.
_BEAT_FILE = ("rank-", ".heartbeat.json")
_STEP_FILE = ("rank-", ".step")
# A beat older than this is no beat: several were missed.
_SILENT_SECONDS = 4 * INTERVAL_SECONDS


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat file holds.

    Attributes:
        rank: of the process.
        host: its machine.
        pid: its process number there.
        time_seconds: when the beat was written, seconds since 1970.
        step: the step it is in; None before the first one.
        collectives: how many collective operations the rank has entered.
        waiting: the collective it is in, or None.
        failed: why it ended; None while it runs.
    """

    rank: int
    host: str
    pid: int
    time_seconds: float
    step: int | None
    collectives: int
    waiting: str | None
    failed: str | None

    @property
    def age_seconds(self) -> float:
        return time.time() - self.time_seconds

    def gone(self) -> bool:
        """Whether the process is known not to exist any more; only its own machine can tell."""
        return self.host == socket.gethostname() and not process_exists(self.pid)


class Heartbeat:
    """Writes this rank's file from a thread, so that a process that is stopped or swapped out falls silent."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._file = folder / _file_name(rank)
        self._collectives = 0
        self._waiting: str | None = None
        self._step: int | None = None
        self._step_file: int | None = None
        self._failed: str | None = None
        self._ended = threading.Event()
        self.write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def enter(self, collective: str) -> None:
        """The rank enters a collective operation."""
        self._collectives += 1
        self._waiting = collective

    def leave(self) -> None:
        """The rank has left it."""
        self._waiting = None

    def at_step(self, step: int) -> None:
        """The rank begins a step."""
        self._step = step
        with contextlib.suppress(OSError):
            if self._step_file is None:
                path = self.folder / _step_file_name(self.rank)
                self._step_file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.pwrite(self._step_file, f"{step:012d}\n".encode(), 0)

    def end(self, failed: str | None = None) -> None:
        """Write a last beat, with the reason if the rank ends by an error."""
        self._failed = failed
        self._ended.set()
        self.write()

    def write(self) -> None:
        """Write the file now. A disk that is full or gone is no reason for training to stop."""
        beat = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time_seconds=time.time(),
            step=self._step,
            collectives=self._collectives,
            waiting=self._waiting,
            failed=self._failed,
        )
        try:
            write_text(self._file, json.dumps(asdict(beat)) + "\n", durable=False)
        except OSError:
            return

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self.write()


def read_beat(folder: Path, rank: int) -> Beat | None:
    """A rank's last beat; None if there is none."""
    try:
        return Beat(**json.loads((folder / _file_name(rank)).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(folder: Path) -> list[Beat]:
    """The last beats of all ranks, as far as they can be read."""
    beats = (read_beat(folder, rank) for rank in numbered_files(folder, *_BEAT_FILE))
    return [beat for beat in beats if beat is not None]


def read_step(folder: Path) -> int | None:
    """The step an attempt has come to, whichever way it ended: the furthest of its ranks; None before the first."""
    steps = []
    for file in numbered_files(folder, *_STEP_FILE).values():
        with contextlib.suppress(OSError, ValueError):
            steps.append(int(file.read_text()))
    return max(steps, default=None)


class SilenceWatch:
    """For how long a rank has not beaten, by this process's own clock: those of two machines may differ."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._beat = read_beat(folder, rank)
        self._heard = self._looked = time.monotonic()

    def seconds(self) -> float:
        """Since its last new beat, or since the watch began; the file is read once per beat interval."""
        now = time.monotonic()
        if now - self._looked >= INTERVAL_SECONDS:
            self._looked = now
            beat = read_beat(self._folder, self._rank)
            if beat is not None and beat != self._beat:
                self._beat, self._heard = beat, now
        return now - self._heard


def name_culprits(folder: Path, *, rank: int, world_size: int) -> str:
    """Which other ranks a failed collective is due to, by their last beats.

    In this order: those that ended by an error of their own, those whose process is gone, those that have fallen
    silent, those that have not come as far as the furthest rank.
    """
    # Beats of before the failure say nothing of it.
    time.sleep(2 * INTERVAL_SECONDS)
    own = read_beat(folder, rank)
    beats = {other: read_beat(folder, other) for other in range(world_size) if other != rank}
    failed = {r: b for r, b in beats.items() if b and b.failed}
    gone = {r: b for r, b in beats.items() if b and not b.failed and b.gone()}
    silent = {r: b for r, b in beats.items() if b is None or b.age_seconds > _SILENT_SECONDS}
    furthest = max([b.collectives for b in (own, *beats.values()) if b], default=0)
    behind = {r: b for r, b in beats.items() if b and b.collectives < furthest}
    if failed:
        return "; ".join(f"rank {r} failed ({b.failed})" for r, b in failed.items())
    if gone:
        return "; ".join(f"rank {r} died (process {b.pid} on {b.host})" for r, b in gone.items())
    if silent:
        return "; ".join(f"rank {r} {_silence(b)}" for r, b in silent.items())
    if behind:
        return "; ".join(f"rank {r} lives but did not come ({b.host})" for r, b in behind.items())
    return "no rank is missing: the network between them may have failed"


def process_exists(pid: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def process_started_at(pid: int) -> int | None:
    """When this machine started the process, in its own ticks; with the number it names one process, for good."""
    fields = _process_status(pid)
    return int(fields[19]) if fields else None


def _is_zombie(pid: int) -> bool:
    """Dead, but its parent has not taken note yet."""
    return _process_status(pid)[:1] == ["Z"]


def _process_status(pid: int) -> list[str]:
    """The fields after the name, from the third (state) on; none where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _silence(beat: Beat | None) -> str:
    if beat is None:
        return "never gave a sign"
    return f"has been silent for {beat.age_seconds:.0f} s (process {beat.pid} on {beat.host})"


def _step_file_name(rank: int) -> str:
    return f"{_STEP_FILE[0]}{rank}{_STEP_FILE[1]}"


def _file_name(rank: int) -> str:
    return f"{_BEAT_FILE[0]}{rank}{_BEAT_FILE[1]}"
