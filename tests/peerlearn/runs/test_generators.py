"""The generators of other libraries, whose states are saved."""

import subprocess
import sys


def test_late_imports_do_not_draw() -> None:
    """Else a resumed run, which imports them after its state is restored, would have another state in its saves."""
    code = """
import random
from peerlearn.runs.generators import seed_generators
seed_generators(0, 0)
before = random.getstate()
import peerlearn.evaluation.score_table, peerlearn.runs.progress, pretrain.summary, torch.utils.tensorboard
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
