"""An evaluator that trains, around a training that counts and costs nothing."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import StepGuard
from peerlearn.compute.program import Program
from peerlearn.compute.resumable import Resumable
from peerlearn.config import changeable
from peerlearn.errors import SavedError, UsageError, UserError
from peerlearn.evaluation.evaluator import Evaluator, EvaluatorConfig, run
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.score_table import metric_column
from peerlearn.evaluation.selection import Selection
from peerlearn.evaluation.training_run import own_config, resume, trained, training_run
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.save_config import SaveConfig
from peerlearn.runs.training_facts import training_verb, write_env


@dataclass(frozen=True, kw_only=True)
class CountConfig(EvaluatorConfig):
    """A training that counts its steps.

    Attributes:
        run: folder of the training; null = one beside the results.
        seed: seed of nothing.
        steps: number of steps.
        stop_at: step before which the process is told to stop; "scoring" = while it scores.
        keeps_saves: whether the saves stay.
    """

    run: str | None = changeable(None)
    seed: int = 0
    steps: int = 4
    stop_at: str = changeable("never")
    keeps_saves: bool = changeable(True)
    checkpoint_every: SaveConfig = field(default_factory=lambda: SaveConfig(every_steps=1))


class Count(Resumable):
    def __init__(self, config: CountConfig, run: RunDirectory, ranks: Ranks) -> None:
        self.config, self.run, self.ranks, self.step = config, run, ranks, 0
        self.model = nn.Linear(1, 1)
        nn.init.zeros_(self.model.weight)
        self.guard = StepGuard([self.model], max_skipped_in_a_row=1)

    saves = property(lambda self: self.config.checkpoint_every)
    total_steps = property(lambda self: self.config.steps)

    def trained(self) -> nn.Module:
        return self.model

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": dict(self.model.state_dict())}

    def load(self, tensors, state) -> None:
        self.model.load_state_dict(tensors["model"])


def interrupt_at(config: CountConfig, place: object) -> None:
    if config.stop_at == str(place):
        os.kill(os.getpid(), signal.SIGTERM)


def count(attempt: Attempt[Count]) -> bool:
    counting = attempt.training
    while counting.step < counting.total_steps:
        interrupt_at(counting.config, counting.step)
        attempt.begin_step()
        with torch.no_grad():
            counting.model.weight += 1
        counting.step += 1
        if attempt.save_if_due():
            return False
    return True


def score(config: CountConfig, selection: Selection, ranks: Ranks) -> Iterator[Score]:
    protocol = {"steps": config.steps, "sizes": (1, 2)}
    place = training_run(
        *("count", config, selection, protocol, ranks), prefix="count-7", folder=config.run
    )
    program = Program(build=Count, train=count)
    own = own_config(config, selection)
    with trained(place, program, own, ranks, keeps_saves=config.keeps_saves) as counted:
        interrupt_at(config, "scoring")
        for name in selection.folders:
            metrics = {"count": counted.model.weight.item(), "n": 1}
            yield Score(network=name, dataset="d", metrics=metrics, protocol=protocol)


COUNT = Evaluator(
    verb="count",
    config=CountConfig,
    score=score,
    columns=[metric_column("count", "count")],
    title=lambda config: "Count",
    description="Count.",
    example="peerlearn count --checkpoint runs/a",
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "net-0"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def words(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return ["--checkpoint", str(export), "--device", "cpu", "--results", "out"]


def starts(folder: Path) -> list[int]:
    """The step at which each start of a training began."""
    return [event["step"] for event in RunDirectory(folder).events() if event["event"] == "started"]


def scores(folder: Path) -> list[float]:
    return [
        json.loads(file.read_text())["metrics"]["count"] for file in folder.glob("count-d-*.json")
    ]


def test_without_a_folder_the_training_lies_beside_the_results(words):
    assert run(COUNT, words) == 0
    (folder,) = Path("out").glob("count-7-*")
    assert re.fullmatch("count-7-[0-9a-f]{12}", folder.name)
    assert scores(Path("out")) == [4.0]
    assert training_verb(RunDirectory(folder).env) == "count"
    # What it has learned is scored once more, and not learned again.
    assert run(COUNT, words) == 0
    assert starts(folder) == [0, 4]
    assert run(COUNT, [*words, "--steps", "5"]) == 0
    assert len(list(Path("out").glob("count-7-*"))) == 2


def test_without_its_saves_it_is_begun_anew(words, capsys):
    words += ["--keeps_saves", "false"]
    assert run(COUNT, words) == 0
    (folder,) = Path("out").glob("count-7-*")
    assert not (folder / "checkpoints").exists()
    assert resume(COUNT, [str(folder)]) == 0
    assert f"{folder} is done already; its results are in out" in capsys.readouterr().out
    assert run(COUNT, words) == 0
    assert starts(folder) == [0]


@pytest.mark.parametrize(("stop_at", "done"), [("0", 1), ("2", 3), ("scoring", 4)])
def test_told_to_stop_it_goes_on_by_the_same_command(words, stop_at, done):
    with pytest.raises(SavedError, match=r"saved in out/count-7-.*: the same command continues"):
        run(COUNT, [*words, "--stop_at", stop_at])
    (folder,) = Path("out").glob("count-7-*")
    assert not scores(Path("out"))
    assert run(COUNT, words) == 0
    assert starts(folder) == [0, done]
    assert scores(Path("out")) == [4.0]


def test_a_folder_of_ones_own_is_gone_on_with_from_anywhere(words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SavedError, match="saved in mine: the same command continues"):
        run(COUNT, [*words, "--run", "mine", "--stop_at", "1"])
    with pytest.raises(SavedError):
        run(COUNT, [*words, "--run", "mine", "--stop_at", "2"])
    monkeypatch.chdir(tmp_path)
    folder = Path("here/mine")
    assert resume(COUNT, [str(folder), "--stop_at", "never"]) == 0
    assert starts(folder) == [0, 2, 3]
    assert scores(Path("here/out")) == [4.0]
    assert not Path("out").exists()
    shutil.rmtree(folder / "checkpoints")
    assert resume(COUNT, [str(folder)]) == 0
    out = (tmp_path / "here/out").resolve()
    assert f"{folder} is done already; its results are in {out}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--run: a run goes on where it lies"):
        resume(COUNT, [str(folder), "--run", "another"])


def test_a_folder_with_another_training_is_refused(words, tmp_path, export):
    words += ["--run", "mine"]
    assert run(COUNT, words) == 0
    before = sorted(Path("mine").rglob("*"))
    other = Path(shutil.copytree(export, tmp_path / "other/net-0"))
    (other / "model.safetensors").write_text("other weights")
    for more, differs in (
        (["--steps", "5"], "config.steps"),
        (["--checkpoint", str(other)], "exports.0"),
    ):
        with pytest.raises(UserError) as refused:
            run(COUNT, [*words, *more])
        assert str(refused.value) == (
            f"mine holds another training, which differs in {differs}: choose another folder by --run"
        )
    assert sorted(Path("mine").rglob("*")) == before
    # The same weights elsewhere are the same networks.
    moved = shutil.copytree(export, tmp_path / "moved/net-0")
    assert run(COUNT, [*words, "--checkpoint", str(moved)]) == 0


def test_a_folder_with_something_else_is_refused(words):
    Path("notes").mkdir()
    Path("notes/a.txt").touch()
    with pytest.raises(UserError, match="notes is there and no run: choose another folder"):
        run(COUNT, [*words, "--run", "notes"])
    other = RunDirectory(Path("other"))
    other.create_folder()
    other.write_config("steps: 4\n")
    write_env(other.env, "pretrain", None)
    with pytest.raises(UserError, match="other holds a run of `peerlearn pretrain`: choose"):
        run(COUNT, [*words, "--run", "other"])
    assert sorted(path.name for path in other.root.iterdir()) == ["config.yaml", "env.json"]


def test_a_start_that_was_killed_before_its_first_step_is_gone_on_with(words, monkeypatch):
    def killed(attempt: object) -> bool:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("peerlearn.evaluation.training_run._note_identity", killed)
        with pytest.raises(SystemExit):
            run(COUNT, [*words, "--run", "mine"])
    with pytest.raises(UserError, match="changed since the last save: steps 4 -> 5"):
        run(COUNT, [*words, "--run", "mine", "--steps", "5"])
    assert run(COUNT, [*words, "--run", "mine"]) == 0
