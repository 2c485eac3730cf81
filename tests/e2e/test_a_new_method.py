"""A pretraining method is one file and one line: it trains, is monitored, exports and resumes like the others."""

import signal
import subprocess
import time

import pytest
import timm
import torch

from peerlearn.runs.directory import RunDirectory
from tests.e2e.runs import SMALL, assert_same_run, newest_tensors, rows
from tests.trees import add_line, command_of, copied_tree, run_in

TOY = '''
"""Two views of an image are to be alike, and every network's mean embedding is remembered."""
import torch
from pretrain.losses import MCLTerms
from pretrain.method import Method

class Alike(Method):
    def __init__(self, cohort, config, ranks, *, steps_per_epoch):
        super().__init__(cohort, config, ranks, steps_per_epoch=steps_per_epoch)
        self.mean = torch.zeros(config.cohort.networks, config.cohort.embedding_dim)
    def terms(self, views, labels):
        first, second = (self.cohort(view) for view in views)
        self.fresh = first.detach().mean(1)
        unlike = 1 - (first * second).sum(-1).mean(1)
        nothing = torch.zeros_like(unlike)
        return MCLTerms(unlike, nothing, nothing, nothing)
    def end_step(self): self.mean.lerp_(self.fresh, 0.1)
    def state_tensors(self): return {"alike": {"mean": self.mean}}
    def load_state_tensors(self, state): self.mean.copy_(state["alike"]["mean"])
    def metrics(self): return {"mean_norm": float(self.mean.norm())}
'''.lstrip()
pytestmark = pytest.mark.slow
WORDS = ["pretrain", *SMALL, "--method", "alike"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = copied_tree(tmp_path_factory.mktemp("tree"))
    (tree / "pretrain/alike.py").write_text(TOY)
    add_line(tree / "pretrain/config.py", "METHODS = {", '    "alike": "pretrain.alike:Alike",')
    return tree


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "r"
    run_in(tree, *WORDS, "--run", str(run))
    return run


def test_it_trains_is_monitored_and_exports(tree, undisturbed):
    first, *logged = rows(undisturbed)
    assert {"net/0/knn_top1", "ensemble/knn_top1", "pixels/knn_top1"} <= set(first)
    # Four terms with weight alpha on the first alone, summed over two networks.
    for row in logged:
        loss = 0.5 * (row["net/0/scl_hard"] + row["net/1/scl_hard"])
        assert row["loss"] == pytest.approx(loss, rel=1e-6)
        assert row["mean_norm"] > 0
    assert logged[-1]["net/0/scl_hard"] < logged[0]["net/0/scl_hard"]
    assert newest_tensors(undisturbed)["alike"]["mean"].norm() == pytest.approx(
        logged[-1]["mean_norm"], rel=1e-6
    )
    export = RunDirectory(undisturbed).exports / "step-00000012/net-1"
    network = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 16, 16)).isfinite().all()
    assert "alike" in run_in(tree, "pretrain", "--help")


def test_after_kill_9_it_goes_on_to_the_same_bytes(tree, undisturbed, tmp_path):
    run = tmp_path / "r"
    words = [*WORDS, "--run", str(run), "--checkpoint.every_steps", "1"]
    process = subprocess.Popen(**command_of(tree, *words), stdout=subprocess.DEVNULL)
    while not (run / "checkpoints/step-00000003/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_in(tree, "resume", str(run))
    assert_same_run(run, undisturbed)
