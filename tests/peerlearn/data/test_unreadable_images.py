"""Image files that cannot be decoded: told apart, substituted by counters, reported, and limited."""

import os
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader

from peerlearn.counter_random import SUBSTITUTE, random_bits
from peerlearn.data.augment import (
    ViewParameters,
    distort,
    draw_view_parameters,
)
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.evaluation_views import evaluation_batches
from peerlearn.data.image_folders import DecodeError, decode_image
from peerlearn.data.loader import ViewBatch, ViewLoader
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation
from peerlearn.data.unreadable import (
    Unreadable,
    check_unreadable_rate,
    read_substitute,
    substitutes,
)
from peerlearn.errors import UserError
from peerlearn.evaluation.features import extract_features
from tests.view_loaders import view_loader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CPU = torch.device("cpu")
CROP_FLIP = AUGMENTATIONS["crop_flip"]
UNKNOWN = "no image in any known format"


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_dataset(folder: Path, count: int, size: tuple[int, int] = (9, 11)) -> ImageDataset:
    """PNG files of noise; each image's label is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{i:02}.png" for i in range(count))
    for i, path in enumerate(paths):
        Image.fromarray(pixels(*size, seed=i)).save(path)
    return ImageDataset(
        name="made",
        split="train",
        images=paths,
        labels=torch.arange(count),
        class_names=tuple(map(str, range(count))),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def empty(dataset: ImageDataset, *unreadable: int) -> ImageDataset:
    """The dataset, the files of these images emptied."""
    for index in unreadable:
        dataset.images[index].write_bytes(b"")
    return dataset


def make(dataset: ImageDataset, backend: str, **changes: object) -> ViewLoader:
    arguments = {
        "augmentation": CROP_FLIP,
        "backend": backend,
        "image_size": 8,
        "batch_size_global": len(dataset),
        "seed": 3,
        "device": CPU,
        "max_unreadable_percent": 100,
    }
    return view_loader(dataset, **{**arguments, **changes})


def labels_by_index(batches: list[ViewBatch]) -> dict[int, int]:
    return {
        i: label
        for batch in batches
        for i, label in zip(batch.index.tolist(), batch.labels.tolist(), strict=True)
    }


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# What cannot be decoded


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises that many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write_unreadable(folder: Path) -> dict[Path, str]:
    """One file of each kind, with the reason it is refused for."""
    reasons = {
        "truncated.jpg": "image file is truncated",
        "lacks_its_end.jpg": "image file is truncated",
        "empty.jpg": UNKNOWN,
        "text.jpg": UNKNOWN,
        "folder.jpg": "Is a directory",
        "dangling.jpg": "No such file or directory",
        "floats.tif": "32 bits",
        "truncated.tif": UNKNOWN,
        "bad_strip.tif": "decoder error",
        "bomb.png": r"Image size \(3600000000 pixels\) exceeds limit",
        "small_bomb.png": r"Image size \(90000000 pixels\) exceeds limit of 89478485",
    }
    files = {folder / name: reason for name, reason in reasons.items()}
    image = Image.fromarray(pixels(40, 40))
    image.save(folder / "intact.jpg")
    image.save(folder / "intact.tif", compression="tiff_lzw")
    jpeg, tiff = ((folder / f"intact.{suffix}").read_bytes() for suffix in ("jpg", "tif"))
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "lacks_its_end.jpg").write_bytes(jpeg[:-3])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "floats.tif")
    (folder / "truncated.tif").write_bytes(tiff[: len(tiff) // 2])
    start = tiff.index(b"\x80")  # the LZW code that every strip starts with
    (folder / "bad_strip.tif").write_bytes(tiff[:start] + b"\xff" * 60 + tiff[start + 60 :])
    (folder / "bomb.png").write_bytes(png_claiming(60_000, 60_000))
    (folder / "small_bomb.png").write_bytes(png_claiming(9_000, 10_000))
    return files


def test_unreadable_files_are_refused_in_one_line_and_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for path, reason in write_unreadable(tmp_path).items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(DecodeError, match=reason) as error:
                decode_image(path)
        assert not warned
        assert one_line(error) == (
            f"cannot decode {path} ({error.value.reason}): replace or remove the file"
        )
        assert str(tmp_path) not in error.value.reason
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tiff_leaves_stderr_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_unreadable(tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DecodeError):
        decode_image(tmp_path / "bad_strip.tif")
    # Without the care taken, libtiff writes.
    with Image.open(tmp_path / "bad_strip.tif") as image, pytest.raises(OSError, match="decoder"):
        image.load()
    assert "tif" in capfd.readouterr().err
    os.write(2, b"still heard")
    assert capfd.readouterr().err == "still heard"
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_cmyk_and_16_bit_files_are_readable(
    backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    image = Image.fromarray(pixels(8, 8))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    paths = (tmp_path / "cmyk.jpg", tmp_path / "deep.png")
    dataset = replace(image_dataset(tmp_path / "rest", 2), images=paths)
    (batch,) = make(dataset, backend, max_unreadable_percent=0).epoch(0)
    assert batch.unreadable == ()
    assert batch.labels.tolist() == batch.index.tolist()
    (views,) = evaluation_batches(dataset, image_size=8, batch_size=2, device=CPU)
    ours = ((views * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours[0], np.asarray(default_loader(str(paths[0]))))
    assert np.array_equal(ours[1], np.stack([(deep >> 8).astype(np.uint8)] * 3, axis=2))
    assert capfd.readouterr() == ("", "")


# Substitutes


def test_substitutes_are_pinned_so_that_no_refactoring_changes_runs():
    image = Unreadable(5, "5.png", UNKNOWN)
    drawn = list(islice(substitutes(image, images=1000, seed=7), 4))
    assert drawn == [int(random_bits(SUBSTITUTE, 7, 5, attempt)) % 1000 for attempt in range(4)]
    assert drawn == [549, 418, 843, 538]


def test_substitutes_are_drawn_evenly():
    first = [next(substitutes(Unreadable(i, "", ""), images=10, seed=0)) for i in range(2000)]
    counts = np.bincount(first, minlength=10)
    # Nine degrees of freedom: above 33.7 in one of 10,000 samples.
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_two_unreadable_images_that_would_take_each_others_place(backend: str, tmp_path: Path):
    count, first, second = 12, 0, 5

    def drawn(index: int, seed: int) -> list[int]:
        image = Unreadable(index, "", "")
        return list(islice(substitutes(image, images=count, seed=seed), 20))

    seed = next(
        s for s in range(10_000) if (drawn(first, s)[0], drawn(second, s)[0]) == (second, first)
    )
    dataset = empty(image_dataset(tmp_path, count), first, second)
    loader = make(dataset, backend, seed=seed)
    (batch,) = loader.epoch(0)
    labels = labels_by_index([batch])
    for index in (first, second):
        expected = next(j for j in drawn(index, seed) if j not in (first, second))
        assert labels[index] == expected
        image = Unreadable(index, "", "")
        number, decoded = read_substitute(image, dataset.images, seed=seed)
        assert number == expected
        assert torch.equal(decoded, dataset.read(expected))
    assert {image.index for image in batch.unreadable} == {first, second}


@pytest.fixture(scope="module")
def seventeen(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return empty(image_dataset(tmp_path_factory.mktemp("images"), 17), 0, 3, 8, 9, 16)


@settings(max_examples=25, deadline=None)
@given(
    backend=st.sampled_from(["memory", "folder"]),
    epoch=st.integers(0, 50),
    per_rank=st.integers(1, 5),
    world_size=st.integers(1, 3),
    start_step=st.integers(0, 3),
)
def test_an_image_keeps_its_substitute(
    backend: str,
    epoch: int,
    per_rank: int,
    world_size: int,
    start_step: int,
    seventeen: ImageDataset,
):
    (whole,) = make(seventeen, "memory").epoch(0)
    expected = labels_by_index([whole])
    assert {i for i in expected if expected[i] != i} == {0, 3, 8, 9, 16}
    assert not {0, 3, 8, 9, 16} & set(expected.values())
    batch_size = per_rank * world_size
    start_step = min(start_step, 17 // batch_size)
    for rank in range(world_size):
        loader = make(
            seventeen, backend, batch_size_global=batch_size, rank=rank, world_size=world_size
        )
        for batch in loader.epoch(epoch, start_step):
            index = batch.index.tolist()
            assert batch.labels.tolist() == [expected[i] for i in index]
            reported = [image.index for image in batch.unreadable]
            assert reported == [i for i in index if i in (0, 3, 8, 9, 16)]


@pytest.mark.parametrize("workers", [0, 2])
def test_view_parameters_fit_the_size_of_the_substitute(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = empty(image_dataset(tmp_path, 4), 3)
    # A gradient from left to right tells where a crop was cut.
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (20, 200, 3))
    Image.fromarray(gradient).save(dataset.images[1])
    seed = next(
        s for s in range(100) if next(substitutes(Unreadable(3, "", ""), images=4, seed=s)) == 1
    )
    used: list[ViewParameters] = []

    def recording(crops: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> Tensor:
        used.append(parameters)
        return distort(crops, parameters, augmentation)

    monkeypatch.setattr("peerlearn.data.loader.distort", recording)
    (batch,) = make(dataset, "folder", seed=seed, workers=workers).epoch(0)
    row = batch.index.tolist().index(3)
    assert batch.labels[row] == 1
    for view, crops in enumerate(batch.views):
        expected = draw_view_parameters(
            CROP_FLIP,
            seed=seed,
            epoch=0,
            index=torch.tensor([3]),
            draw=torch.tensor([0]),
            view=view,
            height=20,
            width=200,
        )
        for ours, alone in zip(used[view], expected, strict=True):
            assert torch.equal(ours[row : row + 1], alone)
        _, left, _, width = expected.box[0].tolist()
        grey = (crops[row] * 0.5 + 0.5) * 255
        assert grey.mean().item() == pytest.approx(left + (width - 1) / 2, abs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_follows_what_happens_to_a_file(workers: int, tmp_path: Path):
    dataset = image_dataset(tmp_path, 6)
    loader = make(dataset, "folder", workers=workers)
    (intact,) = loader.epoch(4)
    assert intact.unreadable == ()
    aside = shutil.move(dataset.images[2], tmp_path / "aside")
    (without,) = loader.epoch(4)
    assert without.unreadable == (
        Unreadable(2, str(dataset.images[2]), "No such file or directory"),
    )
    rows = without.index != 2
    for ours, expected in zip(without.views, intact.views, strict=True):
        assert torch.equal(ours[rows], expected[rows])
        assert not torch.equal(ours[~rows], expected[~rows])
    shutil.move(aside, dataset.images[2])
    (mended,) = loader.epoch(4)
    assert mended.unreadable == ()
    assert all(map(torch.equal, mended.views, intact.views))


def test_images_without_labels(seventeen: ImageDataset):
    dataset = replace(seventeen, labels=None)
    for backend in ("memory", "folder"):
        (batch,) = make(dataset, backend).epoch(0)
        assert batch.labels is None
        assert len(batch.unreadable) == 5


# Too many


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_tells_all_at_once_and_refuses_more_than_the_rate(workers: int, tmp_path: Path):
    dataset = empty(image_dataset(tmp_path, 100), 0, 64, 65, 99)
    loader = make(dataset, "memory", max_unreadable_percent=4, workers=workers)
    assert loader.unreadable == tuple(
        Unreadable(i, str(dataset.images[i]), UNKNOWN) for i in (0, 64, 65, 99)
    )
    with pytest.raises(UserError) as error:
        make(dataset, "memory", max_unreadable_percent=3.9, workers=workers)
    named = ", ".join(f"{dataset.images[i]} ({UNKNOWN})" for i in (0, 64, 65))
    assert one_line(error) == (
        f"4 of 100 images (4 %) cannot be decoded: {named}, ...: restore or remove them, "
        "or raise data.max_unreadable_percent (3.9)"
    )


def test_one_percent_is_allowed_unless_told_otherwise(tmp_path: Path):
    dataset = empty(image_dataset(tmp_path, 100), 7)
    arguments = {"image_size": 8, "batch_size_global": 4, "seed": 0, "device": CPU}
    loader = view_loader(dataset, augmentation=CROP_FLIP, backend="memory", **arguments)
    assert len(loader.unreadable) == 1
    empty(dataset, 8)
    with pytest.raises(UserError, match=r"2 of 100 images \(2 %\)"):
        view_loader(dataset, augmentation=CROP_FLIP, backend="memory", **arguments)


@pytest.mark.parametrize(
    ("count", "images", "max_percent", "refused"),
    [
        (0, 10, 0, False),
        (1, 10_000_000, 0, True),
        (10, 1000, 1, False),
        (11, 1000, 1, True),
        (1, 99, 1, True),
        (7, 1000, 0.7, False),
        (10, 10, 100, False),
    ],
)
def test_the_rate_may_be_reached_but_not_passed(
    count: int, images: int, max_percent: float, refused: bool
):
    examples = [Unreadable(3, "a.png", "empty")]
    if refused:
        with pytest.raises(UserError, match=r"a\.png \(empty\).*data\.max_unreadable_percent"):
            check_unreadable_rate(count, images, max_percent, examples)
    else:
        check_unreadable_rate(count, images, max_percent, examples)


@pytest.mark.parametrize(
    ("count", "ending"), [(1, "(empty): restore"), (2, "(empty), ...: restore")]
)
def test_the_message_says_whether_it_names_all(count: int, ending: str):
    with pytest.raises(UserError) as error:
        check_unreadable_rate(count, 7, 0, [Unreadable(3, "a.png", "empty")])
    assert ending in one_line(error)


# Evaluation


class Sums(nn.Module):
    """Three features: the channels' sums."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sum((2, 3)) + 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_refuses_an_unreadable_image(workers: int, tmp_path: Path):
    dataset = empty(image_dataset(tmp_path, 7), 4, 5)
    arguments = {"image_size": 8, "batch_size": 3, "device": CPU, "workers": workers}
    batches = evaluation_batches(dataset, **arguments)
    next(batches)
    with pytest.raises(UserError) as error:
        next(batches)
    assert one_line(error).startswith(f"cannot decode {dataset.images[4]} ({UNKNOWN})")
    with pytest.raises(UserError, match=r"04\.png"):
        extract_features([Sums()], dataset, **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_around_unreadable_images(workers: int, tmp_path: Path):
    intact = image_dataset(tmp_path / "intact", 7)
    dataset = empty(image_dataset(tmp_path / "damaged", 7), 0, 4, 5)
    arguments = {"image_size": 8, "batch_size": 3, "device": CPU, "workers": workers}
    earlier = Unreadable(1, "of another split", "empty")
    unreadable = [earlier]
    networks = [Sums(), Sums()]
    ours = extract_features(networks, dataset, unreadable=unreadable, **arguments)
    assert unreadable == [
        earlier,
        *(Unreadable(i, str(dataset.images[i]), UNKNOWN) for i in (0, 4, 5)),
    ]
    for features, expected in zip(
        ours, extract_features(networks, intact, **arguments), strict=True
    ):
        assert features[[0, 4, 5]].count_nonzero() == 0
        assert torch.equal(features[[1, 2, 3, 6]], expected[[1, 2, 3, 6]])


def test_evaluation_of_a_part_tells_numbers_in_the_dataset(tmp_path: Path):
    dataset = empty(image_dataset(tmp_path, 9), 1, 5, 8)
    unreadable: list[Unreadable] = []
    views = evaluation_batches(
        dataset, image_size=8, batch_size=2, device=CPU, start=4, stop=8, unreadable=unreadable
    )
    black = [bool((view == -1).all()) for batch in views for view in batch]
    assert black == [False, True, False, False]
    assert [image.index for image in unreadable] == [5]
