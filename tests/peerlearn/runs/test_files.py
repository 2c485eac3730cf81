"""Files in folders of any name."""

import logging
import os
import secrets
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import (
    append_text,
    changed_by_owner_alone,
    load_tensors,
    read_json_lines,
    replacing,
    write_text,
)
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.lock import run_lock
from peerlearn.runs.logs import log_to
from peerlearn.runs.run_contents import read_contents


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


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of ours elsewhere, to which others would lead what is written here."""
    file = tmp_path / "elsewhere" / ".bashrc"
    file.parent.mkdir()
    file.write_text("precious")
    return file


def test_a_planted_link_leads_no_temporary_file_elsewhere(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even if the name is guessed; and it is as long as no one can guess."""
    asked: list[int] = []

    def guessed(count: int) -> str:
        asked.append(count)
        return "guessed"

    monkeypatch.setattr(secrets, "token_hex", guessed)
    (tmp_path / ".a.guessed.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a", "evil")
    assert asked == [8]
    assert precious.read_text() == "precious"
    assert not (tmp_path / "a").exists()


def test_a_planted_link_is_replaced_by_the_file(tmp_path: Path, precious: Path):
    (tmp_path / "a").symlink_to(precious)
    write_text(tmp_path / "a", "ours")
    assert not (tmp_path / "a").is_symlink()
    assert ((tmp_path / "a").read_text(), precious.read_text()) == ("ours", "precious")


@pytest.mark.parametrize("there", [True, False])
def test_lines_are_not_added_to_what_a_link_leads_to(tmp_path: Path, precious: Path, there: bool):
    if not there:
        precious.unlink()
    (tmp_path / "events.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        append_text(tmp_path / "events.jsonl", "evil\n")
    assert [f.read_text() for f in precious.parent.iterdir()] == (["precious"] if there else [])


def test_a_lock_is_no_link(tmp_path: Path, precious: Path):
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="cannot be locked"), run_lock(tmp_path):
        pass
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("umask", "plain", "private"), [(0, 0o644, 0o600), (0o002, 0o644, 0o600), (0o077, 0o600, 0o600)]
)
def test_others_change_nothing_whatever_the_umask(
    tmp_path: Path, umask: int, plain: int, private: int
):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "plain", "a")
        write_text(tmp_path / "private", "a", mode=0o600)
        append_text(tmp_path / "lines", "a\n")
        with changed_by_owner_alone():
            (tmp_path / "folder").mkdir()
            (tmp_path / "file").touch()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    folder = plain | (plain & 0o444) >> 2
    assert modes == {
        "plain": plain,
        "lines": plain,
        "file": plain,
        "private": private,
        "folder": folder,
    }


def test_a_log_is_no_link(tmp_path: Path, precious: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "rank-0.log").symlink_to(precious)
    before = logging.getLogger().handlers[:]
    log_to(tmp_path / "rank-0.log").write("evil")
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
    assert precious.read_text() == "precious"
    assert "rank-0.log cannot be written" in caplog.text


def test_what_is_written_whole_or_not_at_all(tmp_path: Path, precious: Path):
    def write(content: bytes) -> None:
        with replacing(tmp_path / "a.png") as file:
            file.write(content)
            assert not (tmp_path / "a.png").exists()
            assert content != b"half", "interrupted"

    with pytest.raises(AssertionError, match="interrupted"):
        write(b"half")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    write(b"whole")
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_not_waited_for(tmp_path):
    run = RunDirectory(tmp_path)
    for file in (run.metrics, run.failed_mark, run.notes, tmp_path / "result.json"):
        os.mkfifo(file)
    assert run.failure() is None
    with pytest.raises(OSError, match="no regular file"):
        read_json_object(tmp_path / "result.json")
    with pytest.raises(OSError, match="no regular file"):
        list(read_json_lines(run.notes))
    contents, _ = read_contents(run, {})
    assert "metrics.jsonl cannot be read (it is no regular file)" in contents.problems


def test_the_reason_of_a_failure_is_no_other_file(tmp_path):
    (tmp_path / "secret").write_text("of others")
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    run.failed_mark.symlink_to(tmp_path / "secret")
    assert run.failure() is None
