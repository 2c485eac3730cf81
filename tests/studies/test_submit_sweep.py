"""A sweep as one job array: a job for each run that is not done."""

import json
import shlex
import sys
from pathlib import Path

import yaml

from peerlearn.runs.directory import RunDirectory
from slurm.submission import jobs_of
from tests.e2e.runs import SMALL, environment, events
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import PROFILE, logs, peerlearn
from tests.warm import run as run_process

KEYS = [*SMALL, "--epochs", "1", "--monitor.train_limit", "200", "--method", "simclr"]


def test_a_sweep_is_one_array(cluster: Cluster, tmp_path: Path) -> None:
    """What is done is left alone, what has begun is gone on with, the table is the whole sweep's."""
    root = tmp_path / "s"
    file = tmp_path / "file.yaml"
    content = {
        "folder": str(root),
        "pretrain": shlex.join(KEYS),
        "seeds": [0],
        "grids": {"g": {"alpha": [0.5, 0.25]}, "h": {"beta": [0.1, 0.2]}},
    }
    file.write_text(yaml.safe_dump(content))
    first, begun, missing = (root / f"{name}-seed-0" for name in ("base", "alpha-0.25", "beta-0.2"))
    for run, *more in ((first,), (begun, "--alpha", "0.25")):
        words = [*KEYS, *more, "--seed", "0", "--run", str(run)]
        start = [sys.executable, "-m", "peerlearn", "pretrain", *words]
        run_process(start, env=environment(), check=True, capture_output=True)
    (begun / "DONE").unlink()

    found = peerlearn(cluster, "submit", *PROFILE, "--wait", "true", "--", "sweep", str(file))
    assert found.returncode == 0, found.stdout + found.stderr + logs(begun)
    jobs = [next(jobs_of(run))["job"] for run in (begun, missing)]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    assert list(jobs_of(first)) == []
    assert [len(events(run, "started")) for run in (first, begun, missing)] == [1, 2, 1]
    assert all(RunDirectory(run).done for run in (first, begun, missing))
    again = peerlearn(cluster, "submit", *PROFILE, "--", "sweep", str(file))
    assert again.returncode == 1
    assert f"{root}: all its runs are done" in again.stderr
    table = peerlearn(cluster, "sweep", str(file), "--table")
    assert table.returncode == 0, table.stderr
    content = json.loads((root / "sweep.json").read_text())
    assert content["problems"] == []
    assert {(score["grid"], *score["labels"]) for score in content["scores"]} == {
        *(("g", "0.5"), ("g", "0.25"), ("h", "0.1"), ("h", "0.2"))
    }
