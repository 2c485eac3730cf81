"""Saves on disk: whole or not there, and never believed unchecked."""

import json
from pathlib import Path

import pytest
import torch

from peerlearn.errors import UserError
from peerlearn.runs.checkpoint import (
    drop_old_checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_steps,
)

TENSORS = {
    "networks": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)},
    "queue": {},
}


def save(root: Path, step: int = 7) -> Path:
    return save_checkpoint(root, step, TENSORS, {"step": step})


def test_round_trip_also_of_strided_tensors(tmp_path):
    tensors = {"networks": {"w": torch.arange(24.0).view(1, 2, 3, 4).permute(0, 3, 1, 2)}}
    folder = save_checkpoint(tmp_path, 7, tensors, {"step": 7})
    loaded, state = load_checkpoint(folder)
    assert torch.equal(loaded["networks"]["w"], tensors["networks"]["w"])
    assert state == {"step": 7}
    assert saved_steps(tmp_path) == [folder]
    assert folder.name == "step-00000007"
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


@pytest.mark.parametrize("name", ["networks.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_any_damaged_file_is_named(tmp_path, name, damage):
    file = save(tmp_path) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        load_checkpoint(file.parent)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_manifest_that_cannot_be_read_means_no_save(tmp_path, content):
    folder = save(tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json"):
        load_checkpoint(folder)


def test_a_newer_format_is_refused(tmp_path):
    folder = save(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format 99 is newer"):
        load_checkpoint(folder)


def test_a_leftover_of_a_killed_save_is_replaced_and_never_taken_for_one(tmp_path):
    (tmp_path / ".tmp-step-00000007").mkdir()
    (tmp_path / ".tmp-step-00000007/stump").write_text("half")
    folder = save(tmp_path)
    assert not (folder / "stump").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007"]


def test_the_newest_saves_stay(tmp_path):
    for step in (1, 5, 10, 20):
        save(tmp_path, step)
    drop_old_checkpoints(tmp_path, keep_last=2)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000010", "step-00000020"]
