"""Detectors of several processes (gloo) against one, and against each other."""

import signal
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch
from safetensors.torch import load_file

from peerlearn.cli import main
from tests.e2e.detectors import scores, training_of, words
from tests.e2e.runs import (
    command,
    ends,
    environment,
    events,
    launch,
    rows,
    wait_for,
    without_clocks,
)
from tests.warm import run as run_process

pytestmark = pytest.mark.ddp
# Six images of one size: what is padded is the same, however they are dealt to processes.
EVEN = (
    *("--batch_size", "6", "--base_batch_size", "6", "--model.short_sides", "[64]"),
    *("--base_lr", "0.002"),
)
# Keeps what every rank has: its detector after PreciseBN, and the detections of all images.
KEPT = """
import os, sys, torch
import detection.evaluate, detection.state
from peerlearn.cli import main
place = os.path.join(os.environ["KEPT"], "rank-" + os.environ.get("RANK", "0"))
measure_norms, measure = detection.state.Detection.measure_norms, detection.evaluate.measure
def measure_norms_and_keep(training):
    measure_norms(training)
    torch.save(training.detector.state_dict(), place + "-detector.pt")
def measure_and_keep(*arguments, **named):
    measured = measure(*arguments, **named)
    torch.save(measured.detections, place + "-found.pt")
    return measured
detection.state.Detection.measure_norms = measure_norms_and_keep
detection.evaluate.measure = measure_and_keep
sys.exit(main(sys.argv[1:]))
"""

