"""What a process of a job tells the command that it runs, and makes of its signals and its end."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm.job
import slurm.requeue
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.launcher import MEETING_SOCKET
from slurm.config import SubmitConfig
from slurm.job import _Process, _Signals, listen
from slurm.outcome import Outcome, read_outcomes
from slurm.submission import Submission, Task, create_submission


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    config = SubmitConfig(nodes=2, tasks_per_node=4, cpus_per_task=3)
    return create_submission(tmp_path / "slurm", [Task(words=["configs"])], config)


def process(submission: Submission, rank: int, cluster: str = "slurm") -> _Process:
    place = SimpleNamespace(
        cluster=cluster,
        global_rank=rank,
        local_rank=rank % 4,
        num_tasks=8,
        num_nodes=2,
        job_id="51",
    )
    return _Process(submission, 0, place, _Signals())


def test_every_process_learns_its_place_and_where_rank_0_is(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 5 is the second of the second node; it waits until rank 0 has found a port."""
    for name in ("OMP_NUM_THREADS", "MASTER_ADDR", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "77")
    found: list[dict[str, str]] = []
    with contextlib.ExitStack() as held:
        variables = process(submission, 5)._variables
        waiting = threading.Thread(target=lambda: found.append(variables(held)))
        waiting.start()
        time.sleep(0.3)
        assert found == []
        main = process(submission, 0)._variables(held)
        waiting.join(timeout=120)
        (other,) = found
        # Rank 0 listens already: nobody else can take the port before the others come.
        assert socket.socket(fileno=os.dup(int(main[MEETING_SOCKET]))).getsockname()[1] == int(
            main["MASTER_PORT"]
        )
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("", int(main["MASTER_PORT"])))
    assert other[MEETING_SOCKET] == "-1"
    expected = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "3"}
    assert expected.items() <= main.items()
    assert expected.items() <= other.items()
    assert (main["RANK"], main["LOCAL_RANK"]) == ("0", "0")
    assert (other["RANK"], other["LOCAL_RANK"]) == ("5", "1")
    assert other["MASTER_ADDR"] == main["MASTER_ADDR"] == os.uname().nodename
    with listen("51", 3) as expected_socket:
        port = str(expected_socket.getsockname()[1])
    assert other["MASTER_PORT"] == main["MASTER_PORT"] == port
    # What the user has set stays; the flight recorder is on otherwise.
    assert "TORCH_FR_BUFFER_SIZE" not in main
    assert main["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert main["TORCH_FR_DUMP_TEMP_FILE"] == f"{submission.folder}/outcomes/nccl-0-3-rank-"


def test_a_signal_that_came_before_the_child_is_passed_on(tmp_path: Path) -> None:
    signals = _Signals()
    sent: list[int] = []
    signals.receive(signal.SIGUSR2, None)
    signals.watch(SimpleNamespace(send_signal=sent.append))
    signals.receive(signal.SIGTERM, None)
    assert sent == [signal.SIGUSR2, signal.SIGTERM]


@pytest.mark.parametrize(
    ("code", "failures", "kind", "reason"),
    [
        (0, [], "done", "done"),
        (75, [], "saved", "told to stop in time"),
        # Before the command could answer the signal: there was nothing to save.
        (-signal.SIGUSR2, [], "saved", "told to stop in time"),
        (-signal.SIGKILL, [], "crashed", "died of SIGKILL"),
        # A command that did not say why was ended by its machine: a library that is not there, a disk that is gone.
        (1, [], "crashed", f"it exited with 1 on {os.uname().nodename}"),
        (127, [], "crashed", f"it exited with 127 on {os.uname().nodename}"),
        (1, [("crash", "CUDA error")], "crashed", "CUDA error"),
        (1, [("lost_rank", "rank 3 died")], "crashed", "rank 3 died"),
        (1, [("lost_rank", "rank 3 failed"), ("user", "no space")], "failed", "no space"),
    ],
)
def test_what_an_exit_code_means(
    submission: Submission,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    failures: list[tuple[str, str]],
    kind: str,
    reason: str,
) -> None:
    run = tmp_path / "run"
    here = process(submission, 2)
    here.run_directory = RunDirectory(run)
    (run / "logs" / "attempt-1").mkdir(parents=True)

    def run_child() -> int:
        logs = run / "logs" / "attempt-2"
        logs.mkdir()
        (logs / "rank-0.step").write_text("000000000041\n")
        (logs / "rank-2.step").write_text("000000000040\n")
        lines = [
            {"event": "failed", "attempt": 2, "kind": kind, "reason": reason}
            for kind, reason in failures
        ]
        lines.append({"event": "failed", "attempt": 1, "kind": "crash", "reason": "long ago"})
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return int(code)

    monkeypatch.setattr(here, "_run_child", run_child)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outcome = here.run()
    assert (outcome.kind, outcome.reason, outcome.step) == (kind, reason, 41)
    assert read_outcomes(submission.folder, task=0, restart=here.restart) == {2: outcome}


@pytest.mark.parametrize(
    ("script", "kind", "reason"),
    [
        ("echo peerlearn: no such key >&2; exit 2", "failed", "no such key"),
        ('echo user > "$PEERLEARN_FAULT_FILE"; exit 1', "failed", "it exited with 1 on HOST"),
        (
            'printf machine > "$PEERLEARN_FAULT_FILE"; echo peerlearn: no route >&2; exit 1',
            "crashed",
            "no route",
        ),
        (
            "echo Traceback >&2; echo ImportError: libcudnn >&2; exit 1",
            "crashed",
            "it exited with 1 on HOST: ImportError: libcudnn",
        ),
    ],
)
def test_whose_fault_a_failure_is(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, script: str, kind: str, reason: str
) -> None:
    """As the command wrote it, else by whether it could complain at all."""
    monkeypatch.setattr(slurm.job, "module_words", lambda *_: ["bash", "-c", script])
    here = process(submission, 0)
    here.place.num_tasks = 1
    outcome = here.run()
    assert (outcome.kind, outcome.reason.replace(os.uname().nodename, "HOST")) == (kind, reason)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    submission = Submission(
        folder=tmp_path, tasks=[Task(words=["configs"])], config=SubmitConfig(), working_directory=str(gone)
    )  # fmt: skip
    submission.outcomes.mkdir()
    here = process(submission, 0)
    here.place.num_tasks = 1
    outcome = here.run()
    assert outcome.kind == "crashed"
    assert outcome.reason == f"{gone}: No such file or directory on {os.uname().nodename}"


@pytest.mark.parametrize(
    ("received", "code", "kind"),
    [
        ({signal.SIGUSR2}, 1, "saved"),
        ({signal.SIGUSR2}, 2, "failed"),
        (set(), 1, "failed"),
    ],
)
def test_an_evaluation_that_was_told_to_stop_in_time_starts_again(
    submission: Submission, received: set[int], code: int, kind: str
) -> None:
    here = process(submission, 0)
    here.complaint = "no such key"
    here.signals.received |= received
    assert here.run_directory is None
    assert here._outcome(code, attempt_before=0).kind == kind


def test_a_start_that_never_began_knows_no_step(
    submission: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step files of the start before it are not its own."""
    here = process(submission, 0)
    here.run_directory = RunDirectory(tmp_path / "run")
    logs = tmp_path / "run" / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    (logs / "rank-0.step").write_text("000000000041\n")
    monkeypatch.setattr(here, "_run_child", lambda: -11)
    assert here.run().step is None


@pytest.mark.parametrize(("code", "exit_code"), [(75, 75), (1, 78), (-9, -9)])
def test_on_a_full_disk_the_exit_code_tells(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    """And the end of the batch script understands it: what is the user's to mend is not requeued."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    here = process(submission, 0)
    here.complaint = "no space"
    monkeypatch.setattr(here, "_run_child", lambda: code)
    monkeypatch.setattr(slurm.job, "write_outcome", full)
    with pytest.raises(SystemExit) as stopped:
        here.run()
    assert stopped.value.code == exit_code
    monkeypatch.setenv("SLURM_JOB_ID", "51")
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm.requeue, "call", lambda *words, **_: calls.append(words))
    monkeypatch.setattr(slurm.requeue, "_REQUEUE_SECONDS", 0)
    monkeypatch.setattr(slurm.requeue, "_PATIENCE_SECONDS", 0)
    srun = exit_code if exit_code > 0 else 128 - exit_code
    assert slurm.requeue.after(submission, 0, srun, restart=0) == srun
    assert calls == ([] if exit_code == 78 else [("scontrol", "requeue", "51")])


@pytest.mark.parametrize(
    ("done", "step", "again"), [(True, 123, False), (False, 123, True), (True, None, True)]
)
def test_a_run_that_had_ended_when_it_was_told_to_stop_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool, step: int | None, again: bool
) -> None:
    """A start without a step of its own may go on with a run that is done: DONE is then the older one's."""
    run = RunDirectory(tmp_path / "run")
    run.logs(1).mkdir(parents=True)
    if done:
        run.mark_done()
    submission = create_submission(
        tmp_path / "slurm", [Task(words=["pretrain"], run=str(run.root))], SubmitConfig()
    )
    outcome = Outcome(kind="saved", code=75, reason="told to stop in time", step=step)
    monkeypatch.setattr(slurm.requeue, "_outcome", lambda *words: outcome)
    monkeypatch.setenv("SLURM_JOB_ID", "51")
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm.requeue, "call", lambda *words, **_: calls.append(words))
    monkeypatch.setattr(slurm.requeue, "_REQUEUE_SECONDS", 0)
    monkeypatch.setattr(slurm.requeue, "_PATIENCE_SECONDS", 0)
    assert slurm.requeue.after(submission, 0, 75, restart=0) == (75 if again else 0)
    assert calls == ([("scontrol", "requeue", "51")] if again else [])


def test_a_start_that_can_leave_no_trace_is_not_repeated(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "51")
    monkeypatch.setattr(slurm.requeue, "call", lambda *words: pytest.fail("requeued"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm.requeue, "add_to_history", full)
    assert slurm.requeue.after(submission, 0, 137, restart=0) == 137
