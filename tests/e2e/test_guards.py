"""What training does when numbers, images or the disk go wrong."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain.train as training_loop
from peerlearn.cli import main
from peerlearn.compute.attempt import Attempt
from peerlearn.runs.checkpoint import saved_steps
from studies.evaluations import Evaluation, orders
from tests.e2e.runs import (
    SMALL,
    STEPS,
    assert_same_run,
    command,
    environment,
    events,
    newest_tensors,
    pretrain,
    rows,
    small_disk,
    standing,
    wait_for,
    without_clocks,
)
from tests.warm import Process

QUIET = ["--monitor.every_epochs", "0"]


@pytest.fixture
def poisoned_steps(monkeypatch):
    """Calls of the loop, counted from 0 over rollbacks too, whose first view is NaN."""
    bad: set[int] = set()
    plain, calls = training_loop._micro_batches, iter(range(10**6))

    def micro_batches(batch, parts):
        poison = next(calls) in bad
        for (first, second), labels in plain(batch, parts):
            yield (first * float("nan") if poison else first, second), labels

    monkeypatch.setattr(training_loop, "_micro_batches", micro_batches)
    return bad


def all_finite(run: Path) -> bool:
    groups = newest_tensors(run)
    return all(
        bool(tensor.isfinite().all())
        for group, tensors in groups.items()
        if group != "rng"
        for tensor in tensors.values()
    )


def test_a_step_with_nan_is_as_if_its_batch_had_not_been(poisoned_steps, tmp_path):
    """Weights, queue, statistics and optimiser after the skipped last step are those before it."""
    words = [*QUIET, "--checkpoint.every_steps", "1"]
    poisoned_steps.add(11)
    run = tmp_path / "n"
    assert pretrain(run, *words) == 0
    last, before = (
        {group: tensors for group, tensors in load(folder).items() if group != "rng"}
        for folder in saved_steps(run / "checkpoints")[:2]
    )
    changed = {
        group
        for group, tensors in last.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, before[group][name])
    }
    # The key networks moved towards the query networks once more, before they saw the batch.
    assert changed == {"key_networks"}
    momentum = {n: t for n, t in last["key_networks"].items() if "running" not in n}
    for name, tensor in momentum.items():
        if tensor.is_floating_point():
            old, query = before["key_networks"][name], before["networks"][name]
            torch.testing.assert_close(tensor, 0.999 * old + 0.001 * query)
    assert rows(run)[-1]["skipped_steps"] == 1
    (event,) = events(run, "step_skipped")
    assert event["step"] == 11
    assert "scl_hard of network 0 is not finite: query[0] holds NaN or Inf" in event["reason"]
    assert len(event["images"]) == 32


def load(folder: Path):
    from peerlearn.runs.checkpoint import load_checkpoint

    return load_checkpoint(folder)[0]


def test_a_fault_that_passes_is_healed_by_going_back_to_a_save(poisoned_steps, tmp_path):
    """Steps 7 to 9 are bad the first time only: back to the save of step 6, and then as a clean run."""
    assert pretrain(tmp_path / "clean", *QUIET, "--checkpoint.every_steps", "3") == 0
    clean_calls = STEPS
    poisoned_steps.update(clean_calls + step for step in (7, 8, 9))
    run = tmp_path / "healed"
    assert pretrain(run, *QUIET, "--checkpoint.every_steps", "3") == 0
    (event,) = events(run, "rolled_back")
    assert (event["step"], event["before_step"]) == (6, 7)
    assert_same_run(run, tmp_path / "clean")


def test_a_fault_that_returns_stops_the_run_and_keeps_the_last_good_save(
    poisoned_steps, tmp_path, capsys
):
    poisoned_steps.update(range(7, 10**4))
    run = tmp_path / "s"
    assert pretrain(run, *QUIET, "--checkpoint.every_steps", "3") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 steps in a row gave NaN or Inf, the last at step 8" in error
    assert "again after going back to a save: lower base_lr" in error
    assert (run / "FAILED").read_text().startswith("3 steps in a row gave NaN or Inf")
    assert not (run / "DONE").exists()
    assert all_finite(run)


def test_divergence_by_a_learning_rate_ends_in_one_line_and_saves_nothing_poisoned(
    tmp_path, capsys
):
    run = tmp_path / "d"
    assert pretrain(run, *QUIET, "--base_lr", "1e30", "--checkpoint.every_steps", "1") == 1
    error = capsys.readouterr().err
    assert "lower base_lr" in error
    assert "Traceback" not in error
    for folder in saved_steps(run / "checkpoints"):
        for name in ("networks", "key_networks"):
            assert all(bool(t.isfinite().all()) for t in load(folder)[name].values()), folder


def test_a_collapse_is_warned_of(tmp_path, capsys, monkeypatch):
    from pretrain import state

    build_networks = state.build_networks

    def with_a_dead_head(*arguments, **named):
        cohort = build_networks(*arguments, **named)
        with torch.no_grad():
            cohort.heads[1].weight.zero_()
        cohort.heads[1].weight.requires_grad_(False)
        return cohort

    monkeypatch.setattr(state, "build_networks", with_a_dead_head)
    run = tmp_path / "c"
    assert pretrain(run, "--epochs", "1") == 0
    assert {e["network"] for e in events(run, "collapse")} == {"net/1"}
    said = "net/1: its embeddings (output of the head) no longer tell images apart at step 6"
    assert said in " ".join(capsys.readouterr().err.split())


def image_folder(root: Path, bad: dict[int, bytes], images: int = 100) -> Path:
    """Two classes of noise in a train split, one test image each; ``bad`` replaces files by their bytes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 4)):
        for i in range(count):
            file = root / split / f"class{i % 2}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            if split == "train" and i in bad:
                file.write_bytes(bad[i])
    return root


