"""Run directories as trainings leave them, without any training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from peerlearn.evaluation.results import write_result
from peerlearn.runs.directory import RunDirectory

NETWORKS = ("0", "1")
# Names that the page's figures are of, in a row without and with a measurement.
TERMS = ("loss", "scl_hard", "scl_soft", "icl_hard", "icl_soft")
CONFIG = {"method": "moco", "seed": 0, "epochs": 2, "queue": {"size": 64}, "run": ""}
ENVIRONMENT = {"python": "3.11.7", "versions": {"torch": "2.14.1"}, "verb": "pretrain"}


def row(step: int, **more: Any) -> dict[str, Any]:
    """A row of metrics with losses that fall."""
    losses = {f"net/{m}/{term}": 4 + int(m) / 10 - step / 1000 for m in NETWORKS for term in TERMS}
    header = {"step": step, "epoch": step / 50, "seconds": step / 10, "attempt": 1}
    return header | {"loss": 8 - step / 500, "lr": 0.03, "images_per_second": 512.5} | losses | more


def measured(step: int, top1: float) -> dict[str, Any]:
    """What the monitor adds to a row."""
    return {
        "knn/k": 20,
        "knn/temperature": 0.1,
        "knn/test_images": 400,
        "pixels/knn_top1": 60.0,
        **{f"net/{m}/knn_top1": top1 + int(m) for m in NETWORKS},
        "ensemble/knn_top1": top1 + 2,
        "cohort/agreement": 80.0 + step / 100,
    }


def make_run(
    folder: Path,
    rows: Iterable[dict[str, Any]] | None = None,
    *,
    events: Iterable[dict[str, Any]] = (),
    done: bool = True,
    **config: Any,
) -> RunDirectory:
    """A run directory; without ``rows`` of 100 steps, measured at 0, 50 and 100."""
    run = RunDirectory(folder)
    run.create_folder()
    run.write_config(yaml.safe_dump({**CONFIG, "run": str(folder), **config}))
    run.env.write_text(json.dumps(ENVIRONMENT))
    if rows is None:
        rows = [
            row(step) | (measured(step, 70 + step / 10) if step % 50 == 0 else {})
            for step in range(0, 101, 10)
        ]
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in rows))
    for event in events:
        run.event(event["event"], **{k: v for k, v in event.items() if k != "event"})
    if done:
        run.mark_done()
    return run


def write_top1(run: RunDirectory, top1: float, *, seed: int = 0, **changes: Any) -> Path:
    """A result of the verb knn: of the ensemble, of 400 images."""
    facts: dict[str, Any] = {
        "task": "knn",
        "dataset": "digits",
        "step": 100,
        "network": "ensemble",
        "metrics": {"top1": top1, "n": 400, "top1_wilson95": [top1 - 4, top1 + 4]},
        "protocol": {"k": 200, "temperature": 0.1},
        "export_hash": "x",
        "seed": seed,
        "seconds": 1.0,
    }
    return write_result(run.results, **(facts | changes))
