"""The small devkit that is drawn here: what is on its canvases, and the folder that it is kept in."""

import logging
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peerlearn.data import mini_voc as module
from peerlearn.data.canvases import MOST_ITEMS, Canvas, draw_canvas
from peerlearn.data.datasets import load_dataset
from peerlearn.data.image_folders import decode_image
from peerlearn.data.mini_voc import CANVASES, mini_voc
from peerlearn.data.packed_datasets import FASHION_MNIST_CLASSES
from peerlearn.data.verify import verify
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256
from tests.idx_files import write_idx

FEW = {"train": 12, "validation": 4, "test": 5}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "peerlearn/mini_voc"


def few(split: str = "train", seed: int = 0):
    return mini_voc(split, None, seed=seed, images=FEW)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def devkits(cache: Path) -> list[Path]:
    """What lies beside the locks."""
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def start(cache: Path, images: dict[str, int]) -> subprocess.Popen:
    """Another process that asks for the train split, and prints its fingerprint."""
    code = (
        "from peerlearn.data.mini_voc import mini_voc;"
        f"print(mini_voc('train', None, seed=0, images={images}).fingerprint())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)


def fingerprint_of(process: subprocess.Popen) -> str:
    return process.communicate()[0].split()[-1].decode()


# Items of known shapes: full rectangles of the brightest level.
BLOCKS = np.zeros((MOST_ITEMS, 28, 28), np.uint8)
for _number, _block in enumerate(BLOCKS):
    _block[3 : 12 + 2 * _number, 5 : 24 - 2 * _number] = 255


def step_by_step(number: int) -> tuple[Canvas, list[np.ndarray]]:
    """A canvas with blocks, and which pixels each of them changed when it was pasted."""
    pictures = [draw_canvas(list(BLOCKS[:items]), 5, number) for items in range(MOST_ITEMS + 1)]
    changed = [before.pixels != after.pixels for before, after in pairwise(pictures)]
    return pictures[-1], changed


def test_boxes_are_tight_and_flags_follow_from_what_is_hidden():
    flags = set()
    for number in range(60):
        canvas, changed = step_by_step(number)
        height, width = canvas.pixels.shape
        for item, (x1, y1, x2, y2), truncated, difficult in canvas.placed:
            rows, columns = (np.flatnonzero(changed[item].any(axis)) for axis in (1, 0))
            assert (columns[0], rows[0]) == (x1, y1)
            assert (columns[-1] + 1, rows[-1] + 1) == (x2, y2)
            if x1 == 0 or y1 == 0 or x2 == width or y2 == height:
                continue
            # Whole when it was pasted; what later ones took of its rectangle is hidden.
            seen = np.zeros((height, width), bool)
            seen[y1:y2, x1:x2] = True
            for _, (left, top, right, bottom), *_ in (
                each for each in canvas.placed if each.item > item
            ):
                seen[top:bottom, left:right] = False
            hidden_percent = 100 - 100 * seen.sum() / ((y2 - y1) * (x2 - x1))
            assert truncated == (hidden_percent > 5)
            assert difficult == (hidden_percent > 60)
            assert hidden_percent <= 85
            flags.add((truncated, difficult))
    assert flags == {(False, False), (True, False), (True, True)}


def test_items_beyond_the_border_are_truncated():
    cut = 0
    for number in range(60):
        canvas, _ = step_by_step(number)
        for item, (x1, y1, x2, y2), truncated, _ in canvas.placed:
            # The enlarged block keeps its shape, unless a part of it is beyond the border.
            shape = (9 + 2 * item) / (19 - 2 * item)
            if abs((y2 - y1) / (x2 - x1) / shape - 1) > 0.25:
                assert truncated
                cut += 1
    assert cut > 10


def test_every_byte_is_pinned_so_that_no_refactoring_changes_data(cache: Path):
    """If this fails on purpose, raise the number of the recipe too."""
    few()
    (devkit,) = devkits(cache)
    assert file_sha256(devkit / "SHA256SUMS")[:16] == "562fa48f4f408c2a"
    assert module._RECIPE == 1


def test_canvases_vary(cache: Path):
    data = mini_voc("train", None, seed=0, images={"train": 200, "validation": 1, "test": 1})
    counts = [len(labels) for labels in data.labels]
    assert set(counts) == set(range(MOST_ITEMS + 1))
    # 6 % of 200 are drawn empty.
    assert 4 <= counts.count(0) <= 30
    assert set(data.sizes.flatten().tolist()) == {96, 112, 128, 144, 160}
    of_class = torch.cat(data.labels).bincount(minlength=10)
    assert of_class.min() > 30
    difficult, truncated = torch.cat(data.difficult), torch.cat(data.truncated)
    assert 5 < difficult.sum() < truncated.sum() < len(truncated) // 2
    # A detector has to find all kinds of brightness.
    means = torch.tensor([data.read(i).float().mean() for i in range(200)])
    assert means.std() > 20


def test_the_devkit_is_read_by_the_reader_of_voc(cache: Path):
    data = few("validation")
    assert (data.name, data.split, data.title) == ("mini_voc", "validation", "mini_voc")
    assert data.class_names == FASHION_MNIST_CLASSES
    assert len(data) == FEW["validation"]
    (devkit,) = devkits(cache)
    assert data.images[0] == devkit / "VOC2007/JPEGImages/val_000000.png"
    for image, (width, height) in zip(data.images, data.sizes.tolist(), strict=True):
        assert decode_image(image).shape == (3, height, width)
    found = verify(devkit, classes=FASHION_MNIST_CLASSES)
    assert not found.faults
    sizes = {split.name: len(split.images) for split in found.splits}
    assert sizes == {"trainval2007": 16, "train2007": 12, "val2007": 4, "test2007": 5}


def test_published_numbers_of_canvases():
    assert CANVASES == {"train": 1500, "validation": 300, "test": 500}


def test_splits_take_items_of_their_own_and_none_twice(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    dealt: dict[int, list[bytes]] = {0: [], 1: [], 2: []}

    def note(items, seed, part, number):
        dealt[part] += [item.tobytes() for item in items]
        return draw_canvas(items, seed, part, number)

    monkeypatch.setattr(module, "draw_canvas", note)
    few()
    train, test = (load_dataset("fashion_mnist", part).images for part in ("train", "test"))
    pools = [train[:50_000], train[50_000:], test]
    for part, pool in enumerate(pools):
        known = {image.numpy().tobytes() for image in pool}
        assert len(dealt[part]) == MOST_ITEMS * list(FEW.values())[part]
        assert len(set(dealt[part])) == len(dealt[part])
        assert set(dealt[part]) <= known


def test_annotations_tell_what_was_drawn(cache: Path):
    data = few("test")
    levels, labels = module._items(None)["test"]
    order = module.permutation(len(levels), module.MINI_VOC, 0, 2).numpy()
    for number in range(FEW["test"]):
        dealt = order[MOST_ITEMS * number :][:MOST_ITEMS]
        canvas = draw_canvas(levels[dealt], 0, 2, number)
        assert np.array_equal(data.read(number)[0], canvas.pixels)
        assert data.boxes[number].tolist() == [list(each.box) for each in canvas.placed]
        assert data.labels[number].tolist() == [labels[dealt[each.item]] for each in canvas.placed]
        assert data.truncated[number].tolist() == [each.truncated for each in canvas.placed]
        assert data.difficult[number].tolist() == [each.difficult for each in canvas.placed]


def test_bytes_are_the_same_in_every_process_and_follow_the_seed(cache: Path, tmp_path: Path):
    first = few().fingerprint()
    (devkit,) = devkits(cache)
    assert fingerprint_of(start(tmp_path / "other/peerlearn/mini_voc", FEW)) == first
    assert content(tmp_path / "other/peerlearn/mini_voc" / devkit.name) == content(devkit)
    assert few(seed=1).fingerprint() != first
    assert len(devkits(cache)) == 2


def test_more_canvases_begin_with_the_same(cache: Path):
    small, large = few(), mini_voc("train", None, seed=0, images={**FEW, "train": 15})
    for one, other in zip(small.images, large.images, strict=False):
        assert one.read_bytes() == other.read_bytes()
    assert len(large) == 15


def test_files_are_plain_grey_png(cache: Path):
    file = few().images[0]
    with Image.open(file) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        pixels = np.asarray(image)
    # A file of one block of 65,535 bytes and a part of another.
    large = np.arange(70_000, dtype=np.uint32).astype(np.uint8).reshape(200, 350)
    (file.parent / "large.png").write_bytes(module._png(large))
    with Image.open(file.parent / "large.png") as image:
        assert np.array_equal(np.asarray(image), large)
    assert module._png(pixels) == file.read_bytes()


def change(devkit: Path) -> None:
    file = devkit / "VOC2007/JPEGImages/train_000003.png"
    file.write_bytes(file.read_bytes()[:-20] + b"\0" * 20)


def remove(devkit: Path) -> None:
    (devkit / "VOC2007/Annotations/val_000001.xml").unlink()


def add(devkit: Path) -> None:
    (devkit / "VOC2007/JPEGImages/train_000003.jpg").write_bytes(b"")


def lose_sums(devkit: Path) -> None:
    (devkit / "SHA256SUMS").write_text("no sums\n")


@pytest.mark.parametrize("damage", [change, remove, add, lose_sums])
def test_a_damaged_devkit_is_written_again(damage, cache: Path, caplog: pytest.LogCaptureFixture):
    few()
    (devkit,) = devkits(cache)
    whole = content(devkit)
    damage(devkit)
    with caplog.at_level(logging.WARNING):
        few("test")
    assert content(devkit) == whole
    assert "is damaged or was changed: it is written again" in caplog.text


def test_a_whole_devkit_is_not_written_again_and_needs_no_fashion_mnist(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    few()
    monkeypatch.setattr(module, "_write", None)
    assert len(few("test")) == FEW["test"]


def wait_for_images(cache: Path, process: subprocess.Popen) -> None:
    while not list(cache.glob(".*.tmp/VOC2007/JPEGImages/*")):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.slow(15)
def test_a_writer_that_is_killed_leaves_nothing_half_and_two_write_once(cache: Path):
    killed = start(cache, {"train": 150})
    wait_for_images(cache, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [path.name.endswith(".tmp") for path in devkits(cache)] == [True]
    both = [start(cache, {"train": 150}) for _ in range(2)]
    assert len({fingerprint_of(process) for process in both}) == 1
    (devkit,) = devkits(cache)
    assert module._is_whole(devkit)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\): make room there"):
        few()


def test_a_planted_link_leads_nothing_elsewhere(cache: Path, tmp_path: Path):
    few()
    (written,) = devkits(cache)
    written.rename(tmp_path / "old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    written.with_name(f".{written.name}.tmp").symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"{written} cannot be written \(File exists"):
        few()
    assert list(elsewhere.iterdir()) == []


def test_a_full_disk_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fill(canvas):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_png", fill)
    with pytest.raises(UserError, match="No space left on device"):
        few()
    assert devkits(cache) == []


def test_other_images_than_the_published_ones_are_refused(cache: Path, tmp_path: Path):
    root = tmp_path / "other"
    for prefix, count in (("train", 20), ("t10k", 10)):
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", np.ones((count, 28, 28), np.uint8))
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    with pytest.raises(UserError, match=r"Fashion-MNIST as published, and .*other differs"):
        mini_voc("train", str(root), seed=0, images=FEW)
    assert devkits(cache) == []


def test_an_unknown_split_is_named(cache: Path):
    with pytest.raises(UserError, match="no split 'val': choose from train, validation, test"):
        few("val")
