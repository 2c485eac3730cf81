"""Small trees in the layout of CIFAR's python version, as Python 2 wrote it and as Python 3 would."""

import os
import pickle
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision

from peerlearn.data.cifar_pickles import read_batch, read_class_names
from peerlearn.data.datasets import load_dataset
from peerlearn.errors import UserError

CIFAR10_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
PER_BATCH = 3


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 does, of which some are words and some are pixels."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        short = len(raw) < 256
        self.write(
            (b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw))) + raw
        )
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(content: object) -> bytes:
    buffer = BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def python3(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def in_bytes(value: object) -> object:
    """All words as bytes: what Python 3 writes after it has read the file with encoding="bytes"."""
    if isinstance(value, dict):
        return {in_bytes(key): in_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [in_bytes(item) for item in value]
    return value.encode() if isinstance(value, str) else value


def python3_in_bytes(content: object) -> bytes:
    return python3(in_bytes(content))


def old_numpy(content: object) -> bytes:
    return python3(content).replace(b"numpy._core", b"numpy.core")


WRITERS = [python2, python3, python3_in_bytes, old_numpy]
Writer = Callable[[object], bytes]


def pixels_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def batch(pixels: np.ndarray, labels: list[int], prefix: str = "") -> dict[str, object]:
    return {
        "batch_label": "batch 1 of 5",
        f"{prefix}labels": labels,
        "data": pixels,
        "filenames": [f"leptodactylus_s_{i:06}.png" for i in range(len(labels))],
    }


def write_cifar10(folder: Path, write: Writer = python2) -> tuple[np.ndarray, list[int]]:
    """Pixels and labels, the last batch being the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = pixels_of(len(CIFAR10_BATCHES) * PER_BATCH)
    labels = [7 * i % 10 for i in range(len(pixels))]
    for i, name in enumerate(CIFAR10_BATCHES):
        part = slice(i * PER_BATCH, (i + 1) * PER_BATCH)
        (folder / name).write_bytes(write(batch(pixels[part], labels[part])))
    meta = {
        "num_cases_per_batch": 10000,
        "label_names": [f"class {i}" for i in range(10)],
        "num_vis": 3072,
    }
    (folder / "batches.meta").write_bytes(write(meta))
    return pixels, labels


def write_cifar100(folder: Path, write: Writer) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (split, count) in enumerate({"train": 5, "test": 2}.items()):
        written[split] = pixels_of(count, seed)
        fine = batch(written[split], [99 - i for i in range(count)], "fine_")
        (folder / split).write_bytes(write({**fine, "coarse_labels": list(range(count))}))
    meta = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    (folder / "meta").write_bytes(write(meta))
    return written


def error(function: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("nested", ["", "cifar-10-batches-py"])
def test_cifar10(nested: str, write: Writer, tmp_path: Path):
    pixels, labels = write_cifar10(tmp_path / nested, write)
    train = load_dataset("cifar10", root=str(tmp_path))
    test = load_dataset("cifar10", "test", root=str(tmp_path))
    assert (len(train), len(test)) == (15, 3)
    images = torch.cat([train.images, test.images])
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert torch.cat([train.labels, test.labels]).tolist() == labels
    assert train.labels.dtype == torch.int64
    assert train.class_names == tuple(f"class {i}" for i in range(10))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("nested", ["", "cifar-100-python"])
def test_cifar100_takes_the_fine_labels(nested: str, write: Writer, tmp_path: Path):
    written = write_cifar100(tmp_path / nested, write)
    for split, pixels in written.items():
        dataset = load_dataset("cifar100", split, root=str(tmp_path))
        assert np.array_equal(dataset.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        assert dataset.labels.tolist() == [99 - i for i in range(len(pixels))]
        assert dataset.class_names == tuple(f"fine {i}" for i in range(100))


@pytest.mark.parametrize("write", [python2, python3])
def test_torchvision_agrees(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cifar10(tmp_path / "cifar-10-batches-py", write)
    write_cifar100(tmp_path / "cifar-100-python", write)
    # Its MD5s are those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    classes = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    for name, reader in classes.items():
        for split in ("train", "test"):
            ours = load_dataset(name, split, root=str(tmp_path))
            oracle = reader(tmp_path, train=split == "train")
            assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), oracle.data)
            assert ours.labels.tolist() == oracle.targets
            assert ours.class_names == tuple(oracle.classes)


def test_the_binary_version_is_preferred_and_equal(tmp_path: Path):
    pixels, labels = write_cifar10(tmp_path / "cifar-10-batches-py")
    pickled = {s: load_dataset("cifar10", s, root=str(tmp_path)) for s in ("train", "test")}
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate(CIFAR10_BATCHES):
        part = slice(i * PER_BATCH, (i + 1) * PER_BATCH)
        records = np.hstack([np.array(labels[part], dtype=np.uint8)[:, None], pixels[part]])
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        path.write_bytes(b"not to be read")
    for split, from_pickles in pickled.items():
        binary = load_dataset("cifar10", split, root=str(tmp_path))
        assert binary.fingerprint() == from_pickles.fingerprint()


@pytest.mark.parametrize("write", WRITERS)
def test_arrays_stored_by_columns(write: Writer, tmp_path: Path):
    pixels = pixels_of(4)
    (tmp_path / "b").write_bytes(write(batch(np.asfortranarray(pixels), [1, 2, 3, 4])))
    read, labels = read_batch(tmp_path / "b", labels_key="labels")
    assert np.array_equal(read.numpy(), pixels)
    assert labels.tolist() == [1, 2, 3, 4]


def test_pixels_may_be_written_to(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    write_cifar10(tmp_path)
    images = load_dataset("cifar10", "test", root=str(tmp_path)).images
    images += 1
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


# Damage


@pytest.mark.parametrize("write", WRITERS)
def test_every_truncated_file_is_named(write: Writer, tmp_path: Path):
    path = tmp_path / "b"
    content = write(batch(pixels_of(1), [3]))
    ends = [
        *range(400),
        *range(400, len(content) - 200, 97),
        *range(len(content) - 200, len(content)),
    ]
    for end in ends:
        path.write_bytes(content[:end])
        assert str(path) in error(read_batch, path, labels_key="labels")
    path.write_bytes(content)
    read_batch(path, labels_key="labels")


BATCH = batch(pixels_of(3), [0, 1, 9])
DAMAGED = {
    "no dictionary": ["data", "labels"],
    "no data": {"labels": [0, 1, 9]},
    "no labels": {"data": pixels_of(3)},
    "wide": batch(pixels_of(3).astype(np.uint16), [0, 1, 9]),
    "signed": batch(pixels_of(3).astype(np.int8), [0, 1, 9]),
    "objects": batch(np.array([None, "a"], dtype=object), [0, 1]),
    "records": batch(np.zeros((3, 3072), dtype=[("f", np.uint8)]), [0, 1, 9]),
    "narrow": batch(pixels_of(3)[:, 1:].copy(), [0, 1, 9]),
    "flat": batch(pixels_of(1).flatten(), [0]),
    "images": batch(pixels_of(3).reshape(3, 3, 32, 32), [0, 1, 9]),
    "list of pixels": {**BATCH, "data": [[0] * 3072] * 3},
    "few labels": batch(pixels_of(3), [0, 1]),
    "empty": batch(pixels_of(0), []),
    "high label": batch(pixels_of(3), [0, 1, 10]),
    "huge label": batch(pixels_of(3), [0, 1, 10**30]),
    "negative label": batch(pixels_of(3), [0, 1, -1]),
    "fractional label": batch(pixels_of(3), [0, 1, 2.5]),
    "label array": {**BATCH, "labels": np.array([0, 1, 9], dtype=np.uint8)},
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_damaged_batches_are_named(damaged: object, tmp_path: Path):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_4"
    path.write_bytes(python3(damaged))
    assert str(path) in error(load_dataset, "cifar10", root=str(tmp_path))


@pytest.mark.parametrize("names", [None, "class 0", [1, 2], {"class 0": 0}])
def test_damaged_class_names_are_named(names: object, tmp_path: Path):
    path = tmp_path / "meta"
    path.write_bytes(python3({} if names is None else {"label_names": names}))
    assert str(path) in error(read_class_names, path, key="label_names")


@pytest.mark.parametrize("name", ["data_batch_5", "batches.meta"])
def test_missing_files_are_named(name: str, tmp_path: Path):
    write_cifar10(tmp_path)
    (tmp_path / name).unlink()
    assert str(tmp_path / name) in error(load_dataset, "cifar10", root=str(tmp_path))


# Malice


class Call:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def make_folder_in_torch(canary: Path) -> Call:
    # What a storage is pickled as: a call that unpickles again, without restriction.
    buffer = BytesIO()
    torch.save(Call(os.mkdir, str(canary)), buffer)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


# Plain unpickling of each makes the folder ``canary``.
MALICE: dict[str, Callable[[Path], object]] = {
    "posix.system": lambda canary: Call(os.system, f"mkdir {canary}"),
    "posix.mkdir": lambda canary: Call(os.mkdir, str(canary)),
    "builtins.eval": lambda canary: Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
    "builtins.exec": lambda canary: Call(exec, f"import os; os.mkdir({str(canary)!r})"),
    "torch.storage._load_from_bytes": make_folder_in_torch,
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", MALICE)
def test_a_planted_call_is_not_run(name: str, protocol: int, tmp_path: Path):
    canary = tmp_path / "canary"
    call = MALICE[name](canary)
    pickle.loads(pickle.dumps(call, protocol))
    canary.rmdir()
    root = tmp_path / "root"
    write_cifar10(root)
    for file, content in {
        "data_batch_1": call,
        "data_batch_3": {**BATCH, "filenames": [call]},
        "batches.meta": {"label_names": [call]},
    }.items():
        intact = (root / file).read_bytes()
        (root / file).write_bytes(pickle.dumps(content, protocol))
        message = error(load_dataset, "cifar10", root=str(root))
        assert str(root / file) in message
        assert "was not run" in message
        # Older protocols call builtins by the name they had in Python 2.
        if protocol > 2 and file != "data_batch_3":
            assert name in message
        (root / file).write_bytes(intact)
    assert not canary.exists()
    load_dataset("cifar10", root=str(root))


def stack_global(module: str, name: str) -> bytes:
    """A pickle of that name alone, dots and all."""
    text = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + text + b"\x93."


@pytest.mark.parametrize(
    "content",
    [
        stack_global("_codecs", "encode.__globals__"),
        stack_global("numpy.core.multiarray", "_reconstruct.__globals__"),
        stack_global("numpy", "ndarray.tofile"),
        stack_global("numpy.testing._private.utils", "runstring"),
        stack_global("numpy", "load"),
        stack_global("peerlearn.data.cifar_pickles", "_load"),
        stack_global("builtins", "getattr"),
        stack_global("copyreg", "_reconstructor"),
        stack_global("no_such_module\nat all", "x"),
        b"cnumpy\nobject\n.",
        b"(icollections\nOrderedDict\n.",
        python3({"data": 1 + 2j}),
    ],
)
def test_other_names_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "b"
    path.write_bytes(content)
    message = error(read_batch, path, labels_key="labels")
    assert str(path) in message
    assert "not run" in message


@pytest.mark.parametrize(
    "content",
    [
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"c_codecs\nencode\n(I3\nVlatin1\ntR.",
        b"c_codecs\nencode\n(Vabc\nVlatin1\nVignore\ntR.",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"cnumpy\ndtype\n(VV8\nI0\nI1\ntR.",
        # State is set of a function: what it holds, and what it takes where nothing is given.
        b"cnumpy\ndtype\n(dVcode\nVu1\nsb.",
        b"c_codecs\nencode\n(N(dV__defaults__\n(Vlatin1\ntstb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1\ntNNI5\ntb.",
        b"Ppersistent\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_stand_ins_take_only_what_makes_bytes(content: bytes, tmp_path: Path):
    path = tmp_path / "b"
    path.write_bytes(content)
    assert f"cannot read {path}" in error(read_batch, path, labels_key="labels")


def test_a_name_that_is_never_called_is_no_data(tmp_path: Path):
    path = tmp_path / "b"
    for value in (b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n(tR"):
        path.write_bytes(b"(dVdata\n" + value + b"sVlabels\n(lI3\nas.")
        assert f"{path} holds no rows of 3072 bytes" in error(read_batch, path, labels_key="labels")
