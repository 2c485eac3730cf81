"""What any training gets from the spine: a toy of one file, and one line among the verbs, in processes of their own."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.training_facts import training_verb
from tests.e2e.runs import assert_same_run, events, rows, small_disk, standing
from tests.trees import add_line, command_of, copied_tree, run_in

TOY = '''
"""A linear model that learns to add up random numbers."""
import time
from dataclasses import dataclass, field
from peerlearn.compute import trainer
from peerlearn.config import changeable
from peerlearn.runs.save_config import SaveConfig

@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    run: str | None = changeable(None)
    seed: int = 0
    steps: int = changeable(40, to_more=True)
    lr: float = 0.1
    bad_steps: list[int] = field(default_factory=list)
    pause_seconds: float = changeable(0.0)
    device: str = changeable("cpu")
    rank_timeout_seconds: float = changeable(600.0)
    checkpoint: SaveConfig = changeable(default_factory=lambda: SaveConfig(every_steps=5))

def program():
    import torch
    from peerlearn.compute.program import Program
    from peerlearn.compute.guards import StepGuard, all_finite
    from peerlearn.compute.resumable import Resumable

    class Toy(Resumable):
        def __init__(self, config, run, ranks):
            self.config, self.run, self.ranks, self.step = config, run, ranks, 0
            self.model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
            torch.nn.init.zeros_(self.model[1].weight), torch.nn.init.zeros_(self.model[1].bias)
            self.guard, self.to_spoil = StepGuard([self.model], max_skipped_in_a_row=3), set(config.bad_steps)
        total_steps = property(lambda self: self.config.steps)
        def trained(self): return self.model
        def tensors(self): return {"model": self.model.state_dict()}
        def load(self, tensors, state): self.model.load_state_dict(tensors["model"])

    def train(attempt):
        toy = attempt.training
        while toy.step < toy.total_steps:
            attempt.begin_step()
            numbers = torch.randn(16, 8) * (float("nan") if toy.step in toy.to_spoil else 1)
            loss = (toy.model(numbers) - numbers.sum(1, keepdim=True)).square().mean()
            gradients = torch.autograd.grad(loss, toy.model.parameters())
            if any(attempt.agree(~all_finite([loss, *gradients]).view(1))):
                toy.to_spoil.discard(toy.step)  # once only
                attempt.skip("the loss is not finite")
            else:
                torch._foreach_sub_([p.data for p in toy.model.parameters()], gradients, alpha=toy.config.lr)
                toy.guard.passed()
            toy.step += 1
            attempt.log.write(toy.step, {"loss": loss.item()})
            time.sleep(toy.config.pause_seconds)
            if attempt.save_if_due(): return False
        return True
    return Program(build=Toy, train=train)

TOYS = trainer.Trainer(
    verb="toy", config_class=ToyConfig, description="A toy.", example="toy", program=program)
def main(argv): return trainer.start(TOYS, argv)
def resume(argv): return trainer.resume(TOYS, argv)
'''.lstrip()
pytestmark = pytest.mark.slow
SLOW = ("--pause_seconds", "0.1")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = copied_tree(tmp_path_factory.mktemp("tree"))
    (tree / "toy").mkdir()
    (tree / "toy/__init__.py").write_text(TOY)
    add_line(
        tree / "peerlearn/commands/verbs.py",
        "VERBS = {",
        '    "toy": Verb("toy", "main", "a toy", True),',
    )
    return tree


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "r"
    run_in(tree, "toy", "--run", str(run))
    return run


@pytest.fixture
def slow_run(tree, tmp_path, request):
    """A run that is going on and has saved step 5; it takes 4 s, or as many steps as the test says."""
    run = tmp_path / "r"
    steps = getattr(request, "param", "40")
    process = subprocess.Popen(
        **command_of(tree, "toy", "--run", str(run), *SLOW, "--steps", steps),
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
    )
    wait_for(run / "checkpoints/latest", process)
    yield run, process
    process.kill()
    process.communicate()


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_the_toy_is_short():
    assert len(TOY.splitlines()) <= 60


def test_its_run_is_a_run_like_any(tree, undisturbed):
    run = RunDirectory(undisturbed)
    assert run.done
    assert training_verb(run.env) == "toy"
    logged = rows(undisturbed)
    assert [row["step"] for row in logged] == list(range(1, 41))
    # Eight numbers of variance 1 to be added up, and nothing known yet.
    assert 4 < logged[0]["loss"] < 16
    # It would be 0 but for the statistics of batches of 16.
    assert logged[-1]["loss"] < 2
    assert [event["step"] for event in events(undisturbed, "saved")] == list(range(5, 41, 5))
    assert run.log(1, 0).is_file()
    stands = standing(undisturbed)
    assert (stands.step, stands.total_steps, stands.seconds_left) == (40, 40, 0.0)
    assert "--checkpoint.every_steps" in run_in(tree, "toy", "--help")
    assert "every_steps: 5" in run_in(tree, "toy", "--dry_run")
    assert "steps (more), pause_seconds, device" in run_in(
        tree, "resume", str(undisturbed), "--help"
    )
    assert " 40/40 " in run_in(tree, "status", str(undisturbed))
    assert "is done already" in run_in(tree, "resume", str(undisturbed))


def test_after_kill_9_it_goes_on_to_the_same_bytes(tree, slow_run, undisturbed):
    run, process = slow_run
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "steps 5 to 40" in run_in(tree, "resume", str(run), "--pause_seconds", "0")
    assert_same_run(run, undisturbed)


def test_told_to_stop_it_saves_and_says_how_to_go_on(tree, slow_run, undisturbed):
    run, process = slow_run
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"saved; `peerlearn resume {run}` continues" in output
    (stopped,) = events(run, "stopped")
    run_in(tree, "resume", str(run), "--pause_seconds", "0")
    assert [event["step"] for event in events(run, "started")] == [0, stopped["step"]]
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("slow_run", ["1000000"], indirect=True)
def test_nobody_else_may_train_it_meanwhile(tree, slow_run):
    run, process = slow_run
    assert f"process {process.pid}" in run_in(tree, "resume", str(run), code=1)
    assert "running" in run_in(tree, "status", str(run))


def test_a_changed_config_is_refused_and_more_steps_are_not(tree, undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "r"))
    assert "lr 0.1 -> 0.2" in run_in(tree, "resume", str(run), "--lr", "0.2", code=1)
    assert "steps 40 -> 39" in run_in(tree, "resume", str(run), "--steps", "39", code=1)
    run_in(tree, "resume", str(run), "--steps", "42")
    assert [row["step"] for row in rows(run)] == list(range(1, 43))


def test_a_step_with_nan_is_skipped(tree, tmp_path):
    run = tmp_path / "r"
    run_in(tree, "toy", "--run", str(run), "--bad_steps", "7", "8")
    assert [(e["step"], e["reason"]) for e in events(run, "step_skipped")] == [
        (step, "rank 0: the loss is not finite") for step in (7, 8)
    ]
    assert all(row["loss"] is None for row in rows(run)[7:9])
    # The running statistics would have become NaN too.
    assert rows(run)[-1]["loss"] < 2
    assert not events(run, "rolled_back")


def test_steps_with_nan_in_a_row_are_healed_by_going_back_to_a_save(tree, undisturbed, tmp_path):
    run = tmp_path / "r"
    run_in(tree, "toy", "--run", str(run), "--bad_steps", "7", "8", "9")
    (event,) = events(run, "rolled_back")
    assert (event["step"], event["before_step"]) == (5, 7)
    assert_same_run(run, undisturbed)


def test_a_full_disk_costs_saves_but_not_the_run(tree, undisturbed, tmp_path):
    with small_disk(tmp_path, mib=1) as disk:
        run = disk / "r"
        words = ["toy", "--run", str(run), *SLOW, "--checkpoint.max_missed", "100"]
        process = subprocess.Popen(
            **command_of(tree, *words), stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        wait_for(run / "checkpoints/latest", process)
        with (disk / "filler").open("wb", buffering=0) as filler:
            while shutil.disk_usage(disk).free and filler.write(bytes(4096)):
                pass
        line = next(line for line in process.stderr if "could not be saved" in line)
        assert "(No space left on device): training goes on, the older saves stand" in line
        (disk / "filler").unlink()
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert events(run, "save_missed")
        assert_same_run(run, undisturbed)
