"""What a run chooses by what it finds: the size of the views, and where they are cut."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peerlearn.compute.dist import Ranks
from peerlearn.data.beton_dataset import is_packed
from peerlearn.data.beton_writer import pack
from peerlearn.data.datasets import load_dataset
from peerlearn.errors import UserError
from pretrain.config import DataConfig, PretrainConfig
from pretrain.training_data import TrainingData, chosen_backend, load_training_data
from tests.view_loaders import NEEDS_FFCV

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


# Packed files


def pack_folder(root: Path) -> Path:
    file = root.with_suffix(".beton")
    pack(load_dataset("folder", root=str(root)), file, format="raw")
    return file


def load_packed(file: Path, root: Path | None, **data: object) -> TrainingData:
    settings = {"name": "folder", "image_size": 8, **data}
    settings = DataConfig(root=root and str(root), packed=str(file), **settings)
    return load_training_data(PretrainConfig(data=settings), RANKS, "unused")


def test_packed_needs_its_backend_and_the_other_way_round():
    with pytest.raises(ValueError, match=r"data.backend ffcv needs data.packed: .*data build"):
        DataConfig(backend="ffcv")
    for backend in ("memory", "folder"):
        with pytest.raises(ValueError, match=f"data.packed is for data.backend ffcv.* {backend}:"):
            DataConfig(backend=backend, packed="a.beton")


@NEEDS_FFCV
@pytest.mark.parametrize("backend", [None, "ffcv"])
def test_a_packed_file_is_trained_on_with_and_without_the_images(backend, tmp_path, capsys):
    root = write(tmp_path / "a", *[(40, 30)] * 5)
    expected = load_dataset("folder", root=str(root))
    file = pack_folder(root)
    for given in (root, None):
        if given is None:
            shutil.rmtree(root)
        data = load_packed(file, given, backend=backend)
        assert (data.backend, data.train.title, len(data.train)) == ("ffcv", "a", 5)
        assert is_packed(data.train)
        assert data.train.read(3).shape == (3, 30, 40)
        assert data.train.class_names == expected.class_names
        assert len(load_packed(file, given, limit=2).train) == 2
    # As of the images themselves.
    assert load_packed(file, None, image_size=None).image_size == 30
    assert "cut from a packed file" in capsys.readouterr().out


@NEEDS_FFCV
def test_a_packed_file_of_other_images_is_refused(tmp_path):
    root = write(tmp_path / "a", *[(40, 30)] * 5)
    file = pack_folder(root)
    (root / "0004.png").rename(root / "0009.png")
    with pytest.raises(UserError, match=r"a.beton holds other labels or names of images than a tr"):
        load_packed(file, root)
    (root / "0009.png").unlink()
    with pytest.raises(UserError, match=r"a.beton holds 5 images, and a train has 4: "):
        load_packed(file, root)
    with pytest.raises(UserError, match=r"a.beton holds folder train, not digits train: "):
        load_packed(file, None, name="digits")


@NEEDS_FFCV
def test_without_ffcv_the_images_themselves_are_taken_and_a_line_says_so(
    tmp_path, monkeypatch, capsys
):
    root = write(tmp_path / "a", *[(40, 30)] * 5)
    file = pack_folder(root)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    data = load_packed(file, root, backend="ffcv")
    assert (data.backend, is_packed(data.train)) == ("memory", False)
    line = capsys.readouterr().out
    assert line.startswith("ffcv is not installed (sh scripts/system_packages.sh ffcv")
    assert line.endswith(f"training on the images of a themselves, not on those in {file}\n")
    with pytest.raises(
        UserError,
        match=r"\Adata.packed [^\n]*a.beton cannot be read \(ffcv is not installed[^\n]*, nor can the images that it "
        r"was packed from \(folder needs data.root[^\n]*\)\Z",
    ):
        load_packed(file, None)


@NEEDS_FFCV
def test_a_root_that_is_wrong_is_not_passed_over(tmp_path):
    file = pack_folder(write(tmp_path / "a", *[(40, 30)] * 5))
    with pytest.raises(UserError, match=r"data.root .*gone is not a folder"):
        load_packed(file, tmp_path / "gone")
