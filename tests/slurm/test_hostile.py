"""A cluster that misbehaves: a controller that is away, programs that hang, chat or lag, and other people's shells."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm.client
import slurm.executors
import slurm.outcome
from peerlearn.cli import main
from slurm.client import JobState, job_states
from slurm.outcome import read_history
from slurm.submission import job_numbers, jobs_of
from tests.e2e.runs import assert_same_run, events
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    PROFILE,
    TWO_NODES,
    kill,
    logs,
    peerlearn,
    started_at,
    status,
    submit,
    submit_words,
    wait_for_end,
    wait_for_step,
    wait_until,
)

HELD = ("--sbatch", "hold")


def outcomes(run: Path) -> list[dict]:
    return read_history(run / "slurm" / "pretrain-1", 0)


@pytest.fixture
def programs(tmp_path: Path, cluster: Cluster) -> Callable[..., str]:
    """Puts scripts before Slurm's own programs: ``programs(squeue="exit 1")`` gives a PATH."""

    def make(**scripts: str) -> str:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            file = folder / name
            file.write_text(f"#!/bin/sh\nreal=/usr/bin/{name}\n{script}\n")
            file.chmod(0o755)
        return f"{folder}:{cluster.environment['PATH']}"

    return make


@pytest.fixture
def login(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on a login node."""
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)
    for name, text in cluster.environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow(90)
def test_controller_frozen_at_the_requeue(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """For 40 s, from the crash on: the run is requeued when the controller is back, and never said to have failed."""
    run = tmp_path / "a"
    job = submit(cluster, run)
    wait_for_step(run, 33)
    controller = cluster.daemons["slurmctld"]
    controller.send_signal(signal.SIGSTOP)
    try:
        kill(run, 0)
        wait_until(lambda: bool(outcomes(run)), "the end of the start")
        time.sleep(40)
        assert not (run / "FAILED").exists()
    finally:
        controller.send_signal(signal.SIGCONT)
    wait_for_end(cluster, job, run)
    assert events(run, "job_failed") == []
    assert [line["decision"] for line in outcomes(run)] == ["requeue", "done"]
    assert cluster.restarts(job) == 1
    assert_same_run(run, alone)


def test_a_refused_requeue_is_a_failure(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run)
    wait_for_step(run, 20)
    cluster.call("scontrol", "update", f"jobid={job}", "requeue=0")
    kill(run, 0)
    wait_for_end(cluster, job, run, "FAILED")
    assert "could not be requeued: scontrol: " in (run / "FAILED").read_text()
    assert outcomes(run)[-1]["decision"] == "failed"
    assert status(run).state == "failed"


def test_waiting_through_questions_without_an_answer(
    cluster: Cluster, alone: Path, tmp_path: Path, programs: Callable[..., str]
) -> None:
    """Every other question times out, and squeue does not know the job at first: `--wait` waits on."""
    run, calls = tmp_path / "a", tmp_path / "calls"
    path = programs(
        squeue=f"echo x >> {calls}; case $(wc -l < {calls}) in 1|4) exit 0;; *[02468]) "
        'echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1;; '
        '*) echo "Quota: 12 of 40"; exec $real "$@";; esac',
        sacct="exit 1",
    )
    keys = ("--environment", "GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1")
    words = ["submit", *PROFILE, *keys, "--wait", "true", "--", *submit_words(run)]
    found = subprocess.run(
        [sys.executable, "-m", "peerlearn", *words],
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr + found.stdout
    assert found.stdout.rstrip().endswith(": done (done)")
    assert_same_run(run, alone)


def test_users_variables_change_nothing_that_is_seen(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, options=HELD)
    strange = {
        **cluster.environment,
        "SQUEUE_FORMAT": "%u",
        "SQUEUE_FORMAT2": "userid",
        "SQUEUE_STATES": "COMPLETED",
        "SQUEUE_PARTITION": "urgent",
        "SACCT_FORMAT": "User",
        "SLURM_TIME_FORMAT": "relative",
        "SBATCH_PARTITION": "nowhere",
        "SCANCEL_STATE": "RUNNING",
    }
    words = [sys.executable, "-m", "peerlearn"]

    def told(*more: str) -> str:
        return subprocess.run(
            [*words, *more], env=strange, capture_output=True, text=True, check=True
        ).stdout

    assert "pending (JobHeldUser)" in told("status", str(run))
    other = tmp_path / "b"
    told("submit", *PROFILE, *HELD, "--", *submit_words(other))
    (record,) = jobs_of(other)
    assert cluster.state(record["job"]) == "PENDING"
    told("cancel", str(run))
    assert cluster.state(job) == "CANCELLED"


def test_whatever_setup_does_the_job_is_requeued(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    setup = [
        "set -euo pipefail; cd /; unset HOME; alias python=false",
        "trap 'echo the end' EXIT; trap 'exit 9' USR2 TERM; srun_args() { :; }; set -- other words",
    ]
    job = submit(cluster, run, options=("--setup", *setup))
    wait_for_step(run, 33)
    kill(run, 0)
    wait_for_step(run, 60, attempt=2)
    cluster.call("scancel", "--signal=USR2", job)
    wait_for_end(cluster, job, run)
    assert [line["decision"] for line in outcomes(run)] == ["requeue", "requeue", "done"], logs(run)
    assert_same_run(run, alone)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("exit 0", "setup ended with 0, before the command"),
        ("set -e; module() { return 7; }; module load cuda", "setup ended with 7, before"),
        ("echo 'never closed", "setup ended with 2, before the command"),
    ],
)
def test_a_setup_that_ends_the_start(
    cluster: Cluster,
    tmp_path: Path,
    login: None,
    monkeypatch: pytest.MonkeyPatch,
    setup: str,
    reason: str,
) -> None:
    run = tmp_path / "a"
    job = submit(cluster, run, options=("--setup", setup, "--max_crashes", "0"))
    wait_for_end(cluster, job, run, "FAILED")
    (line,) = outcomes(run)
    assert line["kind"] == "crashed"
    assert line["reason"].startswith(f"crashed 1 times, max_crashes is 0: {reason}"), logs(run)
    assert status(run).text.startswith(f"failed: {line['reason']}")
    # Its files tell, also where Slurm cannot be asked.
    monkeypatch.setenv("SLURM_CONF", os.devnull)
    assert status(run).text.startswith(f"failed: {line['reason']}")


def test_a_path_of_many_characters(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    """The job runs its own copy of the program, also with a time in the path."""
    run = tmp_path / "2026-11-26T12:30:00 it's $HOME é" / "a"
    job = submit(cluster, run, options=HELD)
    package = run / "slurm" / "pretrain-1" / "code" / "peerlearn" / "cli.py"
    package.write_text(package.read_text() + "\nprint('this is the copy')\n")
    cluster.call("scontrol", "release", job)
    wait_for_end(cluster, job, run)
    assert "this is the copy" in logs(run)
    assert_same_run(run, alone)


@pytest.mark.parametrize("character", ["%", "\\", "\n"])
def test_characters_that_mean_something_to_slurm(
    cluster: Cluster, tmp_path: Path, character: str
) -> None:
    words = ["--", *submit_words(tmp_path / f"a{character}j")]
    for dry_run in ((), ("--dry_run",)):
        found = peerlearn(cluster, "submit", *PROFILE, *dry_run, *words)
        assert found.returncode == 1
        assert f"to Slurm {character!r} in a path has a meaning" in found.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script",
    [
        # Submitted, and then no answer.
        'PATH=/usr/bin; $real "$@" > /dev/null; exec sleep 60',
        # Numbers of a wrapper's own beside the job's.
        'echo "Submitted 3 quotas"; echo 42; $real "$@"; echo "7"',
        # No number at all.
        '$real "$@" > /dev/null; echo "Lot de travaux soumis"',
        # The controller takes the job, and the answer is lost.
        '$real "$@" > /dev/null; echo "sbatch: error: Socket timed out" >&2; exit 1',
    ],
    ids=["hangs", "chats", "another language", "lost answer"],
)
def test_a_job_whose_number_sbatch_does_not_tell_is_found(
    cluster: Cluster,
    tmp_path: Path,
    login: None,
    programs: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    monkeypatch.setattr(slurm.client, "_CALL_SECONDS", 3.0)
    monkeypatch.setenv("PATH", programs(sbatch=script))
    run = tmp_path / "a"
    assert main(["submit", *PROFILE, *HELD, "--", *submit_words(run)]) == 0
    (record,) = jobs_of(run)
    queued = cluster.call("squeue", "--noheader", "--format=%i").split()
    assert queued == [record["job"]] == job_numbers(run / "slurm" / "pretrain-1")


@pytest.mark.parametrize("script", ["exec sleep 60", "echo 'Unable to contact' >&2; exit 1"])
def test_a_submission_that_never_came_to_slurm(
    cluster: Cluster,
    tmp_path: Path,
    login: None,
    programs: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
) -> None:
    monkeypatch.setattr(slurm.client, "_CALL_SECONDS", 2.0)
    monkeypatch.setattr(slurm.executors, "_APPEARS_SECONDS", 3.0)
    monkeypatch.setenv("PATH", programs(sbatch=script))
    run = tmp_path / "a"
    assert main(["submit", *PROFILE, *HELD, "--", *submit_words(run)]) == 1
    assert "and no job came of it: submit again" in capsys.readouterr().err
    assert not list(run.glob("slurm/*"))


def test_a_job_whose_submitter_was_killed_is_found_by_the_next(
    cluster: Cluster, tmp_path: Path
) -> None:
    """No ghost holds a node: the job is known again before another one could be submitted."""
    run = tmp_path / "a"
    job = submit(cluster, run, options=HELD)
    (run / "slurm" / "jobs.jsonl").unlink()
    (run / "slurm" / "pretrain-1" / "jobs.json").unlink()
    again = peerlearn(cluster, "submit", *PROFILE, "--", *submit_words(run))
    assert again.returncode == 1
    assert f"{run}: job {job} (pending (JobHeldUser)) works on it already" in again.stderr
    assert [record["job"] for record in jobs_of(run)] == [job]


def test_a_runaway_record_of_the_accounting_locks_no_run(
    cluster: Cluster, tmp_path: Path, alone: Path, programs: Callable[..., str]
) -> None:
    """Accounting has a job running for ever that the controller has forgotten."""
    run = tmp_path / "a"
    first = submit(cluster, run, options=HELD)
    cluster.call("scancel", first)
    (run / "slurm" / "jobs.jsonl").write_text(
        (run / "slurm" / "jobs.jsonl").read_text().replace(f'"{first}"', '"7777777"')
    )
    # It was not submitted just now.
    os.utime(run / "slurm" / "pretrain-1" / "jobs.json", (time.time() - 120,) * 2)
    path = programs(sacct='echo "7777777|RUNNING|None"')
    words = ["submit", *PROFILE, *HELD, "--", *submit_words(run)]
    found = subprocess.run(
        [sys.executable, "-m", "peerlearn", *words],
        env={**cluster.environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


def test_what_only_the_accounting_calls_alive_is_unknown(
    login: None, programs: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs(sacct='echo "7777777|RUNNING|None"'))
    (state,) = job_states(["7777777"]).values()
    assert state == JobState(
        state="UNKNOWN", reason="running in the accounting, and squeue does not know it"
    )
    assert (state.live, state.ended) == (False, False)
    refused = 'echo "sacct: error: slurm_persist_conn_open: Connection refused" >&2; exit 1'
    monkeypatch.setenv("PATH", programs(sacct=refused))
    assert job_states(["7777777"])["7777777"].text == "unknown (sacct does not answer)"


def test_twenty_thousand_jobs_are_asked_about(
    cluster: Cluster, login: None, tmp_path: Path
) -> None:
    """More than one command line takes."""
    job = submit(cluster, tmp_path / "a", options=HELD)
    others = [f"9{number:07d}" for number in range(20_000)]
    assert job_states([*others, job]) == {job: JobState(state="PENDING", reason="JobHeldUser")}


def test_a_process_that_exits_with_0_before_the_end_is_not_done(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    file = tmp_path / "exit"
    job = submit(cluster, run, faults=(f"EXIT_FILE={file}",))
    wait_for_step(run, 43)
    file.touch()
    wait_for_end(cluster, job, run)
    first, last = outcomes(run)
    assert (first["kind"], first["decision"]) == ("crashed", "requeue")
    told = f"it exited with 0 at step {first['step']} of 124, and is not done"
    assert first["reason"] == told
    assert last["kind"] == "done"
    assert started_at(run)[1] == first["step"] // 10 * 10
    assert_same_run(run, alone)


def test_ranks_that_do_not_meet_at_first(cluster: Cluster, together: Path, tmp_path: Path) -> None:
    """A name that does not resolve for a while: a crash of start-up, told with the host, and started again."""
    run, mark = tmp_path / "a", tmp_path / "mark"
    setup = f"[ -e {mark} ] || {{ touch {mark}; export MASTER_ADDR=nowhere.invalid; }}"
    keys = ("--rank_timeout_seconds", "8")
    job = submit(cluster, run, *keys, options=(*TWO_NODES, "--setup", setup))
    wait_for_end(cluster, job, run)
    first, last = outcomes(run)
    assert (first["kind"], first["decision"], first["step"]) == ("crashed", "requeue", None)
    assert (
        f"of 2 on {os.uname().nodename} did not meet the others at nowhere.invalid:"
        in first["reason"]
    )
    assert last["kind"] == "done"
    assert_same_run(run, together)


def test_a_working_directory_that_is_gone_for_a_while(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    place, run = tmp_path / "place", tmp_path / "a"
    place.mkdir()
    words = ["submit", *PROFILE, *HELD, "--", *submit_words(run)]
    found = subprocess.run(
        [sys.executable, "-m", "peerlearn", *words],
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    (record,) = jobs_of(run)
    place.rmdir()
    cluster.call("scontrol", "release", record["job"])
    wait_until(lambda: bool(outcomes(run)), "the first start")
    place.mkdir()
    wait_for_end(cluster, record["job"], run)
    first, last = outcomes(run)
    assert first["reason"] == f"{place}: No such file or directory on {os.uname().nodename}"
    assert (first["decision"], last["decision"]) == ("requeue", "done")
    assert_same_run(run, alone)


def test_a_python_that_is_gone_is_named(
    cluster: Cluster, tmp_path: Path, login: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the program can run, so the last line of the log tells."""
    run = tmp_path / "a"
    monkeypatch.setattr("peerlearn.runs.launcher.sys.executable", "/gone/bin/python")
    assert main(["submit", *PROFILE, "--", *submit_words(run)]) == 0
    monkeypatch.undo()
    (record,) = jobs_of(run)
    wait_for_end(cluster, record["job"], run, "FAILED")
    found = peerlearn(cluster, "status", str(run)).stdout
    assert "/gone/bin/python: No such file or directory" in found, found
