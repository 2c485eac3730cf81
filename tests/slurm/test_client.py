"""Questions to Slurm: asked again while nobody answers, and never answered by a guess."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm.client
from peerlearn.errors import UserError
from slurm.client import JobState, NoAnswerError, call, neutral, outside_any_job
from slurm.config import SubmitConfig
from slurm.outcome import MissingJobs, Outcome, add_to_history, is_decided, last_words
from slurm.submission import NUMBERS_FILE, Submission, Task

Program = Callable[[str], None]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Makes a squeue of a shell script."""

    def make(script: str) -> None:
        file = tmp_path / "squeue"
        file.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_a_question_is_asked_again_until_it_is_answered(
    squeue: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    pauses: list[float] = []
    own = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(slurm.client, "time", own)
    squeue(
        f"[ $(wc -l < {tmp_path}/calls) -ge 8 ] && exec echo fine; "
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    assert call("squeue", patience_seconds=300) == "fine\n"
    assert pauses == [0.5, 1, 2, 4, 8, 16, 20]
    said = "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    assert capfd.readouterr().err == f"{said}: asking again for 300 s\n"


def test_without_patience_it_is_asked_once(squeue: Program, tmp_path: Path) -> None:
    squeue("echo 'Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(NoAnswerError, match="squeue: Socket timed out on send/recv operation"):
        call("squeue")
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_refusal_is_an_answer(squeue: Program, tmp_path: Path) -> None:
    squeue("echo 'squeue: error: Invalid user: nobody9' >&2; exit 1")
    with pytest.raises(UserError, match="squeue: Invalid user: nobody9") as told:
        call("squeue", patience_seconds=300)
    assert not isinstance(told.value, NoAnswerError)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_program_that_hangs(squeue: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.client, "_CALL_SECONDS", 0.3)
    squeue("exec sleep 60")
    with pytest.raises(NoAnswerError, match="squeue gave no answer for 0 s"):
        call("squeue")


def test_environments() -> None:
    inside = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_CLUSTERS": "a",
        "SLURM_JOB_ID": "7",
        "SLURM_TIME_FORMAT": "relative",
        "SQUEUE_FORMAT": "%u",
        "SACCT_FORMAT": "User",
        "SBATCH_PARTITION": "x",
        "RANK": "3",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "a"}
    assert outside_any_job(inside) == kept
    job = {"SLURM_JOB_ID": "7", "RANK": "3", "SUBMITIT_EXECUTOR": "slurm"}
    assert neutral(inside) == {**kept, **job}


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(
        folder=tmp_path, tasks=[Task(words=["configs"])], config=SubmitConfig(), working_directory="/"
    )  # fmt: skip


def state(word: str) -> JobState:
    return JobState(state=word)


@pytest.mark.parametrize(
    ("answers", "ended"),
    [
        # Each with the seconds since the one before.
        ([(0, "RUNNING"), (99, "RUNNING")], False),
        ([(0, "FAILED")], True),
        ([(0, "CANCELLED")], True),
        # Slurm may start it again.
        ([(0, "NODE_FAIL"), (50, "PENDING"), (50, "PREEMPTED")], False),
        ([(0, "NODE_FAIL"), (61, "NODE_FAIL")], True),
        # squeue lags.
        ([(0, None), (59, None)], False),
        ([(0, None), (61, None)], True),
        ([(0, None), (59, "RUNNING"), (59, None)], False),
        # Not to be asked is no answer.
        ([(0, None), (59, "NOT_ASKED"), (59, None)], False),
    ],
)
def test_a_job_is_over_when_slurm_says_so_or_has_not_known_it_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
    answers: list[tuple[float, str | None]],
    ended: bool,
) -> None:
    now = 1000.0
    monkeypatch.setattr("slurm.outcome.time.monotonic", lambda: now)
    jobs = MissingJobs()
    for seconds, word in answers:
        now += seconds
        answer = slurm.client.NOT_ASKED if word == "NOT_ASKED" else word and state(word)
        found = jobs.has_ended("7", answer or None, decided=False)
    assert found is ended


def test_a_job_that_left_its_decision_is_over_at_once(submission: Submission) -> None:
    outcome = Outcome(kind="done", code=0, reason="done")
    facts = {"job": "7", "restart": 0, "reason": "done", "attempt": 1, "nodes": "n1"}
    assert not is_decided(submission.folder, "7")
    (submission.folder / NUMBERS_FILE).write_text('["7"]')
    add_to_history(submission.folder, 0, outcome, decision="requeue", **facts)
    assert not is_decided(submission.folder, "7")
    add_to_history(submission.folder, 0, outcome, decision="done", **facts)
    assert is_decided(submission.folder, "7")
    assert not is_decided(submission.folder, "8")
    assert MissingJobs().has_ended("7", None, decided=True)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("start 0 on n1\nTraceback\nFileNotFoundError: /a\nsrun: error: n1: task 0\n", "FileNotFoundError: /a"),
        ("start 0 on n1\npeerlearn: no such key\nslurmstepd: error: x\n\n", "no such key"),
        # Of the newest start alone.
        ("start 0 on n1\nold\njob 7, start 0: crashed, requeue (old)\nstart 1 on n2\n", ""),
        ("bash: /gone/python: No such file\n", "bash: /gone/python: No such file"),
    ],
)  # fmt: skip
def test_last_words(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "7_0_log.out").write_text(log)
    assert last_words(tmp_path, "7") == words
    assert last_words(tmp_path, "8") == ""
