"""Whom a lost rank's last beats accuse: beats written by hand, and beats of real processes."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.runs import heartbeat
from peerlearn.runs.heartbeat import (
    Beat,
    Heartbeat,
    Sightings,
    SilenceWatch,
    name_culprits,
    process_exists,
    process_started_at,
    read_beat,
)

HOST = socket.gethostname()
# Linux numbers processes below 2**22.
NO_PROCESS = 2**22 + 1


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Beats written by hand are there at once."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.0)


def write_beat(folder: Path, rank: int, *, age: float = 0.0, **changes: object) -> None:
    beat = Beat(
        rank=rank,
        host=HOST,
        pid=os.getpid(),
        started=process_started_at(os.getpid()),
        time_seconds=time.time() - age,
        beats=1,
        step=7,
        collectives=5,
        waiting="gather",
        failed=None,
    )
    content = dataclasses.asdict(dataclasses.replace(beat, **changes))
    (folder / f"rank-{rank}.heartbeat.json").write_text(json.dumps(content))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


# How grave it is (only the gravest is told), what the beat says, and the words that tell it.
FATES = {
    "failed": (
        *(0, {"failed": "no memory", "pid": NO_PROCESS, "age": 99, "collectives": 1}),
        "rank {} failed (no memory)",
    ),
    "dead": (
        *(1, {"pid": NO_PROCESS, "age": 99, "collectives": 1}),
        f"rank {{}} died (process {NO_PROCESS} on {HOST})",
    ),
    "dead at the front": (
        *(1, {"pid": NO_PROCESS, "collectives": 6}),
        f"rank {{}} died (process {NO_PROCESS} on {HOST})",
    ),
    "silent": (
        *(2, {"age": -1, "collectives": 1}),
        f"rank {{}} has been silent for 0 s (process {os.getpid()} on {HOST})",
    ),
    # By its time it has just beaten, but it stays the same while it is looked at.
    "silent elsewhere": (
        *(2, {"age": -1, "host": "elsewhere", "pid": NO_PROCESS, "step": 8}),
        f"rank {{}} has been silent for 0 s (process {NO_PROCESS} on elsewhere)",
    ),
    "never there": (2, None, "rank {} never gave a sign"),
    "a later process has its number": (
        *(1, {"started": 1, "age": -1}),
        f"rank {{}} died (process {os.getpid()} on {HOST})",
    ),
    "behind": (3, {"collectives": 4}, f"rank {{}} lives but did not come ({HOST})"),
    "behind elsewhere": (
        *(3, {"collectives": 0, "host": "elsewhere", "pid": NO_PROCESS}),
        "rank {} lives but did not come (elsewhere)",
    ),
    "here": (4, {}, ""),
    # By their times they have been silent for ever, or will be, but they change.
    "here, an hour ago": (4, {"age": 3600}, ""),
    "here, in an hour": (4, {"age": -3600}, ""),
    "here, of an earlier version": (4, {"started": None}, ""),
    "here elsewhere": (4, {"host": "elsewhere", "pid": NO_PROCESS, "age": 1e6}, ""),
}
NOBODY = "no rank is missing: the network between them may have failed"


@given(
    fates=st.lists(st.sampled_from(sorted(FATES)), min_size=1, max_size=5), place=st.integers(0, 5)
)
def test_the_gravest_fate_is_told_of_all_ranks_that_met_it(fates, place, tmp_path_factory):
    """Failed before dead before silent before behind, whatever else holds of a rank, and in rank order."""
    folder = tmp_path_factory.mktemp("beats")

    def sleep(seconds: float) -> None:
        for rank, fate in zip(ranks, fates, strict=True):
            _, changes, _ = FATES[fate]
            if changes is not None and "silent" not in fate:
                write_beat(folder, rank, **{"beats": 2, **changes})

    own = place % (len(fates) + 1)
    write_beat(folder, own)
    ranks = [rank for rank in range(len(fates) + 1) if rank != own]
    told: dict[int, list[str]] = {4: [NOBODY]}
    for rank, fate in zip(ranks, fates, strict=True):
        grave, changes, words = FATES[fate]
        if changes is not None:
            write_beat(folder, rank, **changes)
        if words:
            told.setdefault(grave, []).append(words.format(rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat.time, "sleep", sleep)
        found = name_culprits(folder, rank=own, world_size=len(fates) + 1)
    assert found == "; ".join(told[min(told)])


@given(
    own=st.one_of(st.none(), st.integers(0, 4)),
    others=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_behind_are_those_that_another_rank_or_this_one_has_passed(own, others, tmp_path_factory):
    folder = tmp_path_factory.mktemp("beats")
    if own is not None:
        write_beat(folder, 0, collectives=own)

    def sleep(seconds: float) -> None:
        for rank, collectives in enumerate(others, start=1):
            write_beat(folder, rank, collectives=collectives, beats=2)

    for rank, collectives in enumerate(others, start=1):
        write_beat(folder, rank, collectives=collectives)
    furthest = max(*others, -1 if own is None else own)
    behind = [rank for rank, collectives in enumerate(others, start=1) if collectives < furthest]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat.time, "sleep", sleep)
        found = name_culprits(folder, rank=0, world_size=len(others) + 1)
    if behind:
        assert found == "; ".join(f"rank {r} lives but did not come ({HOST})" for r in behind)
    else:
        assert found == NOBODY


SOUND = dataclasses.asdict(
    Beat(
        rank=1, host=HOST, pid=2, time_seconds=3.0, step=4, collectives=5, waiting=None, failed=None
    )
)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "7", "[" * 10**5, '{"rank": 1}', '{"rank": 1, "more": 2}'),
        *(json.dumps(SOUND | {"collectives": "5"}), json.dumps(SOUND | {"pid": None})),
        *(json.dumps(SOUND | {"time_seconds": math.nan}), "\udcff"),
    ],
)
def test_a_beat_that_cannot_be_read_is_none(tmp_path, content):
    write_beat(tmp_path, 0)
    file = tmp_path / "rank-1.heartbeat.json"
    file.write_text(json.dumps(SOUND))
    assert read_beat(tmp_path, 1).collectives == 5
    file.write_text(content, errors="surrogateescape")
    assert read_beat(tmp_path, 1) is None
    assert name_culprits(tmp_path, rank=0, world_size=2) == "rank 1 never gave a sign"


def test_beats_are_read_only_after_those_of_before_the_failure_have_been_replaced(
    tmp_path, monkeypatch
):
    """The rank that dies last had beaten just before: two intervals later its death shows."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 2.0)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        write_beat(tmp_path, 1, failed="only now")

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    write_beat(tmp_path, 0)
    write_beat(tmp_path, 1)
    assert name_culprits(tmp_path, rank=0, world_size=2) == "rank 1 failed (only now)"
    assert waited == [4.0]


