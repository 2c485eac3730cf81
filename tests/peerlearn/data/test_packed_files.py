"""Packed files: what is written, what is refused, and what a training must not suffer from ffcv.

The contract of all backends is in tests/contract/test_loader_backends.py.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peerlearn.data import beton_facts, beton_file, croppers, threads
from peerlearn.data.beton_dataset import check_packed_from, packed_dataset
from peerlearn.data.beton_facts import checked_facts, read_facts
from peerlearn.data.beton_file import PackedFile, open_packed
from peerlearn.data.beton_writer import pack
from peerlearn.data.datasets import ImageDataset, first_images, load_dataset
from peerlearn.data.ffcv_package import why_no_ffcv
from peerlearn.data.image_folders import DecodeError
from peerlearn.data.loader import ViewLoader
from peerlearn.data.recipes import AUGMENTATIONS
from peerlearn.data.threads import ahead
from peerlearn.errors import CrashError, UserError
from tests.view_loaders import NEEDS_FFCV, packed_copy, view_loader

pytestmark = NEEDS_FFCV
CPU = torch.device("cpu")


def smooth(height: int, width: int, number: int) -> np.ndarray:
    """A colour image that JPEG keeps well, (height, width, 3)."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photos(folder: Path, *sizes: tuple[int, int], suffix: str = "jpg") -> ImageDataset:
    """Image files of these heights and widths, in two class folders by turns."""
    for number, size in enumerate(sizes):
        file = folder / "ab"[number % 2] / f"{number:03}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(*size, number)).save(file)
    return load_dataset("folder", root=str(folder))


SIZES = [(60, 80), (80, 60), (50, 50), (61, 79)] * 4


def make(dataset: ImageDataset, **changes: object) -> ViewLoader:
    arguments = {
        "augmentation": AUGMENTATIONS["crop_flip"],
        "backend": "ffcv",
        "image_size": 24,
        "batch_size_global": 4,
        "seed": 3,
        "device": CPU,
    }
    return view_loader(dataset, **{**arguments, **changes})


def packed(tmp_path: Path, format: str = "raw", sizes: list[tuple[int, int]] = SIZES) -> Path:
    file = tmp_path / "photos.beton"
    pack(photos(tmp_path / "photos", *sizes), file, format=format)
    return file


def opened(file: Path) -> ImageDataset:
    return packed_dataset(file, "folder", "train")


def change_byte(file: Path, place: int, *, time_too: bool = True) -> None:
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 0xFF]))
    if not time_too:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