def folder_words(root: Path, *more: str) -> list[str]:
    small = [word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) for word in pair]
    words = dict(zip(small[::2], small[1::2], strict=True))
    words |= {"--data.name": "folder", "--data.root": str(root), "--data.limit": "null"}
    words |= {"--batch_size": "20", "--data.workers": "1"}
    return [word for pair in words.items() for word in pair] + list(more)


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_unreadable_images_are_replaced_counted_and_listed(tmp_path, backend):
    root = image_folder(tmp_path / "data", {3: b"", 8: b"no image"})
    run = tmp_path / "r"
    words = ["--data.backend", backend, "--data.max_unreadable_percent", "2"]
    assert main(["pretrain", *folder_words(root, *words), "--run", str(run)]) == 0
    listed = {Path(e["path"]).name: e["reason"] for e in events(run, "image_unreadable")}
    assert set(listed) == {"003.png", "008.png"}
    ends = [row for row in rows(run) if row["step"] in (5, 10)]
    assert [row["unreadable_images"] for row in ends] == [2, 2]
    assert ends[-1]["knn/train_images"] == 98
    assert ends[-1]["knn/test_images"] == 4


@pytest.mark.slow(8)
def test_a_resumed_run_replaces_the_same_images(tmp_path):
    root = image_folder(tmp_path / "data", {3: b"", 8: b"no image"})
    words = folder_words(root, "--data.backend", "folder", "--data.max_unreadable_percent", "2")
    assert main(["pretrain", *words, "--run", str(tmp_path / "a")]) == 0
    process = Process(
        command("pretrain", *words, "--run", str(tmp_path / "b"), "--checkpoint.every_steps", "1"),
        env=environment(STEP_SECONDS="0.2"),
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: (tmp_path / "b/checkpoints/step-00000003").exists(), [process])
    process.kill()
    process.wait()
    assert main(["resume", str(tmp_path / "b")]) == 0
    assert [without_clocks(row) for row in rows(tmp_path / "b")] == [
        without_clocks(row) for row in rows(tmp_path / "a")
    ]
    assert len(events(tmp_path / "b", "image_unreadable")) == 2


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_too_many_unreadable_images_stop_the_run(tmp_path, backend, capsys):
    root = image_folder(tmp_path / "data", dict.fromkeys(range(5), b"no image"))
    words = [*folder_words(root, "--data.backend", backend), *QUIET, "--run", str(tmp_path / "r")]
    assert main(["pretrain", *words]) == 1
    error = capsys.readouterr().err
    assert "of 100 images" in error
    assert "cannot be decoded" in error
    assert "raise data.max_unreadable_percent (1)" in error
    assert error.count("\n") == 1


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path, mib=12) as disk:
        yield disk


