"""Heartbeats: one small file per rank that says that the rank is alive, which step it is in and why it ended.

A collective that fails says only that some peer is gone. These files say which peer.

Times in files are by the clocks of the machines that wrote them. Whether a process of another machine lives is seen by
whether what it writes changes (`Sightings`).

    RUN/logs/attempt-K/rank-R.heartbeat.json
    {"rank", "host", "pid", "time_seconds", "step", "collectives", "waiting", "failed"}
    RUN/logs/attempt-K/rank-R.step      the exact step of the rank; a heartbeat may be 2 s old when the rank dies
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
# A rank that has not beaten for so long is silent: it has missed several beats.
SILENT_SECONDS = 4 * INTERVAL_SECONDS


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat file holds.

    Attributes:
        rank: rank of the process.
        host: name of its machine.
        pid: number of its process on that machine.
        time_seconds: time of the beat, in seconds since 1970.
        step: step that the rank is in; None before the first step.
        collectives: number of collective operations that the rank has entered.
        waiting: name of the collective operation that the rank is in, or None.
        failed: reason of the rank's end; None while it runs and after a success.
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
    def age_seconds(self) -> float | None:
        """The age of the beat; None for a beat of another machine, whose clock may be wrong."""
        return max(0.0, time.time() - self.time_seconds) if self._is_ours else None

    def gone(self) -> bool:
        """Whether the process is known to be dead. Only its own machine can know."""
        return self._is_ours and not process_exists(self.pid)

    @property
    def _is_ours(self) -> bool:
        return self.host == socket.gethostname()


class Heartbeat:
    """Writes this rank's file from a thread, so that a process which is stopped or swapped out falls silent."""

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
        """The rank has left the collective operation."""
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
        """Write a last beat. ``failed`` is the reason if the rank ends by an error."""
        self._failed = failed
        self._ended.set()
        self.write()

    def write(self) -> None:
        """Write the file now. Training goes on if the disk is full or gone."""
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
    """The last beat of a rank; None if there is none."""
    try:
        return Beat(**json.loads((folder / _file_name(rank)).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(folder: Path) -> list[Beat]:
    """The last beats of all ranks, as far as they can be read."""
    beats = (read_beat(folder, rank) for rank in numbered_files(folder, *_BEAT_FILE))
    return [beat for beat in beats if beat is not None]


def read_step(folder: Path) -> int | None:
    """The step that the furthest rank of an attempt has reached; None before the first step."""
    steps = (read_rank_step(folder, rank) for rank in numbered_files(folder, *_STEP_FILE))
    return max((step for step in steps if step is not None), default=None)


def read_rank_step(folder: Path, rank: int) -> int | None:
    """The step that a rank of an attempt has reached; None before its first."""
    try:
        return int((folder / _step_file_name(rank)).read_text())
    except (OSError, ValueError):
        return None


class Sightings:
    """When what others write was last seen to change, by this process's own clock."""

    def __init__(self) -> None:
        # The content, since when it has been there, and whether it was seen to come.
        self._seen: dict[object, tuple[object, float, bool]] = {}

    def look(self, key: object, content: object) -> tuple[float, bool]:
        """Note what is there now.

        Returns:
            The seconds since it was first seen, and whether it has taken the place of something else since this
            process first looked. If it has, its writer was alive then.
        """
        now = time.monotonic()
        before = self._seen.get(key)
        if before is None or before[0] != content:
            self._seen[key] = (content, now, before is not None)
        _, since, moved = self._seen[key]
        return now - since, moved


class SilenceWatch:
    """Measures how long a rank has been silent, by this process's clock: the clocks of two machines may differ."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._beat = read_beat(folder, rank)
        self._heard = self._looked = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the rank's last new beat, or since the watch began. The file is read once per beat interval."""
        now = time.monotonic()
        if now - self._looked >= INTERVAL_SECONDS:
            self._looked = now
            beat = read_beat(self._folder, self._rank)
            if beat is not None and beat != self._beat:
                self._beat, self._heard = beat, now
        return now - self._heard


def name_culprits(folder: Path, *, rank: int, world_size: int) -> str:
    """The other ranks that made a collective operation fail, by their last beats, in words.

    The first of these groups that has any rank is named: ranks that ended by an error, ranks whose process is gone,
    silent ranks, ranks that are behind the furthest one.
    """
    others = [other for other in range(world_size) if other != rank]
    before = {other: read_beat(folder, other) for other in others}
    # Beats from before the failure would hide it.
    time.sleep(2 * INTERVAL_SECONDS)
    own = read_beat(folder, rank)
    beats = {other: read_beat(folder, other) for other in others}
    failed = {r: b for r, b in beats.items() if b and b.failed}
    gone = {r: b for r, b in beats.items() if b and not b.failed and b.gone()}
    silent = {r: b for r, b in beats.items() if b is None or _is_silent(b, before[r])}
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
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def process_started_at(pid: int) -> int | None:
    """When the process was started, in ticks of this machine; None if unknown. With the number it is unique."""
    fields = _process_status(pid)
    return int(fields[19]) if fields else None


def _is_zombie(pid: int) -> bool:
    """Whether the process is dead and its parent has not collected it yet."""
    return _process_status(pid)[:1] == ["Z"]


def _process_status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, from the third (state) on; none where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_silent(beat: Beat, before: Beat | None) -> bool:
    """Whether a rank beats no more. ``before``: its beat two intervals earlier."""
    if beat.age_seconds is None:
        return beat == before
    return beat.age_seconds > SILENT_SECONDS


def _silence(beat: Beat | None) -> str:
    if beat is None:
        return "never gave a sign"
    if beat.age_seconds is None:
        return f"gives no sign of life (process {beat.pid} on {beat.host})"
    return f"has been silent for {beat.age_seconds:.0f} s (process {beat.pid} on {beat.host})"


def _step_file_name(rank: int) -> str:
    return f"{_STEP_FILE[0]}{rank}{_STEP_FILE[1]}"


def _file_name(rank: int) -> str:
    return f"{_BEAT_FILE[0]}{rank}{_BEAT_FILE[1]}"
