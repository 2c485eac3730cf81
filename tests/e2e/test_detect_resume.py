"""The training of a detector goes on after any stop to the same detector and the same score, bit for bit."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

from detection.state import Detection
from peerlearn.cli import main
from peerlearn.runs.directory import RunDirectory
from tests.e2e.detectors import STEPS, scores, training_of, words
from tests.e2e.runs import command, environment, events, rows, standing, wait_for, without_clocks
from tests.warm import Process
from tests.warm import run as run_process

pytestmark = pytest.mark.slow(8)
VALIDATED = ("--data.validation", "val2007", "--validate_every", "3", "--save_every", "2")
KINDS = {
    "d2_fpn": VALIDATED,
    "d2_c4": (
        *(
            "--model.detector",
            "d2_c4",
            "--model.regions_per_image",
            "4",
            "--accumulation_steps",
            "2",
        ),
        *("--model.rpn_proposals_test", "10", "--precise_bn_iterations", "1"),
    ),
    # Its scales and samplers draw from torch's own generator.
    "torchvision_fpn": ("--model.detector", "torchvision_fpn", "--save_every", "2"),
}
# Gets a signal in the middle of the last test, or of the last PreciseBN.
DRIVER = """
import os, signal, sys
import detection.evaluate, detection.state, detection.train
from peerlearn.cli import main
def die(*arguments, **named):
    os.kill(os.getpid(), getattr(signal, os.environ.get("BY", "SIGKILL")))
if os.environ["DIES_IN"] == "test":
    detection.evaluate.measure = die
elif os.environ["DIES_IN"] == "validation":
    detection.train.measure = die
else:
    measure = detection.state.measure_batch_norm
    detection.state.measure_batch_norm = lambda module, passes, ranks: measure(module, (*passes, die), ranks)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def undisturbed(once, place):
    """``undisturbed(kind)``: the results of a training that nothing stopped."""

    def make(kind: str) -> Path:
        def train(results: Path) -> None:
            found = finish(words(place, results, *KINDS[kind]))
            (results / "printed.txt").write_text(found)

        return once(f"detect-{kind}", train)

    return make


