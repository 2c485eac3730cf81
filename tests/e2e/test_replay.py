"""`peerlearn replay`: a step of a run, computed again bit for bit, and where its NaN arose."""

import itertools
import json
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import matplotlib.image
import pytest
import torch

import pretrain.train as training_loop
from peerlearn.cli import main
from peerlearn.runs.files import file_sha256, load_tensors
from pretrain import replay_files
from tests.e2e.runs import (
    SMALL,
    command,
    ends,
    environment,
    flip_last_byte,
    launch,
    pretrain,
    rows,
    wait_for,
)
from tests.warm import Process

QUIET = ["--monitor.every_epochs", "0"]
# Saves of steps 8 and 12 are left at the end of 12 steps.
SAVES = ["--checkpoint.every_steps", "4"]


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """The picture takes as long as all the rest, and one test is enough for it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(replay_files, "draw_sheet", lambda file, sheet: file.touch())


@contextmanager
def recording():
    """What every step of training computed: its terms and gradients, by its number from 1, and its views."""
    seen: dict[int, tuple] = {}
    plain = training_loop.train_step

    def train_step(attempt, batch):
        done = plain(attempt, batch)
        cohort = attempt.training.cohort
        gradients = {n: p.grad.clone() for n, p in cohort.named_parameters() if p.grad is not None}
        seen[attempt.training.step + 1] = (batch, done.terms, gradients)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "train_step", train_step)
        yield seen


def replay(run: Path, step: int, *more: str) -> dict:
    assert main(["replay", str(run), "--step", str(step), *more]) == 0
    return json.loads((run / f"replay/step-{step:08d}/step.json").read_text())


def tensors(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_tensors(run / f"replay/step-{step:08d}/{file}.safetensors")


def hashes(run: Path) -> dict[str, str]:
    """Of everything in the run but its replays."""
    files = (path for path in run.rglob("*") if path.is_file())
    return {
        str(path): file_sha256(path)
        for path in files
        if "replay" not in path.relative_to(run).parts
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in micro-batches whose views are query and key in turn, and what its steps computed."""
    run = tmp_path_factory.mktemp("replay") / "r"
    words = [*QUIET, *SAVES, "--symmetric", "true", "--accumulation_steps", "2"]
    words += ["--mutual_warmup_epochs", "1.9"]
    with recording() as seen:
        assert pretrain(run, *words) == 0
    return run, seen


def assert_as_recorded(run: Path, step: int, seen: dict) -> None:
    batch, terms, gradients = seen[step]
    views = tensors(run, step, "views")
    assert torch.equal(views["index"], batch.index)
    for number, view in enumerate(batch.views):
        assert torch.equal(views[f"view/{number}"], view)
    again = tensors(run, step, "terms")
    assert again.keys() == {name for name, term in terms[0]._asdict().items() if len(term)}
    for name, term in again.items():
        assert torch.equal(term[0], torch.stack([getattr(part, name) for part in terms])), name
    own = tensors(run, step, "gradients")
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(("step", "begins"), [(3, "the start"), (10, "checkpoints/step-00000008")])
def test_a_step_is_what_training_computed_and_the_run_is_not_touched(trained, step, begins):
    run, seen = trained
    before = hashes(run)
    told = replay(run, step)
    assert hashes(run) == before
    assert_as_recorded(run, step, seen)
    assert told["from"] == begins
    assert (told["step"], told["epoch"], told["batch"]) == (step, *divmod(step - 1, 6))
    assert (told["skipped"], told["first_not_finite"], told["anomaly"]) == (False, None, None)
    assert told["agrees"] == {"row": {"figures": 17, "differences": {}}, "save": None}
    row = rows(run)[step - 1]
    assert told["losses"]["loss"] == row["loss"]
    assert told["gradient_norms"]["net/1/gradient_norm"] == row["net/1/gradient_norm"]
    assert told["trained_on"] == told["replayed_on"]


def test_outputs_are_those_of_each_call_of_each_network(trained):
    """Two micro-batches, and of each the first view as query, then the second; the keys are of the other view."""
    run, _ = trained
    replay(run, 9)
    outputs = tensors(run, 9, "outputs")
    assert {name: tuple(t.shape) for name, t in outputs.items()} == {
        f"net/{network}/{figure}": (1, 4, 16, size)
        for network, figure, size in [
            *((m, "features", 64) for m in (0, 1)),
            *((m, "embedding", 16) for m in ("0", "1", "key-0", "key-1")),
        ]
    }
    # The keys of the last step are the newest of the queue: those of the second views, then those of the first.
    queued = load_tensors(run / "checkpoints/step-00000012/queue.safetensors")["keys"]
    assert queued.shape == (2, 80, 16)
    replay(run, 12)
    for m in (0, 1):
        keys = tensors(run, 12, "outputs")[f"net/key-{m}/embedding"][0]
        in_order = torch.cat([keys[0], keys[2], keys[1], keys[3]])
        rows_of = [int((queued[m] == key).all(-1).nonzero()) for key in in_order]
        assert rows_of == [(rows_of[0] + number) % 80 for number in range(64)]


