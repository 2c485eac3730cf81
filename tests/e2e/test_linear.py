"""`peerlearn linear` on exports of small runs: protocols, transfer, ensembles, seeds, processes, refusals."""

import json
import math
import os
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peerlearn.cli import main
from peerlearn.config import load_config
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.errors import UserError
from peerlearn.evaluation.data import check_same_classes
from peerlearn.evaluation.networks import weights_hash
from peerlearn.export import load_export
from pretrain.cohort import build_cohort
from pretrain.config import PretrainConfig
from pretrain.exports import TrainingImages, export_cohort
from tests.e2e.runs import ends, flip_last_byte, launch, pretrain
from tests.peerlearn.data.test_datasets import write_cifar10, write_tinyimagenet

CPU = ["--device", "cpu"]
LOGISTIC = ["--method", "logistic_regression", "--inputs", "standardised", "--penalties_c", "0.1"]
QUICK_SGD = ["--epochs", "2", "--base_lr", "0.1", "--inputs", "standardised", "--batch_size", "64"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def linear(*words: str | Path) -> int:
    return main(["linear", *map(str, words), *CPU])


def results(folder: Path, pattern: str = "*") -> dict[str, dict]:
    """By network."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"linear-{pattern}.json")]
    return {each["network"]: each for each in found}


def one_error(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_run_is_scored_network_by_network_and_together(runs, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (runs[0] / "export").rglob("*") if path.is_file()}
    assert linear("logistic_regression", "--checkpoint", runs[0], "--results", tmp_path) == 0
    found = results(tmp_path)
    assert set(found) == {"0", "1", "ensemble", "ensemble-logits"}
    printed = capsys.readouterr().out
    for network, result in found.items():
        metrics = result["metrics"]
        # 16 x 16 digits by a network of a minute: far above chance (10 %), n = 360.
        assert metrics["top1"] > 60
        low, high = metrics["top1_wilson95"]
        assert low < metrics["top1"] < high
        assert metrics["top1"] < metrics["top5"] <= 100
        per_class = metrics["per_class_top1"]
        assert list(per_class) == [str(digit) for digit in range(10)]
        counts = np.bincount(load_dataset("digits", "test").labels)
        mean = sum(share * n for share, n in zip(per_class.values(), counts, strict=True)) / 360
        assert mean == pytest.approx(metrics["top1"])
        assert 0 <= metrics["calibration_error"] <= 100
        assert (metrics["n"], result["task"], result["dataset"], result["step"]) == (
            *(360, "linear", "digits", 12),
        )
        assert result["protocol"]["train_images"] == 1437
        assert f"{metrics['top1']:.2f}" in printed
        assert network in printed
    assert found["ensemble"]["export_hash"] == {
        network: found[network]["export_hash"] for network in ("0", "1")
    }
    assert {"inputs", "c"} == set(found["0"]["metrics"]["chosen"])
    assert len(found["0"]["metrics"]["held_out_top1"]) == 5
    pictures = list(tmp_path.glob("*.png"))
    # The mean of the logits has no candidates of its own.
    assert sum("-candidates" in path.name for path in pictures) == 3
    assert len(pictures) == 4 + 3
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 300
    after = {path: path.read_bytes() for path in (runs[0] / "export").rglob("*") if path.is_file()}
    assert after == before


def test_the_same_again_replaces_its_files_and_is_the_same(runs, tmp_path):
    """Features computed, then read; a protocol with augmentation, then without."""
    for words in (LOGISTIC, ["--checkpoint", str(runs[0]), *QUICK_SGD]):
        scores = []
        for _ in range(2):
            words = [*words, "--checkpoint", str(runs[0]), "--network", "0", "--results", tmp_path]
            assert linear(*words) == 0
            scores.append(results(tmp_path, "*-0-*")["0"]["metrics"])
        assert scores[0] == scores[1]
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("network", ["1", "key-0", "ensemble"])
def test_networks_can_be_chosen(runs, tmp_path, network):
    words = ["--checkpoint", runs[0], "--network", network, "--results", tmp_path]
    assert linear(*LOGISTIC, *words) == 0
    expected = {"ensemble", "ensemble-logits"} if network == "ensemble" else {network}
    assert set(results(tmp_path)) == expected


def test_runs_that_cannot_be_averaged_are_refused_before_any_work(runs, tmp_path, capsys):
    assert linear(*LOGISTIC, "--checkpoint", runs[0], str(runs[0]) + "/") == 2
    assert "are the same networks" in one_error(capsys)
    alone = colour_export(tmp_path / "e")
    for order in ((runs[0], alone), (alone, runs[0])):
        assert linear(*LOGISTIC, "--checkpoint", *order) == 2
        assert f"{runs[0]} has 0, 1" in (error := one_error(capsys))
        assert "choose one of those by --network" in error
    assert linear(*LOGISTIC, "--checkpoint", "") == 2
    assert "checkpoint: expected text or a list of text, got ''" in one_error(capsys)


def test_a_mean_over_unlike_runs_is_warned_of(runs, tmp_path, caplog):
    other = shutil.copytree(runs[1], tmp_path / "other")
    config = (other / "config.yaml").read_text()
    assert "temperature: 0.2\n" not in config
    (other / "config.yaml").write_text(re.sub(r"(?m)^temperature: .*$", "temperature: 0.2", config))
    words = ["--network", "0", "--results", tmp_path / "results"]
    assert linear(*LOGISTIC, "--checkpoint", runs[0], other, *words) == 0
    before = config.split("\ntemperature: ")[1].split("\n")[0]
    assert (
        "the 2 checkpoints are averaged though they differ in more than their seeds: "
        f"temperature ({before}, 0.2)"
    ) in caplog.messages


@pytest.mark.parametrize("protocol", ["logistic_regression", "lr_sweep"])
def test_one_image_of_each_class_leaves_nothing_to_choose_by(runs, protocol, tmp_path, capsys):
    words = ["--checkpoint", runs[0], "--network", "0", "--results", tmp_path]
    assert linear(protocol, *words, "--data.shots", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "10 training images of 10 classes leave none to hold out" in error
    assert not list(tmp_path.iterdir())


def test_the_learning_rates_told_are_those_of_the_images_that_are_left_to_train_on(runs, tmp_path):
    """Two shots of ten classes, one of each held out: steps of ten images."""
    sgd = ["--epochs", "1", "--base_lr", "0.1", "1", "--data.shots", "2", "--augmentation", "none"]
    words = ["--checkpoint", runs[0], "--network", "0", "--results", tmp_path]
    assert linear(*sgd, *words) == 0
    protocol = results(tmp_path)["0"]["protocol"]
    assert protocol["lrs"] == pytest.approx([0.1 * 10 / 256, 10 / 256])
    assert protocol["train_images"] == 20


def test_several_runs_give_their_mean_and_spread(runs, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    assert linear(*LOGISTIC, "--checkpoint", *runs) == 0
    assert "2 runs: mean +- std" in capsys.readouterr().out
    assert "differ in more than" not in caplog.text
    mean = results(tmp_path / "results")["0"]
    values = [results(run / "results")["0"]["metrics"]["top1"] for run in runs]
    found = mean["metrics"]["top1"]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert found["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    # Student's t with one degree of freedom: 12.706.
    assert found["ci95"] == pytest.approx(12.7062047 * found["std"] / math.sqrt(2))
    assert mean["metrics"]["runs"] == 2
    assert len(mean["export_hash"]) == 2
    assert main(["knn", "--checkpoint", *map(str, runs), "--k", "5", *CPU]) == 0
    assert len(list((tmp_path / "results").glob("knn-*.json"))) == 3


def test_a_sweep_in_one_pass_is_its_members_one_by_one(runs, tmp_path):
    """Held-out accuracies of three learning rates, trained together, are those of each trained with one other."""
    lrs = ["0.01", "0.1", "1.0"]
    words = ["--epochs", "2", "--augmentation", "none", "--checkpoint", runs[0], "--network", "0"]
    assert linear(*words, "--base_lr", *lrs, "--results", tmp_path / "all") == 0
    together = results(tmp_path / "all")["0"]["metrics"]["held_out_top1"]
    for lr in lrs:
        folder = tmp_path / lr
        assert linear(*words, "--base_lr", lr, "0.5", "--results", folder) == 0
        alone = results(folder)["0"]["metrics"]["held_out_top1"][0]
        assert alone in together


@pytest.mark.slow(10)
def test_digits_to_fashion_mnist_and_back(runs, tmp_path):
    fashion = ["--data.name", "fashion_mnist", "--data.limit", "128", "--monitor.every_epochs", "0"]
    assert pretrain(tmp_path / "fashion", *fashion, "--data.image_size", "28") == 0
    there = [
        "--data.name",
        "fashion_mnist",
        "--data.train_limit",
        "500",
        "--data.test_limit",
        "203",
    ]
    assert linear(*LOGISTIC, *there, "--checkpoint", runs[0], "--results", tmp_path) == 0
    back = ["--data.name", "digits", "--checkpoint", tmp_path / "fashion", "--results", tmp_path]
    assert linear(*LOGISTIC, *back) == 0
    for dataset, n in (("fashion_mnist", 203), ("digits", 360)):
        found = results(tmp_path, f"{dataset}-*")["0"]
        assert found["metrics"]["n"] == n
        assert found["metrics"]["top1"] > 40


def colour_export(folder: Path) -> Path:
    """A 32-pixel network, as one trained on CIFAR."""
    config = PretrainConfig()
    cohort_config = load_config(PretrainConfig, _yaml(folder)).cohort
    cohort = build_cohort(cohort_config, in_chans=3, image_size=32, seed=0)
    images = TrainingImages(
        dataset="cifar100", split="train", images=1, channels=3, image_size=32, mean=[0.5] * 3, std=[0.25] * 3
    )  # fmt: skip
    config = load_config(PretrainConfig, _yaml(folder))
    export_cohort(cohort, folder, config=config, images=images, step=0, row={})
    return folder


def _yaml(folder: Path) -> Path:
    file = folder.with_suffix(".yaml")
    file.write_text("cohort: {networks: 1, backbones: resnet32}\n")
    return file


def write_stl10(folder: Path) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0)
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for part, count in (("train", 20), ("test", 11)):
        pixels = noise.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))


@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "tinyimagenet"])
def test_transfer_to_the_published_layouts(dataset, tmp_path):
    root = tmp_path / "data"
    if dataset == "cifar10":
        write_cifar10(root, per_file=4)
    elif dataset == "stl10":
        write_stl10(root)
    else:
        write_tinyimagenet(root)
    words = [
        "--data.name",
        dataset,
        "--data.root",
        root,
        "--checkpoint",
        colour_export(tmp_path / "e"),
    ]
    assert linear(*LOGISTIC, *words, "--results", tmp_path / "results") == 0
    found = results(tmp_path / "results")["0"]
    expected = {"cifar10": (20, 4, 10), "stl10": (20, 11, 10), "tinyimagenet": (6, 3, 2)}[dataset]
    metrics, protocol = found["metrics"], found["protocol"]
    sizes = (protocol["train_images"], protocol["test_images"], len(metrics["per_class_top1"]))
    assert sizes == expected
    # Augmented streams too, decoded by workers where images are files.
    sgd = [*QUICK_SGD, "--batch_size", "6", "--data.workers", "1"]
    assert linear(*sgd, *words, "--results", tmp_path / "sgd") == 0


def test_few_shots_and_percent_take_so_many_images(runs, tmp_path):
    for words, images in ((["--data.shots", "3"], 30), (["--data.train_percent", "10"], 143)):
        folder = tmp_path / words[0]
        more = ["--checkpoint", runs[0], "--network", "0", "--results", folder]
        assert linear(*LOGISTIC, *words, *more) == 0
        assert abs(results(folder)["0"]["protocol"]["train_images"] - images) <= 5
    more = ["--checkpoint", runs[0], "--network", "0", "--results", tmp_path / "tiny"]
    assert linear(*QUICK_SGD, "--data.shots", "2", *more) == 0
    assert results(tmp_path / "tiny")["0"]["protocol"]["lrs"] == [0.1 * 20 / 256]


@pytest.mark.slow(12)
def test_finetuning_learns_and_leaves_the_export_alone(runs, tmp_path):
    export = runs[0] / "export/step-00000012/net-0"
    before = weights_hash([load_export(export)])
    words = ["--epochs", "8", "--base_lr", "0.2", "--batch_size", "64", "--crop_scale", "0.6", "1"]
    words += ["--checkpoint", str(runs[0]), "--results", str(tmp_path)]
    assert linear("finetune", *words) == 0
    found = results(tmp_path)
    assert set(found) == {"0", "1", "ensemble-logits"}
    assert found["0"]["metrics"]["top1"] > 85
    assert weights_hash([load_export(export)]) == before


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_score_as_one_does(processes, runs, tmp_path):
    """101 training and 67 test images divide by neither: none is left out, none counts twice."""
    more = ["--data.train_limit", "101", "--data.test_limit", "67", "--cache", "false"]
    more += ["--checkpoint", str(runs[0]), *CPU]
    sgd = [
        "--epochs",
        "3",
        "--base_lr",
        "0.1",
        "1",
        "--batch_size",
        "24",
        "--crop_scale",
        "0.5",
        "1",
    ]
    # On kept features a step is not shared, and need not divide.
    kept = ["--epochs", "2", "--base_lr", "0.1", "--augmentation", "none", "--batch_size", "25"]
    for name, words in (("logistic", LOGISTIC), ("sgd", sgd), ("kept", kept)):
        alone, together = tmp_path / f"{name}-1", tmp_path / f"{name}-n"
        assert main(["linear", *words, *more, "--results", str(alone)]) == 0
        ranks = launch(processes, "linear", *words, *more, "--results", str(together))
        for rank, (code, output) in enumerate(ends(ranks)):
            assert code == 0, output
            assert ("accuracy (%)" in output) == (rank == 0)
        ours, theirs = results(together), results(alone)
        assert ours.keys() == theirs.keys() == {"0", "1", "ensemble", "ensemble-logits"}
        for network, result in theirs.items():
            assert ours[network]["protocol"] == result["protocol"]
            for key in ("top1", "top5", "n", "per_class_top1"):
                assert ours[network]["metrics"][key] == result["metrics"][key], (name, network)


@pytest.mark.ddp
def test_features_of_several_processes_are_each_images_own(tmp_path, runs):
    """In the dataset's order, to the last bits: the parts of the ranks are put together rightly."""
    code = """
import sys, torch
from pathlib import Path
from peerlearn.data.datasets import first_images, load_dataset
from peerlearn.compute.dist import joined_ranks
from peerlearn.evaluation.feature_cache import Extraction, load_features
with joined_ranks("cpu") as ranks:
    how = Extraction(ranks=ranks, batch_size=7, workers=0, cached=False)
    images = first_images(load_dataset("digits", "test"), int(sys.argv[3]))
    found = load_features({"0": Path(sys.argv[1])}, images, how)["0"]
    torch.save(found, f"{sys.argv[2]}/{ranks.rank}.pt")
"""
    script = tmp_path / "features.py"
    script.write_text(code)
    export = runs[0] / "export/step-00000012/net-0"
    for n in (53, 2):
        whole = tmp_path / f"{n}"
        whole.mkdir()
        for exit_code, output in ends(launch(3, str(export), str(whole), str(n), driver=script)):
            assert exit_code == 0, output
        ranks = [torch.load(whole / f"{rank}.pt", weights_only=True) for rank in range(3)]
        assert torch.equal(ranks[0], ranks[1])
        assert torch.equal(ranks[0], ranks[2])
        from peerlearn.compute.dist import Ranks
        from peerlearn.data.datasets import first_images
        from peerlearn.evaluation.feature_cache import Extraction, load_features

        how = Extraction(ranks=Ranks(torch.device("cpu")), batch_size=100, workers=0, cached=False)
        images = first_images(load_dataset("digits", "test"), n)
        alone = load_features({"0": export}, images, how)["0"]
        torch.testing.assert_close(ranks[0], alone, rtol=1e-5, atol=1e-5)


def test_a_damaged_export_is_one_line(runs, tmp_path, capsys):
    import shutil

    export = tmp_path / "net-0"
    shutil.copytree(runs[0] / "export/step-00000012/net-0", export)
    flip_last_byte(export / "model.safetensors")
    capsys.readouterr()
    assert linear(*LOGISTIC, "--checkpoint", export, "--data.name", "digits") == 1
    assert "damaged, its SHA-256 is not that of config.json" in one_error(capsys)


def test_a_dataset_with_one_class_or_without_labels_is_one_line(tmp_path, capsys):
    export = colour_export(tmp_path / "e")
    pixels = np.zeros((8, 8, 3), np.uint8)
    for split in ("train", "val"):
        file = tmp_path / "one" / split / "n01" / "0.JPEG"
        file.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(file)
    words = ["--checkpoint", export, "--data.root", tmp_path / "one"]
    assert linear(*LOGISTIC, *words, "--data.name", "imagenet") == 1
    assert "imagenet has one class only" in one_error(capsys)
    assert linear(*LOGISTIC, *words, "--data.name", "folder") == 1
    assert "folder has no labels" in one_error(capsys)


def test_splits_without_some_class_are_told_and_scored(runs, tmp_path, caplog):
    """The first seven digits are 0 to 6; the first two of the test split are of two classes."""
    words = ["--checkpoint", runs[0], "--network", "0", "--results", tmp_path]
    assert linear(*LOGISTIC, *words, "--data.limit", "7", "--data.test_limit", "2") == 0
    assert "the train split has images of only 7 of its 10 classes" in caplog.text
    assert "the test split has images of only 2 of its 10 classes" in caplog.text
    per_class = results(tmp_path)["0"]["metrics"]["per_class_top1"]
    assert sum(share is None for share in per_class.values()) == 8


def test_more_shots_than_a_class_has_are_one_line(runs, capsys):
    words = ["--checkpoint", runs[0], "--data.shots", "1000"]
    assert linear(*LOGISTIC, *words) == 1
    assert "data.shots 1000: class" in one_error(capsys)


def test_class_counts_that_differ_are_one_line():
    def split(name: str, classes: int) -> ImageDataset:
        return ImageDataset(
            name="both", split=name, images=torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
            labels=torch.arange(4) % classes, class_names=tuple("abcd"[:classes]), mean=(0.5,), std=(1.0,),
        )  # fmt: skip

    with pytest.raises(UserError, match="train split has 3 classes and the test split 2"):
        check_same_classes(split("train", 3), split("test", 2))


def test_results_that_cannot_be_written_are_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--checkpoint", runs[0], "--network", "0", "--results", tmp_path / "file"]
    assert linear(*LOGISTIC, *words) == 1
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow(70)
def test_a_trained_network_beats_an_untrained_one_on_fashion_mnist(tmp_path):
    """Linear accuracy, n = 2000, standard error 0.9: MoCo of 12 epochs against its start, by few labels, 3 seeds."""
    gains = [_gain_by_training(seed, tmp_path / str(seed)) for seed in range(3)]
    assert min(gains) > 0, gains
    assert statistics.mean(gains) > 3.0, gains


def _gain_by_training(seed, tmp_path):
    data = ["--data.name", "fashion_mnist", "--data.train_limit", "500"]
    data += ["--data.test_limit", "2000"]
    protocol = ["--method", "logistic_regression", "--inputs", "standardised"]
    run, start = tmp_path / "run", tmp_path / "start"
    training = ["mcl_fashion_mnist_demo", "--data.limit", "2000", "--data.image_size", "16"]
    training += ["--cohort.networks", "1", "--alpha", "1", "--beta", "0"]
    # After fewer steps the gain of a seed is as small as what another processor rounds otherwise.
    training += ["--epochs", "12"]
    training += ["--seed", str(seed), "--monitor.every_epochs", "0", "--run", str(run)]
    assert main(["pretrain", *training, *CPU]) == 0
    config = load_config(PretrainConfig, run / "config.yaml")
    cohort = build_cohort(config.cohort, in_chans=1, image_size=16, seed=seed)
    images = TrainingImages.of(load_dataset("fashion_mnist", "train", limit=1), 16)
    export_cohort(cohort, start, config=config, images=images, step=0, row={})
    scores = []
    for checkpoint in (run, start):
        folder = tmp_path / "results" / checkpoint.name
        words = ["--checkpoint", checkpoint, "--network", "0", "--results", folder]
        assert linear(*protocol, *data, *words) == 0
        scores.append(results(folder)["0"]["metrics"]["top1"])
    return scores[0] - scores[1]
