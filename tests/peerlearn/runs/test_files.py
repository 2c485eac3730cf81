"""Files in folders of any name."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from peerlearn.runs.files import load_tensors, write_text


@pytest.mark.parametrize("folder", ["plain", "grün 😀", "gr\udcfcn"])
def test_tensors_are_read_from_folders_of_any_name(folder: str, tmp_path: Path):
    file = tmp_path / folder / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(safetensors.torch.save({"a": torch.arange(5)}))
    assert load_tensors(file)["a"].tolist() == [0, 1, 2, 3, 4]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(safetensors.SafetensorError):
        load_tensors(file)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        load_tensors(file)


def test_text_with_a_byte_of_a_files_name_is_written_escaped(tmp_path: Path):
    write_text(tmp_path / "a", "grün " + os.fsdecode(b"gr\xfcn"))
    assert (tmp_path / "a").read_bytes() == "grün gr\\udcfcn".encode()


def test_two_that_write_one_file_at_once_leave_the_text_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    both = threading.Barrier(2)
    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        plain_fsync(descriptor)
        both.wait(timeout=60)

    monkeypatch.setattr(os, "fsync", fsync)
    texts = ["short", "long" * 100]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a", text), texts))
    assert (tmp_path / "a").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
