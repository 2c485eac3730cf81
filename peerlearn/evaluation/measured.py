"""What evaluators have measured of one export, for its model card."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peerlearn.evaluation.results import read_result
from peerlearn.runs.model_card import Figure

_TASKS = {"detect": "object-detection"}
# The percentages that are told, with their names on the Hub.
_METRICS = {
    "top1": "accuracy",
    "top5": "top_5_accuracy",
    "accuracy": "accuracy",
    "ap": "mean_average_precision",
    "ap50": "ap50",
    "ap75": "ap75",
}

logger = logging.getLogger(__name__)


def measured_figures(results: Path, export_sha256: str) -> list[Figure]:
    """What the result files tell of these very weights, in the order of the files' names.

    Args:
        results: folder of result files. One that cannot be read is passed over with a warning.
        export_sha256: `peerlearn.export.export_hash` of the export.
    """
    figures: list[Figure] = []
    for file in sorted(results.glob("*.json")):
        try:
            result = read_result(file)
        except (OSError, ValueError) as error:
            logger.warning("passed over %s, which holds no result: %s", file, error)
            continue
        if result.get("export_hash") == export_sha256:
            figures.extend(_figures(result))
    return figures


def _figures(result: dict[str, Any]) -> Iterator[Figure]:
    """The percentages of one result. Their uncertainty, and what else it tells in plain values, is their protocol."""
    metrics, protocol = result["metrics"], result["protocol"]
    told = {**protocol, "step": result["step"], "seed": result.get("seed"), "n": metrics.get("n")}
    variant = f", {result['variant']}" if result["variant"] else ""
    for metric in filter(metrics.__contains__, _METRICS):
        uncertainty = {key: metrics[key] for key in metrics if key.startswith(f"{metric}_")}
        plain = {
            key: value
            for key, value in {**told, **uncertainty}.items()
            if isinstance(value, str | int | float)
        }
        if isinstance(metrics[metric], float):
            yield Figure(
                name=f"{metric} in percent, by peerlearn {result['task']}{variant}",
                metric=_METRICS[metric],
                value=metrics[metric],
                dataset=result["dataset"],
                split=str(protocol.get("split", "test")),
                task=_TASKS.get(result["task"], "image-classification"),
                protocol=plain,
            )
