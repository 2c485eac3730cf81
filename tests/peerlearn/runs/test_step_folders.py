"""Names of step folders, and which of them is named as the newest."""

from pathlib import Path

import pytest

from peerlearn.runs.step_folders import (
    latest_step,
    step_folder,
    step_folders,
    step_of,
    write_latest,
)


def test_a_name_tells_its_step():
    assert step_folder(1000) == "step-00001000"
    for step in (0, 7, 10**8 - 1, 10**8, 10**12):
        assert step_of(step_folder(step)) == step
    for name in ("step-", "step-x", "step-5.bad", ".tmp-step-5", "1000", "latest", ""):
        assert step_of(name) is None


def test_folders_come_newest_first(tmp_path: Path):
    assert step_folders(tmp_path / "none") == []
    for name in ("step-00000006", "step-00000012", "step-100000000", "step-00000012.bad", "best"):
        (tmp_path / name).mkdir()
    assert step_folders(tmp_path) == [
        (step, tmp_path / step_folder(step)) for step in (100_000_000, 12, 6)
    ]


@pytest.mark.parametrize("content", [None, b"", b"step-\n", b"\xff\xfe", b"12\n"])
def test_what_is_named_is_read_back_and_a_spoilt_file_names_nothing(tmp_path: Path, content):
    write_latest(tmp_path / step_folder(12))
    assert (tmp_path / "latest").read_text() == "step-00000012\n"
    assert latest_step(tmp_path) == 12
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert latest_step(tmp_path) is None