def finish(given: list[str], driver: Path | None = None, **more: str) -> str:
    done = run_process(
        command(*given, driver=driver),
        env=environment(**more),
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def start_held(given: list[str], step: int, folder: Path) -> Process:
    """Held at the start of a step, which it never gets past."""
    process = Process(
        command(*given),
        env=environment(STEP_SECONDS="0", HOLD_STEP=str(step), HOLD_UNTIL=str(folder / "go")),
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    wait_for((folder / "go.held").exists, [process])
    return process


def detectors(results: Path) -> dict[str, bytes]:
    """Every file of the detectors that a training has left."""
    run = training_of(results)
    files = [path for path in run.glob("detector*/*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def assert_same(results: Path, expected: Path) -> None:
    assert detectors(results) == detectors(expected)
    assert scores(results) == scores(expected)
    assert [without_clocks(row) for row in rows(training_of(results))] == [
        without_clocks(row) for row in rows(training_of(expected))
    ]
    assert not RunDirectory(training_of(results)).checkpoints.exists()


def test_an_undisturbed_one_leaves_its_detectors_and_no_saves(undisturbed):
    results = undisturbed("d2_fpn")
    run = training_of(results)
    assert RunDirectory(run).done
    assert not RunDirectory(run).checkpoints.exists()
    assert {"detector/model.safetensors", "detector-best/model.safetensors"} <= set(
        detectors(results)
    )
    assert [row["step"] for row in rows(run)] == [3, STEPS]
    stands = standing(run)
    assert (stands.step, stands.total_steps, stands.seconds_left) == (STEPS, STEPS, 0.0)
    last = rows(run)[-1]
    parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    assert last["loss"] == pytest.approx(sum(last[name] for name in parts))
    assert list((run / "tb").iterdir())
    assert json.loads((run / "env.json").read_text())["verb"] == "detect"


@pytest.mark.parametrize("kind", KINDS)
def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(
    kind, place, undisturbed, tmp_path
):
    results = tmp_path / "results"
    given = words(place, results, *KINDS[kind], "--save_every", "3")
    process = start_held(given, 5, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not scores(results)
    finish(given)
    assert [event["step"] for event in events(training_of(results), "started")] == [0, 3]
    assert_same(results, undisturbed(kind))


def test_told_to_stop_it_saves_and_resume_goes_on(place, undisturbed, tmp_path, capsys):
    results = tmp_path / "results"
    process = start_held(words(place, results, *KINDS["d2_fpn"]), 4, tmp_path)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=120)
    run = training_of(results)
    assert process.returncode == 75, output
    assert output.count(f"saved in {run}: the same command continues") == 1
    assert "Traceback" not in output
    (tmp_path / "elsewhere").mkdir()
    done = run_process(
        command("resume", str(run)),
        env=environment(),
        cwd=tmp_path / "elsewhere",
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert [event["step"] for event in events(run, "started")] == [0, 5]
    assert_same(results, undisturbed("d2_fpn"))
    assert main(["resume", str(run)]) == 0
    assert "is done already" in capsys.readouterr().out


@pytest.mark.parametrize("dies_in", ["test", "precise_bn"])
def test_killed_after_its_last_save_it_ends_alike(dies_in, place, undisturbed, tmp_path):
    results = tmp_path / "results"
    given = words(place, results, *KINDS["torchvision_fpn"])
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    process = Process(
        command(*given, driver=driver), env=environment(DIES_IN=dies_in), stdout=PIPE, stderr=STDOUT
    )
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not scores(results)
    run = RunDirectory(training_of(results))
    assert run.done == (dies_in == "test")
    assert run.checkpoints.exists()
    printed = finish(given)
    assert ("is done already" in printed) == (dies_in == "test")
    assert_same(results, undisturbed("torchvision_fpn"))


def test_killed_in_a_validation_it_goes_on_from_that_step(place, undisturbed, tmp_path):
    results = tmp_path / "results"
    given = words(place, results, *KINDS["d2_fpn"], "--save_every", "3")
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    process = Process(
        command(*given, driver=driver),
        env=environment(DIES_IN="validation"),
        stdout=PIPE,
        stderr=STDOUT,
    )
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    run = training_of(results)
    assert [row["step"] for row in rows(run)] == []
    finish(given)
    assert [event["step"] for event in events(run, "started")] == [0, 3]
    assert_same(results, undisturbed("d2_fpn"))


@pytest.mark.parametrize("times", [1, 2])
def test_steps_with_nan_send_it_back_to_its_save_once(
    times, place, undisturbed, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results"
    plain, seen = Detection.losses, []

    def poisoned(training, part, step, number):
        losses = plain(training, part, step, number)
        if torch.is_grad_enabled():
            seen.append(step)
            if step in (2, 3, 4) and seen.count(step) <= times:
                losses["loss_box_reg"] = losses["loss_box_reg"] * float("nan")
        return losses

    monkeypatch.setattr(Detection, "losses", poisoned)
    code = main(words(place, results, *KINDS["d2_fpn"], "--data.workers", "1"))
    run = training_of(results)
    skipped = [(event["step"], event["reason"]) for event in events(run, "step_skipped")]
    assert skipped == [(s, "rank 0: not finite: loss_box_reg") for s in (2, 3, 4)] * times
    assert [event["step"] for event in events(run, "rolled_back")] == [2]
    assert code == times - 1
    if times == 1:
        assert_same(results, undisturbed("d2_fpn"))
    else:
        assert "again after going back to a save: lower base_lr" in capsys.readouterr().err
        assert not (run / "detector").exists()


def test_a_full_disk_costs_a_best_detector_and_asks_for_room_for_the_last(
    place, tmp_path, monkeypatch, capsys
):
    results, full = tmp_path / "results", [True]
    plain = Path.write_bytes

    def write(path, content):
        # Of each detector the first file still has room.
        if full and path.parent.name.startswith(".detector") and path.name == "config.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return plain(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    given = words(place, results, *KINDS["d2_fpn"])
    assert main(given) == 1
    run = training_of(results)
    error = capsys.readouterr().err
    assert (
        f"{run / 'detector'} could not be written (No space left on device): make room, then the same command"
        in " ".join(error.split())
    )
    assert "Traceback" not in error
    missed = [(event["step"], event["reason"]) for event in events(run, "detector_missed")]
    assert missed == [(3, "No space left on device"), (6, "No space left on device")]
    assert not list(run.glob("*detector*"))
    full.clear()
    assert main(given) == 0
    assert [event["step"] for event in events(run, "started")] == [0, 6]
    assert (run / "detector/model.safetensors").exists()


def test_one_that_is_done_is_only_scored_again_and_says_so(undisturbed, tmp_path, place):
    before = undisturbed("d2_fpn")
    results = Path(shutil.copytree(before, tmp_path / "results"))
    for file in results.glob("detect-*.json"):
        file.unlink()
    printed = finish(words(place, results, *KINDS["d2_fpn"]))
    run = training_of(results)
    assert f"{run} is done already: what it has learned is scored" in printed
    assert len(events(run, "started")) == 1
    assert_same(results, before)


def test_told_to_stop_while_it_tests_it_goes_on_with_the_test(place, undisturbed, tmp_path, capsys):
    results = tmp_path / "results"
    given = words(place, results, *KINDS["torchvision_fpn"])
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    # At first after the training, then where the training is done already.
    for _ in range(2):
        stopped = run_process(
            command(*given, driver=driver),
            env=environment(DIES_IN="test", BY="SIGTERM"),
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
        )
        run = training_of(results)
        assert stopped.returncode == 75, stopped.stdout
        assert stopped.stdout.count(f"saved in {run}: the same command continues") == 1
        assert "Traceback" not in stopped.stdout
        assert RunDirectory(run).done
        assert not scores(results)
    assert main(["resume", str(run)]) == 0
    assert "what it has learned is scored" in capsys.readouterr().out
    assert len(events(run, "started")) == 1
    assert_same(results, undisturbed("torchvision_fpn"))


def test_a_validation_on_the_way_changes_nothing(place, undisturbed, tmp_path):
    results = tmp_path / "results"
    finish(words(place, results))
    weights = "detector/model.safetensors"
    assert detectors(results)[weights] == detectors(undisturbed("d2_fpn"))[weights]


def test_processes_that_read_images_change_nothing(place, undisturbed, tmp_path):
    results = tmp_path / "results"
    finish(words(place, results, *KINDS["d2_fpn"], "--data.workers", "2"))
    assert_same(results, undisturbed("d2_fpn"))


def test_the_same_data_in_cocos_format_is_the_same_training(place, undisturbed, tmp_path):
    """With objects that are hard for VOC as crowds, which are trained on where that is asked for."""
    results = tmp_path / "results"
    coco = (
        *("--data.name", "coco", "--data.root", str(place / "VOCdevkit/VOC2007/JPEGImages")),
        *("--data.train", str(place / "train.json"), "--data.test", str(place / "test.json")),
        *("--data.validation", str(place / "val.json"), "--data.classes", "null"),
        *("--data.difficult", "keep", "--rule", "voc07"),
    )
    finish(words(place, results, *KINDS["d2_fpn"], *coco))
    ours, theirs = detectors(results), detectors(undisturbed("d2_fpn"))
    for name in ("detector/model.safetensors", "detector-best/model.safetensors"):
        assert ours[name] == theirs[name]
    (score,), (expected,) = scores(results).values(), scores(undisturbed("d2_fpn")).values()
    assert score["metrics"] == expected["metrics"]
    assert score["protocol"]["leakage"] == {"same": 0, "near": 0, "undecodable": 0}


def test_a_rate_that_makes_it_diverge_ends_in_one_line(place, tmp_path, capsys):
    results = tmp_path / "results"
    assert main(words(place, results, "--base_lr", "1e30", "--warmup_iterations", "0")) == 1
    error = capsys.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("peerlearn:"))
    assert "lower base_lr" in line
    assert "Traceback" not in error
    assert not scores(results)
    run = training_of(results)
    assert not (run / "detector").exists()
    # The images of the batches that were skipped.
    assert all(len(event["images"]) == 2 for event in events(run, "step_skipped"))