NAN_ON_RANK_1 = """
import os, sys
import detection.state
from peerlearn.cli import main
plain = detection.state.Detection.losses
def losses(training, part, step, number):
    found = plain(training, part, step, number)
    if step == 5 and os.environ["RANK"] == "1":
        found["loss_box_reg"] = found["loss_box_reg"] * float("nan")
    return found
detection.state.Detection.losses = losses
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def driver(tmp_path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(KEPT)
    return path


def finish(processes: int, driver: Path, kept: Path, given: list[str]) -> None:
    kept.mkdir(exist_ok=True)
    if processes == 1:
        done = run_process(
            command(*given, driver=driver),
            env=environment(KEPT=str(kept)),
            stdout=PIPE,
            stderr=STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return
    for code, output in ends(launch(processes, *given, driver=driver, KEPT=str(kept))):
        assert code == 0, output


def kept(folder: Path, what: str) -> list:
    return [torch.load(file) for file in sorted(folder.glob(f"rank-*-{what}.pt"))]


def assert_alike(values: list) -> None:
    """All ranks have the same, bit for bit."""
    first, *others = values
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def weights(results: Path) -> dict[str, torch.Tensor]:
    return load_file(training_of(results) / "detector/model.safetensors")


@pytest.fixture(scope="session")
def alone(once, place):
    def train(folder: Path) -> None:
        folder.mkdir()
        driver = folder / "driver.py"
        driver.write_text(KEPT)
        finish(1, driver, folder / "kept", even_words(place, folder / "results"))

    return once("detect-alone", train)


def even_words(place: Path, results: Path) -> list[str]:
    return words(place, results, "--data.root", str(place / "even/VOCdevkit"), *EVEN)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_share_of_the_batch_each_equals_one_process(processes, place, alone, driver, tmp_path):
    """Losses, weights and the statistics of PreciseBN, up to the rounding of six steps in float32."""
    results, folder = tmp_path / "results", tmp_path / "kept"
    finish(processes, driver, folder, even_words(place, results))
    detectors = kept(folder, "detector")
    assert len(detectors) == processes
    assert_alike(detectors)
    assert_alike(kept(folder, "found"))
    ours, theirs = rows(training_of(results))[-1], rows(training_of(alone / "results"))[-1]
    for name in ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    expected = weights(alone / "results")
    for name, tensor in weights(results).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=name)


def test_images_of_several_sizes_leave_all_ranks_alike(place, driver, tmp_path):
    """Each rank pads its three images to its own size."""
    results, folder = tmp_path / "results", tmp_path / "kept"
    uneven = (*EVEN[:4], "--data.validation", "val2007", "--validate_every", "3")
    finish(2, driver, folder, words(place, results, *uneven))
    detectors = kept(folder, "detector")
    assert len(detectors) == 2
    assert_alike(detectors)
    assert_alike(kept(folder, "found"))
    assert all(bool(tensor.isfinite().all()) for tensor in detectors[0].values())
    assert [row["step"] for row in rows(training_of(results)) if "ap" in row] == [3, 6]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_shared_test_finds_the_very_detections_of_one_process(
    processes, place, alone, driver, tmp_path
):
    detector = training_of(alone / "results") / "detector"
    given = [*even_words(place, tmp_path / "results"), "--checkpoint", str(detector)]
    finish(processes, driver, tmp_path / "kept", given)
    found = kept(tmp_path / "kept", "found")
    assert len(found) == processes
    (expected,) = kept(alone / "kept", "found")
    assert sum(len(each["scores"]) for each in expected) > 8
    assert_alike([expected, *found])
    (ours,), (theirs,) = scores(tmp_path / "results").values(), scores(alone / "results").values()
    assert ours["metrics"] == theirs["metrics"]


def test_a_rank_that_is_killed_and_the_same_command_end_alike(place, driver, tmp_path):
    undisturbed, results, folder = tmp_path / "whole", tmp_path / "results", tmp_path / "kept"
    more = ("--save_every", "2")
    finish(2, driver, folder, words(place, undisturbed, *more))
    go = tmp_path / "go"
    held = {"STEP_SECONDS": "0", "HOLD_STEP": "3", "HOLD_UNTIL": str(go)}
    ranks = launch(2, *words(place, results, *more), **held)
    wait_for(go.with_suffix(".held").exists, ranks)
    ranks[1].send_signal(signal.SIGKILL)
    go.touch()
    found = ends(ranks)
    assert [code for code, _ in found] == [1, -signal.SIGKILL]
    assert "Traceback" not in found[0][1]
    finish(2, driver, folder, words(place, results, *more))
    assert [event["step"] for event in events(training_of(results), "started")] == [0, 2]
    assert scores(results) == scores(undisturbed)
    ours, theirs = weights(results), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [without_clocks(row) for row in rows(training_of(results))] == [
        without_clocks(row) for row in rows(training_of(undisturbed))
    ]


def test_told_to_stop_all_ranks_save_together(place, tmp_path):
    results, go = tmp_path / "results", tmp_path / "go"
    held = {"STEP_SECONDS": "0", "HOLD_STEP": "3", "HOLD_UNTIL": str(go)}
    ranks = launch(2, *words(place, results), **held)
    wait_for(go.with_suffix(".held").exists, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    go.touch()
    found = ends(ranks)
    assert [code for code, _ in found] == [75, 75], found
    assert found[0][1].count("the same command continues") == 1
    assert "the same command continues" not in found[1][1]


def test_nan_on_one_rank_skips_the_step_on_all_and_names_its_images(place, driver, tmp_path):
    driver.write_text(NAN_ON_RANK_1)
    results = tmp_path / "results"
    for code, output in ends(launch(2, *even_words(place, results), driver=driver)):
        assert code == 0, output
    run = training_of(results)
    (skipped,) = events(run, "step_skipped")
    assert (skipped["step"], skipped["reason"]) == (5, "rank 1: not finite: loss_box_reg")
    assert len(skipped["images"]) == 3
    # The row of the last step, which was skipped, has no losses.
    assert [(row["step"], "lr" in row, "loss" in row) for row in rows(run)] == [(6, True, False)]


def test_parts_of_a_batch_one_after_another_equal_the_whole(place, tmp_path):
    """Where no batch norm takes the statistics of a part."""
    frozen = ("--model.norm", "frozen", "--base_lr", "0.005")
    for parts in ("1", "3"):
        given = even_words(place, tmp_path / parts)
        assert main([*given, *frozen, "--accumulation_steps", parts]) == 0
    whole, parted = (rows(training_of(tmp_path / parts))[-1] for parts in ("1", "3"))
    assert parted["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    expected = weights(tmp_path / "1")
    for name, tensor in weights(tmp_path / "3").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_half_precision_trains_and_its_boxes_are_whole(place, driver, tmp_path):
    results, folder = tmp_path / "results", tmp_path / "kept"
    finish(1, driver, folder, words(place, results, "--precision", "bf16", "--base_lr", "0.002"))
    for name, tensor in weights(results).items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        assert tensor.isfinite().all(), name
    (found,) = kept(folder, "found")
    corners = torch.cat([each["boxes"] for each in found])
    assert corners.dtype == torch.float32
    # bf16 has 8 bits: of corners between 32 and 64 no multiples of a quarter would be left.
    assert bool((corners * 4 % 1 != 0).any())
    (score,) = scores(results).values()
    assert score["protocol"]["precision"] == "bf16"