class TestWriting:
    @pytest.mark.parametrize("format", ["raw", "jpeg"])
    def test_ffcv_s_own_loader_reads_the_file(self, format: str, tmp_path: Path):
        from ffcv.loader import Loader

        dataset = load_dataset("digits", limit=150)
        file = tmp_path / "digits.beton"
        facts = pack(dataset, file, format=format)
        read = list(Loader(str(file), batch_size=50, num_workers=1))
        images = torch.cat([torch.as_tensor(image).clone() for image, _ in read])
        labels = torch.cat([torch.as_tensor(label).clone() for _, label in read])
        assert torch.equal(labels[:, 0], dataset.labels)
        expected = dataset.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        if format == "raw":
            assert torch.equal(images, expected)
        else:
            assert (images.int() - expected.int()).abs().float().mean() < 5
        assert (facts.images, facts.format, facts.labelled) == (150, format, True)

    def test_the_hash_is_that_of_sha256sum(self, tmp_path: Path):
        file = packed(tmp_path)
        said = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True)
        assert json.loads((tmp_path / "photos.beton.json").read_text())["sha256"] in said.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("photos", "photos.beton", "photos.beton.json"),
        ]

    def test_raw_files_hold_the_pixels(self, tmp_path: Path):
        dataset = opened(packed(tmp_path))
        originals = load_dataset("folder", root=str(tmp_path / "photos"))
        assert torch.equal(dataset.labels, originals.labels)
        assert dataset.class_names == originals.class_names == ("a", "b")
        for index in range(len(originals)):
            assert torch.equal(dataset.read(index), originals.read(index))

    def test_grey_images_have_one_channel_again(self):
        digits = load_dataset("digits", limit=20)
        dataset = packed_copy(digits)
        assert all(torch.equal(dataset.read(i), digits.images[i]) for i in range(20))
        assert dataset.channels == 1

    def test_jpeg_files_are_kept_as_they_are_and_others_are_encoded(self, tmp_path: Path):
        dataset = photos(tmp_path / "photos", *SIZES)
        png = tmp_path / "photos/a/900.png"
        Image.fromarray(smooth(50, 60, 900)).save(png)
        four_inks = tmp_path / "photos/b/901.jpg"
        Image.fromarray(smooth(50, 60, 901)).convert("CMYK").save(four_inks)
        dataset = load_dataset("folder", root=str(tmp_path / "photos"))
        file = tmp_path / "photos.beton"
        pack(dataset, file, format="jpeg")
        content = file.read_bytes()
        kept = [path for path in dataset.images if path.read_bytes() in content]
        assert set(dataset.images) - set(kept) == {png, four_inks}
        for ours, index in ((opened(file).read(i), i) for i in range(len(dataset))):
            difference = (ours.int() - dataset.read(index).int()).abs().float()
            assert difference.mean() < (4 if index in (8, 17) else 1.5), dataset.images[index]

    def test_large_images_are_resized_by_their_shorter_side(self, tmp_path: Path):
        dataset = photos(tmp_path / "photos", (60, 80), (100, 50), (30, 20))
        file = tmp_path / "photos.beton"
        assert pack(dataset, file, format="jpeg", shorter_side=40).shorter_side == 40
        whole = open_packed(file)
        assert [whole.extent(i)[::-1] for i in (0, 1, 2)] == [(40, 53), (30, 20), (80, 40)]
        # Shrunk, not cut: the mean colour stays.
        assert torch.allclose(
            opened(file).read(0).float().mean((1, 2)),
            dataset.read(0).float().mean((1, 2)),
            atol=2,
        )

    def test_images_larger_than_a_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("peerlearn.data.beton_writer._PAGE_BYTES", 2**12)
        dataset = opened(packed(tmp_path))
        originals = load_dataset("folder", root=str(tmp_path / "photos"))
        assert all(torch.equal(dataset.read(i), originals.read(i)) for i in range(len(SIZES)))

    def test_unreadable_images_keep_their_places_and_are_listed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        dataset = photos(tmp_path / "photos", *SIZES)
        bad = dataset.images[5]
        bad.write_bytes(b"no image")
        file = tmp_path / "photos.beton"
        with pytest.raises(UserError, match=r"1 of 16 images .*max_unreadable_percent \(1\)\Z"):
            pack(dataset, file, format="raw")
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]
        facts = pack(dataset, file, format="raw", max_unreadable_percent=10)
        assert facts == read_facts(file)
        (named,) = facts.unreadable
        assert named == (5, str(bad), "no image in any known format")
        (record,) = caplog.records
        assert str(bad) in record.getMessage()
        with pytest.raises(DecodeError, match="could not be decoded when it was packed"):
            opened(file).read(5)
        with pytest.raises(UserError, match=r"1 of 16 images"):
            make(opened(file), max_unreadable_percent=1)

    def test_a_disk_that_is_full_is_one_line(self, tmp_path: Path):
        dataset = photos(tmp_path / "photos", *SIZES)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            with pytest.raises(
                UserError, match=r"\A[^\n]*photos.beton: cannot be written \(File t"
            ):
                pack(dataset, tmp_path / "photos.beton", format="raw")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_nothing_is_written_over(self, tmp_path: Path):
        file = packed(tmp_path)
        content = file.read_bytes()
        for there in (file, beton_facts.facts_file(file)):
            with pytest.raises(UserError, match=r"\A[^\n]*photos.beton is there already"):
                pack(load_dataset("digits"), file, format="raw")
            there.rename(tmp_path / "aside")
            with pytest.raises(UserError, match="is there already"):
                pack(load_dataset("digits"), file, format="raw")
            (tmp_path / "aside").rename(there)
        assert file.read_bytes() == content
        with pytest.raises(UserError, match=r"photos.bin must end in .beton"):
            pack(load_dataset("digits"), tmp_path / "photos.bin", format="raw")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose SHA-256 is worked out."""
    files: list[Path] = []
    plain = beton_facts.file_sha256

    def noting(file: Path) -> str:
        files.append(file)
        return plain(file)

    monkeypatch.setattr(beton_facts, "file_sha256", noting)
    return files


class TestDamage:
    def test_a_changed_byte_is_refused_by_name(self, tmp_path: Path):
        file = packed(tmp_path)
        opened(file)
        change_byte(file, file.stat().st_size // 2)
        with pytest.raises(UserError, match=r"\A[^\n]*photos.beton is damaged: its SHA-256"):
            opened(file)
        change_byte(file, file.stat().st_size // 2)
        opened(file)

    def test_a_file_cut_short_is_refused_unread(self, tmp_path: Path, hashed: list[Path]):
        file = packed(tmp_path)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(
            UserError, match=r"\A[^\n]*photos.beton is damaged: it has [\d,]+ bytes"
        ):
            opened(file)
        assert hashed == []

    def test_the_hash_is_kept_by_size_and_time(
        self, tmp_path: Path, hashed: list[Path], capsys: pytest.CaptureFixture[str]
    ):
        file = packed(tmp_path)
        opened(file)
        assert hashed == []
        os.utime(file)
        for _ in range(2):
            opened(file)
            assert hashed == [file]
        assert capsys.readouterr().out == (
            f"{file}: reading all of it once, to compare its SHA-256\n"
        )

    def test_facts_that_cannot_be_written_cost_a_reading_each(
        self,
        tmp_path: Path,
        hashed: list[Path],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        file = packed(tmp_path)
        os.utime(file)

        def refused(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(beton_facts, "write_facts", refused)
        for times in (1, 2):
            checked_facts(file)
            assert hashed == [file] * times
        assert "photos.beton.json cannot be written (Permission denied)" in caplog.text

    @pytest.mark.parametrize("content", [None, b"", b"[]", b'{"sha256": 1}', b"\xff"])
    def test_facts_that_are_gone_or_spoilt(self, content: bytes | None, tmp_path: Path):
        file = packed(tmp_path)
        beside = beton_facts.facts_file(file)
        if content is None:
            beside.unlink()
        else:
            beside.write_bytes(content)
        with pytest.raises(UserError, match=r"\A[^\n]*photos.beton.json[^\n]*data build[^\n]*\Z"):
            opened(file)

    @pytest.mark.parametrize("content", [b"", b"text", bytes(5000)])
    def test_what_is_no_packed_file(self, content: bytes, tmp_path: Path):
        file = tmp_path / "a.beton"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"\A[^\n]*a.beton is no packed file \([^\n]*\Z"):
            PackedFile(file)

    def test_a_path_at_which_nothing_lies_is_named_and_not_its_facts(self, tmp_path: Path):
        file = tmp_path / "nowhere.beton"
        with pytest.raises(UserError, match=r"cannot read [^\n]*nowhere.beton \(No such file"):
            packed_dataset(file, "folder", "train")

    def test_a_file_that_is_gone(self, tmp_path: Path):
        file = packed(tmp_path)
        file.unlink()
        with pytest.raises(UserError, match=r"cannot read [^\n]*photos.beton \(No such file"):
            opened(file)


class TestBelonging:
    def test_another_name_or_split_is_refused(self, tmp_path: Path):
        file = packed(tmp_path)
        for name, split in (("cifar10", "train"), ("folder", "test")):
            with pytest.raises(UserError, match=rf"holds folder train, not {name} {split}: "):
                packed_dataset(file, name, split)

    def test_other_images_are_refused(self, tmp_path: Path):
        file = packed(tmp_path)
        originals = load_dataset("folder", root=str(tmp_path / "photos"))
        facts = read_facts(file)
        check_packed_from(facts, file, originals)
        with pytest.raises(UserError, match=r"holds 16 images, and photos train has 15: "):
            check_packed_from(facts, file, first_images(originals, 15))
        labels = originals.labels.clone()
        labels[0] = 1 - labels[0]
        renamed = (originals.images[0].with_name("x.jpg"), *originals.images[1:])
        for other in (replace(originals, labels=labels), replace(originals, images=renamed)):
            with pytest.raises(UserError, match="holds other labels or names of images than"):
                check_packed_from(facts, file, other)

    def test_the_fingerprint_covers_the_pixels(self, tmp_path: Path):
        first = opened(packed(tmp_path / "1"))
        again = opened(packed(tmp_path / "2"))
        other = opened(packed(tmp_path / "3", format="jpeg"))
        assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_importing_ffcv_leaves_torch_its_threads():
    code = (
        "import torch; from peerlearn.data.ffcv_package import why_no_ffcv; torch.set_num_threads(3);"
        "assert not why_no_ffcv(); print(torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("3\n", "")


def test_a_broken_ffcv_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert why_no_ffcv() == "ffcv is not installed"
    with pytest.raises(
        UserError, match=r"\Apacking images needs ffcv, and ffcv is not installed: "
    ):
        pack(load_dataset("digits"), tmp_path / "a.beton", format="raw")


@pytest.mark.parametrize("recipe", ["crop_flip", "supervised_cifar", "none"])
def test_large_images_are_cut_one_by_one_and_equal_those_cut_together(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Above and below the size at which matrices are faster; the canvases are black beside smaller images."""
    dataset = opened(packed(tmp_path))
    arguments = {"augmentation": AUGMENTATIONS[recipe], "batch_size_global": 8}
    batches = []
    for limit in (0, 10**9):
        monkeypatch.setattr(croppers, "_SMALL_PIXELS", limit)
        batches.append(list(make(dataset, **arguments).epoch(0)))
    folder = load_dataset("folder", root=str(tmp_path / "photos"))
    batches.append(list(make(folder, **arguments, backend="folder").epoch(0)))
    for one, together, decoded in zip(*batches, strict=True):
        assert torch.equal(one.index, together.index)
        for mine, other, theirs in zip(one.views, together.views, decoded.views, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine, theirs, atol=0.5 / 255 / 0.22 + 1e-5, rtol=0)


