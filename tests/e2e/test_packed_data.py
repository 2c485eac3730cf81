"""A packed file from its making to a training on it."""

import subprocess
from pathlib import Path

import pytest

from peerlearn.cli import main
from tests.e2e.runs import (
    SMALL,
    assert_same_run,
    command,
    environment,
    pretrain,
    rows,
    wait_for,
    without_clocks,
)
from tests.view_loaders import NEEDS_FFCV
from tests.warm import Process

pytestmark = NEEDS_FFCV


def build(file: Path, *more: str) -> int:
    words = ["--data.name", "digits", "--format", "raw", "--output", str(file), *more]
    return main(["data", "build", *words])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "digits.beton"
    assert build(file) == 0
    return file


def keys(file: Path) -> list[str]:
    return ["--data.backend", "ffcv", "--data.packed", str(file)]


def test_build_says_what_it_wrote_and_how_to_use_it(tmp_path, capsys):
    file = tmp_path / "d.beton"
    assert build(file, "--data.split", "test") == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith(f"{file}: 360 images of digits test, raw, ")
    assert second == (
        f"use it: --data.name digits --data.split test --data.backend ffcv --data.packed {file}"
    )
    assert build(file) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in (["--shorter_side", "0"], ["--data.workers", "-1"], ["--format", "png"]):
        assert build(tmp_path / "e.beton", *wrong) == 2


def test_an_unknown_data_set_is_refused_before_anything_is_read(tmp_path, capsys):
    file = tmp_path / "a.beton"
    words = ["data", "build", "--data.name", "fasion_mnist", "--format", "raw"]
    assert main([*words, "--output", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--data.name" in line
    assert "'fashion_mnist'" in line
    assert not file.exists()


def test_a_run_from_a_packed_file_is_that_from_memory(digits, tmp_path):
    """To the rounding of crops, which grows over the steps."""
    assert pretrain(tmp_path / "packed", *keys(digits)) == 0
    assert pretrain(tmp_path / "memory") == 0
    for ours, theirs in zip(rows(tmp_path / "packed"), rows(tmp_path / "memory"), strict=True):
        assert ours.keys() - {"unreadable_images"} == theirs.keys()
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
            assert 0 <= ours["data_wait_percent"] <= 100


def test_a_run_stopped_in_the_middle_of_an_epoch_equals_the_undisturbed_one(digits, tmp_path):
    run, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    assert pretrain(undisturbed, *keys(digits)) == 0
    words = ["pretrain", *SMALL, *keys(digits), "--run", str(run), "--checkpoint.every_steps", "2"]
    slowly = environment(STEP_SECONDS="0.2")
    process = Process(command(*words), env=slowly, stdout=subprocess.PIPE)
    wait_for(lambda: (run / "checkpoints/step-00000002").exists(), [process])
    process.terminate()
    process.communicate(timeout=240)
    assert process.returncode == 75
    assert rows(run)[-1]["step"] % 6
    assert main(["resume", str(run)]) == 0
    assert_same_run(run, undisturbed)
    assert "data_wait_percent" not in without_clocks(rows(run)[-1])


def test_a_damaged_file_is_refused_at_the_start(digits, tmp_path, capsys):
    file = tmp_path / "digits.beton"
    content = bytearray(digits.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "digits.beton.json").write_bytes(digits.with_name("digits.beton.json").read_bytes())
    assert pretrain(tmp_path / "run", *keys(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} is damaged" in line