def test_the_save_of_the_step_is_compared_and_the_picture_is_drawn(trained, capsys):
    run, _ = trained
    told = replay(run, 12, "--anomaly")
    assert told["agrees"]["save"]["differences"] == []
    assert told["agrees"]["save"]["tensors"] > 100
    assert told["anomaly"] == {
        "in_words": "all that the step has computed is finite",
        "origins": [],
    }
    folder = run / "replay/step-00000012"
    height, width, _ = matplotlib.image.imread(folder / "views.png").shape
    # Eight rows of an image and two views.
    assert height > 8 * 100
    assert width > 3 * 100
    said = capsys.readouterr().out
    assert "save of step 12: its " in said
    assert said.splitlines()[-1] == f"wrote {folder}"


def test_from_a_save_and_from_the_start_a_step_has_the_same_bytes(trained, tmp_path):
    run, _ = trained
    assert replay(run, 10)["from"] == "checkpoints/step-00000008"
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    for folder in (copied / "checkpoints").iterdir():
        if folder.is_dir():
            flip_last_byte(folder / "networks.safetensors")
    (copied / "replay/.tmp-step-00000010").mkdir()
    before = hashes(copied)
    # Saves that are damaged are passed over, and stay where they are.
    assert replay(copied, 10)["from"] == "the start"
    assert hashes(copied) == before
    for file in ("views", "outputs", "terms", "gradients"):
        name = f"replay/step-00000010/{file}.safetensors"
        assert (copied / name).read_bytes() == (run / name).read_bytes(), file
    assert not list((copied / "replay").glob(".tmp*"))


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "supervised", "--supervised.teaching", "dml"],
        ["--method", "simclr", "--data.limit", "100", "--cohort.frozen", "1"],
        ["--cohort.share_stages", "all", "--monitor.linear", "true"],
    ],
)
def test_other_methods(words, tmp_path):
    run = tmp_path / "r"
    with recording() as seen:
        assert pretrain(run, *QUIET, *words, "--epochs", "1") == 0
    told = replay(run, 3)
    assert_as_recorded(run, 3, seen)
    assert told["agrees"]["row"]["differences"] == {}
    outputs, views = tensors(run, 3, "outputs"), tensors(run, 3, "views")
    assert ("net/1/logits" in outputs) == ("supervised" in words)
    assert torch.equal(views["labels"], seen[3][0].labels)