def test_without_room_for_two_saves_a_run_does_not_start(disk, capsys):
    (disk / "filler").write_bytes(bytes(8 * 2**20))
    assert pretrain(disk / "r") == 1
    error = capsys.readouterr().err
    assert "no space: 2 x 2.6 MiB are needed for saves, 4.0 MiB are free" in error
    assert error.count("\n") == 1


def fill(disk: Path, leaving: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(bytes(max(shutil.disk_usage(disk).free - leaving, 0)))
    return filler


def test_a_disk_that_fills_up_costs_saves_but_not_the_run(disk, monkeypatch, capsys):
    """Full from step 4 to step 7, then emptied: two saves are missed, the older one stands, every row is there."""
    run = disk / "r"
    begin_step = Attempt.begin_step

    def fill_and_begin(attempt):
        training = attempt.training
        if training.step == 4:
            fill(disk, leaving=0)
        if training.step == 8:
            (disk / "filler").unlink()
            saves = [path.name for path in saved_steps(run / "checkpoints")]
            assert saves == ["step-00000004", "step-00000002"]
            assert not list((run / "checkpoints").glob(".tmp*"))
        begin_step(attempt)

    monkeypatch.setattr(Attempt, "begin_step", fill_and_begin)
    words = ["--checkpoint.every_steps", "2", "--checkpoint.export_every_epochs", "1"]
    assert pretrain(run, *QUIET, *words) == 0
    missed = events(run, "save_missed")
    assert [e["step"] for e in missed] == [6, 8]
    assert {e["reason"] for e in missed} == {"No space left on device"}
    (export,) = events(run, "export_missed")
    assert (export["step"], export["reason"]) == (6, "No space left on device")
    assert [event["step"] for event in events(run, "exported")] == [STEPS]
    # A study says so, and takes no other in its place.
    line = Evaluation(line="knn", config={})
    found, missing = orders(run, [line], "all", live=False)
    assert [order.step for order in found] == [STEPS]
    assert missing == {6: "export/step-00000006 was never written (No space left on device)"}
    assert [path.name for path in (run / "export").glob("step-*")] == ["step-00000012"]
    error = capsys.readouterr().err
    assert "step 6 could not be saved (No space left on device): training goes on" in error
    assert "Traceback" not in error
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert (standing(run).step, standing(run).seconds_left) == (STEPS, 0.0)
    assert all_finite(run)


def test_without_room_for_its_last_export_a_run_is_not_done_and_resume_writes_it(
    disk, monkeypatch, capsys
):
    run = disk / "r"
    begin_step = Attempt.begin_step

    def fill_and_begin(attempt):
        if attempt.training.step == STEPS - 1:
            fill(disk, leaving=0)
        begin_step(attempt)

    monkeypatch.setattr(Attempt, "begin_step", fill_and_begin)
    assert pretrain(run, *QUIET, "--checkpoint.every_steps", "2") == 1
    last = f"{run}/export/step-{STEPS:08d}"
    expected = f"{last} could not be written (No space left on device): make room, then "
    assert expected + f"`peerlearn resume {run}` writes it" in capsys.readouterr().err
    assert not (run / "DONE").exists()
    assert not Path(last).exists()
    assert main(["knn", "--checkpoint", str(run)]) == 1
    assert f"{run}: nothing has been exported yet" in capsys.readouterr().err
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert main(["resume", str(run)]) == 0
    assert (run / "export/latest").read_text() == f"step-{STEPS:08d}\n"
    assert [event["step"] for event in events(run, "exported")] == [STEPS]
    assert (run / "DONE").exists()


def test_a_disk_that_stays_full_ends_the_run_after_three_misses(disk, monkeypatch, capsys):
    run = disk / "r"
    begin_step = Attempt.begin_step

    def fill_and_begin(attempt):
        training = attempt.training
        if training.step == 4:
            fill(disk, leaving=0)
        begin_step(attempt)

    monkeypatch.setattr(Attempt, "begin_step", fill_and_begin)
    assert pretrain(run, *QUIET, "--checkpoint.every_steps", "2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 10 could not be saved (No space left on device), miss number 3 in a row" in error
    assert f"make room, then `peerlearn resume {run}`" in error
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert main(["resume", str(run)]) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
