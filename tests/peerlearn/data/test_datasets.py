"""Small trees are written byte by byte in each published layout and read back."""

import gzip
import os
import tarfile
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets.folder import default_loader

from peerlearn.data import datasets, packed_datasets
from peerlearn.data.datasets import DATASET_NAMES, load_dataset
from peerlearn.data.image_folders import decode_image
from peerlearn.errors import UserError
from tests.idx_files import write_idx

DOWNLOADABLE = ("cifar10", "cifar100", "fashion_mnist", "stl10", "tinyimagenet")
FASHION_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def one_line_error(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load_error(*args: str, **kwargs: object) -> str:
    return one_line_error(lambda: load_dataset(*args, **kwargs))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands in for root where none is given; it does not exist yet."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "peerlearn"


# Names, splits and limits


def test_digits_are_split_by_the_order_of_the_file():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    images = torch.cat([train.images, test.images])
    assert images.shape == (1797, 1, 8, 8)
    assert (len(train), len(test), train.num_classes, train.channels) == (1437, 360, 10, 1)
    bunch = load_digits()
    assert torch.cat([train.labels, test.labels]).tolist() == bunch.target.tolist()
    torch.testing.assert_close(
        images[:, 0].double() * 16 / 255, torch.from_numpy(bunch.images), atol=0.05, rtol=0
    )
    assert images.max() == 255
    scaled = train.images / 255
    assert scaled.mean().item() == pytest.approx(train.mean[0], abs=5e-5)
    assert scaled.std().item() == pytest.approx(train.std[0], abs=5e-4)


def test_limit_keeps_the_first_images_alone_in_memory():
    whole, part = load_dataset("digits"), load_dataset("digits", limit=13)
    assert torch.equal(part.images, whole.images[:13])
    assert torch.equal(part.labels, whole.labels[:13])
    assert part.images.untyped_storage().nbytes() == 13 * 64
    assert len(load_dataset("digits", limit=10**6)) == 1437


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(limit: int):
    assert "data.limit" in load_error("digits", limit=limit)


def test_unknown_name_names_the_nearest():
    message = load_error("fashion-mnst")
    assert "did you mean 'fashion_mnist'" in message
    assert all(name in message for name in DATASET_NAMES)


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_unknown_split_lists_the_splits(name: str):
    assert f"{name} has no split 'val': choose from train, " in load_error(name, "val")


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_root_is_required(name: str):
    assert f"{name} needs data.root" in load_error(name)


@pytest.mark.parametrize("name", DATASET_NAMES)
@pytest.mark.parametrize("missing", ["none", "~no-such-user/none"])
def test_root_must_exist(name: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert missing in load_error(name, root=missing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_empty_root_says_what_to_unpack(name: str, tmp_path: Path):
    message = load_error(name, root=str(tmp_path))
    assert "no network" in message
    assert "unpack" in message
    assert str(tmp_path) in message
    assert {path.name for path in tmp_path.iterdir()} <= {".download.lock"}


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_without_root_the_cache_is_named(name: str, cache: Path):
    message = load_error(name)
    assert message.startswith(f"{cache} lacks the files of {name}, and the download failed (")
    assert "no network" in message
    assert {path.name for path in cache.iterdir()} <= {".download.lock"}


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_without_root_the_cache_is_read(name: str, cache: Path):
    WRITERS[name](cache)
    without_root = load_dataset(name)
    assert without_root.fingerprint() == load_dataset(name, root=str(cache)).fingerprint()


def test_the_cache_is_created_only_for_a_download(cache: Path, monkeypatch: pytest.MonkeyPatch):
    debian = cache.parent / "debian"
    write_fashion_mnist(debian, random_bytes(2, 28, 28), np.zeros(2, dtype=np.uint8))
    monkeypatch.setattr(packed_datasets, "DEBIAN_FASHION_MNIST", debian)
    load_dataset("fashion_mnist")
    load_dataset("digits")
    load_error("folder")
    assert not cache.exists()


def test_a_cache_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = load_error("cifar10")
    assert str(tmp_path / "file" / "peerlearn") in message
    assert "cifar-10-python.tar.gz" in message


def test_nothing_is_fetched_into_a_root_that_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable" in load_error("cifar10", root=str(tmp_path))
    assert not list(tmp_path.iterdir())


# Fashion-MNIST


def write_fashion_mnist(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_idx(folder / FASHION_FILES[0], images)
    write_idx(folder / FASHION_FILES[1], labels)


@pytest.fixture
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packed_datasets, "DEBIAN_FASHION_MNIST", tmp_path / "no-such-package")


@pytest.mark.parametrize("nested", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_root(nested: str, tmp_path: Path):
    images, labels = random_bytes(7, 28, 28), np.arange(7, dtype=np.uint8)
    write_fashion_mnist(tmp_path / nested, images, labels)
    dataset = load_dataset("fashion_mnist", root=str(tmp_path))
    assert torch.equal(dataset.images, torch.from_numpy(images)[:, None])
    assert dataset.labels.tolist() == list(range(7))
    assert dataset.labels.dtype == torch.int64
    assert dataset.class_names[9] == "Ankle boot"


def test_debian_comes_after_root_and_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    root, debian = tmp_path / "root", tmp_path / "debian"
    root.mkdir()
    write_fashion_mnist(debian, random_bytes(2, 28, 28), np.zeros(2, dtype=np.uint8))
    monkeypatch.setattr(packed_datasets, "DEBIAN_FASHION_MNIST", debian)
    assert len(load_dataset("fashion_mnist")) == 2
    assert len(load_dataset("fashion_mnist", root=str(root))) == 2
    write_fashion_mnist(root, random_bytes(3, 28, 28), np.zeros(3, dtype=np.uint8))
    assert len(load_dataset("fashion_mnist", root=str(root))) == 3
    write_fashion_mnist(cache, random_bytes(4, 28, 28), np.zeros(4, dtype=np.uint8))
    assert len(load_dataset("fashion_mnist")) == 4


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize("with_root", [False, True])
def test_fashion_mnist_download(
    with_root: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path if with_root else cache
    root = str(tmp_path) if with_root else None

    def fetch(url: str, root: str, md5: str) -> None:
        values = random_bytes(4, 28, 28) if "images" in url else np.full(4, 5, dtype=np.uint8)
        write_idx(Path(root, url.rpartition("/")[2]), values)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    for split in ("train", "test"):
        assert load_dataset("fashion_mnist", split, root=root).labels.tolist() == [5] * 4
    assert len(list((folder / "FashionMNIST" / "raw").iterdir())) == 4


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize("with_root", [False, True])
def test_missing_fashion_mnist_names_the_package(with_root: bool, tmp_path: Path):
    root = str(tmp_path) if with_root else None
    assert "dataset-fashion-mnist" in load_error("fashion_mnist", root=root)


def test_damaged_idx_files_are_named(tmp_path: Path):
    images_path, labels_path = (tmp_path / file for file in FASHION_FILES)
    images, labels = random_bytes(7, 28, 28), np.arange(7, dtype=np.uint8)
    write_fashion_mnist(tmp_path, images, labels)
    intact, intact_labels = images_path.read_bytes(), labels_path.read_bytes()
    raw = gzip.decompress(intact)
    flipped = bytearray(intact)
    flipped[len(flipped) // 2] ^= 0xFF
    for damaged in (
        b"",
        intact[:-100],
        bytes(flipped),
        b"no gzip",
        gzip.compress(raw[:-1]),
        gzip.compress(raw + b"\0"),
        gzip.compress(raw[:9]),
        gzip.compress(b"\0\0\x0d\x03" + raw[4:]),  # float32 instead of bytes
    ):
        images_path.write_bytes(damaged)
        assert str(images_path) in load_error("fashion_mnist", root=str(tmp_path))
    images_path.write_bytes(intact)
    for wrong in (np.arange(6, dtype=np.uint8), np.full(7, 10, dtype=np.uint8)):
        write_idx(labels_path, wrong)
        assert str(labels_path) in load_error("fashion_mnist", root=str(tmp_path))
    labels_path.unlink()
    assert str(labels_path) in load_error("fashion_mnist", root=str(tmp_path))
    labels_path.write_bytes(intact_labels)
    load_dataset("fashion_mnist", root=str(tmp_path))


@pytest.mark.skipif(
    not packed_datasets.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist"
)
def test_debian_fashion_mnist():
    train, test = load_dataset("fashion_mnist"), load_dataset("fashion_mnist", "test")
    assert (train.images.shape, test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert (train.images / 255).mean().item() == pytest.approx(0.2860, abs=5e-5)
    assert (train.images / 255).std().item() == pytest.approx(0.3530, abs=5e-5)
    assert (train.mean, train.std) == ((0.2860,), (0.3530,))


# CIFAR


def write_cifar10(folder: Path, per_file: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images (6 * per_file, 3, 32, 32) and labels, the last file being the test batch."""
    folder.mkdir(parents=True, exist_ok=True)
    images = random_bytes(6 * per_file, 3, 32, 32)
    labels = (np.arange(len(images)) % 10).astype(np.uint8)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for i, name in enumerate(names):
        part = slice(i * per_file, (i + 1) * per_file)
        records = np.hstack([labels[part, None], images[part].reshape(per_file, -1)])
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n\n")
    return images, labels


@pytest.mark.parametrize("nested", ["", "cifar-10-batches-bin"])
def test_cifar10(nested: str, tmp_path: Path):
    images, labels = write_cifar10(tmp_path / nested)
    train = load_dataset("cifar10", root=str(tmp_path))
    test = load_dataset("cifar10", "test", root=str(tmp_path))
    assert (len(train), len(test)) == (15, 3)
    assert np.array_equal(torch.cat([train.images, test.images]).numpy(), images)
    assert torch.cat([train.labels, test.labels]).tolist() == labels.tolist()
    assert train.class_names == tuple(f"class {i}" for i in range(10))


def write_cifar100(folder: Path) -> list[str]:
    """The names of the classes."""
    folder.mkdir(parents=True)
    names = [f"fine {i}" for i in range(100)]
    (folder / "fine_label_names.txt").write_text("\n".join(names))
    for name, count in (("train.bin", 5), ("test.bin", 2)):
        coarse_fine = np.array([[i, 99 - i] for i in range(count)], dtype=np.uint8)
        pixels = random_bytes(count, 3 * 32 * 32)
        (folder / name).write_bytes(np.hstack([coarse_fine, pixels]).tobytes())
    return names


def test_cifar100_takes_the_fine_labels(tmp_path: Path):
    names = write_cifar100(tmp_path / "cifar-100-binary")
    train = load_dataset("cifar100", root=str(tmp_path))
    assert train.labels.tolist() == [99, 98, 97, 96, 95]
    assert np.array_equal(train.images.numpy().reshape(5, -1), random_bytes(5, 3 * 32 * 32))
    assert train.class_names == tuple(names)
    assert load_dataset("cifar100", "test", root=str(tmp_path)).labels.tolist() == [99, 98]


def test_damaged_cifar_files_are_named(tmp_path: Path):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    intact = path.read_bytes()
    for damaged in (intact[:-1], b"", b"\x0a" + intact[1:]):
        path.write_bytes(damaged)
        assert str(path) in load_error("cifar10", root=str(tmp_path))
    path.unlink()
    assert str(path) in load_error("cifar10", root=str(tmp_path))


def test_an_archive_in_root_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, _ = write_cifar10(tmp_path / "made" / "cifar-10-batches-bin")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    # With its MD5 taken for the published one, it must not be fetched.
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda path, md5: True)
    dataset = load_dataset("cifar10", root=str(root))
    assert np.array_equal(dataset.images.numpy(), images[:15])
    assert not list(root.glob("tmp*"))


# STL-10


def write_stl10(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names))
    images = {}
    for seed, (part, count) in enumerate({"train": 4, "test": 3, "unlabeled": 5}.items()):
        images[part] = random_bytes(count, 3, 96, 96, seed=seed)
        (folder / f"{part}_X.bin").write_bytes(images[part].transpose(0, 1, 3, 2).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3, 3]))
    (folder / "test_y.bin").write_bytes(bytes([2, 4, 6]))
    return images


@pytest.mark.parametrize("nested", ["", "stl10_binary"])
def test_stl10(nested: str, tmp_path: Path):
    images = write_stl10(tmp_path / "data" / nested)
    for split, labels in {
        "train": [0, 9, 2, 2],
        "test": [1, 3, 5],
        "unlabeled": None,
        "train+unlabeled": [0, 9, 2, 2, -1, -1, -1, -1, -1],
    }.items():
        dataset = load_dataset("stl10", split, root=str(tmp_path / "data"))
        expected = np.concatenate([images[part] for part in split.split("+")])
        assert np.array_equal(dataset.images.numpy(), expected)
        assert (None if dataset.labels is None else dataset.labels.tolist()) == labels
        assert dataset.class_names[9] == "truck"


def test_stl10_agrees_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_stl10(tmp_path / "stl10_binary")
    # Its MD5s are those of the real files.
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for split in ("train", "test", "train+unlabeled"):
        ours = load_dataset("stl10", split, root=str(tmp_path))
        oracle = torchvision.datasets.STL10(tmp_path, split)
        assert np.array_equal(ours.images.numpy(), oracle.data)
        assert ours.labels.tolist() == oracle.labels.tolist()


def test_damaged_stl10_files_are_named(tmp_path: Path):
    write_stl10(tmp_path / "stl10_binary")
    labels = tmp_path / "stl10_binary" / "train_y.bin"
    for damaged in (b"", bytes([1, 2, 3]), bytes([0, 1, 2, 3]), bytes([11, 1, 2, 3])):
        labels.write_bytes(damaged)
        assert str(labels) in load_error("stl10", root=str(tmp_path))
    images = tmp_path / "stl10_binary" / "test_X.bin"
    os.truncate(images, 96 * 96)
    assert str(images) in load_error("stl10", "test", root=str(tmp_path))


# Folders of image files


def write_tinyimagenet(folder: Path) -> None:
    for wnid in ("n02", "n01"):
        for i in range(3):
            save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", random_bytes(64, 64, 3))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t63\t63\n")
    for i in range(3):
        save(folder / "val" / "images" / f"val_{i}.JPEG", random_bytes(64, 64, seed=i))
    (folder / "val" / "val_annotations.txt").write_text(
        "val_2.JPEG\tn02\t0\t0\t1\t1\nval_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n"
    )
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\n")


WRITERS: dict[str, Callable[[Path], object]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "fashion_mnist": lambda folder: write_fashion_mnist(
        folder, random_bytes(7, 28, 28), np.arange(7, dtype=np.uint8)
    ),
    "stl10": write_stl10,
    "tinyimagenet": write_tinyimagenet,
}


@pytest.mark.parametrize("nested", ["", "tiny-imagenet-200"])
def test_tinyimagenet(nested: str, tmp_path: Path):
    write_tinyimagenet(tmp_path / nested)
    train = load_dataset("tinyimagenet", root=str(tmp_path))
    assert [path.name for path in train.images] == [
        f"{wnid}_{i}.JPEG" for wnid in ("n01", "n02") for i in range(3)
    ]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.class_names == ("goldfish, Carassius auratus", "n02")
    test = load_dataset("tinyimagenet", "test", root=str(tmp_path))
    assert [path.name for path in test.images] == ["val_0.JPEG", "val_1.JPEG", "val_2.JPEG"]
    assert test.labels.tolist() == [1, 0, 1]
    # Grey JPEGs occur in the published set.
    grey = np.asarray(Image.open(test.images[1]))
    assert np.array_equal(test.read(1).numpy(), np.stack([grey] * 3))


def test_tinyimagenet_without_annotation(tmp_path: Path):
    write_tinyimagenet(tmp_path)
    save(tmp_path / "val" / "images" / "val_9.JPEG", random_bytes(64, 64, 3))
    message = load_error("tinyimagenet", "test", root=str(tmp_path))
    assert "val_annotations.txt" in message
    assert "val_9.JPEG" in message


def test_imagenet(tmp_path: Path):
    for name in ("train/n02/b.JPEG", "train/n02/a.JPEG", "train/n01/z.JPEG", "train/n03/c.JPEG"):
        save(tmp_path / name, random_bytes(5, 9, 3))
    save(tmp_path / "val/n03/v.JPEG", random_bytes(6, 4, 3))
    train = load_dataset("imagenet", root=str(tmp_path))
    assert [path.relative_to(tmp_path).as_posix() for path in train.images] == [
        "train/n01/z.JPEG",
        "train/n02/a.JPEG",
        "train/n02/b.JPEG",
        "train/n03/c.JPEG",
    ]
    assert train.labels.tolist() == [0, 1, 1, 2]
    # A class that the test split lacks must not shift the numbers.
    test = load_dataset("imagenet", "test", root=str(tmp_path))
    assert test.labels.tolist() == [2]
    assert test.class_names == train.class_names == ("n01", "n02", "n03")
    assert test.read(0).shape == (3, 6, 4)
    stray = tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG"
    save(stray, random_bytes(4, 4, 3))
    assert str(stray) in load_error("imagenet", "test", root=str(tmp_path))


def test_folder_of_classes_agrees_with_torchvision(tmp_path: Path):
    suffixes = ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "JPEG", "PNG"]
    for i, suffix in enumerate(suffixes):
        save(tmp_path / f"class {i % 3}" / f"{9 - i}.{suffix}", random_bytes(4, 6, 3, seed=i))
    save(tmp_path / "class 0" / "grey.pgm", random_bytes(4, 6))
    (tmp_path / "class 1" / "notes.txt").write_text("not an image")
    oracle = torchvision.datasets.ImageFolder(str(tmp_path))
    ours = load_dataset("folder", root=str(tmp_path))
    assert [str(path) for path in ours.images] == [path for path, _ in oracle.samples]
    assert ours.labels.tolist() == oracle.targets
    assert ours.class_names == tuple(oracle.classes)
    for i, (image, _) in enumerate(oracle):
        assert np.array_equal(ours.read(i).permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_splits(held_out: str, tmp_path: Path):
    for name in ("train/a/1.png", "train/b/2.png", "train/c/3.png"):
        save(tmp_path / name, random_bytes(4, 4, 3))
    for name in ("b/4.png", "c/5.png"):
        save(tmp_path / held_out / name, random_bytes(4, 4, 3))
    assert load_dataset("folder", root=str(tmp_path)).labels.tolist() == [0, 1, 2]
    test = load_dataset("folder", "test", root=str(tmp_path))
    assert test.labels.tolist() == [1, 2]
    assert test.class_names == ("a", "b", "c")
    stray = tmp_path / held_out / "d" / "6.png"
    save(stray, random_bytes(4, 4, 3))
    assert str(stray) in load_error("folder", "test", root=str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png"],
        ["1.png", "a/2.png", "b/3.png"],
        ["a/1.png", "a/2.png"],
        ["a/x/1.png", "b/y/2.png"],
        ["train/1.png", "train/2.png"],
    ],
    ids=["flat", "mixed", "one-folder", "deep", "flat-train"],
)
def test_folder_without_classes(names: list[str], tmp_path: Path):
    for name in names:
        save(tmp_path / name, random_bytes(4, 4, 3))
    dataset = load_dataset("folder", root=str(tmp_path))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in dataset.images) == names
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_folder_without_images_or_test_split(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    message = load_error("folder", root=str(tmp_path))
    assert str(tmp_path) in message
    assert ".jpg" in message
    assert "test or val" in load_error("folder", "test", root=str(tmp_path))


def test_hidden_entries_are_skipped_and_links_followed_once(tmp_path: Path):
    save(tmp_path / "store" / "x.png", random_bytes(4, 4, 3))
    root = tmp_path / "root"
    for name in ("b/2.png", "b/._2.png", ".cache/3.png"):
        save(root / name, random_bytes(4, 4, 3))
    (root / "a").symlink_to(tmp_path / "store")
    (root / "b" / "loop").symlink_to(root)
    images = load_dataset("folder", root=str(root)).images
    assert [path.relative_to(root).as_posix() for path in images] == ["a/x.png", "b/2.png"]


# Decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "P-alpha"])
def test_decoding_agrees_with_torchvision(mode: str, tmp_path: Path):
    image = Image.fromarray(random_bytes(5, 7, 3))
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "P-alpha":
        image.quantize(8).save(path, transparency=bytes([0, 100, 255]))
    else:
        image.convert(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = decode_image(path)
    assert ours.shape == (3, 5, 7)
    with warnings.catch_warnings():
        # Pillow's advice about palettes with transparency.
        warnings.simplefilter("ignore", UserWarning)
        oracle = default_loader(str(path))
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(oracle))


def test_exif_orientation_is_ignored(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_bytes(5, 7, 3)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        decode_image(tmp_path / "turned.png").permute(1, 2, 0).numpy(), random_bytes(5, 7, 3)
    )


def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for suffix in ("png", "tif"):
        path = tmp_path / f"deep.{suffix}"
        save(path, levels)
        assert np.array_equal(decode_image(path).numpy(), np.stack([levels >> 8] * 3))


def test_undecodable_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "intact.jpg", random_bytes(64, 64, 3))
    save(tmp_path / "intact.png", random_bytes(64, 64, 3))
    for suffix in ("jpg", "png"):
        intact = (tmp_path / f"intact.{suffix}").read_bytes()
        path = tmp_path / f"damaged.{suffix}"
        for damaged in (intact[: len(intact) // 2], b"", b"plain text", intact[:8]):
            path.write_bytes(damaged)
            assert str(path) in one_line_error(lambda path=path: decode_image(path))
    floats = tmp_path / "floats.tif"
    save(floats, np.ones((4, 4), dtype=np.float32))
    assert str(floats) in one_line_error(lambda: decode_image(floats))
    absent = tmp_path / "absent.png"
    assert str(absent) in one_line_error(lambda: decode_image(absent))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    assert "decompression bomb" in one_line_error(lambda: decode_image(tmp_path / "intact.png"))


# Fingerprints


def test_fingerprint_of_images_in_memory(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_cifar10(first)
    write_cifar10(second)
    reference = load_dataset("cifar10", root=str(first)).fingerprint()
    assert load_dataset("cifar10", root=str(second)).fingerprint() == reference
    assert load_dataset("cifar10", root=str(second), limit=14).fingerprint() != reference
    assert load_dataset("cifar10", "test", root=str(second)).fingerprint() != reference
    for position in (0, 1):  # a label, a pixel
        path = second / "data_batch_3.bin"
        intact = path.read_bytes()
        changed = bytearray(intact)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert load_dataset("cifar10", root=str(second)).fingerprint() != reference
        path.write_bytes(intact)


def test_fingerprint_of_image_files(tmp_path: Path):
    for root in ("first", "second"):
        for name in ("a/1.png", "b/2.png"):
            save(tmp_path / root / name, random_bytes(4, 4, 3))
    reference = load_dataset("folder", root=str(tmp_path / "first")).fingerprint()
    assert load_dataset("folder", root=str(tmp_path / "second")).fingerprint() == reference
    (tmp_path / "second" / "a" / "1.png").rename(tmp_path / "second" / "a" / "3.png")
    assert load_dataset("folder", root=str(tmp_path / "second")).fingerprint() != reference
    assert len(reference) == 64


@pytest.mark.parametrize("hashed_bytes", [2**28, 0])
def test_fingerprint_of_image_files_that_change_in_place(
    hashed_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another size always shows; the same size with another content in datasets that are small enough to read."""
    monkeypatch.setattr(datasets, "_HASHED_BYTES", hashed_bytes)
    for name in ("a/1.bmp", "b/2.bmp"):
        save(tmp_path / name, random_bytes(4, 4, 3))
    dataset = load_dataset("folder", root=str(tmp_path))
    reference = dataset.fingerprint()
    save(tmp_path / "a" / "1.bmp", random_bytes(4, 4, 3, seed=1))
    assert (dataset.fingerprint() != reference) == bool(hashed_bytes)
    save(tmp_path / "a" / "1.bmp", random_bytes(5, 5, 3))
    assert dataset.fingerprint() != reference
    (tmp_path / "a" / "1.bmp").unlink()
    assert dataset.fingerprint() != reference
