"""What all tests share: their order, runs made once for all, a SLURM, reproducible properties, Ctrl-C, a full disk."""

import itertools
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.slurm.cluster import Cluster, missing_programs, scratch_folder, start_cluster

# The same examples on every machine, however busy it is.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

# A shell without job control has what it runs in the background ignore SIGINT, and programs inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: twice the cores of a small machine, as tests that wait take none."""
    cores = len(os.sched_getaffinity(0))
    return max(cores, min(2 * cores, 8))


# What takes one of these fixtures has its markers; a worker that would wait for another to make it does other things.
MARKED_FIXTURES = {
    "cluster": [pytest.mark.slurm],
    "killed_twice": [pytest.mark.slow(60), pytest.mark.xdist_group("killed_twice")],
}
# Seconds that a test takes, roughly, where its marker `slow` does not say.
USUAL_SECONDS = {"slurm": 30.0, "ddp": 10.0, "slow": 10.0}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one. Those of a cluster mostly wait: turn by turn with
    those that compute. Short tests follow, a module of them staying with one worker, which has its fixtures."""
    for item in items:
        for fixture in sorted(MARKED_FIXTURES.keys() & getattr(item, "fixturenames", ())):
            for marker in MARKED_FIXTURES[fixture]:
                item.add_marker(marker)
    long = [item for item in items if expected_seconds(item)]
    long.sort(key=expected_seconds, reverse=True)
    for item in long:
        # Short tests cover the code; counting lines would make these, which add few, a third slower.
        item.add_marker(pytest.mark.no_cover)
    waiting = [item for item in long if item.get_closest_marker("slurm")]
    computing = [item for item in long if not item.get_closest_marker("slurm")]
    short = [item for item in items if not expected_seconds(item)]
    for item in short:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0].replace("/", ".")))
    turns = itertools.chain.from_iterable(itertools.zip_longest(waiting, computing))
    items[:] = [*(item for item in turns if item), *short]


def expected_seconds(item: pytest.Item) -> float:
    """0 where no marker says that it takes long."""
    found = [(marker.name, *marker.args) for marker in item.iter_markers()]
    said = [args[1] for args in found if args[0] == "slow" and len(args) > 1]
    usual = [USUAL_SECONDS[args[0]] for args in found if args[0] in USUAL_SECONDS]
    return float(said[0] if said else max(usual, default=0))


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """``once(name, make)``: the folder that ``make`` was given and made, once for all workers; to be read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        whole = folder.with_name(f"{folder.name}.whole")
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One SLURM for all tests of a worker, left empty and as configured by each."""
    if reason := missing_programs():
        pytest.skip(reason)
    started = start_cluster(scratch_folder())
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def _cluster_left_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    used = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if used:
        used.restore_configuration()
        used.cancel_all()


@pytest.fixture(scope="session")
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """Within ``files_up_to(size)`` no file of this process grows beyond so many bytes: a write that
    would stops there, in the middle, and the next fails with an OSError, as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
