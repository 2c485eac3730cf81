"""`peerlearn logs` and `peerlearn cancel`: of jobs of this machine and of a real SLURM."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import process_started_at
from slurm.submission import JOBS_FILE, jobs_of
from tests.e2e.runs import (
    SMALL,
    STEPS,
    command,
    ends,
    environment,
    events,
    launch,
    wait_for,
)
from tests.owners import beating
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import peerlearn, status, submit, wait_for_step, wait_until
from tests.warm import Process
from tests.warm import run as run_process

LONG = ["--epochs", "2000"]


def submit_here(*words: str) -> None:
    found = run_process(
        command("submit", "--cluster", "local", "--", *words),
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert found.returncode == 0, found.stderr


def printed(run: Path) -> Path:
    """What the process of the newest job of a run has printed."""
    *_, job = jobs_of(run)
    return Path(job["folder"]) / f"{job['job']}_0_log.out"


def complaint(run: Path) -> str:
    """The error in it, the same for any way the run was started."""
    lines = printed(run).read_text().splitlines()
    (error,) = [line for line in lines if line.startswith("peerlearn: ")]
    assert "cuda:9" in error
    return error.removeprefix("peerlearn: ")


def headers(text: str) -> list[str]:
    return [line.strip("=<> ") for line in text.splitlines() if line.startswith("==> ")]


def follow(run: Path, *words: str, **more: str) -> subprocess.Popen:
    return Process(
        command("logs", str(run), "-f", *words),
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def test_logs_of_a_rank_and_of_an_attempt(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = copy / "logs" / "attempt-1", copy / "logs" / "attempt-2"
    second.mkdir()
    (second / "rank-0.log").write_bytes(b"zero\xff\n")
    (second / "rank-10.log").write_text("ten\n")
    for words, file in (
        ([], second / "rank-0.log"),
        (["--rank", "10"], second / "rank-10.log"),
        (["--attempt", "1"], first / "rank-0.log"),
    ):
        capfd.readouterr()
        assert main(["logs", str(copy), *words]) == 0
        content = file.read_bytes().decode(errors="replace")
        assert capfd.readouterr().out == f"==> {file} <==\n{content}"
    for words, error in (
        (["--rank", "3"], f"{second}: no log of rank 3; there are those of 0, 10"),
        (["--attempt", "4"], f"{copy}: no attempt 4; there is 1 to 2"),
        (["--rank", "1", "--attempt", "1"], f"{first}: no log of rank 1; there are those of 0"),
        (["--rank", "1", "-f"], f"{second}: no log of rank 1; there are those of 0, 10"),
    ):
        assert main(["logs", str(copy), *words]) == 1
        assert capfd.readouterr().err == f"peerlearn: {error}\n"
    assert main(["logs", str(copy.parent)]) == 1
    assert f"holds 1 runs: name one of them, as {copy}" in capfd.readouterr().err


def test_the_last_lines_of_an_attempt_are_not_lost_to_the_next(
    copy: Path, killed_later: list[subprocess.Popen]
) -> None:
    (copy / "DONE").unlink()
    owner = {"host": "elsewhere", "pid": 1, "since": "2020-01-01", "time_seconds": time.time() + 60}
    first, second = (copy / "logs" / f"attempt-{k}" / "rank-0.log" for k in (1, 2))
    first.write_text("one\n")
    with beating(copy, owner):
        following = follow(copy)
        killed_later.append(following)
        assert following.stdout is not None
        before = [following.stdout.readline() for _ in ("the file", "one")]
        with first.open("a") as file:
            file.write("the last\n")
        second.parent.mkdir()
        second.write_text("the first\n")
        beat = json.loads((first.parent / "rank-0.heartbeat.json").read_text())
        beat |= {"host": "elsewhere", "pid": 1, "started": None}
        (second.parent / "rank-0.heartbeat.json").write_text(json.dumps(beat))
        (copy / "DONE").touch()
        out, err = following.communicate(timeout=120)
    expected = f"==> {first} <==\none\nthe last\n\n==> {second} <==\nthe first\n"
    assert "".join(before) + out == expected
    assert err == f"{copy}: done, 1 restart\n"


@pytest.mark.slow(15)
def test_a_local_job_is_followed_to_its_end(
    copy: Path, killed_later: list[subprocess.Popen], capfd: pytest.CaptureFixture[str]
) -> None:
    """From what it prints to its log. It runs again after it failed: an earlier start's mark counts no more."""
    (copy / "DONE").unlink()
    RunDirectory(copy).mark_failed("earlier")
    submit_here("resume", str(copy), "--epochs", "6")
    following = follow(copy)
    killed_later.append(following)
    words = command("status", str(copy.parent), "--follow", "--interval_seconds", "0.2")
    looked = run_process(
        [*words, "--json"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (looked.returncode, looked.stderr) == (0, "")
    looks = [json.loads(line)[0] for line in looked.stdout.splitlines()]
    assert (looks[0]["state"], looks[0]["reason"]) == ("running", "starting")
    assert {look["state"] for look in looks} == {"running", "done"}
    assert any(look["seconds_left"] for look in looks)
    assert [looks[-1][key] for key in ("state", "restarts", "step")] == ["done", 1, 3 * STEPS]
    assert looks[-1]["job"].isdecimal()
    table = run_process(words, env=environment(), capture_output=True, text=True).stdout
    assert len([line for line in table.splitlines() if line.strip()]) == 4
    assert "done, 1 restart" in table
    assert "36/36" in table

    out, err = following.communicate(timeout=120)
    assert following.returncode == 0
    logs = [copy / "logs" / f"attempt-{k}" / "rank-0.log" for k in (1, 2)]
    assert headers(out) == [str(logs[0]), str(printed(copy)), str(logs[1])]
    assert out.startswith(f"==> {logs[0]} <==\n{logs[0].read_text()}\n==> ")
    assert out.endswith(f"==> {logs[1]} <==\n{logs[1].read_text()}")
    assert err == f"{copy}: done, 1 restart\n"
    # Now it has begun, what it printed is no part of the log.
    capfd.readouterr()
    assert main(["logs", str(copy)]) == 0
    assert headers(capfd.readouterr().out) == [str(logs[1])]


@pytest.mark.slow(20)
def test_jobs_that_die_in_start_up(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    # What only the machine that runs the job can tell.
    nowhere = ("--device", "cuda:9")
    submit_here("pretrain", *SMALL, *nowhere, "--run", str(here))
    submit(cluster, there, *nowhere)
    assert status(here).text == "running (starting)"
    capfd.readouterr()
    assert main(["logs", str(here), "-f"]) == 0
    out, err = capfd.readouterr()
    assert headers(out) == [str(printed(here))]
    assert "peerlearn: " in out
    assert err == f"{here}: failed: {complaint(here)}\n"
    assert main(["logs", str(here)]) == 0
    assert capfd.readouterr().out == f"==> {printed(here)} <==\n{printed(here).read_text()}"

    out, err = follow(there, **cluster.environment).communicate(timeout=120)
    assert headers(out) == [str(printed(there))]
    assert out.endswith(printed(there).read_text())
    assert err == f"{there}: failed: {complaint(there)}\n"
    # A moved run's submission has moved with it.
    moved = there.rename(tmp_path / "moved")
    assert main(["logs", str(moved)]) == 0
    file = moved / "slurm" / "pretrain-1" / printed(moved).name
    assert headers(capfd.readouterr().out) == [str(file)]


@pytest.mark.slow(10)
def test_cancel_makes_a_local_job_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "a"
    submit_here("pretrain", *SMALL, *LONG, "--run", str(run))
    wait_for_step(run, 8)
    assert main(["cancel", str(run.parent)]) == 0
    *_, job = jobs_of(run)
    told = f"{run}: job {job['job']} (pretrain, running) is told to end\n"
    assert capsys.readouterr().out == told
    wait_until(lambda: not status(run).live, "the end of the job")
    stopped = events(run, "stopped")
    assert len(stopped) == 1
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{stopped[0]['step']:08d}"
    assert (status(run).state, status(run).step) == ("cancelled", stopped[0]["step"])
    assert main(["cancel", str(run)]) == 0
    out = capsys.readouterr().out
    assert out == f"{run}: nothing to cancel: none of its jobs waits or runs\n"


@pytest.mark.slow(10)
def test_cancel_ends_a_local_job_in_start_up(tmp_path: Path) -> None:
    run = tmp_path / "a"
    submit_here("pretrain", *SMALL, *LONG, "--run", str(run))
    # submitit opens the file a little before it starts the process, and forwards no signal in between.
    wait_until(
        lambda: printed(run).exists() and bool(printed(run).stat().st_size),
        "the process of the job",
    )
    assert main(["cancel", str(run)]) == 0
    wait_until(lambda: not status(run).live, "the end of the job")
    assert status(run).text == "cancelled"


def test_cancel_leaves_processes_alone_that_are_no_jobs(
    copy: Path,
    killed_later: list[subprocess.Popen],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """One that was given the number of a job that is gone; and a run that was started by hand."""
    other = subprocess.Popen(["sleep", "100"])
    killed_later.append(other)
    record = {"job": str(other.pid), "verb": "resume", "executor": "local", "folder": "x"}
    file = copy / JOBS_FILE
    file.parent.mkdir()
    begun = process_started_at(other.pid)
    for host, since in ((socket.gethostname(), 1), ("elsewhere", begun)):
        file.write_text(json.dumps({**record, "host": host, "started": since}) + "\n")
        assert main(["cancel", str(copy)]) == 0
        assert "nothing to cancel" in capsys.readouterr().out
        assert other.poll() is None
    file.write_text(json.dumps({**record, "host": socket.gethostname(), "started": begun}) + "\n")
    assert main(["cancel", str(copy)]) == 0
    assert other.wait() == -signal.SIGTERM

    by_hand = launch(1, "pretrain", *SMALL, *LONG, "--run", str(tmp_path / "a"))
    killed_later += by_hand
    run = tmp_path / "a"
    wait_for((run / "config.yaml").exists, by_hand)
    assert main(["cancel", str(run)]) == 0
    assert f"stop process {by_hand[0].pid} on {socket.gethostname()}" in capsys.readouterr().out
    assert by_hand[0].poll() is None
    assert status(run).live
    by_hand[0].terminate()
    ((code, _),) = ends(by_hand)
    assert code == 75
    assert status(run).text == "stopped: resume continues"
    assert status(run).step == events(run, "stopped")[0]["step"]


def test_cancel_of_a_study_ends_what_watches_it_first(
    copy: Path, killed_later: list[subprocess.Popen], capsys: pytest.CaptureFixture[str]
) -> None:
    study = copy.parent
    (study / "study.yaml").write_text("")
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    killed_later += processes
    record = {"executor": "local", "host": socket.gethostname(), "folder": "x"}
    for place, verb, process in zip((copy, study), ("pretrain", "watch"), processes, strict=True):
        started = process_started_at(process.pid)
        job = {**record, "verb": verb, "job": str(process.pid), "started": started}
        (place / "slurm").mkdir()
        (place / JOBS_FILE).write_text(json.dumps(job) + "\n")
    assert main(["cancel", str(study)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{study}: job {processes[1].pid} (watch, running) is told to end",
        f"{copy}: job {processes[0].pid} (pretrain, running) is told to end",
    ]
    assert [process.wait(timeout=60) for process in processes] == [-signal.SIGTERM] * 2


def test_a_job_that_is_requeued_then_cancelled(
    cluster: Cluster, tmp_path: Path, killed_later: list[subprocess.Popen]
) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, *LONG)
    following = follow(run, **cluster.environment)
    killed_later.append(following)
    wait_for_step(run, 20)
    cluster.call("scontrol", "requeue", job)
    wait_until(lambda: slurm_status(cluster, run)["state"] == "pending", "the requeue")
    # What it left at an earlier start counts no more.
    RunDirectory(run).mark_failed("earlier")
    assert slurm_status(cluster, run)["state"] == "pending"
    wait_for_step(run, 20, attempt=2)
    found = slurm_status(cluster, run)
    assert (found["state"], found["reason"], found["restarts"]) == ("running", None, 1)
    assert found["heartbeat_age_seconds"] < 20

    cancelled = peerlearn(cluster, "cancel", str(run))
    assert cancelled.stdout == f"{run}: job {job} (pretrain, running) is told to end\n"
    assert cluster.wait_for_state(job, "CANCELLED", "PENDING") == "CANCELLED"
    found = slurm_status(cluster, run)
    assert (found["state"], found["live"], found["restarts"]) == ("cancelled", False, 1)
    assert found["step"] == events(run, "stopped")[-1]["step"]
    assert found["seconds_left"] is None
    out, err = following.communicate(timeout=120)
    assert following.returncode == 0
    logs = [run / "logs" / f"attempt-{k}" / "rank-0.log" for k in (1, 2)]
    assert [name for name in headers(out) if name != str(printed(run))] == list(map(str, logs))
    for log in logs:
        assert f"==> {log} <==\n{log.read_text()}" in out
    assert err == f"{run}: cancelled, 1 restart\n"


def test_cancel_of_all_that_waits_in_a_folder(
    cluster: Cluster, copy: Path, killed_later: list[subprocess.Popen]
) -> None:
    held = ("--sbatch", "hold")
    runs = [copy.parent / "held" / f"seed-{seed}" for seed in (0, 1)]
    jobs = [submit(cluster, run, options=held) for run in runs]
    words = ["submit", "--cluster", "slurm", *held, "--cpus_per_task", "1", "--", "knn"]
    submitted = peerlearn(cluster, *words, "--checkpoint", str(copy))
    knn = submitted.stdout.split("job ")[1].split(":")[0]
    waiting = peerlearn(cluster, "logs", str(runs[0]))
    assert waiting.returncode == 1
    assert waiting.stderr == (
        f"peerlearn: {runs[0]}: no log yet (pending (JobHeldUser)); -f waits for it\n"
    )
    following = follow(runs[0], **cluster.environment)
    killed_later.append(following)
    with pytest.raises(subprocess.TimeoutExpired):
        following.wait(timeout=2)
    following.send_signal(signal.SIGINT)
    assert following.communicate() == ("", "")
    assert following.returncode == 0

    found = peerlearn(cluster, "cancel", str(copy.parent))
    assert found.stdout.splitlines() == [
        f"{copy}: job {knn} (knn, pending) is told to end",
        f"{runs[0]}: job {jobs[0]} (pretrain, pending) is told to end",
        f"{runs[1]}: job {jobs[1]} (pretrain, pending) is told to end",
    ]
    assert cluster.call("squeue", "--noheader") == ""
    found = peerlearn(cluster, "cancel", str(copy.parent))
    assert found.returncode == 0
    assert found.stdout.count("nothing to cancel") == 3


def test_cancel_where_slurm_does_not_answer(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "slurm").mkdir()
    record = {"job": "1", "verb": "pretrain", "executor": "slurm", "folder": "x"}
    (copy / JOBS_FILE).write_text(json.dumps(record) + "\n")
    monkeypatch.setenv("PATH", os.devnull)
    assert main(["cancel", str(copy)]) == 1
    assert "`squeue` is not on this machine" in capsys.readouterr().err


def slurm_status(cluster: Cluster, run: Path) -> dict:
    (found,) = json.loads(peerlearn(cluster, "status", str(run), "--json").stdout)
    return found