@pytest.mark.parametrize("clock", [0.0, 7200.0, -7200.0])
def test_a_rank_is_silent_only_after_8_seconds_of_looking_whatever_the_clock_does(
    tmp_path, monkeypatch, clock
):
    """Rank 2, which ends meanwhile because of rank 1, is not to blame."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 2.0)
    now, waited = [100.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        waited.append(seconds)
        write_beat(tmp_path, 2, age=clock, beats=len(waited) + 1, failed="1" * (len(waited) - 1))

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    for rank in range(3):
        write_beat(tmp_path, rank, age=-clock)
    expected = f"rank 1 has been silent for 8 s (process {os.getpid()} on {HOST})"
    assert name_culprits(tmp_path, rank=0, world_size=3) == expected
    assert waited == [4.0, 4.0]


def test_silence_is_counted_from_the_last_new_beat_by_this_process_own_clock(tmp_path, monkeypatch):
    """A beat that stays the same is no beat, whatever its time says: the clocks of machines differ."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 2.0)
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    write_beat(tmp_path, 0, age=5000)
    watch = SilenceWatch(tmp_path, 0)
    assert watch.seconds() == 0.0
    now += 3
    assert watch.seconds() == 3.0
    write_beat(tmp_path, 0, age=-5000)
    now += 1
    assert watch.seconds() == 4.0  # read last 1 s ago
    now += 1
    assert watch.seconds() == 0.0
    now += 50
    assert watch.seconds() == 50.0
    (tmp_path / "rank-0.heartbeat.json").unlink()
    now += 2
    assert watch.seconds() == 52.0


def test_what_changes_was_written_by_somebody_who_lived(monkeypatch):
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    sightings = Sightings()
    assert sightings.look("a", 1) == (0.0, False)
    now += 7
    assert sightings.look("a", 1) == (7.0, False)
    assert sightings.look("b", 1) == (0.0, False)
    now += 1
    assert sightings.look("a", 2) == (0.0, True)
    now += 2
    assert sightings.look("a", 2) == (2.0, True)
    assert sightings.look("b", 1) == (3.0, False)


