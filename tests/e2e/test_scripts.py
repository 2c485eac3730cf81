"""The scripts behind documents: data sets for experiments, and figures that a page quotes."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFont

from peerlearn.data.datasets import load_dataset
from tests.e2e.runs import SMALL, environment, rows
from tests.idx_files import write_idx
from tests.warm import run as run_process

SCRIPTS = Path(__file__).parents[2] / "scripts"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return run_process(
        [sys.executable, str(SCRIPTS / script), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )


def families(folder: Path) -> set[str]:
    names = {file.stem.partition("-")[2] for file in folder.rglob("*.png")}
    return {str(ImageFont.truetype(FONTS / f"{name}.ttf").getname()[0]) for name in names}


def test_no_family_is_in_both_splits_and_few_classes_are_the_first_of_many(tmp_path: Path) -> None:
    root = tmp_path / "characters"
    done = run("character_images.py", root, "--fonts", FONTS)
    assert done.returncode == 0, done.stderr
    train, test = (families(root / "60" / split) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    for split in ("train", "test"):
        many, few = (load_dataset("folder", split, root=str(root / n)) for n in ("60", "10"))
        assert len(many.class_names) == 60
        assert few.class_names == tuple(f"{ord(letter):04x}" for letter in "ABCDEFGHIJ")
        assert many.labels is not None
        per_class = many.labels.bincount()
        assert per_class.unique().numel() == 1
        assert len(few) == 10 * per_class[0]
        # A font without the characters draws boxes, all alike: it is left out.
        for font in (root / "60" / split / "0041").iterdir():
            images = {
                (root / "60" / split / name / font.name).read_bytes() for name in many.class_names
            }
            assert len(images) == 60
        for name in few.class_names:
            for image in (root / "10" / split / name).iterdir():
                twin = root / "60" / split / name / image.name
                assert image.read_bytes() == twin.read_bytes()


def test_nothing_is_drawn_without_fonts_or_over_files(tmp_path: Path) -> None:
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"\x00\x01\x00\x00 no font")
    found = run("character_images.py", tmp_path / "a", "--fonts", tmp_path / "fonts")
    assert (found.returncode, (tmp_path / "a").exists()) == (1, False)
    assert "too few fonts" in found.stderr
    found = run("character_images.py", tmp_path / "fonts")
    assert found.returncode == 1
    assert "is there already" in found.stderr
    (tmp_path / "file").touch()
    found = run("character_images.py", tmp_path / "file" / "a", "--fonts", FONTS)
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path / 'file' / 'a'} cannot be written" in found.stderr


def test_the_halves_of_fashion_mnist_hold_every_image_once(tmp_path: Path) -> None:
    images, labels = {}, {}
    random = np.random.default_rng(0)
    for split, prefix, count in (("train", "train", 43), ("test", "t10k", 21)):
        images[split] = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels[split] = (np.arange(count) * 7 % 10).astype(np.uint8)
        write_idx(tmp_path / "root" / f"{prefix}-images-idx3-ubyte.gz", images[split])
        write_idx(tmp_path / "root" / f"{prefix}-labels-idx1-ubyte.gz", labels[split])
    labels_file = tmp_path / "root" / "t10k-labels-idx1-ubyte.gz"
    intact = labels_file.read_bytes()
    labels_file.write_bytes(intact[:-9])
    found = run("fashion_mnist_parts.py", tmp_path / "parts", "--root", tmp_path / "root")
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert str(labels_file) in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    labels_file.write_bytes(intact)
    done = run("fashion_mnist_parts.py", tmp_path / "parts", "--root", tmp_path / "root")
    assert done.returncode == 0, done.stderr
    for split in ("train", "test"):
        indices = {}
        for part, names in (("garments", "02346"), ("distinct", "15789")):
            dataset = load_dataset("folder", split, root=str(tmp_path / "parts" / part))
            assert dataset.class_names == tuple(names)
            assert not isinstance(dataset.images, torch.Tensor)
            assert dataset.labels is not None
            for file, label in zip(dataset.images, dataset.labels.tolist(), strict=True):
                indices[int(file.stem)] = int(names[label])
                with Image.open(file) as image:
                    assert np.array_equal(np.asarray(image), images[split][int(file.stem)])
        assert indices == dict(enumerate(labels[split].tolist()))


def test_the_table_of_class_aware_batches_is_the_one_in_the_document() -> None:
    done = run("class_aware_coverage.py")
    assert done.stdout.count("\n") == 4
    assert done.stdout in (SCRIPTS.parent / "docs" / "supervised.md").read_text()


def test_differences_between_cells_are_paired_by_seed(tmp_path: Path) -> None:
    """Every seed of MCL has one to three points more: mean 2, half the interval 2.145 x 0.845 / sqrt(15)."""
    for cell, gain in (
        ("alpha-0.0_beta-0.0_supervised.teaching-none", 0),
        ("supervised.teaching-none", 1),
    ):
        for seed in range(15):
            folder = tmp_path / f"runs/where_mcl_helps/{cell}-seed-{seed}/results"
            folder.mkdir(parents=True)
            for network in (0, 1):
                score = 50 + 7 * seed + gain * (1 + seed % 3)
                metrics = dict.fromkeys(("top1", "top5", "calibration_error"), score)
                file = folder / f"classification-fashion_mnist-00001500-{network}-abc.json"
                file.write_text(json.dumps({"metrics": metrics}))
    done = run_process(
        [sys.executable, str(SCRIPTS / "where_mcl_helps.py"), "results"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[0] == "top1: +2.00 (1.53 .. 2.47), p 0.0000, n 15", done.stderr


def test_an_architecture_of_ones_own_is_trained_and_scored(tmp_path: Path) -> None:
    names = ["--cohort.backbones", "two_layers"]
    words = ["pretrain", *SMALL, "--epochs", "1", *names, "--run", tmp_path / "own"]
    done = run("own_backbone.py", *words)
    assert done.returncode == 0, done.stderr
    knn = ["knn", "--checkpoint", tmp_path / "own", "--k", "5", "--data.train_limit", "300"]
    done = run("own_backbone.py", *knn, "--cache", "false")
    assert done.returncode == 0, done.stderr
    last = rows(tmp_path / "own")[-1]
    for file in (tmp_path / "own/results").glob("knn-*.json"):
        result = json.loads(file.read_text())
        network = result["network"]
        name = f"net/{network}" if network.isdecimal() else network
        assert result["metrics"]["top1"] == last[f"{name}/knn_top1"]
    assert len(list((tmp_path / "own/results").glob("knn-*.json"))) == 3
