"""Saves of any content, damage of any kind, and which saves stay."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlearn.errors import UserError
from peerlearn.runs.checkpoint import (
    DamagedSaveError,
    check_whole,
    drop_old_checkpoints,
    load_checkpoint,
    remove_stumps,
    save_checkpoint,
    saved_steps,
    set_aside,
)
from peerlearn.runs.step_folders import step_folder, step_folders

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
]
STEPS = st.sets(st.integers(0, 10**10), max_size=10)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bytes, NaN with a message in it too; also what lies transposed in memory."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte % 2 for byte in content)
    flat = torch.tensor(list(content), dtype=torch.uint8).view(dtype)
    return flat.view(shape).permute(draw(st.permutations(range(len(shape)))))


def as_saved(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.tolist()


NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
FILES = st.text("abz_-.0", min_size=1, max_size=8).filter(lambda name: not name.startswith("."))
CONTENTS = st.dictionaries(FILES, st.dictionaries(NAMES, tensors(), max_size=4), max_size=3)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
STATES = st.dictionaries(st.text(max_size=5), st.one_of(PLAIN, st.lists(PLAIN, max_size=3)))


@settings(max_examples=60)
@given(step=st.integers(0, 10**10), content=CONTENTS, state=STATES)
def test_whatever_is_saved_is_loaded(step, content, state, tmp_path_factory):
    root = tmp_path_factory.mktemp("saves")
    folder = save_checkpoint(root, step, content, state)
    check_whole(folder)
    loaded, loaded_state = load_checkpoint(folder)
    assert loaded_state == state
    assert {
        name: {key: as_saved(tensor) for key, tensor in group.items()}
        for name, group in loaded.items()
    } == {
        name: {key: as_saved(tensor) for key, tensor in group.items()}
        for name, group in content.items()
    }
    assert step_folders(root) == [(step, folder)]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == step
    others = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (
        set(manifest["sha256"]) == others == {f"{n}.safetensors" for n in content} | {"state.json"}
    )
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a save of two groups."""
    groups = {"networks": {"w": torch.arange(3.0)}, "queue": {"cursor": torch.tensor(5)}}
    folder = save_checkpoint(tmp_path_factory.mktemp("whole"), 7, groups, {"step": 7})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def save(whole, tmp_path_factory) -> Path:
    """A save to damage, and to mend by ``write``."""
    folder = tmp_path_factory.mktemp("damaged") / step_folder(7)
    folder.mkdir()
    write(folder, whole)
    return folder


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


FILE_NAMES = ["manifest.json", "networks.safetensors", "queue.safetensors", "state.json"]


def test_a_save_holds_the_files_that_are_damaged_here(whole):
    assert sorted(whole) == FILE_NAMES


@pytest.mark.parametrize("name", FILE_NAMES[1:])
def test_any_single_bit_that_is_flipped_is_found(save, whole, name):
    for position in range(len(whole[name])):
        content = bytearray(whole[name])
        content[position] ^= 1 << position % 8
        (save / name).write_bytes(content)
        for read in (check_whole, load_checkpoint):
            with pytest.raises(DamagedSaveError, match=rf"{name}: missing or damaged"):
                read(save)
    write(save, whole)
    check_whole(save)


@settings(max_examples=60)
@given(name=st.sampled_from(FILE_NAMES[1:]), data=st.data())
def test_any_other_content_of_a_file_is_found(save, whole, name, data):
    """Bytes changed, cut off, put in or left out anywhere, one file in the place of another."""
    content = whole[name]
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    other = content[:start] + data.draw(st.binary(max_size=4)) + content[stop:]
    changed = data.draw(st.sampled_from([other, *(whole[n] for n in FILE_NAMES if n != name)]))
    (save / name).write_bytes(changed)
    try:
        for read in (check_whole, load_checkpoint):
            if changed == content:
                read(save)
                continue
            with pytest.raises(DamagedSaveError, match=rf"{name}: missing or damaged"):
                read(save)
    finally:
        write(save, whole)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_missing_file_or_a_folder_in_its_place_is_found(save, whole, name):
    (save / name).unlink()
    for make_folder in (False, True):
        if make_folder:
            (save / name).mkdir()
        for read in (check_whole, load_checkpoint):
            with pytest.raises(DamagedSaveError, match=name):
                read(save)
    (save / name).rmdir()
    write(save, whole)


def test_a_manifest_with_a_bit_flipped_anywhere_is_refused_or_still_vouches_for_every_file(
    save, whole
):
    """What may be flipped unnoticed says nothing about the files: white space, the step, a lower version."""
    vouches = json.loads(whole["manifest.json"])["sha256"]
    accepted = 0
    for position in range(len(whole["manifest.json"])):
        content = bytearray(whole["manifest.json"])
        content[position] ^= 1 << position % 8
        (save / "manifest.json").write_bytes(content)
        try:
            check_whole(save)
        except UserError:
            continue
        assert json.loads(content)["sha256"] == vouches
        accepted += 1
    write(save, whole)
    assert accepted < len(whole["manifest.json"]) / 4


