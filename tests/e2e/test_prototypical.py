"""Whole few-shot trainings: chosen by validation, killed and resumed, shared by processes, evaluated."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import timm
import torch

from peerlearn.cli import main
from pretrain import state
from tests.e2e.runs import (
    assert_same_run,
    assert_same_to_rounding,
    command,
    ends,
    environment,
    events,
    exported_files,
    launch,
    newest_tensors,
    rows,
    wait_for,
)
from tests.e2e.several_processes import DOUBLE
from tests.warm import Process
from tests.warm import run as run_process

DATA = [
    *("--data.name", "fashion_mnist_classes", "--data.limit", "300", "--data.image_size", "16"),
    *("--data.augmentation", "none", "--cohort.backbones", "conv4", "--device", "cpu"),
    *("--cohort.embedding_dim", "16", "--temperature", "0.1", "--monitor.log_every_steps", "1"),
]
EPISODES = [
    *("--prototypical.ways", "3", "--prototypical.queries", "5"),
    *("--prototypical.steps_per_epoch", "4", "--prototypical.validation_ways", "3"),
    *("--prototypical.validation_queries", "5", "--prototypical.validation_episodes", "20"),
]
WORDS = [
    *("pretrain", "--method", "prototypical", *DATA, *EPISODES, "--epochs", "4"),
    *("--base_lr", "0.003", "--optimizer.name", "adamw", "--optimizer.weight_decay", "0"),
    *("--checkpoint.export_every_epochs", "3"),
]
STEPS = 16
SCORES = ("net/0/episode_top1", "net/1/episode_top1")
pytestmark = pytest.mark.slow(15)


@pytest.fixture(scope="session")
def undisturbed(once) -> Path:
    def make(run: Path) -> None:
        done = run_process(
            command(*WORDS, "--run", str(run)), env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (run / "printed.txt").write_text(done.stdout)

    return once("prototypical", make)


def measured(run: Path) -> dict[int, float]:
    """By step: what an epoch is chosen by."""
    scored = [row for row in rows(run) if SCORES[0] in row and row["step"]]
    return {row["step"]: sum(row[name] for name in SCORES) / 2 for row in scored}


def best_of(run: Path, until: int = STEPS) -> int:
    scores = {step: score for step, score in measured(run).items() if step <= until}
    return max(scores, key=lambda step: (scores[step], -step))


def test_the_epoch_that_validation_chose_stands_beside_the_latest(undisturbed):
    first, *logged = rows(undisturbed)
    assert first["step"] == 0
    assert set(measured(undisturbed)) == {4, 8, 12, 16}
    for row in logged:
        loss = sum(row[f"net/{m}/prototypical"] for m in (0, 1))
        for m in (0, 1):
            loss += 0.5 * (row[f"net/{m}/scl_hard"] + row[f"net/{m}/scl_soft"])
            loss += 0.1 * (row[f"net/{m}/icl_hard"] + row[f"net/{m}/icl_soft"])
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    best = best_of(undisturbed)
    folder = undisturbed / "export"
    assert (folder / "latest").read_text() == f"step-{STEPS:08d}\n"
    assert (folder / "best").read_text() == f"step-{best:08d}\n"
    # Those of the third and the last epoch, and what was best then.
    steps = {12, STEPS, best, best_of(undisturbed, until=12)}
    assert {path.name for path in folder.glob("step-*")} == {f"step-{s:08d}" for s in steps}
    saved = newest_tensors(undisturbed)
    assert saved["best"]["step"] == best
    assert saved["best"]["score"] == pytest.approx(measured(undisturbed)[best])
    for m in (0, 1):
        network = timm.create_model(
            f"local-dir:{folder}/step-{best:08d}/net-{m}", pretrained=True, num_classes=0
        )
        weight = saved["best_networks"][f"backbones.{m}.layer1.0.weight"]
        assert torch.equal(network.state_dict()["layer1.0.weight"], weight)
    printed = (undisturbed / "printed.txt").read_text()
    assert f"export/best, epoch {best // 4}" in " ".join(printed.split())
    assert "3-way 1-shot, 5 queries, 20 episodes" in " ".join(printed.split())


def test_kill_9_at_any_step_then_resume_is_the_same_to_the_byte(undisturbed, tmp_path):
    run = tmp_path / "r"
    words = [*WORDS, "--run", str(run), "--checkpoint.every_steps", "1"]
    process = Process(
        command(*words), env=environment(STEP_SECONDS="0.1"), stdout=subprocess.DEVNULL
    )
    wait_for(lambda: (run / "checkpoints/step-00000009/manifest.json").exists(), [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["resume", str(run)]) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("lost", ["latest", "best"])
def test_exports_that_are_lost_come_back(lost, done, undisturbed, tmp_path, capsys):
    """Nothing else is scored in their place meanwhile."""
    run = tmp_path / "r"
    shutil.copytree(undisturbed, run)
    expected = exported_files(run)
    named = (run / "export" / lost).read_text().strip()
    if done:
        shutil.rmtree(run / "export" / named)
        (run / "export" / lost).unlink()
    else:
        shutil.rmtree(run / "export" / named / "net-1")
        (run / "DONE").unlink()
    if lost == "best":
        capsys.readouterr()
        assert main(["fewshot", "--checkpoint", str(run)]) == 1
        error = capsys.readouterr().err
        folder = run / "export" / named
        what = f"{folder} is gone, the best" if done else f"{folder / 'net-1'} is missing, one of 2"
        assert error.startswith(f"peerlearn: {what}")
        assert error.count("\n") == 1
    assert main(["resume", str(run)]) == 0
    assert exported_files(run) == expected
    assert (run / "DONE").exists()


def test_a_disk_that_does_not_take_the_best_network_costs_the_latest_nothing(
    undisturbed, tmp_path, monkeypatch
):
    run, write_best = tmp_path / "r", state.write_best

    def full_in_the_third_epoch(folder):
        if not (run / "export" / f"step-{STEPS:08d}").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write_best(folder)

    monkeypatch.setattr(state, "write_best", full_in_the_third_epoch)
    assert main([*WORDS, "--run", str(run)]) == 0
    missed = [(event["step"], event["reason"]) for event in events(run, "export_missed")]
    assert missed == [(12, "No space left on device")]
    assert (run / "export/step-00000012/net-1/model.safetensors").exists()
    best = best_of(run)
    assert [(e["step"], e.get("best")) for e in events(run, "exported")] == [
        *((12, None), (STEPS, None), (best, True))
    ]
    assert exported_files(run) == exported_files(undisturbed)


def fewshot(run: Path, results: Path, *others: str) -> list[dict]:
    words = ["fewshot", "--checkpoint", str(run), *others, "--results", str(results)]
    small = ("--ways", "3", "--shots", "1", "--episodes", "5", "--cache", "false")
    assert main([*words, *small, "--device", "cpu"]) == 0
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def test_evaluators_take_the_best_and_say_so(undisturbed, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(undisturbed, run)
    best = best_of(run)
    found = fewshot(run, tmp_path / "a")
    assert f"{run}: networks of step {best}, which validation chose" in capsys.readouterr().out
    assert {result["step"] for result in found} == {best}
    assert {result["network"] for result in found} == {"0", "1", "ensemble"}
    assert {result["protocol"]["split"] for result in found} == {"test"}
    latest = run / "export" / f"step-{STEPS:08d}"
    assert {result["step"] for result in fewshot(latest, tmp_path / "b")} == {STEPS}
    assert "chose" not in capsys.readouterr().out
    # The run's events tell it too.
    (run / "export/best").write_text("nonsense")
    assert {result["step"] for result in fewshot(run, tmp_path / "c")} == {best}


def test_steps_that_validation_chose_may_differ_between_the_runs_of_a_mean(
    undisturbed, tmp_path, capsys, caplog
):
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        shutil.copytree(undisturbed, run)
    step = next(s for s in (12, STEPS) if s != best_of(undisturbed))
    (other / "export/best").write_text(f"step-{step:08d}\n")
    fewshot(one, tmp_path / "results", str(other))
    assert "differ" not in caplog.text + capsys.readouterr().err
    for run in (one, other):
        # As if there had been no validation.
        (run / "export/best").unlink()
        lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
        (run / "events.jsonl").write_text("".join(x for x in lines if '"best"' not in x))
    (one / "export/latest").write_text("step-00000012\n")
    fewshot(one, tmp_path / "results", str(other))
    assert f"step (12, {STEPS})" in caplog.text + capsys.readouterr().err


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, ("--cohort.sync_batch_norm", "true")),
        (3, ("--cohort.sync_batch_norm", "true", "--prototypical.distance", "cosine")),
        (2, ("--cohort.batch_norm_splits", "2", "--prototypical.shots", "3")),
        (
            2,
            (
                *("--prototypical.batches", "images_per_class", "--batch_size", "24"),
                *("--cohort.sync_batch_norm", "true", "--epochs", "1"),
            ),
        ),
    ],
)
def test_an_episode_that_is_shared_equals_one_process(processes, more, tmp_path):
    """18 or 24 images, of which the first rank may have all the support: to 1e-9 in float64."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    # Adam would magnify the rounding of gradients that are zero, as those of biases before batch norm are.
    words = [*WORDS, "--optimizer.name", "sgd", "--base_lr", "0.05", "--epochs", "2", *more]
    done = run_process(
        command(*words, "--run", str(alone), driver=DOUBLE), env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    for code, output in ends(launch(processes, *words, "--run", str(together), driver=DOUBLE)):
        assert code == 0, output
    assert len(rows(alone)) > 4
    assert_same_to_rounding(together, alone)


def test_a_dry_run_counts_episodes(capsys):
    assert main([*WORDS, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 4 in each of 4 epochs, 16 in all, of 18 images" in printed
    assert "images: 300 of fashion_mnist_classes train, views of 16 pixels" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prototypical.ways", "5"], "episodes of 5 ways need as many classes, and there are 4"),
        (["--prototypical.queries", "99"], "takes 1 shots and 99 queries of a class, and class"),
        (
            ["--prototypical.validation_ways", "4"],
            "episodes of 4 ways need as many classes, and there are 3",
        ),
        (
            ["--data.name", "digits"],
            "and digits is not split so: choose data.name from fashion_mnist_classes",
        ),
        (
            ["--cohort.batch_norm_splits", "4"],
            "= 18 images of an episode must divide into accumulation_steps x cohort.batch_norm_splits = 4",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_one_line(more, message, tmp_path, capsys):
    run = tmp_path / "r"
    assert main([*WORDS, *more, "--run", str(run)]) in (1, 2)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not run.exists()
    assert main([*WORDS, *more, "--dry_run"]) in (1, 2)
    assert message in capsys.readouterr().err


def test_episodes_that_processes_cannot_share_are_refused(tmp_path):
    run = tmp_path / "r"
    found = ends(launch(4, *WORDS, "--run", str(run)))
    assert {code for code, _ in found} == {1}
    assert "= 18 images of an episode must divide into 4 processes" in found[0][1]
    assert not run.exists()
