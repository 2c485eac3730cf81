"""Whole supervised runs: what they leave, what they resume to, and that ranks share them."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch.utils.flop_counter import FlopCounterMode

from peerlearn.backbones import create_backbone
from peerlearn.cli import main
from peerlearn.compute.dist import Ranks
from peerlearn.config import load_config
from peerlearn.data.datasets import load_dataset
from peerlearn.data.evaluation_views import evaluation_batches
from peerlearn.export import load_export
from pretrain import state
from pretrain.config import PretrainConfig
from pretrain.distill import ensemble_weights
from pretrain.training_data import load_training_data
from tests.e2e.runs import (
    SMALL,
    assert_same_run,
    command,
    ends,
    environment,
    events,
    launch,
    newest_tensors,
    pretrain,
    rows,
    wait_for,
    without_clocks,
    write_noise,
)
from tests.e2e.several_processes import DOUBLE
from tests.warm import Process
from tests.warm import run as run_process

SUPERVISED = ["--method", "supervised", "--temperature", "0.1", "--cohort.projection", "mlp"]
TEACHING = ["--supervised.teaching", "ensemble_teaching", "--supervised.weights_per_class", "true"]


@pytest.fixture(scope="session")
def finished(once) -> Path:
    def make(run: Path) -> None:
        assert pretrain(run, *SUPERVISED, *TEACHING) == 0

    return once("supervised", make)


def results(run: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (run / "results").glob("*.json")]
    return {result["network"]: result for result in found}


def logits_of_exports(run: Path, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Through timm: (M, N, C), and the labels."""
    folder = run / "export" / (run / "export/latest").read_text().strip()
    dataset = load_dataset("digits", split)
    batches = list(
        evaluation_batches(dataset, image_size=16, batch_size=50, device=torch.device("cpu"))
    )
    found = []
    for path in sorted(folder.glob("net-?")):
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        with torch.no_grad():
            found.append(torch.cat([network(batch) for batch in batches]))
    assert dataset.labels is not None
    return torch.stack(found).double().numpy(), dataset.labels.numpy()


def test_result_files_hold_what_timm_and_scikit_learn_find(finished):
    logits, labels = logits_of_exports(finished)
    theta = newest_tensors(finished)["ensemble"]["weights"].double().numpy()
    assert theta.shape == (2, 10)
    np.testing.assert_allclose(theta.sum(0), 1, atol=1e-6)
    scores = {
        "0": logits[0],
        "1": logits[1],
        "ensemble": logits.mean(0),
        "weighted-ensemble": (theta[:, None, :] * logits).sum(0),
    }
    found = results(finished)
    assert found.keys() == scores.keys()
    for network, each in scores.items():
        metrics, protocol = found[network]["metrics"], found[network]["protocol"]
        assert metrics["top1"] == pytest.approx(100 * accuracy_score(labels, each.argmax(1)))
        top5 = top_k_accuracy_score(labels, each, k=5)
        assert metrics["top5"] == pytest.approx(100 * top5)
        assert (metrics["n"], found[network]["step"]) == (360, 12)
        assert (protocol["split"], protocol["epoch"]) == ("test", 2)
    assert found["weighted-ensemble"]["protocol"]["theta_from"].startswith("training batches")
    last = rows(finished)[-1]
    for network in scores:
        key = f"net/{network}" if network.isdecimal() else network.replace("-", "_")
        assert last[f"{key}/test_top1"] == pytest.approx(found[network]["metrics"]["top1"])


