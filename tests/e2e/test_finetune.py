"""Fine-tuning goes on after any stop to the same scores, bit for bit."""

import json
import shutil
import signal
import time
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE, STDOUT

import pytest

from peerlearn.cli import main
from peerlearn.runs.directory import RunDirectory
from tests.e2e.runs import (
    command,
    ends,
    environment,
    events,
    launch,
    pretrain,
    rows,
    standing,
    without_clocks,
)
from tests.warm import Process
from tests.warm import run as run_process

pytestmark = pytest.mark.slow
WORDS = ["linear", "finetune", "--epochs", "12", "--data.limit", "120", "--batch_size", "32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert pretrain(run, "--monitor.every_epochs", "0", "--epochs", "1") == 0
    return run


def words(run: Path, *more: str) -> list[str]:
    return [*WORDS, "--checkpoint", str(run), "--network", "all", "--device", "cpu", *more]


def finetuning(run: Path) -> Path:
    (folder,) = (run / "results").glob("finetune-*")
    return folder


def scores(run: Path) -> dict[str, dict]:
    files = (run / "results").glob("linear-*.json")
    results = [json.loads(file.read_text()) for file in files]
    return {result["network"]: result["metrics"] for result in results}


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("undisturbed") / "r"))
    run_process(command(*words(run)), env=environment(), check=True, capture_output=True)
    return run


@pytest.fixture
def stopped(trained, tmp_path):
    """A copy of the run, and a fine-tuning of it that has saved something."""
    run = Path(shutil.copytree(trained, tmp_path / "r"))
    process = Process(
        command(*words(run)),
        env=environment(),
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    while not list((run / "results").glob("finetune-*/checkpoints/latest")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    yield run, process
    process.kill()
    process.communicate()


def test_an_undisturbed_one_leaves_a_run_without_saves(undisturbed):
    run = RunDirectory(finetuning(undisturbed))
    assert run.done
    assert not run.checkpoints.exists()
    logged = rows(run.root)
    assert [row["step"] for row in logged] == sorted({*range(3, 37, 3), 10, 20, 30})
    assert logged[-1]["loss"] == (logged[-1]["net/0/loss"] + logged[-1]["net/1/loss"]) / 2
    stands = standing(run.root)
    assert (stands.step, stands.total_steps, stands.seconds_left) == (36, 36, 0.0)
    assert stands.images_per_second == median(row["images_per_second"] for row in logged[-5:])
    assert set(scores(undisturbed)) == {"0", "1", "ensemble-logits"}


def assert_same(run: Path, expected: Path) -> None:
    assert scores(run) == scores(expected)
    assert [without_clocks(row) for row in rows(finetuning(run))] == [
        without_clocks(row) for row in rows(finetuning(expected))
    ]


def test_after_kill_9_the_same_command_goes_on(stopped, undisturbed):
    run, process = stopped
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not scores(run)
    run_process(command(*words(run)), env=environment(), check=True, capture_output=True)
    first, second = events(finetuning(run), "started")
    assert first["step"] == 0
    assert second["step"] >= 3
    assert_same(run, undisturbed)


def test_told_to_stop_it_saves_and_resume_goes_on(stopped, undisturbed, tmp_path, capsys):
    run, process = stopped
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert f"saved in {finetuning(run)}: the same command continues" in output
    # From elsewhere than the folder that the command was given in.
    resume = command("resume", str(finetuning(run)))
    done = run_process(
        resume, env=environment(), cwd=tmp_path, stdout=PIPE, stderr=STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert_same(run, undisturbed)
    assert main(["resume", str(finetuning(run))]) == 0
    assert "is done already" in capsys.readouterr().out


def test_its_data_is_found_from_any_folder(trained, tmp_path, monkeypatch):
    run = Path(shutil.copytree(trained, tmp_path / "r"))
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert main(words(run, "--epochs", "1", "--data.root", "here")) == 0
    assert f"root: {tmp_path / 'here'}" in RunDirectory(finetuning(run)).config.read_text()


def test_one_that_is_done_is_begun_anew_by_the_same_command(undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "r"))
    (finetuning(run) / "mark").touch()
    assert main(words(run)) == 0
    assert not (finetuning(run) / "mark").exists()
    assert len(events(finetuning(run), "started")) == 1


def test_a_learning_rate_that_makes_it_diverge_ends_in_one_line(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "r"))
    assert main(words(run, "--base_lr", "1e30")) == 1
    error = capsys.readouterr().err
    assert "lower base_lr" in error
    assert "Traceback" not in error
    assert not scores(run)


def test_results_named_relatively_are_found_from_elsewhere(trained, tmp_path):
    """`resume` goes on beside the run's own folder, wherever it is called."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    start = command(*words(trained, "--results", "out"))
    process = Process(start, env=environment(), cwd=first, stdout=DEVNULL, stderr=DEVNULL)
    while not list(first.glob("out/finetune-*/checkpoints/latest")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (place,) = (first / "out").glob("finetune-*")
    resume = command("resume", str(place))
    done = run_process(resume, env=environment(), cwd=second, stdout=PIPE, stderr=STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert len(events(place, "started")) == 2
    assert not list(second.iterdir())
    assert len(list((first / "out").glob("linear-*.json"))) == 3


def test_a_key_that_it_does_not_use_is_no_reason_to_refuse_it(stopped):
    run, process = stopped
    process.kill()
    process.wait()
    more = command(*words(run, "--tolerance", "0.5", "--epochs", "12"))
    done = run_process(more, env=environment(), stdout=PIPE, stderr=STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list((run / "results").glob("finetune-*"))) == 2


@pytest.mark.ddp
def test_several_processes_stop_and_go_on_together(trained, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for _, output in ends(launch(2, *words(trained, "--results", str(whole)))):
        assert "Traceback" not in output
    ranks = launch(2, *words(trained, "--results", str(parts)))
    while not list(parts.glob("finetune-*/checkpoints/latest")):
        assert ranks[0].poll() is None
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in ends(ranks)] == [75, 75]
    assert not list(parts.glob("linear-*.json"))
    assert [code for code, _ in ends(launch(2, *words(trained, "--results", str(parts))))] == [0, 0]
    (folder,) = parts.glob("finetune-*")
    assert [event["processes"] for event in events(folder, "started")] == [2, 2]
    metrics = [
        {file.name: json.loads(file.read_text())["metrics"] for file in place.glob("linear-*.json")}
        for place in (whole, parts)
    ]
    assert len(metrics[0]) == 3
    assert metrics[0] == metrics[1]