def test_a_difference_is_told(trained, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(trained[0], run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[9])
    loss, row["loss"] = row["loss"], 1.5
    lines[9] = json.dumps(row)
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert replay(run, 10)["agrees"]["row"]["differences"] == {"loss": [1.5, loss]}
    assert (
        f"row of step 10: 1 of its 17 figures differ: loss 1.5 -> {loss}" in capsys.readouterr().out
    )


@pytest.mark.slow(10)
def test_nan_of_a_learning_rate_is_found_where_it_arose(tmp_path, capsys):
    """The second step's layers overflow: its first batch norm squares what a weight of 1e28 made."""
    run = tmp_path / "n"
    assert pretrain(run, *QUIET, "--base_lr", "1e30", "--checkpoint.every_steps", "1") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "step 1 is skipped: rank 0: scl_hard" in error
    assert f"(`peerlearn replay {run} --step 2 --anomaly` shows where)" in error
    before = hashes(run)
    told = replay(run, 2, "--anomaly")
    assert hashes(run) == before
    assert told["skipped"]
    assert told["training"] == {"skipped": True, "reasons": [told["reason"]] * 2}
    assert told["first_not_finite"] == "net/0/features of outputs.safetensors"
    first, then = told["anomaly"]["origins"]
    assert (first["kind"], first["network"], first["module"]) == ("Inf", "0", "backbone.layer1.1")
    assert (then["kind"], then["network"], then["in_backward"]) == ("NaN", "0", False)
    assert told["agrees"]["row"] == {"figures": 3, "differences": {}}
    said = capsys.readouterr().out
    assert "anomaly: Inf arose in backbone.layer1.1 of network 0, by native_batch_norm" in said
    # The last of three in a row, which ended the run: it is computed all the same.
    assert replay(run, 4)["training"]["skipped"]


@pytest.mark.slow(8)
def test_a_step_that_fp16_leaves_out_has_the_scale_of_its_time(tmp_path, capsys):
    run = tmp_path / "h"
    words = [*QUIET, "--precision", "fp16", "--epochs", "1"]
    assert pretrain(run, *words) == 0
    scales = [row["loss_scale"] for row in rows(run)]
    step = next(n for n, (a, b) in enumerate(itertools.pairwise(scales), 2) if b < a)
    told = replay(run, step)
    assert told["loss_scale"] == scales[step - 2]
    assert not told["skipped"]
    assert told["first_not_finite"].endswith("of gradients.safetensors")
    assert told["agrees"]["row"]["differences"] == {}
    assert f"fp16: the gradients overflow at the loss scale {scales[step - 2]:g}" in (
        capsys.readouterr().out
    )


@pytest.mark.slow(7)
def test_steps_of_before_a_run_had_more_epochs_have_the_schedules_of_then(tmp_path):
    run = tmp_path / "r"
    words = ["--queue.momentum_schedule", "cosine", "--epochs", "1"]
    assert pretrain(run, *QUIET, *words) == 0
    assert main(["resume", str(run), "--epochs", "2"]) == 0
    for step in (5, 9):
        told = replay(run, step)
        assert told["agrees"]["row"]["differences"] == {}
        assert told["attempt"] == 1 + step // 6
    # From the start, through both schedules.
    shutil.rmtree(run / "checkpoints")
    told = replay(run, 9)
    assert told["from"] == "the start"
    assert told["agrees"]["row"]["differences"] == {}


@pytest.mark.slow(20)
def test_a_run_that_goes_on_and_is_killed_can_be_asked(tmp_path):
    run = tmp_path / "k"
    process = Process(
        command("pretrain", *SMALL, *QUIET, *SAVES, "--epochs", "9", "--run", str(run)),
        env=environment(STEP_SECONDS="0.5"),
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: len(rows(run)) >= 3, [process])
    told = replay(run, 3)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert told["agrees"]["row"]["differences"] == {}
    last = len(rows(run))
    assert replay(run, last)["agrees"]["row"]["differences"] == {}
    assert not (run / "DONE").exists()


@pytest.mark.ddp
def test_two_processes_compute_a_step_of_two_processes(tmp_path):
    run = tmp_path / "d"
    words = ["pretrain", *SMALL, *QUIET, *SAVES, "--epochs", "1", "--run", str(run)]
    for code, output in ends(launch(2, *words)):
        assert code == 0, output
    for code, output in ends(launch(2, "replay", str(run), "--step", "6", "--anomaly")):
        assert code == 0, output
    told = json.loads((run / "replay/step-00000006/step.json").read_text())
    assert told["processes"] == 2
    assert told["agrees"]["row"]["differences"] == {}
    assert told["agrees"]["save"]["differences"] == []
    assert tensors(run, 6, "views")["view/0"].shape == (32, 1, 16, 16)
    assert tensors(run, 6, "outputs")["net/0/embedding"].shape == (2, 1, 16, 16)


def test_what_cannot_be_computed_is_told_in_a_line(trained, tmp_path, capsys, monkeypatch):
    run, _ = trained

    def refused(folder: Path, *words: str) -> str:
        assert main(["replay", str(folder), *words]) in (1, 2)
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "wrote" not in said.out
        return said.err

    assert f"--step 0 must be within 1..12, the steps that {run} has begun" in refused(
        run, "--step", "0"
    )
    assert "--step 13 must be within 1..12" in refused(run, "--step", "13")
    assert "required: --step" in refused(run)
    assert f"{tmp_path} is not a run directory" in refused(tmp_path, "--step", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(run, "--step", "3")
    assert "was trained by 1 process, whose batch norms see parts of the batch of their own" in said
    assert f"start `peerlearn replay {run} --step 3`" in said
    monkeypatch.delenv("WORLD_SIZE")
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    env = json.loads((copied / "env.json").read_text())
    (copied / "env.json").write_text(json.dumps(env | {"verb": "detect"}))
    assert (
        "was trained by `peerlearn detect`: replay computes steps of `peerlearn pretrain` alone"
        in refused(copied, "--step", "3")
    )
    (copied / "env.json").write_text(json.dumps(env))
    config = (copied / "config.yaml").read_text()
    assert "\ntemperature: 0.07" in config
    (copied / "config.yaml").write_text(config.replace("\ntemperature: 0.07", "\ntemperature: 0.3"))
    assert "changed since the last save: temperature" in refused(copied, "--step", "10")
    (copied / "config.yaml").write_text(config + "unknown_key: 1\n")
    assert "unknown_key" in refused(copied, "--step", "10")
    (copied / "config.yaml").write_text(config)
    started = (copied / "events.jsonl").read_text()
    (copied / "events.jsonl").write_text(started.replace('"processes": 1', '"processes": 3'))
    assert (
        f"start `torchrun --nproc_per_node 3 -m -- peerlearn replay {copied} --step 3`"
        in refused(copied, "--step", "3")
    )
    (copied / "events.jsonl").write_text(started)
    assert "no-such-folder" in refused(copied, "--step", "3", "--data.root", "no-such-folder")
    assert not (copied / "replay").exists() or not list((copied / "replay").glob(".tmp*"))
