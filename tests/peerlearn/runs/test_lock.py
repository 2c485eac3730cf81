"""One run directory, one live process: with real processes, and records written by hand."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peerlearn.errors import UserError
from peerlearn.runs import lock as module
from peerlearn.runs.heartbeat import Sightings, process_started_at
from peerlearn.runs.lock import living_owner, run_lock
from tests.owners import beating

# Says who held the lock before, holds it until its input ends, and may start a process that outlives it.
HOLDER = """
import subprocess
import sys
from pathlib import Path

from peerlearn.errors import UserError
from peerlearn.runs.lock import run_lock

try:
    with run_lock(Path(sys.argv[1])) as last:
        child = subprocess.Popen(["sleep", "600"]) if "child" in sys.argv else None
        print(child.pid if child else last, flush=True)
        sys.stdin.read()
except UserError as error:
    print(f"refused: {error}", flush=True)
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a holder of ``tmp_path``; none outlives the test."""
    processes = []

    def popen(*words: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), *words],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen) -> str:
    return process.stdout.readline().rstrip("\n")


def read_owner(root: Path) -> dict:
    return json.loads((root / "owner.json").read_text())


def test_a_second_process_is_refused_with_the_owner_named_until_the_first_ends(start, tmp_path):
    first = start()
    assert said(first) == "None"
    owner = read_owner(tmp_path)
    assert (owner["pid"], owner["host"]) == (first.pid, socket.gethostname())
    named = f"process {first.pid} on {socket.gethostname()}, since {owner['since']}"
    refusal = f"{tmp_path} is in use by {named}: wait for it, or stop it first"
    second = start()
    assert said(second) == f"refused: {refusal}"
    second.wait()
    with pytest.raises(UserError) as raised, run_lock(tmp_path):
        pass
    assert str(raised.value) == refusal
    # Neither refusal touched the record or the lock of the first.
    assert read_owner(tmp_path)["since"] == owner["since"]
    assert first.poll() is None
    first.communicate("")
    assert first.returncode == 0
    assert not (tmp_path / "owner.json").exists()
    with run_lock(tmp_path) as last:
        assert last is None


def test_a_killed_owner_loses_the_lock_at_once_and_is_named_to_the_next(start, tmp_path):
    first = start()
    said(first)
    owner = read_owner(tmp_path)
    first.kill()
    first.wait()
    second = start()
    named = f"process {first.pid} on {socket.gethostname()}, since {owner['since']}"
    assert said(second) == named
    assert read_owner(tmp_path)["pid"] == second.pid


def test_what_a_killed_owner_has_started_does_not_keep_its_lock(start, tmp_path):
    first = start("child")
    child = int(said(first))
    try:
        first.kill()
        first.wait()
        os.kill(child, 0)
        with run_lock(tmp_path) as last:
            assert f"process {first.pid}" in last
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_owner_that_is_stopped_and_long_silent_still_holds_the_lock(start, tmp_path):
    """On one machine the lock decides, not the beat."""
    first = start()
    said(first)
    first.send_signal(signal.SIGSTOP)
    owner = read_owner(tmp_path)
    (tmp_path / "owner.json").write_text(json.dumps({**owner, "time_seconds": 0.0}))
    with pytest.raises(UserError, match=f"in use by process {first.pid} "), run_lock(tmp_path):
        pass


def test_of_several_that_start_at_once_one_gets_the_lock(start):
    processes = [start() for _ in range(4)]
    answers = [said(process) for process in processes]
    assert answers.count("None") == 1
    for process, answer in zip(processes, answers, strict=True):
        if answer == "None":
            assert process.poll() is None
        else:
            assert answer.startswith("refused: ")
            assert "is in use by " in answer


# The record


@pytest.fixture
def short_looks(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_DEAD_SECONDS", 0.3)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.3)
    monkeypatch.setattr(module, "_sightings", Sightings())


# The other machine's clock: right, an hour ahead, an hour behind, and off by decades.
CLOCKS = [0.0, 3600.0, -3600.0, 1e9, -1e9]


@pytest.mark.parametrize("ahead", CLOCKS)
@pytest.mark.parametrize("job", [None, "8"])
def test_a_record_that_stands_still_is_taken_over_whatever_its_clock_says(
    ahead, job, short_looks, tmp_path, monkeypatch
):
    """The lock itself was free: its owner is dead, or where flock does not reach."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record = {"host": "elsewhere", "pid": 4, "job": job, "since": "then"}
    record |= {"time_seconds": time.time() + ahead}
    (tmp_path / "owner.json").write_text(json.dumps(record))
    assert living_owner(tmp_path) is None
    with run_lock(tmp_path) as last:
        assert last == f"process 4 on elsewhere{f', SLURM job {job}' if job else ''}, since then"
        ours = read_owner(tmp_path)
        assert (ours["host"], ours["pid"]) == (socket.gethostname(), os.getpid())
        assert ours["job"] == "7"
        assert abs(ours["time_seconds"] - time.time()) < 60
    assert not (tmp_path / "owner.json").exists()