def test_views_of_jpeg_differ_by_no_more_than_the_decoder_does(tmp_path: Path):
    file = packed(tmp_path, "jpeg")
    folder = load_dataset("folder", root=str(tmp_path / "photos"))
    stored = zip(make(opened(file)).epoch(0), make(folder, backend="folder").epoch(0), strict=True)
    for ours, theirs in stored:
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.labels, theirs.labels)
        for mine, other in zip(ours.views, theirs.views, strict=True):
            # The decoders' own differences, seen above, are below one grey level on average.
            assert (mine - other).abs().mean() < 1 / 255 / 0.22


# What ffcv's own loader does wrong


def threads_now() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_an_image_that_cannot_be_decoded_ends_the_epoch_with_one_line(
    format: str, workers: int, tmp_path: Path
):
    """Bytes that change under a training: the file's time is as it was."""
    file = packed(tmp_path, format)
    loader, before = make(opened(file), workers=workers), threads_now()
    first = next(loader.epoch(0))
    if format == "raw":
        os.truncate(file, file.stat().st_size // 2)
    else:
        for place in range(file.stat().st_size // 2, file.stat().st_size, 50):
            change_byte(file, place, time_too=False)
    with pytest.raises(UserError, match=r"\Aimage \d+ of [^\n]*photos.beton is damaged: [^\n]*\Z"):
        list(loader.epoch(0))
    assert len(first.index) == 4
    gc.collect()
    assert threads_now() == before


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [ValueError("what nobody expects"), MemoryError(), TimeoutError()]
)
def test_whatever_is_raised_while_decoding_is_raised_where_the_batch_is_asked_for(
    error: BaseException, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loader = make(opened(packed(tmp_path)), workers=workers)

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(PackedFile, "_read_into", broken)
    with pytest.raises(type(error)) as raised:
        next(loader.epoch(0))
    assert raised.value is error


def test_a_disk_that_hangs_ends_with_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(threads, "_PATIENCE_SECONDS", 0.2)
    answers = threading.Event()
    with pytest.raises(CrashError, match=r"\Aa thread that reads images [^\n]*answer\?\Z"):
        list(ahead(lambda _: answers.wait(), range(3), threads=1))
    answers.set()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_epoch_left_early_gives_back_its_threads_and_memory(tmp_path: Path):
    file = packed(tmp_path, sizes=[(400, 500)] * 16)
    loader = make(opened(file), workers=2)

    def leave_early(times: int) -> None:
        for number in range(times):
            epoch = loader.epoch(number)
            next(epoch)
            epoch.close()

    leave_early(5)
    before, files, used = threads_now(), os.listdir("/proc/self/fd"), resident_bytes()
    # Batches of 2.4 MB, of which a loader that keeps them would hold three after each epoch.
    leave_early(40)
    assert threads_now() == before
    assert os.listdir("/proc/self/fd") == files
    assert resident_bytes() - used < 40 * 2.4e6


def test_batches_stay_as_they_were_when_later_ones_come(tmp_path: Path):
    """No buffer is used again, neither for crops nor for what they are cut from."""
    dataset = opened(packed(tmp_path, sizes=[(40, 50)] * 24))
    loader = make(dataset, workers=2, batch_size_global=2)
    batches, copies = [], []
    for batch in loader.epoch(0):
        batches.append(batch)
        copies.append([view.clone() for view in batch.views])
    assert len(batches) == 12
    for batch, copy in zip(batches, copies, strict=True):
        assert all(map(torch.equal, batch.views, copy))
    whole = open_packed(dataset.images[0].parent)
    numbers = torch.arange(24).split(2)
    decoded = list(ahead(whole.read_together, numbers, threads=2))
    assert len({images.data_ptr() for images in decoded}) == 12
    for images, part in zip(decoded, numbers, strict=True):
        for image, number in zip(images, part.tolist(), strict=True):
            assert torch.equal(image.permute(2, 0, 1), dataset.read(number))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [(40, 50), (60, 80)])
def test_an_image_is_decoded_once_for_all_its_views(
    size: tuple[int, int], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loader = make(opened(packed(tmp_path, sizes=[size] * 16)), workers=workers, views=3)
    decoded: Counter[int] = Counter()
    plain = beton_file.PackedFile._read_into

    def counting(self: PackedFile, number: int, pixels: np.ndarray) -> None:
        decoded[number] += 1
        plain(self, number, pixels)

    monkeypatch.setattr(PackedFile, "_read_into", counting)
    batches = list(loader.epoch(0))
    assert [len(batch.views) for batch in batches] == [3] * 4
    assert decoded == Counter(range(16))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_work_ahead_keeps_the_order_and_is_not_far_ahead(number: int):
    asked = []

    def jobs() -> Iterator[int]:
        for job in range(40):
            asked.append(job)
            yield job

    def slow_at_times(job: int) -> int:
        time.sleep(0.002 * (job % 3))
        return job * job

    done = []
    for result in ahead(slow_at_times, jobs(), threads=number):
        done.append(result)
        assert len(asked) - len(done) <= (number + 1 if number else 0)
    assert done == [job * job for job in range(40)]
