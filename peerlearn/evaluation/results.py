"""Results: one JSON file per score, with the protocol it was measured under; and means over several runs."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.evaluation.uncertainty import spread_over_runs
from peerlearn.runs.environment import environment
from peerlearn.runs.files import write_text

SCHEMA_VERSION = 1
# The name of the job that measures, if it is one of a pipeline's: its result files repeat it.
JOB_VARIABLE = "PEERLEARN_JOB"


def write_result(
    folder: Path,
    *,
    task: str,
    dataset: str,
    step: int,
    network: str,
    metrics: Mapping[str, Any],
    protocol: Mapping[str, Any],
    export_hash: Any,
    seed: Any,
    seconds: float,
) -> Path:
    """Write ``<task>-<dataset>-<step>-<network>-<hash>.json``.

    The hash is of protocol, exports and seed: measuring the same again replaces the file, another protocol adds one.

    Args:
        export_hash: of the network; by its name for several networks, a list for several runs.
        seed: of the run or the evaluation; a list for several.

    Raises:
        UserError: the folder cannot be written.
    """
    identity = {"protocol": protocol, "export_hash": export_hash, "seed": seed}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{task}-{dataset}-{step:08d}-{network}-{digest}.json"
    env = environment()
    result = {
        "schema": SCHEMA_VERSION,
        "task": task,
        "dataset": dataset,
        "step": step,
        "network": network,
        "metrics": metrics,
        **identity,
        "versions": env.pop("versions"),
        "hardware": env,
        "seconds": seconds,
    }
    if job := os.environ.get(JOB_VARIABLE):
        result["job"] = job
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}): choose another folder by --results"
        ) from error
    return path


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote."""
    return dict(json.loads(path.read_text()))


def write_mean_result(folder: Path, paths: Sequence[Path]) -> Path:
    """Write the mean over runs of one score: a result file whose numbers are mean, std, ci95 and the runs' values.

    Args:
        folder: where to.
        paths: the runs' result files, of one task, dataset, network and protocol.

    Raises:
        UserError: the protocols differ: such scores have no mean; or the folder cannot be written.
    """
    results = [read_result(path) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        if result["protocol"] != first["protocol"]:
            raise UserError(
                f"{path} and {paths[0]} were measured under different protocols and are not averaged: "
                "evaluate them apart"
            )
    names = [name for name, value in first["metrics"].items() if isinstance(value, float)]
    metrics: dict[str, Any] = {"n": first["metrics"]["n"], "runs": len(results)}
    for name in names:
        values = [result["metrics"][name] for result in results]
        spread = spread_over_runs(values)
        metrics[name] = {
            "mean": spread.mean,
            "std": spread.std,
            "ci95": spread.ci95,
            "values": values,
        }
    return write_result(
        folder,
        task=first["task"],
        dataset=first["dataset"],
        step=max(result["step"] for result in results),
        network=first["network"],
        metrics=metrics,
        protocol=first["protocol"],
        export_hash=[result["export_hash"] for result in results],
        seed=[result["seed"] for result in results],
        seconds=round(sum(result["seconds"] for result in results), 3),
    )
