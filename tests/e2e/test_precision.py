"""Runs in other number formats: on the CPU to show that they work, on CUDA where there is one."""

import pytest
import torch

from peerlearn.cli import main
from tests.e2e.runs import STEPS, assert_same_run, events, newest_tensors, pretrain, rows

QUIET = ["--monitor.every_epochs", "0"]
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_stays_near_float32_and_keeps_float32_state(
    precision, device, tmp_path
):
    words = [*QUIET, "--device", device, "--epochs", "1"]
    assert pretrain(tmp_path / "half", *words, "--precision", precision) == 0
    assert pretrain(tmp_path / "full", *words) == 0
    half, full = rows(tmp_path / "half"), rows(tmp_path / "full")
    # 8 bits of mantissa (bf16) or 11 (fp16) in the networks; the losses themselves are float32.
    # The first step's alone: fp16 begins by leaving steps out until its scale fits.
    for name in ("loss", "net/0/icl_hard", "net/1/icl_soft"):
        assert half[0][name] == pytest.approx(full[0][name], rel=0.05)
        assert half[0][name] != full[0][name]
    for group in ("networks", "key_networks", "queue", "optimizer"):
        for tensor in newest_tensors(tmp_path / "half")[group].values():
            assert tensor.dtype in (torch.float32, torch.int64)


@pytest.mark.slow(8)
def test_the_loss_scale_is_saved_and_grows_again_to_the_bit(tmp_path, monkeypatch):
    """fp16 begins with a scale that is too large here or not; wherever it stands, a resumed run has it."""
    words = [*QUIET, "--precision", "fp16", "--checkpoint.every_steps", "3"]
    assert pretrain(tmp_path / "a", *words) == 0
    from peerlearn.compute.attempt import Attempt

    class Killed(BaseException):
        pass

    begin_step = Attempt.begin_step

    def killed_at_step_8(attempt):
        if attempt.training.step == 8:
            raise Killed
        begin_step(attempt)

    monkeypatch.setattr(Attempt, "begin_step", killed_at_step_8)
    with pytest.raises(Killed):
        pretrain(tmp_path / "b", *words)
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "b")]) == 0
    assert [e["step"] for e in events(tmp_path / "b", "started")] == [0, 6]
    scales = [row["loss_scale"] for row in rows(tmp_path / "b")]
    assert len(scales) == STEPS
    assert scales == [row["loss_scale"] for row in rows(tmp_path / "a")]
    assert_same_run(tmp_path / "b", tmp_path / "a")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", ["true", "false"])
def test_cuda_and_cpu_begin_alike(tf32, tmp_path):
    words = [*QUIET, "--epochs", "1", "--tf32", tf32]
    assert pretrain(tmp_path / "gpu", *words, "--device", "cuda") == 0
    assert pretrain(tmp_path / "cpu", *words) == 0
    for ours, theirs in list(zip(rows(tmp_path / "gpu"), rows(tmp_path / "cpu"), strict=True))[:2]:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2 if tf32 == "true" else 1e-3)