def test_metrics_hold_every_term_and_no_clock_is_without_its_word(finished):
    row = rows(finished)[-1]
    terms = ("scl_hard", "scl_soft", "icl_hard", "icl_soft", "cross_entropy", "teaching")
    for m in range(2):
        assert {f"net/{m}/{term}" for term in terms} <= row.keys()
        assert 0 <= row[f"net/{m}/ensemble_weight"] <= 1
    mine = [row[f"net/{m}/{term}"] for term in terms for m in range(2)]
    weights = [0.5] * 4 + [0.1] * 4 + [1.0] * 4
    expected = sum(w * v for w, v in zip(weights, mine, strict=True))
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_export_is_the_plain_network_with_its_classifier(finished):
    """Same keys and the same FLOPs: cohort training costs nothing at inference (section 3.1)."""
    folder = finished / "export/step-00000012/net-1"
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    plain = timm.create_model("conv4_cifar", in_chans=1, num_classes=10, image_size=16)
    assert weights.keys() == plain.state_dict().keys()
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True)
    counts = []
    for network in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            network.eval()(torch.zeros(2, 1, 16, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    features = load_export(folder)(torch.zeros(2, 1, 16, 16))
    assert features.shape == (2, create_backbone("conv4", in_chans=1, image_size=16).num_features)
    fewer = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert fewer(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


def test_the_verbs_export_and_knn_take_a_supervised_run(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--output", str(tmp_path)]) == 0
    again, first = (
        folder / "net-0/model.safetensors"
        for folder in (tmp_path, finished / "export/step-00000012")
    )
    assert again.read_bytes() == first.read_bytes()
    words = ["knn", "--checkpoint", str(finished), "--network", "all", "--k", "5"]
    assert main([*words, "--results", str(tmp_path / "knn")]) == 0
    assert main(["resume", str(finished)]) == 0
    assert "is done already" in capsys.readouterr().out


def test_a_damaged_accuracy_of_a_run_that_is_done_is_written_again(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    (file,) = run.glob("results/classification-*-1-*.json")
    expected = json.loads(file.read_text())
    file.write_text(file.read_text().replace('"top1": ', '"top1": NaN, "was": '))
    assert main(["resume", str(run)]) == 0
    again = json.loads(file.read_text())
    assert (again["metrics"], again["protocol"]) == (expected["metrics"], expected["protocol"])


RIVALS = [
    *("--cohort.networks", "3", "--cohort.share_stages", "1", "--alpha", "0", "--beta", "0"),
    *("--supervised.ramp_epochs", "2"),
]


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    "more",
    [
        TEACHING,
        [*RIVALS, "--supervised.teaching", "okddip"],
        [*RIVALS, "--supervised.teaching", "one", "--supervised.images_per_class", "null"],
    ],
    ids=["ensemble_teaching", "okddip", "one"],
)
def test_sigkill_and_resume_equal_the_undisturbed_run(more, tmp_path):
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    words = ["pretrain", *SMALL, *SUPERVISED, *more, "--checkpoint.every_steps", "1"]
    whole = run_process(
        command(*words, "--run", str(runs["whole"])), env=environment(), capture_output=True
    )
    assert whole.returncode == 0, whole.stderr
    process = Process(
        command(*words, "--run", str(runs["killed"])),
        env=environment(STEP_SECONDS="0.2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (runs["killed"] / "checkpoints/step-00000004").exists(), [process])
    process.kill()
    process.wait()
    assert not (runs["killed"] / "DONE").exists()
    resumed = run_process(
        command("resume", str(runs["killed"])), env=environment(), capture_output=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(runs["killed"], runs["whole"])
    ours, theirs = (results(runs[name]) for name in ("killed", "whole"))
    assert {k: v["metrics"] for k, v in ours.items()} == {
        k: v["metrics"] for k, v in theirs.items()
    }


def test_sigterm_saves_and_leaves_no_result_before_the_end(tmp_path):
    run = tmp_path / "r"
    words = ["pretrain", *SMALL, *SUPERVISED, "--epochs", "50", "--run", str(run)]
    process = Process(command(*words), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 3, [process])
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75
    assert not (run / "results").exists()


@pytest.mark.ddp
@pytest.mark.parametrize(
    "more",
    [
        TEACHING,
        ["--supervised.teaching", "dml", "--supervised.num_negatives", "7"],
        [*RIVALS, "--supervised.teaching", "cl_ilr"],
        [*RIVALS, "--supervised.teaching", "one"],
    ],
    ids=["ensemble_teaching", "dml", "cl_ilr", "one"],
)
def test_a_share_of_the_batch_each_equals_one_process(more, tmp_path):
    """To 1e-7 in float64: the ensemble's weights are solved to a gap, not exactly."""
    quiet = ["--monitor.every_epochs", "0", "--cohort.sync_batch_norm", "true"]
    quiet += ["--data.limit", "104"]
    words = ["pretrain", *SMALL, *SUPERVISED, *more, *quiet]
    alone, together = tmp_path / "alone", tmp_path / "together"
    found = run_process(
        command(*words, "--run", str(alone), driver=DOUBLE), env=environment(), capture_output=True
    )
    assert found.returncode == 0, found.stderr
    for code, output in ends(launch(2, *words, "--run", str(together), driver=DOUBLE)):
        assert code == 0, output
    ours, theirs = rows(together), rows(alone)
    assert len(ours) == len(theirs) == 6
    for mine, expected in zip(ours, theirs, strict=True):
        for key in without_clocks(expected):
            assert mine[key] == pytest.approx(expected[key], rel=1e-7, abs=1e-7), key
    expected_tensors = newest_tensors(alone)
    for group in expected_tensors.keys() - {"rng"}:
        for name, tensor in expected_tensors[group].items():
            found_tensor = newest_tensors(together)[group][name]
            torch.testing.assert_close(found_tensor, tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_a_validation_split_is_watched_and_gives_the_weights(tmp_path):
    run = tmp_path / "r"
    settings = ["--data.validation_percent", "20", "--data.shots", "12", "--batch_size", "16"]
    assert pretrain(run, *SUPERVISED, *settings) == 0
    watched = [row for row in rows(run) if "net/0/validation_top1" in row]
    assert len(watched) == 3
    assert not any("test_top1" in key for row in rows(run) for key in row)
    config = load_config(PretrainConfig, run / "config.yaml")
    data = load_training_data(config, Ranks(torch.device("cpu")), "classified")
    assert data.validation is not None
    assert len(data.train) == 120
    assert torch.bincount(data.train.labels).tolist() == [12] * 10
    held_out = {image.numpy().tobytes() for image in data.validation.images}
    assert not held_out & {image.numpy().tobytes() for image in data.train.images}
    found = results(run)
    protocol = found["weighted-ensemble"]["protocol"]
    assert protocol["theta_from"] == f"{len(data.validation)} held-out images"
    assert protocol["train_images"] == 120

    # The same theta, solved here from the exported networks' logits of the held-out images.
    folder = run / "export" / (run / "export/latest").read_text().strip()

    def logits(dataset) -> torch.Tensor:
        views = torch.cat(
            list(
                evaluation_batches(
                    dataset, image_size=16, batch_size=64, device=torch.device("cpu")
                )
            )
        )
        nets = [
            timm.create_model(f"local-dir:{folder / f'net-{m}'}", pretrained=True).eval()
            for m in range(2)
        ]
        with torch.no_grad():
            return torch.stack([net(views) for net in nets])

    theta = ensemble_weights(logits(data.validation), data.validation.labels)
    test = load_dataset("digits", "test")
    mixed = (theta.view(2, 1, 1) * logits(test)).sum(0)
    top1 = 100 * float((mixed.argmax(1) == test.labels).double().mean())
    assert found["weighted-ensemble"]["metrics"]["top1"] == pytest.approx(top1, abs=0.3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.shots", "1000"], "data.shots 1000: class"),
        (["--supervised.teaching", "one"], "set cohort.share_stages to 1 or more"),
        (["--supervised.num_negatives", "31"], "supervised.num_negatives"),
        (["--batch_size", "33"], "must be a multiple of supervised.images_per_class 2"),
        (["--supervised.teaching", "dmll"], "dml"),
        (["--data.split", "test"], "data.split must not be test"),
        (["--cohort.networks", "1", "--terms", "icl_hard"], "terms must hold scl_hard"),
        (["--alpha", "0", "--terms", "scl_hard"], "leave nothing to train"),
        (["--method", "moco", "--data.validation_percent", "10"], "data.validation_percent must"),
        # timm's classifier of this one is a convolution; that one has two.
        (["--cohort.backbones", "dla34", "--data.image_size", "32"], "no single linear classifier"),
        (["--cohort.backbones", "deit_tiny_distilled_patch16_224"], "no single linear classifier"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, tmp_path, capsys):
    run = tmp_path / "r"
    code = pretrain(run, *SUPERVISED, *more)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert error.count("\n") == 1 or "usage" in error
    assert not run.exists()


def test_timms_network_of_an_export_gives_our_logits_whatever_stands_before_the_classifier(
    tmp_path,
):
    """MobileNetV3 has a layer between pooling and classifier."""
    words = ["--cohort.backbones", "mobilenetv3_small_050", "--data.image_size", "32"]
    assert pretrain(tmp_path / "r", *SUPERVISED, *words, "--epochs", "1") == 0
    folder = tmp_path / "r/export/step-00000006/net-0"
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        features = load_export(folder)(images)
        expected = features @ weights["classifier.weight"].T + weights["classifier.bias"]
        torch.testing.assert_close(network(images), expected)


def test_a_done_run_whose_results_are_gone_measures_again(tmp_path, capsys):
    run = tmp_path / "r"
    assert pretrain(run, *SUPERVISED, "--epochs", "1") == 0
    first = {name: result["metrics"] for name, result in results(run).items()}
    for path in (run / "results").iterdir():
        path.unlink()
    assert main(["resume", str(run)]) == 0
    assert {name: result["metrics"] for name, result in results(run).items()} == first
    assert events(run, "done")[-1]["step"] == 6


def folder_words(root: Path, *more: str) -> list[str]:
    return ["--data.name", "folder", "--data.root", str(root), "--data.limit", "null", *more]


def test_without_a_test_split_a_run_does_not_start(tmp_path, capsys):
    """Nor with a validation split and nothing to watch: the end of the run needs it."""
    root = tmp_path / "data"
    write_noise(root, {"train/class0": 30, "train/class1": 30})
    words = folder_words(root, "--data.validation_percent", "20", "--monitor.every_epochs", "0")
    assert pretrain(tmp_path / "r", *SUPERVISED, *words) == 1
    assert "test" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    shutil.copytree(root / "train", root / "test")
    assert pretrain(tmp_path / "r", *SUPERVISED, *words, "--epochs", "1") == 0


def test_classes_of_one_image_leave_nothing_to_hold_out(tmp_path, capsys):
    folders = {f"{split}/class{number}": 1 for split in ("train", "test") for number in range(40)}
    write_noise(tmp_path / "data", folders)
    words = folder_words(tmp_path / "data", "--data.validation_percent", "20")
    assert pretrain(tmp_path / "r", *SUPERVISED, *words) == 1
    assert "data.validation_percent 20 holds nothing out" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_substitutes_of_another_class_leave_fewer_negatives(tmp_path):
    """Three classes of 40, unreadable images in each, and as many negatives as pure groups leave."""
    root = tmp_path / "data"
    write_noise(root, {f"{split}/class{c}": 40 for split in ("train", "test") for c in range(3)})
    for file in root.glob("train/class?/00[0-3].png"):
        file.write_bytes(b"no image")
    words = folder_words(root, "--batch_size", "12", "--data.max_unreadable_percent", "50")
    assert pretrain(tmp_path / "r", *SUPERVISED, *words, "--supervised.num_negatives", "8") == 0
    assert len(events(tmp_path / "r", "image_unreadable")) == 12


def test_images_without_labels_are_refused(tmp_path, capsys):
    write_noise(tmp_path, {"images": 40})
    words = folder_words(tmp_path / "images")
    assert pretrain(tmp_path / "r", *SUPERVISED, *words) == 1
    assert "method supervised needs a label for every image" in capsys.readouterr().err


def test_a_step_with_a_poisoned_classifier_is_skipped_and_told(tmp_path, monkeypatch):
    build = state.build_networks

    def poisoned(*arguments, **named):
        cohort = build(*arguments, **named)
        with torch.no_grad():
            cohort.classifiers[1].bias[3] = float("nan")
        return cohort

    monkeypatch.setattr(state, "build_networks", poisoned)
    run = tmp_path / "r"
    assert pretrain(run, *SUPERVISED, "--monitor.every_epochs", "0") == 1
    reasons = [event["reason"] for event in events(run, "step_skipped")]
    assert len(reasons) == 3
    assert all("cross_entropy of network 1 is not finite" in reason for reason in reasons)


def test_an_unreadable_image_that_is_drawn_often_counts_once(tmp_path):
    """A class of 4 among 40 images: the class-aware sampler draws each of them five times an epoch."""
    root = tmp_path / "data"
    write_noise(
        root, {f"{split}/{c}": n for split in ("train", "test") for c, n in (("a", 36), ("b", 4))}
    )
    (root / "train/b/002.png").write_bytes(b"no image")
    run = tmp_path / "r"
    words = folder_words(root, "--batch_size", "20", "--data.backend", "folder")
    words += ["--data.workers", "1", "--data.max_unreadable_percent", "3"]
    assert pretrain(run, *SUPERVISED, *words) == 0
    assert len(events(run, "image_unreadable")) == 1
    assert {row["unreadable_images"] for row in rows(run)[1:]} == {1}
    found = results(run)["0"]["metrics"]
    assert (found["n"], found["top5"]) == (40, None)


def test_padding_takes_no_crop_scale(tmp_path, capsys):
    words = ["--data.augmentation", "supervised_cifar", "--data.crop_scale", "[0.5,1.0]"]
    assert pretrain(tmp_path / "r", *SUPERVISED, *words) == 2
    assert "data.crop_scale must be null" in capsys.readouterr().err
