"""How a training begins, and how its failure is told to a supervisor."""

import pytest
import torch

from peerlearn.compute import program
from peerlearn.compute.dist import LostRankError, Ranks
from peerlearn.compute.program import Program, _failure_kind, run_training
from peerlearn.errors import CrashError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no space"), "user"),
        (CrashError("a process that reads images died"), "crash"),
        (LostRankError("rank 1 died"), "lost_rank"),
        (RuntimeError("CUDA error"), "crash"),
    ],
)
def test_only_what_the_user_must_mend_is_not_tried_again(error, kind):
    assert _failure_kind(error) == kind


@pytest.mark.parametrize(("device", "keeps"), [("cpu", True), ("meta", False)])
def test_a_training_on_the_cpu_keeps_freed_memory_from_the_start(
    device, keeps, monkeypatch, tmp_path
):
    told: list[str] = []
    monkeypatch.setattr(program, "keep_freed_memory", lambda: told.append("kept"))

    def build(*_):
        told.append("built")
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        run_training(
            Program(build=build, train=lambda attempt: True),
            verb="pretrain",
            config=None,
            run=RunDirectory(tmp_path / "r"),
            ranks=Ranks(torch.device(device)),
            stop=Stop(),
            resumes=False,
        )
    assert told == (["kept", "built"] if keeps else ["built"])
