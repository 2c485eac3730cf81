"""Arrays of every kind come out of pickles as they went in, and nothing that a pickle names is run."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from peerlearn.data.pickles import array_in, read_pickle, text_in
from peerlearn.errors import UserError
from tests.peerlearn.data.test_cifar_pickles import MALICE, python2

ARRAYS = {
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "by columns": np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
    "big endian": np.array([1, 500, -3], dtype=">i4"),
    "whole": np.array([[2**40, -1]], dtype=np.int64),
    "fractions": np.array([0.5, np.inf], dtype=np.float32),
    "truth": np.array([True, False]),
    "words": np.array(["a", "bcd"]),
    "bytes of words": np.array([b"a", b"bcd"]),
    "objects": np.array(["a", None, 3], dtype=object),
    "single": np.array(3, dtype=np.uint8),
}


def read(content: bytes, path: Path) -> object:
    path.write_bytes(content)
    return read_pickle(path, advice="fetch it again")


def refusal(content: bytes, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(content, path)
    message = str(caught.value)
    assert message.startswith(f"cannot read {path} (")
    assert message.endswith("): fetch it again")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_as_they_went(array: np.ndarray, protocol: int, tmp_path: Path):
    values = array_in(read(pickle.dumps(array, protocol), tmp_path / "a.pkl"))
    assert values is not None
    assert values.dtype == array.dtype
    assert values.shape == array.shape
    assert values.tolist() == array.tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_of_numpy_are_numbers(protocol: int, tmp_path: Path):
    content = pickle.dumps([np.int64(-7), np.uint8(200), np.float32(0.5), np.str_("ab")], protocol)
    assert read(content, tmp_path / "a.pkl") == [-7, 200, 0.5, "ab"]


def test_words_of_python_2(tmp_path: Path):
    (name, number), *_ = read(python2({"n01532829": 3}), tmp_path / "a.pkl").items()
    assert (text_in(name), number) == ("n01532829", 3)


def test_an_array_within_an_array_of_objects(tmp_path: Path):
    rows = np.empty(2, dtype=object)
    rows[:] = [np.arange(3, dtype=np.uint8), np.arange(5, dtype=np.uint8)]
    values = array_in(read(pickle.dumps(rows, 2), tmp_path / "a.pkl"))
    assert [array_in(row).tolist() for row in values] == [[0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", MALICE)
def test_a_planted_call_is_not_run(name: str, protocol: int, tmp_path: Path):
    canary = tmp_path / "canary"
    call = MALICE[name](canary)
    # The plain unpickler runs it.
    pickle.loads(pickle.dumps(call, protocol))
    canary.rmdir()
    deep = np.array([[call]], dtype=object)
    for content in (call, {"image_data": [call]}, {call: 1}, deep):
        assert "was not run" in refusal(pickle.dumps(content, protocol), tmp_path / "a.pkl")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("numpy", name) for name in ("frombuffer", "fromfile", "load", "memmap", "void", "object_")),
        ("numpy._core.multiarray", "frombuffer"),
        ("numpy._core.multiarray", "_reconstruct.__globals__"),
        ("numpy._core.numeric", "load"),
        ("copyreg", "_reconstructor"),
        ("copy_reg", "_reconstructor"),
        ("builtins", "getattr"),
        ("builtins", "bytearray"),
        ("collections", "OrderedDict"),
        ("peerlearn.data.pickles", "_STAND_INS"),
    ],
)  # fmt: skip
def test_every_other_name_is_refused(module: str, name: str, tmp_path: Path):
    content = f"c{module}\n{name}\n(V/etc/passwd\ntR.".encode()
    message = refusal(content, tmp_path / "a.pkl")
    assert f"asks for '{module}.{name}'" in message or "copy_reg" in module
    assert "was not run" in message


DTYPE = b"cnumpy\ndtype\n(V%s\nI0\nI1\ntR"
MAKE = b"cnumpy._core.numeric\n_frombuffer\n("


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (MAKE + b"Vabcd\n" + DTYPE % b"u1" + b"(I4\ntVC\ntR.", "not of bytes"),
        (MAKE + b"C\x04abcd" + DTYPE % b"O8" + b"(I4\ntVC\ntR.", "not as long as they say"),
        (MAKE + b"(C\x01alp0\n" + DTYPE % b"O8" + b"(I4\ntVC\ntR.", ""),
        (MAKE + b"C\x04abcd" + DTYPE % b"u1" + b"(I5\ntVC\ntR.", "cannot reshape"),
        (MAKE + b"C\x04abcd" + DTYPE % b"u1" + b"(I-1\ntVC\ntR.", "no known shape"),
        (MAKE + b"C\x04abcd" + DTYPE % b"u1" + b"I4\nVC\ntR.", "no known shape"),
        (MAKE + b"C\x04abcd" + DTYPE % b"u1" + b"(I4\ntVA\ntR.", "no known form"),
        (MAKE + b"C\x04abcdNI4\nVC\ntR.", "no known form"),
        (DTYPE % b"V8" + b".", "not of numbers or words"),
        (DTYPE % b"M8[s]" + b".", "not of numbers or words"),
        (DTYPE % b"O8)" + b".", "not of numbers or words"),
        (b"cnumpy\ndtype\n(dVcode\nVu1\nsb.", "sets the state of a function"),
    ],
)
def test_what_is_no_array_is_refused(content: bytes, reason: str, tmp_path: Path):
    assert reason in refusal(content, tmp_path / "a.pkl")


def test_records_are_refused(tmp_path: Path):
    for records in (np.zeros(2, dtype=[("a", np.uint8)]), np.zeros(2, dtype="M8[s]")):
        refusal(pickle.dumps(records, 2), tmp_path / "a.pkl")


def test_what_holds_itself_is_no_endless_loop(tmp_path: Path):
    loop: list = []
    loop.append(loop)
    assert isinstance(read(pickle.dumps(loop), tmp_path / "a.pkl"), list)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path} "):
            read_pickle(path, advice="fetch it again")
