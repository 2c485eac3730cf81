"""`compile: true`: the same training to rounding, which stops and goes on like any other."""

import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.e2e.runs import (
    SMALL,
    assert_same_run,
    command,
    ends,
    environment,
    exported_files,
    launch,
    newest_tensors,
    pretrain,
    rows,
    wait_for,
)
from tests.warm import Process
from tests.warm import run as run_process

# Two epochs of three steps. Batch norm in parts, and stages that are shared, are part of the graphs.
QUIET = ["--data.limit", "104", "--monitor.every_epochs", "2"]
PARTS = ["--cohort.batch_norm_splits", "2", "--cohort.share_stages", "2"]
WORDS = ["pretrain", *SMALL, *QUIET, "--compile", "true"]


def finish(*words: str, run=run_process, **environs: str) -> subprocess.CompletedProcess:
    found = run(command(*words), env=environment(**environs), capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found


def assert_begins_alike(ours: Path, theirs: Path) -> None:
    """Rounding grows from step to step; the first ones show its size."""
    for mine, expected in list(zip(rows(ours), rows(theirs), strict=True))[1:4]:
        for key in ("loss", "net/0/loss", "net/1/scl_soft", "net/0/gradient_norm"):
            assert mine[key] == pytest.approx(expected[key], rel=1e-3), key


def tensor_names(run: Path) -> list[object]:
    files = sorted(run.glob("export/step-*/*/*.safetensors"))
    saved = newest_tensors(run)
    return [
        sorted(saved["networks"]),
        sorted(saved["key_networks"]),
        *(sorted(safe_open(file, "pt").keys()) for file in files),
    ]


@pytest.mark.slow(90)
def test_a_killed_compiled_run_goes_on_byte_for_byte_even_if_all_is_compiled_anew(tmp_path):
    eager, whole, killed = (tmp_path / name for name in ("eager", "whole", "killed"))
    assert pretrain(eager, *QUIET) == 0
    cache, another = ({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)} for name in ("a", "b"))
    finish(*WORDS, "--run", str(whole), **cache)
    assert_begins_alike(whole, eager)
    assert rows(whole) != rows(eager)
    assert tensor_names(whole) == tensor_names(eager)

    words = command(*WORDS, "--run", str(killed), "--checkpoint.every_steps", "2")
    slowly = environment(STEP_SECONDS="0.2", **cache)
    process = Process(words, env=slowly, stdout=subprocess.PIPE)
    wait_for(lambda: (killed / "checkpoints/step-00000002").exists(), [process])
    process.kill()
    process.communicate()
    finish("resume", str(killed), **another)
    assert_same_run(killed, whole)


@pytest.mark.slow(90)
@pytest.mark.ddp
def test_two_compiled_processes_share_stages_and_split_batch_norms(tmp_path):
    eager, together = tmp_path / "eager", tmp_path / "together"
    more = [*PARTS, "--cohort.batch_norm_splits", "4"]
    assert pretrain(eager, *QUIET, *more) == 0
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for code, output in ends(launch(2, *WORDS, *more, "--run", str(together), **cache)):
        assert code == 0, output
        assert "cannot be compiled" not in output
    assert_begins_alike(together, eager)
    assert tensor_names(together) == tensor_names(eager)


@pytest.mark.slow(20)
def test_without_a_compiler_one_line_says_so_and_the_run_is_the_eager_one(tmp_path):
    eager, ours = tmp_path / "eager", tmp_path / "ours"
    assert pretrain(eager, *QUIET, *PARTS) == 0
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    # A real start: torch looks for the compiler when it is imported.
    found = finish(*WORDS, *PARTS, "--run", str(ours), run=subprocess.run, **missing)
    lines = [line for line in found.stderr.splitlines() if "compile" in line]
    assert len(lines) == 1
    assert "compile: the networks cannot be compiled and run as they are" in lines[0]
    assert exported_files(ours).keys() == exported_files(eager).keys()
    for group in ("networks", "key_networks", "queue"):
        for name, tensor in newest_tensors(eager)[group].items():
            assert newest_tensors(ours)[group][name].equal(tensor), (group, name)


def test_synchronised_batch_norm_is_refused(tmp_path, capsys):
    words = ["--compile", "true", "--cohort.sync_batch_norm", "true"]
    assert pretrain(tmp_path / "r", *words) == 2
    assert "compile must be false with cohort.sync_batch_norm" in capsys.readouterr().err
