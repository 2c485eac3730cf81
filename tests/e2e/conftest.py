"""What the tests of whole runs share.

One thread, here and in the processes that tests start: sums are then added in one order.
"""

from pathlib import Path

import pytest
import torch

from tests.e2e.detectors import write_all
from tests.e2e.runs import pretrain


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(once) -> list[Path]:
    """Two small runs of digits that differ in their seed, with the exports of momentum networks."""

    def make(folder: Path) -> None:
        for seed in (0, 1):
            words = ["--seed", str(seed), "--monitor.every_epochs", "0"]
            words += ["--checkpoint.export_key_networks", "true"]
            assert pretrain(folder / str(seed), *words) == 0

    folder = once("two-seeds", make)
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="session")
def place(once) -> Path:
    """What detectors are trained on: images with boxes, in two formats, and exported networks."""
    return once("detect-place", write_all)
