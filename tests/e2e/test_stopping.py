"""Ctrl-C, SIGTERM and SIGUSR2 stop whatever runs where it stands, with the save that is possible."""

import os
import signal
import time
from pathlib import Path

import pytest

import peerlearn.data.evaluation_views
import peerlearn.data.unreadable
import peerlearn.evaluation.features
from peerlearn.cli import main
from peerlearn.runs.checkpoint import saved_steps
from tests.e2e.runs import (
    SMALL,
    assert_same_run,
    command,
    ends,
    environment,
    events,
    exported_files,
    launch,
    pretrain,
    rows,
    write_noise,
)
from tests.warm import run as run_process

STEPS_OF_EPOCH = 6


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(module, function, number, call)``: at that call (from 1) of the function this process gets the
    signal, and the function would then take longer than anybody waits."""

    def prepare(module: object, function: str, number: signal.Signals, call: int) -> None:
        calls = 0
        real = getattr(module, function)

        def interrupted(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), number)
                time.sleep(60)
                raise AssertionError("nothing has stopped this")
            return real(*arguments, **named)

        monkeypatch.setattr(module, function, interrupted)

    return prepare


@pytest.fixture(scope="session")
def undisturbed(once) -> Path:
    def make(run: Path) -> None:
        found = run_process(
            command("pretrain", *SMALL, "--run", str(run)), env=environment(), capture_output=True
        )
        assert found.returncode == 0, found.stderr

    return once("undisturbed-by-signals", make)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_interrupts_the_measuring_of_the_untrained_networks(
    number, interrupt, monkeypatch, undisturbed, tmp_path, capfd
):
    run = tmp_path / "u"
    with monkeypatch.context() as patch:
        interrupt(peerlearn.evaluation.features, "evaluation_batches", number, 1)
        assert pretrain(run) == 75
        patch.undo()
    monkeypatch.undo()
    printed = capfd.readouterr()
    assert f"{number.name}: stopping\n" in printed.err
    assert printed.out.endswith(
        f"stopped by {number.name} before there was anything to save; `peerlearn resume {run}` starts again\n"
    )
    assert not saved_steps(run / "checkpoints")
    assert [(event["step"], event["attempt"]) for event in events(run, "stopped")] == [(0, 1)]
    assert not (run / "FAILED").exists()
    assert main(["resume", str(run)]) == 0
    assert_same_run(run, undisturbed)


# Each measuring extracts the features of the test split and of the train split: of the untrained networks, then of
# each of the two epochs.
@pytest.mark.parametrize(("call", "step"), [(3, 6), (4, 6), (5, 12)])
def test_a_signal_while_the_monitor_measures_saves_the_step_and_the_next_start_measures_it(
    call, step, interrupt, monkeypatch, undisturbed, tmp_path, capfd
):
    run = tmp_path / "m"
    interrupt(peerlearn.evaluation.features, "evaluation_batches", signal.SIGTERM, call)
    assert pretrain(run, "--checkpoint.every_steps", "100") == 75
    monkeypatch.undo()
    assert capfd.readouterr().out.endswith(f"saved; `peerlearn resume {run}` continues\n")
    assert [folder.name for folder in saved_steps(run / "checkpoints")] == [f"step-{step:08d}"]
    assert rows(run)[-1]["step"] == step - 1
    assert not (run / f"export/step-{step:08d}").exists()
    assert main(["resume", str(run)]) == 0
    assert [event["step"] for event in events(run, "started")] == [0, step]
    assert_same_run(run, undisturbed)


def test_a_row_that_a_stop_has_put_off_is_written_once_whatever_follows(
    interrupt, monkeypatch, undisturbed, tmp_path
):
    """Stopped while it measures, resumed, killed before its next save, and resumed again."""
    run = tmp_path / "o"
    interrupt(peerlearn.evaluation.features, "evaluation_batches", signal.SIGTERM, 3)
    assert pretrain(run, "--checkpoint.every_steps", "100") == 75
    monkeypatch.undo()
    killed = run_process(
        command("resume", str(run)),
        env=environment(CRASH_STEPS="8", STEP_SECONDS="0"),
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGSEGV
    assert [row["step"] for row in rows(run)] == [*range(9)]
    assert main(["resume", str(run)]) == 0
    assert_same_run(run, undisturbed)


def test_a_signal_while_images_are_decoded_leaves_nothing_behind(interrupt, tmp_path, capfd):
    write_noise(tmp_path / "images", {"train/a": 80, "train/b": 80, "val/a": 4, "val/b": 4})
    interrupt(peerlearn.data.unreadable, "decode_image", signal.SIGTERM, 100)
    run, data = tmp_path / "d", tmp_path / "images"
    words = ["--data.name", "folder", "--data.root", str(data), "--data.backend", "memory"]
    assert pretrain(run, *words, "--data.workers", "0") == 75
    assert capfd.readouterr().out.endswith(
        "stopped by SIGTERM before there was anything to save; the same command starts again\n"
    )
    assert not run.exists()


def test_a_signal_while_one_batch_is_read_saves_the_steps_before_it(
    interrupt, monkeypatch, tmp_path
):
    write_noise(tmp_path / "images", {"train/a": 40, "train/b": 40, "val/a": 4, "val/b": 4})
    words = ["--data.name", "folder", "--data.root", str(tmp_path / "images")]
    words += ["--data.backend", "folder", "--data.workers", "0", "--monitor.every_epochs", "0"]
    words += ["--queue.size", "64"]
    assert pretrain(tmp_path / "whole", *words) == 0
    run = tmp_path / "b"
    import peerlearn.data.croppers

    interrupt(peerlearn.data.croppers, "decode_images", signal.SIGTERM, 4)
    assert pretrain(run, *words, "--checkpoint.every_steps", "100") == 75
    monkeypatch.undo()
    assert [folder.name for folder in saved_steps(run / "checkpoints")] == ["step-00000003"]
    assert main(["resume", str(run)]) == 0
    assert_same_run(run, tmp_path / "whole")


def test_a_signal_at_the_final_accuracies_leaves_them_to_the_next_start(
    interrupt, monkeypatch, tmp_path
):
    import pretrain.final_accuracy

    run = tmp_path / "f"
    words = ["--method", "supervised", "--monitor.every_epochs", "0", "--epochs", "1"]
    interrupt(pretrain.final_accuracy, "cohort_logits", signal.SIGTERM, 1)
    # The name of the function in this module hides the package.
    assert main(["pretrain", *SMALL, *words, "--run", str(run)]) == 75
    monkeypatch.undo()
    assert not (run / "DONE").exists()
    assert not list((run / "results").glob("*.json"))
    assert main(["resume", str(run)]) == 0
    assert (run / "DONE").exists()
    assert list((run / "results").glob("*.json"))


EVALUATIONS = {
    "knn": ["knn"],
    "logistic regression": ["linear", "logistic_regression"],
    "a sweep by SGD": ["linear", "lr_sweep", "--augmentation", "none"],
    "augmented SGD": ["linear", "--augmentation", "crop_flip"],
}


@pytest.mark.parametrize("words", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_an_evaluation_with_one_line_and_1(
    words, number, interrupt, undisturbed, tmp_path, capfd
):
    interrupt(peerlearn.evaluation.features, "evaluation_batches", number, 2)
    more = ["--results", str(tmp_path / "results"), "--device", "cpu"]
    if "linear" in words or words == ["knn"]:
        more += ["--cache", "false"]
    before = signal.getsignal(number)
    assert main([*words, "--checkpoint", str(undisturbed), *more]) == 1
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == (
        f"peerlearn: stopped by {number.name}: nothing is saved, the same command starts again\n"
    )
    assert not list(tmp_path.glob("results/*.json"))


STOPPED_WHILE_MAIN_MEASURES = """
import os, signal, sys, time
from pathlib import Path
import pretrain.monitor
from peerlearn.cli import main
real = pretrain.monitor.extract_features
calls = 0
def slow(*arguments, **named):
    global calls
    calls += 1
    if calls == int(os.environ.get("CALL", "0")):
        Path(os.environ["MARK"]).touch()
        time.sleep(300)
    return real(*arguments, **named)