@settings(max_examples=60)
@given(cut=st.integers(0, 10**6))
def test_a_manifest_cut_short_means_no_save(save, whole, cut):
    content = whole["manifest.json"].rstrip()
    (save / "manifest.json").write_bytes(content[: cut % len(content)])
    try:
        with pytest.raises(DamagedSaveError, match=r"no readable manifest.json"):
            check_whole(save)
    finally:
        write(save, whole)


# Which saves there are, and which stay


def lay_out(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()
        (root / name / "content").write_text(name)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@settings(max_examples=50)
@given(
    steps=STEPS,
    odd=st.sets(
        st.sampled_from(
            ["step-5.bad", "step-00000005.bad2", ".tmp-step-00000009", "step-", "step-5x", "latest"]
        )
    ),
)
def test_saves_are_told_from_the_rest_and_come_newest_first_by_number(steps, odd, tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    lay_out(root, *odd, *map(step_folder, steps))
    found = saved_steps(root)
    assert [step for step, _ in step_folders(root)] == sorted(steps, reverse=True)
    assert [folder.name for folder in found] == [
        step_folder(step) for step, _ in step_folders(root)
    ]
    shutil.rmtree(root)


@settings(max_examples=50)
@given(
    steps=st.sets(st.integers(0, 60), max_size=12),
    keep_last=st.integers(1, 6),
    every=st.one_of(st.none(), st.integers(1, 20)),
)
def test_the_newest_and_every_kth_save_stay_and_no_other(steps, keep_last, every, tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    others = {"step-00000001.bad", ".tmp-step-00000002"}
    lay_out(root, *others, *map(step_folder, steps))
    drop_old_checkpoints(root, keep_last=keep_last, keep_every_steps=every)
    newer = {step: sum(other > step for other in steps) for step in steps}
    expected = {s for s in steps if newer[s] < keep_last or (every and s % every == 0)}
    assert names_in(root) == others | set(map(step_folder, expected))
    shutil.rmtree(root)


@settings(max_examples=50)
@given(there=st.sets(st.integers(1, 5)), times=st.integers(1, 4))
def test_what_is_set_aside_is_no_save_any_more_and_overwrites_nothing(
    there, times, tmp_path_factory
):
    root = tmp_path_factory.mktemp("aside")
    lay_out(root, *(f"step-00000007.bad{number if number > 1 else ''}" for number in there))
    before = {path: (path / "content").read_text() for path in root.iterdir()}
    for time in range(times):
        lay_out(root, "step-00000007")
        (root / "step-00000007/content").write_text(f"save {time}")
        before[set_aside(root / "step-00000007")] = f"save {time}"
        assert saved_steps(root) == []
    assert {path: (path / "content").read_text() for path in root.iterdir()} == before
    assert len(before) == len(there) + times
    shutil.rmtree(root)


def test_only_stumps_are_removed(tmp_path):
    lay_out(tmp_path, ".tmp-step-00000007", ".tmp-step-00000008", "step-00000007", "step-1.bad")
    remove_stumps(tmp_path)
    assert names_in(tmp_path) == {"step-00000007", "step-1.bad"}


# Saving again, and in vain


def test_a_step_saved_again_is_the_later_save(tmp_path):
    first = {"a": {"w": torch.zeros(2)}, "only then": {}}
    save_checkpoint(tmp_path, 7, first, {"save": 1})
    folder = save_checkpoint(tmp_path, 7, {"a": {"w": torch.ones(3)}}, {"save": 2})
    loaded, state = load_checkpoint(folder)
    assert loaded.keys() == {"a"}
    assert torch.equal(loaded["a"]["w"], torch.ones(3))
    assert state == {"save": 2}


@settings(max_examples=40)
@given(share=st.floats(0, 1.2))
def test_a_save_that_the_disk_does_not_take_leaves_the_older_one(
    share, files_up_to, tmp_path_factory
):
    """Wherever the disk stops: in the first file, in the middle of one, at the last."""
    groups = {"a": {"w": torch.zeros(30)}, "b": {"w": torch.zeros(200)}, "c": {}}
    root = tmp_path_factory.mktemp("full")
    older = save_checkpoint(root, 1, groups, {"step": 1})
    largest = max(path.stat().st_size for path in older.iterdir())
    limit = int(share * largest)
    if limit < largest:
        with files_up_to(limit), pytest.raises(OSError, match="File too large"):
            save_checkpoint(root, 2, groups, {"step": 2})
    else:
        with files_up_to(limit):
            save_checkpoint(root, 2, groups, {"step": 2})
    steps = [1] if limit < largest else [1, 2]
    assert names_in(root) == {"latest", *map(step_folder, steps)}
    assert (root / "latest").read_text() == step_folder(steps[-1]) + "\n"
    for step in steps:
        assert load_checkpoint(root / step_folder(step))[1] == {"step": step}
    shutil.rmtree(root)
