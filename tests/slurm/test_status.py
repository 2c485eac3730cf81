"""`peerlearn status`: runs that are killed, stopped, finished and damaged; jobs of this machine and of a real SLURM."""

import errno
import io
import itertools
import json
import os
import pty
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from peerlearn.cli import main
from peerlearn.compute.attempt import Attempt
from peerlearn.runs import file_ages, lock
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from peerlearn.runs.heartbeat import beat_file, process_started_at
from peerlearn.runs.standing import StandingLog
from slurm import status as status_module
from slurm.config import SubmitConfig
from slurm.jobs import JobWatch
from slurm.outcome import Outcome, write_outcome
from slurm.status import read_statuses
from slurm.submission import Task, create_submission, record_jobs
from tests.e2e.runs import SMALL, STEPS, command, ends, environment, events, launch, pretrain, rows
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import peerlearn, status, submit, wait_for_step, wait_until
from tests.studies.small_studies import write_config
from tests.warm import Process
from tests.warm import run as run_process

LONG = ["--epochs", "2000", "--monitor.every_epochs", "1"]
LONG_STEPS = 2000 * 6
HELD = ("--sbatch", "hold")
THIS_PROCESS = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "started": process_started_at(os.getpid()),
}
# Linux numbers processes below 2**22.
NO_PROCESS = 2**22 + 1


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:
    capsys.readouterr()
    assert main(["status", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def slurm_status(cluster: Cluster, *words: object, **more: str) -> list[dict]:
    """As on a login node, with another environment where asked."""
    found = run_process(
        command("status", *map(str, words), "--json"),
        env={**cluster.environment, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert not found.stderr, found.stderr
    return json.loads(found.stdout)


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = rows(finished)
    expected = {
        "run": str(finished),
        "state": "done",
        "reason": None,
        "live": False,
        "job": None,
        "restarts": 0,
        "step": STEPS,
        "total_steps": STEPS,
        "images_per_second": statistics.median(row["images_per_second"] for row in written[-5:]),
        "seconds_left": None,
        "knn_top1": written[-1]["ensemble/knn_top1"],
        "knn_network": "ensemble",
        "knn_epoch": 2.0,
        "knn_k": 5,
        "knn_temperature": 0.1,
        "linear_top1": None,
        "linear_network": None,
        "linear_epoch": None,
        "classifier_top1": None,
        "classifier_network": None,
        "classifier_epoch": None,
        "classifier_split": None,
        "few_shot_top1": None,
        "few_shot_network": None,
        "few_shot_epoch": None,
        "few_shot_ways": None,
        "few_shot_shots": None,
        "heartbeat_age_seconds": None,
        "evaluations_pending": 0,
        "evaluations_running": 0,
    }
    assert shown(capsys, finished) == [expected]


@pytest.mark.parametrize(
    ("more", "network", "split"),
    [
        ((), "ensemble", "test"),
        (("--data.validation_percent", "20"), "ensemble", "validation"),
        (("--cohort.networks", "1"), "net/0", "test"),
    ],
)
def test_a_supervised_run_shows_the_accuracy_of_its_classifiers(
    more: tuple[str, ...],
    network: str,
    split: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "a"
    assert pretrain(run, "--method", "supervised", "--alpha", "0", "--beta", "0", *more) == 0
    (found,) = shown(capsys, run)
    score = rows(run)[-1][f"{network}/{split}_top1"]
    assert (found["classifier_top1"], found["classifier_epoch"]) == (score, 2.0)
    assert (found["classifier_network"], found["classifier_split"]) == (network, split)
    assert found["knn_top1"] is None
    assert main(["status", str(run), str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "kNN/classifier (epoch)" in printed
    assert f"{score:.2f} (2)" in printed
    assert f"classifier: top-1 in % on the {split} images, {network}" in printed


def test_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each step: the step it is in, the rate of the last five rows, the pace of all rows of this start."""
    run, begin_step = tmp_path / "a", Attempt.begin_step
    seen: list[int] = []

    def look_and_begin(attempt: Attempt) -> None:
        begin_step(attempt)
        found, written = status(run), rows(run)
        assert (found.state, found.live, found.heartbeat_age_seconds) == ("running", True, ANY)
        assert (found.step, found.total_steps) == (written[-1]["step"], STEPS)
        rates = [row["images_per_second"] for row in written if "images_per_second" in row]
        assert found.images_per_second == (statistics.median(rates[-5:]) if rates else None)
        steps = written[-1]["step"] - written[0]["step"]
        if steps:
            pace = steps / (written[-1]["seconds"] - written[0]["seconds"])
            left = (STEPS - written[-1]["step"]) / pace
            assert found.seconds_left == pytest.approx(left, abs=0.06)
        else:
            assert found.seconds_left is None
        scored = [row for row in written if "ensemble/knn_top1" in row][-1]
        assert (found.knn_top1, found.knn_epoch) == (scored["ensemble/knn_top1"], scored["epoch"])
        assert (found.knn_network, found.knn_k, found.knn_temperature) == ("ensemble", 5, 0.1)
        seen.append(written[-1]["step"])

    monkeypatch.setattr("peerlearn.runs.standing.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(Attempt, "begin_step", look_and_begin)
    assert pretrain(run) == 0
    assert seen == list(range(STEPS))


@pytest.mark.ddp
def test_two_ranks_run_one_falls_silent_they_are_killed(
    tmp_path: Path, killed_later: list[subprocess.Popen]
) -> None:
    run = tmp_path / "a"
    killed_later += launch(2, "pretrain", *SMALL, *LONG, "--run", str(run))
    wait_for_step(run, 12)
    found = status(run)
    assert (found.state, found.live, found.total_steps) == ("running", True, LONG_STEPS)
    assert found.restarts == 0
    # The step it is in; it went on meanwhile.
    assert found.step is not None
    assert 12 <= found.step <= rows(run)[-1]["step"] + 5
    first, *_, last = [row for row in rows(run) if row["step"] <= found.step]
    pace = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
    assert found.seconds_left == pytest.approx((LONG_STEPS - found.step) / pace, rel=0.3)
    assert found.heartbeat_age_seconds is not None
    assert found.heartbeat_age_seconds < 10

    os.kill(killed_later[1].pid, signal.SIGSTOP)
    # Of rank 1, not of rank 0, which beats.
    wait_until(lambda: (status(run).heartbeat_age_seconds or 0) > 11, "rank 1's silence")
    assert status(run).state == "running"

    for process in killed_later:
        process.kill()
    ends(killed_later)
    found = status(run)
    assert (found.state, found.live, found.heartbeat_age_seconds) == ("dead", False, None)
    assert found.reason is not None
    assert found.reason.startswith(f"no sign of life since {time.strftime('%Y')}")
    assert found.seconds_left is None


def test_a_failed_run_shows_its_last_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "DONE").unlink()
    RunDirectory(copy).mark_failed("rank 0: first line\nlow \x1b[2J memory\n")
    (found,) = shown(capsys, copy)
    assert (found["state"], found["reason"]) == ("failed", "low  [2J memory")
    assert main(["status", str(copy)]) == 0
    assert "failed: low  [2J memory" in capsys.readouterr().out


def test_damaged_files_leave_the_rest(
    finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standing = copy / "logs" / "attempt-1" / "standing.json"
    standing.write_text(json.dumps(json.loads(standing.read_text()) | {"knn_epoch": "two"}))
    (copy / "env.json").unlink()
    (copy / "metrics.jsonl").unlink()
    heartbeat = copy / "logs" / "attempt-1" / "rank-0.heartbeat.json"
    heartbeat.write_text('{"rank": 0, "host": null')
    (copy / "owner.json").write_text('{"pid": "x"}')
    (copy / "slurm").mkdir()
    (copy / "slurm" / "jobs.jsonl").write_bytes(b'\xff\xfe{"job"')
    (found,) = shown(capsys, copy)
    assert (found["state"], found["step"]) == ("done", STEPS)
    assert found["knn_epoch"] is None
    assert found["knn_top1"] == rows(finished)[-1]["ensemble/knn_top1"]
    assert found["images_per_second"] > 0

    standing.write_bytes(standing.read_bytes()[:-9])
    (found,) = shown(capsys, copy)
    assert (found["step"], found["total_steps"]) == (STEPS, STEPS)
    assert (found["images_per_second"], found["knn_top1"]) == (None, None)
    assert main(["status", str(copy)]) == 0
    assert "12/12" in capsys.readouterr().out

    (copy / "events.jsonl").write_bytes(b"\x00\x01[\n{}")
    (copy / "DONE").unlink()
    (copy / "logs" / "attempt-1" / "rank-0.step").write_text("")
    (found,) = shown(capsys, copy)
    unknown = ("step", "total_steps", "images_per_second", "knn_top1", "knn_epoch")
    assert [found[key] for key in unknown] == [None] * 5
    assert (found["state"], found["reason"]) == ("dead", "it ended while it was starting")


@pytest.fixture
def beats_elsewhere() -> Iterator[Callable[..., None]]:
    """``beats_elsewhere(run, ...)``: the run has an owner on another machine, whose clock is an hour behind."""
    ended = threading.Event()
    threads = []

    def start(run: Path, **record: object) -> None:
        def beat() -> None:
            for number in itertools.count():
                now = {"time_seconds": time.time() - 3600 + number}
                owner = {"host": "elsewhere", **record, **now}
                write_text(run / "owner.json", json.dumps(owner), durable=False)
                if ended.wait(0.1):
                    return

        threads.append(threading.Thread(target=beat))
        threads[-1].start()
        while not (run / "owner.json").exists():
            time.sleep(0.01)

    yield start
    ended.set()
    for thread in threads:
        thread.join()


def test_a_run_of_another_machine_runs_while_its_owner_and_its_ranks_beat(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their clock is an hour ahead of ours, and says nothing."""
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(status_module, "SILENT_SECONDS", 1.0)
    (copy / "DONE").unlink()
    (copy / "events.jsonl").write_text(json.dumps({"event": "started", "attempt": 1}) + "\n")
    place = copy / "logs" / "attempt-1" / "rank-0.heartbeat.json"
    beat = json.loads(place.read_text()) | {"host": "elsewhere", "failed": None}

    def write(number: int) -> None:
        content = json.dumps(beat | {"time_seconds": time.time() + 3600 + number})
        write_text(place, content, durable=False)

    write(0)
    assert status(copy).state == "dead"
    ended = threading.Event()

    def beat_on() -> None:
        for number in itertools.count():
            write(number)
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=beat_on)
    thread.start()
    try:
        time.sleep(0.3)
        found = status(copy)
    finally:
        ended.set()
        thread.join()
    assert found.state == "running"
    assert found.heartbeat_age_seconds is not None
    assert 0 <= found.heartbeat_age_seconds < 60
    # A beat of after that look is still news; then it should have beaten again.
    status(copy)
    time.sleep(1.2)
    assert status(copy).state == "dead"


def test_a_rank_of_another_machine_that_goes_from_step_to_step_is_alive(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two beats too, which come 2 s after each other: many runs need not wait so long to be shown."""
    (copy / "DONE").unlink()
    (copy / "events.jsonl").write_text(json.dumps({"event": "started", "attempt": 1}) + "\n")
    logs = copy / "logs" / "attempt-1"
    beat = json.loads((logs / "rank-0.heartbeat.json").read_text()) | {"host": "elsewhere"}
    (logs / "rank-0.heartbeat.json").write_text(json.dumps(beat))
    slept = []

    def step(seconds: float) -> None:
        slept.append(seconds)
        (logs / "rank-0.step").write_text(f"{20 + len(slept):012d}\n")

    monkeypatch.setattr(status_module, "time", SimpleNamespace(sleep=step))
    found = status(copy)
    assert (found.state, len(slept)) == ("running", 1)
    assert found.heartbeat_age_seconds is not None
    assert found.heartbeat_age_seconds < 2


def test_time_left_is_at_the_pace_of_the_newest_start(
    copy: Path, beats_elsewhere: Callable[..., None]
) -> None:
    """At step 9 of 12. The pace of an earlier start, or of before it went back to a save, is of other clocks."""
    (copy / "DONE").unlink()
    beats_elsewhere(copy, pid=1)
    logs = RunDirectory(copy).logs(2)
    logs.mkdir()
    (logs / "rank-0.step").write_text("000000000009\n")
    with (copy / "events.jsonl").open("a") as file:
        started = {"event": "started", "attempt": 2, "step": 4, "total_steps": STEPS}
        file.write(json.dumps(started) + "\n")
    found = status(copy)
    # It has not written how it stands. What stands in the file of the start before is not of its pace.
    assert (found.state, found.step, found.seconds_left) == ("running", 9, None)
    assert found.knn_top1 == rows(copy)[-1]["ensemble/knn_top1"]
    for begun_at, left in ((0, None), (4, 12.0)):
        log = StandingLog(logs, rows(copy), step=begun_at, total_steps=STEPS)
        if begun_at:
            # Three steps took 12 seconds.
            for step, seconds in ((5, 20.0), (6, 30.0), (8, 32.0)):
                log.add({"step": step, "seconds": seconds})
            log.write()
        found = status(copy)
        assert (found.state, found.step, found.total_steps) == ("running", 9, STEPS)
        assert found.seconds_left == left


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """``read_files(run)``: the operations by which `status` reads the run, by the paths below it, in order."""

    def read(run: Path) -> list[str]:
        found: list[str] = []

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def operate(path: object, *words: object, **more: object) -> object:
                if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(run):
                    found.append(Path(path).relative_to(run).as_posix())
                return function(path, *words, **more)

            return operate

        with monkeypatch.context() as place:
            for name in ("stat", "lstat", "open", "scandir", "listdir"):
                place.setattr(os, name, counted(getattr(os, name)))
            place.setattr(io, "open", counted(io.open))
            status(run)
        return found

    return read


def test_few_files_of_a_run_are_read(copy: Path, read_files: Callable[[Path], list[str]]) -> None:
    """However many rows, starts and saves it has: on a busy file server each operation takes milliseconds."""
    done = ["slurm/jobs.jsonl", "owner.json", "DONE", "events.jsonl", "logs"]
    assert read_files(copy) == [*done, "logs/attempt-1/standing.json"]

    (copy / "DONE").unlink()
    (copy / "owner.json").write_text(json.dumps(THIS_PROCESS))
    shutil.copytree(copy / "logs/attempt-1", copy / "logs/attempt-2")
    with (copy / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "started", "attempt": 2, "step": 0}) + "\n")
    assert (status(copy).state, status(copy).step) == ("running", STEPS)
    logs = "logs/attempt-2"
    running = [*done[:3], "FAILED", *done[3:], f"{logs}/standing.json", logs]
    beat, step = f"{logs}/rank-0.heartbeat.json", f"{logs}/rank-0.step"
    # The age of a heartbeat takes a new file, once for all runs of a file system.
    assert read_files(copy) == [*running, beat, step, "owner.json", beat, logs, logs]


def test_folders_of_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    for name in ("runs/a", "runs/s/x-seed-0", "runs/s/x-seed-1", "runs/y/z/w"):
        shutil.copytree(finished, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    study = tmp_path / "runs" / "s"
    (study / "study.yaml").write_text("")
    (study / "slurm" / "pretrain-1").mkdir(parents=True)
    # Its own jobs make it no run.
    (study / "slurm" / "jobs.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    names = [found["run"] for found in shown(capsys)]
    assert names == ["runs/a", "runs/s/x-seed-0", "runs/s/x-seed-1"]
    assert [found["run"] for found in shown(capsys, "runs/s", "runs/s/x-seed-1")] == names[1:]
    for words, error in (
        (["runs/y/z/w/logs"], "no run in runs/y/z/w/logs"),
        (["b"], "b is not there"),
    ):
        assert main(["status", *words]) == 1
        assert error in capsys.readouterr().err


def test_follow_on_a_terminal_ends_by_itself_and_by_ctrl_c(
    copy: Path, tmp_path: Path, beats_elsewhere: Callable[..., None]
) -> None:
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "config.yaml").write_text("")
    beats_elsewhere(tmp_path / "live", pid=1, since="2999-01-01")
    for run, state, interrupted in ((copy, "done", False), (tmp_path / "live", "running", True)):
        main_end, terminal = pty.openpty()
        process = Process(
            command("status", str(run), "--follow", "--interval_seconds", "0.3"),
            env=environment(TERM="xterm", COLUMNS="200"),
            stdout=terminal,
            stderr=terminal,
            stdin=subprocess.DEVNULL,
        )
        os.close(terminal)
        text = ""
        while state not in text:
            text += os.read(main_end, 4096).decode()
        if interrupted:
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
        # All processes have closed their end: after what they wrote comes an error.
        with suppress(OSError):
            while True:
                text += os.read(main_end, 4096).decode()
        os.close(main_end)
        assert "Traceback" not in text
        assert "interrupted" not in text


def test_a_process_that_was_given_the_number_of_a_dead_owner_is_not_it(copy: Path) -> None:
    (copy / "DONE").unlink()
    (copy / "owner.json").write_text(json.dumps(THIS_PROCESS))
    assert status(copy).state == "running"
    (copy / "owner.json").write_text(json.dumps({**THIS_PROCESS, "started": 1}))
    assert status(copy).state == "dead"


# Clocks


def started_by(run: Path, process: dict[str, object], *, attempt: int = 1) -> Path:
    """The run as it is while a process trains it. Returns the file of its heartbeat."""
    (run / "DONE").unlink(missing_ok=True)
    event = {"event": "started", "attempt": attempt, "total_steps": STEPS}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "owner.json").write_text(json.dumps(process))
    file = beat_file(RunDirectory(run).logs(attempt), 0)
    beat = json.loads(beat_file(RunDirectory(run).logs(1), 0).read_text())
    file.parent.mkdir(exist_ok=True)
    own = {key: process.get(key) for key in ("host", "pid", "started")}
    file.write_text(json.dumps(beat | own | {"failed": None}))
    return file


HOURS = [0.0, 7200.0, -7200.0, 1e9, -1e9]


@pytest.mark.parametrize("skew", HOURS)
def test_a_living_run_is_running_and_a_dead_one_dead_whatever_the_clocks_say(
    copy: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    file = started_by(copy, THIS_PROCESS)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"time_seconds": time.time() + skew}))
    now = time.time()
    for jump in HOURS:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda jump=jump: now + jump)
            found = status(copy)
        assert (found.state, found.live) == ("running", True)
        assert found.heartbeat_age_seconds is not None
        assert 0 <= found.heartbeat_age_seconds < 60

    # The main rank has gone, another one has not: the beats alone tell.
    (copy / "owner.json").unlink()
    assert status(copy).state == "running"
    file.write_text(json.dumps(content | {"time_seconds": time.time() + skew, "started": 1}))
    found = status(copy)
    assert (found.state, found.live, found.heartbeat_age_seconds) == ("dead", False, None)


@pytest.mark.parametrize(("since_then", "age"), [(90.0, 90.0), (-1.0, 0.0), (-7200.0, None)])
def test_the_age_of_a_heartbeat_is_by_the_clock_of_its_file_system(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    since_then: float,
    age: float | None,
) -> None:
    """The clock of a file server that is hours wrong is wrong for both files."""
    file = started_by(copy, THIS_PROCESS)
    logs = sorted(file.parent.iterdir())
    measured = file_ages._new_file_seconds

    def on_server(folder: Path) -> float:
        return measured(folder) - 5000.0

    monkeypatch.setattr(file_ages, "_new_file_seconds", on_server)
    written = time.time() - 5000.0 - since_then
    os.utime(file, (written, written))
    found = status(copy)
    assert found.state == "running"
    assert found.heartbeat_age_seconds == (None if age is None else pytest.approx(age, abs=3))
    assert main(["status", str(copy)]) == 0
    assert (" unknown" if age is None else " s ago") in capsys.readouterr().out
    assert sorted(file.parent.iterdir()) == logs


def test_where_nothing_can_be_written_the_age_is_unknown_and_the_run_is_running(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A colleague's run."""
    started_by(copy, THIS_PROCESS)

    def refuse(folder: Path) -> float:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(file_ages, "_new_file_seconds", refuse)
        found = status(copy)
    assert (found.state, found.heartbeat_age_seconds) == ("running", None)


def test_one_new_file_tells_the_ages_of_a_whole_file_system(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name in "abc":
        runs.append(Path(shutil.copytree(copy, tmp_path / name)))
        started_by(runs[-1], THIS_PROCESS)
    made = []

    def measure(folder: Path) -> float:
        made.append(folder)
        return time.time()

    monkeypatch.setattr(file_ages, "_new_file_seconds", measure)
    monkeypatch.setattr(status_module, "READERS", 1)
    found = read_statuses(runs, JobWatch())
    assert [each.state for each in found] == ["running"] * 3
    assert None not in [each.heartbeat_age_seconds for each in found]
    assert len(made) == 1


@pytest.mark.parametrize("skew", HOURS)
@pytest.mark.parametrize("mark", ["DONE", "FAILED"])
def test_a_mark_counts_once_its_owner_has_begun_whatever_the_clocks_say(
    copy: Path, mark: str, skew: float
) -> None:
    """An owner that has taken the run, but has not begun its own start, finds the mark of an earlier one."""
    started_by(copy, {**THIS_PROCESS, "pid": NO_PROCESS})
    (copy / mark).write_text("no memory\n")
    os.utime(copy / mark, (time.time() + skew,) * 2)
    (copy / "owner.json").write_text(json.dumps({**THIS_PROCESS, "since": "2020-01-01"}))
    assert (status(copy).state, status(copy).live) == ("running", True)
    started_by(copy, {**THIS_PROCESS, "since": "2020-01-01"}, attempt=2)
    (copy / mark).write_text("no memory\n")
    os.utime(copy / mark, (time.time() + skew,) * 2)
    assert (status(copy).state, status(copy).live) == (mark.lower(), False)


@pytest.mark.parametrize("skew", HOURS)
def test_which_came_first_a_job_or_a_start_is_told_by_the_number_of_starts(
    copy: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """The submitting machine's clock may be hours before or behind that of the nodes."""
    (copy / "DONE").unlink()
    then = datetime.fromtimestamp(max(0.0, time.time() + skew), UTC).isoformat(timespec="seconds")
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
    started = {"event": "started", "time": now, "attempt": 1}
    (copy / "events.jsonl").write_text(json.dumps(started) + "\n")
    job = {"job": "7", "verb": "resume", "executor": "slurm", "folder": "gone", "time": then}
    (copy / "slurm").mkdir()
    jobs = copy / "slurm" / "jobs.jsonl"
    watch = JobWatch()
    monkeypatch.setattr(watch, "_ask", lambda records: None)
    beat_file(copy / "logs" / "attempt-1", 0).unlink()
    for before, state in ((1, "submitted"), (0, "dead")):
        jobs.write_text(json.dumps(job | {"starts_before": before}) + "\n")
        (found,) = read_statuses([copy], watch)
        assert (found.state, found.live) == (state, state == "submitted")
    note = {"job": "7", "time": then}
    for before, state in ((1, "cancelled"), (0, "dead")):
        (copy / "slurm" / "cancelled.jsonl").write_text(
            json.dumps(note | {"starts_before": before}) + "\n"
        )
        (found,) = read_statuses([copy], watch)
        assert (found.state, found.live) == (state, False)


@pytest.mark.parametrize("skew", HOURS)
@pytest.mark.parametrize(("attempt", "state"), [(2, "failed"), (3, "dead")])
def test_the_outcome_of_a_job_of_this_machine_counts_until_the_run_is_started_again(
    copy: Path, skew: float, attempt: int, state: str
) -> None:
    file = started_by(copy, {**THIS_PROCESS, "pid": NO_PROCESS}, attempt=attempt)
    (copy / "owner.json").unlink()
    home = copy / "slurm"
    home.mkdir()
    submission = create_submission(
        home, [Task(words=["resume"], run=str(copy))], SubmitConfig(executor="local")
    )
    record_jobs(submission, [str(NO_PROCESS)])
    jobs = json.loads((home / "jobs.jsonl").read_text())
    assert jobs["starts_before"] == attempt
    (home / "jobs.jsonl").write_text(json.dumps(jobs | {"starts_before": 1}) + "\n")
    outcome = Outcome(kind="crashed", code=1, reason="no memory", step=3)
    write_outcome(submission.folder, task=0, restart=0, rank=0, outcome=outcome)
    os.utime(submission.outcomes / "0-0-0.json", (time.time() + skew,) * 2)
    found = status(copy)
    assert (found.state, found.live) == (state, False)
    assert (found.reason == "no memory") == (state == "failed")
    assert file.exists()


BEATING = """
import sys, time
from pathlib import Path
from peerlearn.runs import heartbeat, lock
real, jumps = time.time, {"ahead": 7200.0, "behind": -7200.0, "still": None}
jump = jumps[sys.argv[2]]
time.time = lambda: 1e9 if jump is None else real() + jump
lock._BEAT_SECONDS = heartbeat.INTERVAL_SECONDS = 0.05
run = Path(sys.argv[1])
with lock.run_lock(run):
    beating = heartbeat.Heartbeat(run / "logs" / "attempt-1", 0)
    beating.at_step(3)
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("clock", ["ahead", "behind", "still"])
def test_a_real_process_whose_clock_is_wrong_is_running_until_it_is_killed(
    copy: Path, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on this machine, and as on another one."""
    (copy / "DONE").unlink()
    event = {"event": "started", "attempt": 1}
    (copy / "events.jsonl").write_text(json.dumps(event) + "\n")
    for module in (lock, status_module):
        monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 2.0)
    monkeypatch.setattr(status_module, "SILENT_SECONDS", 2.0)
    process = subprocess.Popen(
        [sys.executable, "-c", BEATING, str(copy), clock],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    host = socket.gethostname
    seen: list[str] = []
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        for name in (host(), "another"):
            monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
            found = status(copy)
            seen.append(found.state)
            assert found.heartbeat_age_seconds is not None
            assert found.heartbeat_age_seconds < 60
    finally:
        process.kill()
        process.communicate()
    for name in (host(), "another"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        # To another machine its last beat may still be news; then it should have beaten again.
        status(copy)
        time.sleep(2.2)
        seen.append(status(copy).state)
    assert seen == ["running", "running", "dead", "dead"]


def test_interval_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--follow", "--interval_seconds", "0"]) == 2
    assert "--interval_seconds must be more than 0, got 0" in capsys.readouterr().err


def programs(folder: Path, *names: str, squeue: str = 'exec /usr/bin/squeue "$@"') -> str:
    """A PATH with these of Slurm's programs and a squeue that counts its calls."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(str(shutil.which(name)))
    file = folder / "squeue"
    file.write_text(f"#!/bin/sh\necho called >> {folder}/calls\n{squeue}\n")
    file.chmod(0o755)
    return str(folder)


def test_jobs_of_a_study_that_wait(cluster: Cluster, tmp_path: Path) -> None:
    """With accounting and without, asked once for all; and where Slurm does not answer at all."""
    profile = tmp_path / "held.yaml"
    profile.write_text("executor: slurm\nsbatch: [hold]\n")
    submitted = peerlearn(cluster, "study", str(write_config(tmp_path, cluster=str(profile))))
    assert submitted.returncode == 0, submitted.stderr
    study = tmp_path / "s"
    array = submitted.stdout.split("job ")[1].split("_")[0]
    path = programs(tmp_path / "bin")
    for more in ({}, {"PATH": path}):
        found = slurm_status(cluster, study, **more)
        assert [each["run"] for each in found] == [f"{study}/base-seed-0", f"{study}/base-seed-1"]
        assert [each["job"] for each in found] == [f"{array}_0", f"{array}_1"]
        for each in found:
            assert (each["state"], each["reason"], each["live"]) == ("pending", "JobHeldUser", True)
            assert (each["step"], each["restarts"], each["heartbeat_age_seconds"]) == (
                None,
                0,
                None,
            )
    assert (tmp_path / "bin" / "calls").read_text() == "called\n"

    offline = run_process(
        command("status", str(study)),
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "SLURM_CONF": os.devnull},
        capture_output=True,
        text=True,
    )
    assert offline.returncode == 0
    assert offline.stdout.count("submitted (Slurm cannot be asked)") == 2
    assert offline.stderr.startswith("peerlearn: by the run directories alone: squeue: ")
    assert offline.stderr.count("\n") == 1

    # Slurm itself forgets at once an array's task that never began.
    assert peerlearn(cluster, "cancel", str(study / "base-seed-0")).returncode == 0
    assert [each["state"] for each in slurm_status(cluster, study)] == ["cancelled", "pending"]


def test_a_job_that_squeue_has_forgotten(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, options=HELD)
    cluster.call("scancel", job)
    assert slurm_status(cluster, run)[0]["state"] == "cancelled"
    path = programs(tmp_path / "accounting", "sacct", squeue="exit 0")
    wait_until(lambda: slurm_status(cluster, run, PATH=path)[0]["state"] == "cancelled", "sacct")
    path = programs(tmp_path / "without", squeue="exit 0")
    (found,) = slurm_status(cluster, run, PATH=path)
    assert (found["state"], found["live"]) == ("submitted", True)
    assert found["reason"] == "Slurm does not know it yet"
    # Its list lags no longer than a minute.
    os.utime(run / "slurm" / "pretrain-1" / "jobs.json", (0, 0))
    (found,) = slurm_status(cluster, run, PATH=path)
    assert (found["state"], found["live"]) == ("dead", False)
    assert found["reason"] == f"Slurm does not know job {job}, and the run never began"


def test_a_job_that_runs_and_one_that_waits_for_its_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run, large = tmp_path / "runs" / "a", tmp_path / "runs" / "large"
    job = submit(cluster, run, *LONG)
    submit(cluster, large, options=("--nodes", "2", "--sbatch", "exclusive"))
    assert slurm_status(cluster, run)[0]["state"] in ("pending", "configuring", "running")
    wait_for_step(run, 20)
    wait_until(lambda: slurm_status(cluster, large)[0]["reason"] == "Resources", "scheduling")
    found, waiting = slurm_status(cluster, tmp_path / "runs")
    assert (found["state"], found["job"], found["restarts"]) == ("running", job, 0)
    assert found["reason"] is None
    assert found["step"] >= 20
    assert found["heartbeat_age_seconds"] < 20
    assert found["seconds_left"] > 10
    assert (found["evaluations_pending"], found["evaluations_running"]) == (0, 0)
    assert (waiting["state"], waiting["live"]) == ("pending", True)

    offline = run_process(
        command("status", str(run), "--json"),
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "SLURM_CONF": os.devnull},
        capture_output=True,
        text=True,
    )
    (found,) = json.loads(offline.stdout)
    assert (found["state"], found["live"]) == ("running", True)
    assert found["heartbeat_age_seconds"] < 20

    # By Slurm's own program: saved, and to be resumed by somebody, but not by itself.
    cluster.call("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    (found,) = slurm_status(cluster, run)
    assert (found["state"], found["live"]) == ("cancelled", False)
    assert found["step"] == events(run, "stopped")[0]["step"]


def test_jobs_that_evaluate_a_run(cluster: Cluster, copy: Path) -> None:
    words = ["submit", "--cluster", "slurm", "--cpus_per_task", "1", *HELD]
    found = peerlearn(cluster, *words, "--", "knn", "--checkpoint", str(copy))
    assert found.returncode == 0, found.stderr
    (found,) = slurm_status(cluster, copy)
    assert (found["state"], found["live"], found["job"]) == ("done", False, None)
    assert (found["evaluations_pending"], found["evaluations_running"]) == (1, 0)
    table = peerlearn(cluster, "status", str(copy)).stdout
    assert "1 pending" in table
