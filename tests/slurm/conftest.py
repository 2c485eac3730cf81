"""One SLURM for all tests of a worker, left empty and as configured by each."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs, scratch_folder, start_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
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
