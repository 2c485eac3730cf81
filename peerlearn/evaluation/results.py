"""Results: one JSON file per score, with the protocol it was measured under; and means over several runs."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.evaluation.plots import PictureFormat, draw
from peerlearn.evaluation.uncertainty import is_percentage, spread_over_runs
from peerlearn.runs.environment import environment
from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.text import file_name_part

SCHEMA_VERSION = 1
# The name of the evaluation that measures, if a study ordered it: its result files repeat it.
JOB_VARIABLE = "PEERLEARN_JOB"
# The task of the accuracies that supervised training itself leaves.
CLASSIFICATION = "classification"
# Keys of a protocol that tell of the training of the networks, not of how they were measured.
OF_TRAINING = ("epoch", "epoch_chosen_by", "image_size", "train_split", "train_images")
# Types of what tells one result from another.
_TYPES = {
    **dict.fromkeys(("task", "dataset", "network", "variant"), str),
    **dict.fromkeys(("metrics", "protocol"), dict),
    "step": int,
}
# Below it, figures can be squared and added up.
_LARGEST_FIGURE = 1e100
# From the metrics of several runs to those of their mean.
Averaging = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One result file, one row of the table.

    Attributes:
        network: name of the scored network: a key of `Selection.folders`, or a name for several of them together.
        dataset: name of the dataset.
        metrics: figures by name; "n" is how many images, or episodes, they are of.
        protocol: all that decides the figures beside the networks. Scores of one network differ in it.
        variant: what the table adds to the network's name, where a network has several scores.
        pictures: functions that draw the score into a file of the given path, by what the file's name adds to that of
            the result: "", "-curves". The path's ending names the format.
    """

    network: str
    dataset: str
    metrics: Mapping[str, Any]
    protocol: Mapping[str, Any]
    variant: str = ""
    pictures: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """The name of the score's row in the table."""
        return f"{self.network}, {self.variant}" if self.variant else self.network


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
    variant: str = "",
) -> Path:
    """Write ``<task>-<dataset>-<step>-<network>-<hash>.json``.

    The hash is of protocol, exports and seed: measuring the same again replaces the file, another protocol adds one.

    Args:
        export_hash: of the network; by its name for several networks, a list for several runs.
        seed: of the run or the evaluation; a list for several.
        variant: what tells the scores of one network apart for people; "" where it has a single one.

    Raises:
        UserError: the folder cannot be written.
    """
    identity = {"protocol": protocol, "export_hash": export_hash, "seed": seed}
    path = folder / f"{_file_stem(task, dataset, step, network)}-{short_hash(identity)}.json"
    env = environment()
    result = {
        "schema": SCHEMA_VERSION,
        "task": task,
        "dataset": dataset,
        "step": step,
        "network": network,
        "variant": variant,
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


def _file_stem(task: str, dataset: str, step: int, network: str) -> str:
    """The beginning of a result file's name, which tells what the file is of."""
    return f"{task}-{file_name_part(dataset)}-{step:08d}-{network}"


def short_hash(identity: Mapping[str, Any]) -> str:
    """Twelve hex digits that tell apart what differs in anything JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def write_score(
    score: Score,
    folder: Path,
    *,
    task: str,
    step: int,
    hashes: Mapping[str, str],
    seed: Any,
    seconds: float,
    pictures: PictureFormat = "png",
) -> Path:
    """Write a score's result file, and draw its pictures beside it. Returns the file.

    Args:
        hashes: export hash of every network; a score of another name is of all of them together.
        pictures: format of the pictures.

    Raises:
        UserError: the result file cannot be written. A picture that cannot be drawn is a warning.
    """
    file = write_result(
        folder,
        task=task,
        dataset=score.dataset,
        step=step,
        network=score.network,
        metrics=score.metrics,
        protocol=score.protocol,
        export_hash=hashes.get(score.network, dict(hashes)),
        seed=seed,
        seconds=round(seconds, 3),
        variant=score.variant,
    )
    for ending, picture in score.pictures.items():
        draw(picture, file.with_name(f"{file.stem}{ending}.{pictures}"))
    return file


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote.

    Raises:
        OSError: the file is gone, or cannot be read.
        ValueError: it is damaged: it holds no whole result, or a figure that no score can have.
    """
    # Files of earlier versions have no variant.
    result = {"variant": "", **read_json_object(path)}
    for key, kind in _TYPES.items():
        if type(result.get(key)) is not kind:
            raise ValueError(f"its {key} is {result.get(key)!r}")
    stem = _file_stem(*(result[key] for key in ("task", "dataset", "step", "network")))
    if not path.name.startswith(f"{stem}-"):
        raise ValueError(f"it is of {stem}")
    if not isinstance(result["metrics"].get("n"), int | None):
        raise ValueError(f"its n is {result['metrics']['n']!r}")
    if not all(abs(each) <= _LARGEST_FIGURE for each in _decimals(result)):
        raise ValueError("it holds a figure that is not finite")
    for name, value in result["metrics"].items():
        if isinstance(value, float) and is_percentage(name) and not 0 <= value <= 100:
            raise ValueError(f"its {name} is {value}")
    return result


def is_sound_result(path: Path) -> bool:
    """Whether the file holds a result."""
    try:
        read_result(path)
    except (OSError, ValueError):
        return False
    return True


def _decimals(content: Any) -> Iterator[float]:
    """All decimal numbers in what a JSON file holds."""
    if isinstance(content, float):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _decimals(each)


def mean_over_runs(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The mean, std, ci95 and values of metrics over several runs, n of one run, and the number of runs.

    Args:
        runs: metrics of each run.
        names: metrics to average; None: every one that is a decimal number in all runs.
    """
    if names is None:
        names = [name for name in runs[0] if all(isinstance(run.get(name), float) for run in runs)]
    metrics: dict[str, Any] = {"n": runs[0]["n"], "runs": len(runs)}
    for name in names:
        values = [run[name] for run in runs]
        spread = spread_over_runs(values)
        metrics[name] = {
            "mean": spread.mean,
            "std": spread.std,
            "ci95": spread.ci95,
            "values": values,
        }
    return metrics


def write_mean_result(
    folder: Path, paths: Sequence[Path], average: Averaging = mean_over_runs
) -> Path:
    """Write the mean over runs of one score: a result file whose numbers are mean, std, ci95 and the runs' values.

    Args:
        folder: folder of the new file.
        paths: the runs' result files, of one task, dataset, network and protocol.
        average: function from the metrics of the runs to those of their mean.

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
    return write_result(
        folder,
        task=first["task"],
        dataset=first["dataset"],
        step=max(result["step"] for result in results),
        network=first["network"],
        metrics=average([result["metrics"] for result in results]),
        protocol=first["protocol"],
        export_hash=[result["export_hash"] for result in results],
        seed=[result["seed"] for result in results],
        seconds=round(sum(result["seconds"] for result in results), 3),
        variant=first.get("variant", ""),
    )
