"""Small studies for the tests, and what they left."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from studies.evaluations import Outcome, read_outcomes
from tests.e2e.runs import SMALL, environment
from tests.warm import run as run_process

ROOT = Path(__file__).parents[2]
PRETRAIN = " ".join([*SMALL, "--epochs", "1", "--monitor.every_epochs", "0"])
KNN = "knn --k 5 --data.limit 200"
# Refused by the evaluation itself, before it loads anything large.
REFUSED = "knn --network 7"
STEP = 6


def write_config(folder: Path, **keys: object) -> Path:
    """FILE.yaml of a small study in ``folder``/s: one config, two seeds."""
    content = {
        "folder": str(folder / "s"),
        "pretrain": PRETRAIN,
        "seeds": [0, 1],
        "grids": {"grid": {"terms": {"all": ""}}},
        "evaluate": [KNN, REFUSED],
        "interval_seconds": 0.3,
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "file.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def write_profile(folder: Path) -> str:
    """The file of a profile for the real cluster."""
    file = folder / "profile.yaml"
    file.write_text(
        "executor: slurm\npartition: main\ntime_minutes: 10\n"
        "environment: [GLOO_SOCKET_IFNAME=lo, OMP_NUM_THREADS=1]\n"
    )
    return str(file)


def peerlearn(*words: str, code: int = 0, **variables: str) -> str:
    """What the command prints."""
    found = run_process(
        [sys.executable, "-m", "peerlearn", *words],
        env=environment(**{"PYTHONPATH": str(ROOT), **variables}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert found.returncode == code, found.stdout + found.stderr
    return str(found.stdout)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def run_of(root: Path, seed: int, name: str = "base") -> Path:
    return root / f"{name}-seed-{seed}"


def outcomes(run: Path) -> dict[tuple[str, int], Outcome]:
    """By line and step."""
    return {(each.line, each.step): each for each in read_outcomes(run)}


def kinds(run: Path) -> dict[str, str]:
    """The kind of the end of each line."""
    return {each.line: each.kind for each in read_outcomes(run)}


def results(run: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(run.glob("results/*.json"))]


def measurements(run: Path) -> int:
    """How many processes have measured anything: each has printed its table, here or in a job."""
    logs = [*run.glob("evaluations/*/log.txt"), *run.glob("evaluations/*/measure-*/*_log.out")]
    return sum(file.read_text().count("kNN top-1") for file in logs)
