"""Heartbeats: one small file per rank that says that the rank is alive, which step it is in and why it ended.

A collective that fails says only that some peer is gone. These files say which peer.

Clocks jump, and those of two machines differ: times in files are for people and decide nothing. A process of this
machine lives if one with its number and its start is there. One of another machine lives if what it writes changes
while this process looks (`Sightings`).

    RUN/logs/attempt-K/rank-R.heartbeat.json
    {"rank", "host", "pid", "started", "time_seconds", "beats", "step", "collectives", "waiting", "failed"}
    RUN/logs/attempt-K/rank-R.step      the exact step of the rank; a heartbeat may be 2 s old when the rank dies
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from peerlearn.runs.files import numbered_files, write_text
from peerlearn.runs.json_files import read_json_object

INTERVAL_SECONDS = 2.0
# A rank that lives has beaten anew after so many.
_LOOK_INTERVALS = 2
# What stands before and after the rank.
_BEAT_FILE = ("rank-", ".heartbeat.json")
_STEP_FILE = ("rank-", ".step")
# A rank whose beat stays the same for so many intervals is silent.
_SILENT_INTERVALS = 4
SILENT_SECONDS = _SILENT_INTERVALS * INTERVAL_SECONDS


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat file holds.

    Attributes:
        rank: rank of the process.
        host: name of its machine.
        pid: number of its process on that machine.
        started: start of that process, in ticks of its machine; None if unknown. With the number it is unique there.
        time_seconds: time of the beat by the clock of that machine, in seconds since 1970.
        beats: number of the beat, by which it differs from the one before whatever the clock does.
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
    started: int | None = None
    beats: int = 0

    def lives(self) -> bool | None:
        """Whether the process lives; None where this machine cannot tell: a process of another one."""
        if self.host != socket.gethostname():
            return None
        if not process_exists(self.pid, self.started):
            return False
        # The number alone may be that of a later process.
        return None if self.started is None else True


class Heartbeat:
    """Writes this rank's file from a thread, so that a process which is stopped or swapped out falls silent."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._file = beat_file(folder, rank)
        self._started = process_started_at(os.getpid())
        self._beats = itertools.count(1)
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
            started=self._started,
            time_seconds=time.time(),
            beats=next(self._beats),
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


def beat_file(folder: Path, rank: int) -> Path:
    """The heartbeat file of a rank."""
    return folder / f"{_BEAT_FILE[0]}{rank}{_BEAT_FILE[1]}"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """The last beat of a rank; None if there is none."""
    try:
        beat = Beat(**read_json_object(beat_file(folder, rank)))
    except (OSError, ValueError, TypeError):
        return None
    hints = get_type_hints(Beat) | {"time_seconds": int | float}
    return beat if all(isinstance(vars(beat)[key], hint) for key, hint in hints.items()) else None


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
    begun, before = time.monotonic(), {other: read_beat(folder, other) for other in others}
    # Beats from before the failure would hide it.
    time.sleep(_LOOK_INTERVALS * INTERVAL_SECONDS)
    beats = {other: read_beat(folder, other) for other in others}
    quiet = {r for r, b in beats.items() if b is None or b == before[r]}
    if quiet and not any(b and (b.failed or b.lives() is False) for b in beats.values()):
        # To be sure of silence takes longer. Ranks that end meanwhile do so for the sake of these.
        time.sleep((_SILENT_INTERVALS - _LOOK_INTERVALS) * INTERVAL_SECONDS)
        beats |= {other: read_beat(folder, other) for other in quiet}
    own, seconds = read_beat(folder, rank), time.monotonic() - begun
    failed = {r: b for r, b in beats.items() if b and b.failed}
    gone = {r: b for r, b in beats.items() if b and not b.failed and b.lives() is False}
    silent = {r: b for r, b in beats.items() if b is None or b == before[r]}
    furthest = max([b.collectives for b in (own, *beats.values()) if b], default=0)
    behind = {r: b for r, b in beats.items() if b and b.collectives < furthest}
    if failed:
        return "; ".join(f"rank {r} failed ({b.failed})" for r, b in failed.items())
    if gone:
        return "; ".join(f"rank {r} died (process {b.pid} on {b.host})" for r, b in gone.items())
    if silent:
        return "; ".join(f"rank {r} {_silence(b, seconds)}" for r, b in silent.items())
    if behind:
        return "; ".join(f"rank {r} lives but did not come ({b.host})" for r, b in behind.items())
    return "no rank is missing: the network between them may have failed"


def process_exists(pid: int, started: int | None = None) -> bool:
    """Whether a process of that number, and of that start where it is known, runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    else:
        if _is_zombie(pid):
            return False
    return started is None or process_started_at(pid) in (None, started)


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


def _silence(beat: Beat | None, seconds: float) -> str:
    """The silence of a rank that was looked at for so long."""
    if beat is None:
        return "never gave a sign"
    return f"has been silent for {seconds:.0f} s (process {beat.pid} on {beat.host})"


def _step_file_name(rank: int) -> str:
    return f"{_STEP_FILE[0]}{rank}{_STEP_FILE[1]}"