pretrain.monitor.extract_features = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.ddp
@pytest.mark.parametrize(("call", "saved"), [(1, []), (3, ["step-00000006"])])
def test_processes_stop_together_while_the_main_one_measures(call, saved, tmp_path):
    driver = tmp_path / "slow.py"
    driver.write_text(STOPPED_WHILE_MAIN_MEASURES)
    mark, run = tmp_path / "mark", tmp_path / "r"
    ranks = launch(
        2,
        *("pretrain", *SMALL, "--run", str(run)),
        driver=driver,
        CALL=str(call),
        MARK=str(mark),
    )
    deadline = time.monotonic() + 300
    while not mark.exists():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    for rank in reversed(ranks):
        rank.send_signal(signal.SIGTERM)
    found = ends(ranks, timeout=100)
    assert [code for code, _ in found] == [75, 75], found
    assert [folder.name for folder in saved_steps(run / "checkpoints")] == saved
    assert "rank" not in found[0][1].split("steps 0 to 12")[1]
    for code, output in ends(launch(2, "resume", str(run))):
        assert code == 0, output
    assert [row["step"] for row in rows(run)] == [*range(13)]
    assert exported_files(run)


def test_a_second_ctrl_c_interrupts_a_save(tmp_path, monkeypatch, capfd):
    from peerlearn.compute import saves

    def slow_save(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(saves, "save_checkpoint", slow_save)
    assert pretrain(tmp_path / "s", "--monitor.every_epochs", "0") == 1
    assert capfd.readouterr().err.endswith(
        "SIGINT: saving after this step\npeerlearn: interrupted\n"
    )
