"""A run to be watched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import pretrain


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Path:
    """A run with exports at steps 6 and 12; not to be changed."""

    def make(run: Path) -> None:
        assert pretrain(run, "--checkpoint.export_every_epochs", "1") == 0
        shutil.rmtree(run / "tb")

    return once("two-exports", make)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