@pytest.mark.parametrize("ahead", CLOCKS)
def test_a_record_that_changes_keeps_others_out_whatever_its_clock_says(
    ahead, short_looks, tmp_path, caplog
):
    record = {"host": "elsewhere", "pid": 4, "job": None, "since": "then"}
    with beating(tmp_path, record | {"time_seconds": time.time() + ahead}):
        while not (tmp_path / "owner.json").exists():
            time.sleep(0.01)
        assert living_owner(tmp_path)["pid"] == 4
        with (
            pytest.raises(UserError, match=r"in use by process 4 on elsewhere, since then: wait"),
            run_lock(tmp_path),
        ):
            pass
        assert "process 4 on elsewhere, since then: looking for up to 0 s whether" in caplog.text
    # It has gone without a word. Its last beat may still be news; then it should have beaten again.
    living_owner(tmp_path)
    time.sleep(2 * module._LOOK_SECONDS)
    assert living_owner(tmp_path) is None


def test_an_owner_elsewhere_that_ends_while_it_is_looked_at_leaves_the_run_free(
    short_looks, tmp_path, monkeypatch
):
    record = {"host": "elsewhere", "pid": 4, "since": "then", "time_seconds": 0.0}
    (tmp_path / "owner.json").write_text(json.dumps(record))
    monkeypatch.setattr(module, "_DEAD_SECONDS", 60.0)
    threading.Timer(0.2, (tmp_path / "owner.json").unlink).start()
    begun = time.monotonic()
    with run_lock(tmp_path) as last:
        assert last == "process 4 on elsewhere, since then"
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("job", ["7", "8", None])
def test_a_dead_owner_of_this_machine_is_not_looked_at(job, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(module, "_DEAD_SECONDS", 600.0)
    host = socket.gethostname()
    record = {"host": host, "pid": 4, "job": job, "since": "then", "time_seconds": time.time()}
    (tmp_path / "owner.json").write_text(json.dumps(record))
    with run_lock(tmp_path) as last:
        assert last.startswith(f"process 4 on {host}")


def test_a_requeued_job_waits_until_its_former_self_on_another_machine_is_dead(
    short_looks, tmp_path, monkeypatch, caplog
):
    """It is the same job on two machines, one of which Slurm has lost sight of: both would write the run."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record = {"host": "elsewhere", "pid": 4, "job": "7", "since": "then", "time_seconds": 0.0}
    ended = threading.Event()

    def beat() -> None:
        with beating(tmp_path, record):
            ended.wait(1.0)
        ended.set()

    thread = threading.Thread(target=beat)
    thread.start()
    while not (tmp_path / "owner.json").exists():
        time.sleep(0.01)
    with run_lock(tmp_path) as last:
        assert ended.is_set()
        assert last == "process 4 on elsewhere, SLURM job 7, since then"
    thread.join()

    monkeypatch.setattr(module, "_FORMER_SELF_SECONDS", 0.5)
    with beating(tmp_path, record):
        while not (tmp_path / "owner.json").exists():
            time.sleep(0.01)
        with (
            pytest.raises(UserError, match="in use by process 4 on elsewhere, SLURM job 7"),
            run_lock(tmp_path),
        ):
            pass


@pytest.mark.parametrize("jump", [0.0, 7200.0, -7200.0, 1e9])
def test_a_living_owner_of_this_machine_lives_whatever_the_clock_does(
    jump, start, tmp_path, monkeypatch
):
    holder = start()
    said(holder)
    owner = read_owner(tmp_path)
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + jump)
    assert living_owner(tmp_path) == owner
    holder.kill()
    holder.wait()
    assert read_owner(tmp_path) == owner
    assert living_owner(tmp_path) is None


@pytest.mark.parametrize(
    ("record", "lives"),
    [
        ({}, True),
        ({"started": 1}, False),
        ({"pid": 2**22 + 1}, False),
        ({"pid": 10**30}, False),
        ({"time_seconds": 0.0}, True),
        ({"time_seconds": "then"}, True),
        # Of an earlier version: the number alone tells nothing, and nobody renews it.
        ({"started": None}, False),
    ],
)
def test_a_later_process_with_the_number_of_a_dead_owner_is_not_it(
    record, lives, short_looks, tmp_path
):
    own = {"host": socket.gethostname(), "pid": os.getpid()}
    own["started"] = process_started_at(os.getpid())
    (tmp_path / "owner.json").write_text(json.dumps(own | record))
    assert (living_owner(tmp_path) is not None) == lives


def test_an_owner_of_an_earlier_version_on_this_machine_lives_while_it_beats(short_looks, tmp_path):
    record = {"host": socket.gethostname(), "pid": os.getpid(), "time_seconds": 0.0}
    with beating(tmp_path, record):
        while not (tmp_path / "owner.json").exists():
            time.sleep(0.01)
        assert living_owner(tmp_path)["pid"] == os.getpid()


def test_many_owners_elsewhere_are_looked_at_at_the_same_time(short_looks, tmp_path):
    roots = [tmp_path / str(number) for number in range(5)]
    for root in roots:
        root.mkdir()
        record = {"host": "elsewhere", "pid": 4, "since": "then", "time_seconds": time.time()}
        (root / "owner.json").write_text(json.dumps(record))
    assert [module.look_at_owner(root) for root in (*roots, tmp_path)] == [True] * 5 + [False]
    assert [living_owner(root) for root in roots] == [None] * 5
    (first, *others) = [module._sightings.look(root, read_owner(root)) for root in roots]
    # One wait was enough for all of them.
    assert all(abs(seconds - first[0]) < 0.25 for seconds, _ in others)
    assert not any(moved for _, moved in (first, *others))


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "7", "null", "{}", "[" * 10**5, "\udcff"),
        # Equal to nothing, it would seem to change at every look.
        '{"host": "elsewhere", "pid": 4, "time_seconds": NaN}',
    ],
)
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "owner.json").write_text(content, errors="surrogateescape")
    assert living_owner(tmp_path) is None
    with run_lock(tmp_path) as last:
        assert last is None


def test_the_record_beats_while_the_lock_is_held_and_not_after(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.001)
    beats = []
    write_owner = module._write_owner

    def writing(*record: object) -> None:
        write_owner(*record)
        beats.append(read_owner(tmp_path))

    monkeypatch.setattr(module, "_write_owner", writing)
    monkeypatch.setattr(module.time, "time", lambda: 1e9)
    with run_lock(tmp_path):
        deadline = time.monotonic() + 60
        while len(beats) < 5:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.001)
    written = len(beats)
    # A clock that stands still makes no two of them alike.
    assert {beat.pop("time_seconds") for beat in beats} == {1e9}
    assert [beat.pop("beats") for beat in beats] == list(range(1, written + 1))
    assert all(beat == beats[0] for beat in beats)
    assert not (tmp_path / "owner.json").exists()
    time.sleep(0.02)
    assert len(beats) == written


def test_without_room_for_the_record_the_lock_still_holds(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text", fail)
    with run_lock(tmp_path) as last:
        assert last is None
        with pytest.raises(UserError, match="in use by another process: "), run_lock(tmp_path):
            pass
    with run_lock(tmp_path):
        pass


def test_a_failure_within_frees_the_lock_and_is_the_one_that_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="within"), run_lock(tmp_path):
        raise RuntimeError("within")
    assert not (tmp_path / "owner.json").exists()
    with run_lock(tmp_path) as last:
        assert last is None


def test_what_is_no_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"\A.*/file: cannot be locked \(.+\): is it writable\?\Z"),
        run_lock(tmp_path / "file"),
    ):
        pass
