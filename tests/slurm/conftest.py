"""The runs that jobs are compared with."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import pretrain
from tests.slurm.jobs import train_undisturbed

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def alone(once: Once) -> Path:
    """The run of `tests.slurm.jobs` by one process that nothing happened to."""
    return once("alone", lambda run: train_undisturbed(run, 1))


@pytest.fixture(scope="session")
def together(once: Once) -> Path:
    """The same by two processes."""
    return once("together", lambda run: train_undisturbed(run, 2))


@pytest.fixture(scope="session")
def finished(once: Once) -> Path:
    """A small run that is done."""

    def make(run: Path) -> None:
        assert pretrain(run) == 0

    return once("runs/finished", make)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "copy"))


@pytest.fixture
def killed_later() -> Iterator[list[subprocess.Popen]]:
    """Processes that do not outlive the test."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()
