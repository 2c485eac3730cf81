"""Results: one JSON file per score, with the protocol it was measured under."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlearn.run_dir import environment, write_text

SCHEMA_VERSION = 1


def write_result(
    folder: Path,
    *,
    task: str,
    dataset: str,
    step: int,
    network: str,
    metrics: Mapping[str, Any],
    protocol: Mapping[str, Any],
    export_hash: str | Mapping[str, str],
    seed: int | None,
    seconds: float,
) -> Path:
    """Write ``<task>-<dataset>-<step>-<network>-<hash>.json``.

    The hash is of protocol, exports and seed: measuring the same again replaces the file, another protocol adds one.
    """
    identity = {"protocol": protocol, "export_hash": export_hash, "seed": seed}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
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
    write_text(path, json.dumps(result, indent=2) + "\n")
    return path
