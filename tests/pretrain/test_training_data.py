"""What a run chooses by what it finds: the size of the views, and where they are cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import load_dataset
from peerlearn.errors import UserError
from pretrain.config import DataConfig, PretrainConfig
from pretrain.training_data import TrainingData, chosen_backend, load_training_data

RANKS = Ranks(torch.device("cpu"))


def write(root: Path, *sizes: tuple[int, int]) -> Path:
    root.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(root / f"{number:04}.png")
    return root


def load(root: Path, *, method: str = "moco", **data: object) -> TrainingData:
    config = PretrainConfig(method=method, data=DataConfig(name="folder", root=str(root), **data))
    return load_training_data(config, RANKS, "classified" if method == "supervised" else "unused")


@pytest.mark.parametrize(
    ("sizes", "backend", "size"),
    [
        ([(40, 40)] * 5, "memory", 40),
        ([(40, 30)] * 5, "memory", 30),
        ([(40, 30), (30, 40), (50, 30)], "folder", 30),
        ([(20, 20), (60, 50), (90, 64), (80, 70), (700, 700)], "folder", 64),
        ([(640, 480)] * 3, "memory", 224),
        ([(640, 480)] * 600 + [(480, 640)], "folder", 224),
    ],
)
def test_views_suit_the_images(sizes: list, backend: str, size: int, tmp_path, capsys):
    data = load(write(tmp_path / "my photos", *sizes))
    assert (data.backend, data.image_size) == (backend, size)
    out = capsys.readouterr().out
    assert out.startswith(f"my photos: views of {size} pixels, ")
    assert ("decoded once" in out) == (backend == "memory")


def test_images_that_would_fill_the_memory_stay_in_their_files(tmp_path, monkeypatch):
    images = load_dataset("folder", root=str(write(tmp_path / "a", *[(40, 40)] * 5)))
    for limit, expected in ((5 * 40 * 40 * 3, "memory"), (5 * 40 * 40 * 3 - 1, "folder")):
        monkeypatch.setattr("pretrain.training_data._LARGEST_HELD_BYTES", limit)
        assert chosen_backend(DataConfig(name="folder"), images) == expected


def test_what_the_config_says_counts(tmp_path, capsys):
    root = write(tmp_path / "a", *[(40, 40)] * 3)
    data = load(root, backend="folder", image_size=16)
    assert (data.backend, data.image_size) == ("folder", 16)
    assert capsys.readouterr().out == ""


def test_files_that_cannot_be_read_decide_nothing(tmp_path):
    root = write(tmp_path / "a", *[(40, 40)] * 3)
    (root / "9.png").write_bytes(b"")
    data = load(root)
    assert (data.backend, data.image_size) == ("memory", 40)
    for file in root.iterdir():
        file.write_bytes(b"")
    assert load(root).image_size == 224


def test_digits_keep_their_size_in_memory():
    config = PretrainConfig(data=DataConfig(name="digits"))
    data = load_training_data(config, RANKS, "unused")
    assert (data.backend, data.image_size) == ("memory", 8)


def test_what_is_skipped_is_told_once(tmp_path, caplog):
    root = write(tmp_path / "a", *[(40, 40)] * 3)
    (root / "x.heic").write_bytes(b"x")
    load(root)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(f"{root}: skipped 1 .heic (a format that is not read")


def test_missing_labels_are_told_with_the_file_in_the_way(tmp_path):
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / part).mkdir(parents=True)
        write(tmp_path / part, (40, 40))
    write(tmp_path / "train", (40, 40))
    with pytest.raises(UserError) as error:
        load(tmp_path, method="supervised")
    assert "method supervised needs a label for every image, which" in str(error.value)
    assert f"({tmp_path / 'train/0000.png'} lies beside the class folders a, b" in str(error.value)