@pytest.mark.parametrize(
    ("changes", "lives"),
    [
        ({"age": 1e6}, True),
        ({"age": -1e6}, True),
        ({"started": 1}, False),
        ({"pid": NO_PROCESS}, False),
        ({"pid": NO_PROCESS, "started": None}, False),
        ({"started": None}, None),
        ({"host": "elsewhere"}, None),
        ({"host": "elsewhere", "pid": 10**30}, None),
        ({"pid": 10**30}, False),
    ],
)
def test_whether_a_process_lives_is_told_by_its_number_and_its_start_not_by_a_clock(
    tmp_path, changes, lives
):
    write_beat(tmp_path, 0, **changes)
    assert read_beat(tmp_path, 0).lives() is lives


# Real processes


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_process_exists_until_it_is_dead_whether_or_not_its_parent_has_noticed(sleeper):
    assert process_exists(os.getpid())
    assert process_exists(sleeper.pid)
    sleeper.kill()
    # Wait for its end without taking note of it: it is a zombie.
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{sleeper.pid}").exists()
    assert not process_exists(sleeper.pid)
    sleeper.wait()
    assert not process_exists(sleeper.pid)


def test_a_process_of_another_user_exists(monkeypatch):
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert process_exists(1)
    assert process_exists(1, process_started_at(1))
    assert not process_exists(1, process_started_at(1) + 1)


def test_a_stopped_process_is_not_dead(sleeper, tmp_path):
    sleeper.send_signal(signal.SIGSTOP)
    write_beat(tmp_path, 0)
    own = {"pid": sleeper.pid, "started": process_started_at(sleeper.pid)}
    write_beat(tmp_path, 1, **own, collectives=4)
    assert read_beat(tmp_path, 1).lives() is True
    expected = f"rank 1 has been silent for 0 s (process {sleeper.pid} on {HOST})"
    assert name_culprits(tmp_path, rank=0, world_size=2) == expected


RANK = """
import sys
import time
from pathlib import Path

from peerlearn.runs import heartbeat

heartbeat.INTERVAL_SECONDS = 0.001
# A clock that stands still, decades ago.
time.time = lambda: 1e9
beating = heartbeat.Heartbeat(Path(sys.argv[1]), 1)
for _ in range(3):
    beating.enter("average")
    beating.leave()
beating.enter("wait for rank 0")
time.sleep(600)
"""


def test_a_killed_rank_is_named_dead_by_the_beats_it_left(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        until(lambda: (beat := read_beat(tmp_path, 1)) is not None and beat.collectives == 4)
        beat = read_beat(tmp_path, 1)
        assert (beat.pid, beat.host, beat.waiting) == (process.pid, HOST, "wait for rank 0")
        write_beat(tmp_path, 0, collectives=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heartbeat, "INTERVAL_SECONDS", 0.5)
            for clock in (0.0, 4e9):
                patch.setattr(heartbeat.time, "time", lambda clock=clock: clock)
                assert name_culprits(tmp_path, rank=0, world_size=2) == NOBODY
    finally:
        process.kill()
        process.wait()
    expected = f"rank 1 died (process {process.pid} on {HOST})"
    assert name_culprits(tmp_path, rank=0, world_size=2) == expected


def test_a_rank_beats_by_itself_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.001)
    beating = Heartbeat(tmp_path, 3)
    first = read_beat(tmp_path, 3)
    assert (first.rank, first.pid, first.host) == (3, os.getpid(), HOST)
    assert (first.collectives, first.waiting, first.failed) == (0, None, None)
    beating.enter("gather")
    until(lambda: read_beat(tmp_path, 3).waiting == "gather")
    assert read_beat(tmp_path, 3).collectives == 1
    beating.leave()
    until(lambda: read_beat(tmp_path, 3).waiting is None)
    later = read_beat(tmp_path, 3)
    assert later.collectives == 1
    assert later.beats > first.beats
    beating.end()


@pytest.mark.parametrize("reason", [None, "out of memory"])
def test_the_last_beat_says_why_a_rank_ended(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 600.0)
    beating = Heartbeat(tmp_path, 0)
    beating.enter("gather")
    beating.end(reason)
    beat = read_beat(tmp_path, 0)
    assert (beat.failed, beat.collectives, beat.waiting) == (reason, 1, "gather")


def test_a_disk_that_takes_no_beat_does_not_stop_a_rank(tmp_path, files_up_to):
    with files_up_to(0):
        beating = Heartbeat(tmp_path, 0)
        beating.end("lost")
    assert read_beat(tmp_path, 0) is None
