"""How a training stands: one small file, which the main rank writes beside its heartbeat.

Who watches many runs reads it in place of the rows of metrics.jsonl.

    RUN/logs/attempt-K/standing.json    the fields of `Standing` that are known
"""

import contextlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from peerlearn.runs.files import open_regular, write_text
from peerlearn.runs.heartbeat import INTERVAL_SECONDS
from peerlearn.runs.score_names import (
    ENSEMBLE,
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TOP1,
    LINEAR_TOP1,
    TOP1,
    measured_part,
    score_name,
)

_FILE = "standing.json"
# Numbers of rows: the rate is the median of some, the pace is measured over many.
_RATE_ROWS = 5
_PACE_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands. None = unknown.

    Attributes:
        step: number of steps done.
        total_steps: number of steps of the whole run.
        images_per_second: images per second over all processes, median of the last logged steps.
        seconds_left: seconds left at the pace of this start, with its evaluations and saves.
        knn_top1: newest kNN score of the monitor in percent.
        knn_network: network of that score: ensemble, or net/0 of a single network.
        knn_epoch: epoch of that score.
        knn_k: number of neighbours of that score.
        knn_temperature: temperature of that score's votes.
        linear_top1: newest accuracy of the linear classifiers that learn beside the networks, in percent.
        linear_network: network of that accuracy: ensemble (mean of logits), or net/0 of a single network.
        linear_epoch: epoch of that accuracy.
        classifier_top1: newest accuracy of a supervised run in percent.
        classifier_network: network of that accuracy: ensemble (mean of logits), or net/0 of a single network.
        classifier_epoch: epoch of that accuracy.
        classifier_split: images of that accuracy: test, or validation if some were held out.
        few_shot_top1: newest accuracy over validation episodes in percent.
        few_shot_network: network of that accuracy: ensemble, or net/0 of a single network.
        few_shot_epoch: epoch of that accuracy.
        few_shot_ways: number of classes of its episodes.
        few_shot_shots: number of support images of each class of its episodes.
    """

    step: int | None = None
    total_steps: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    knn_top1: float | None = None
    knn_network: str | None = None
    knn_epoch: float | None = None
    knn_k: int | None = None
    knn_temperature: float | None = None
    linear_top1: float | None = None
    linear_network: str | None = None
    linear_epoch: float | None = None
    classifier_top1: float | None = None
    classifier_network: str | None = None
    classifier_epoch: float | None = None
    classifier_split: str | None = None
    few_shot_top1: float | None = None
    few_shot_network: str | None = None
    few_shot_epoch: float | None = None
    few_shot_ways: int | None = None
    few_shot_shots: int | None = None


class _Kind(NamedTuple):
    """A kind of score, whose fields of Standing begin with its name.

    Attributes:
        name: beginning of the fields: NAME_top1, NAME_network, NAME_epoch, and those of its protocol.
        figure: figure of a network in a row of metrics.
        logged: fields of the protocol that stand in the row: their names there, and how they are read.
        fixed: fields of the protocol that the figure tells.
    """

    name: str
    figure: str
    logged: dict[str, tuple[str, Callable[[object], float | None]]]
    fixed: dict[str, str]


_LARGEST = 2**63


def integer(value: object) -> int | None:
    """The value if it is a whole number that counts or measures something, else None: no larger one than 2^63."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        return None
    return value


def number(value: object) -> float | None:
    """The value if it is a number, else None. NaN and Inf are none."""
    if isinstance(value, int):
        value = integer(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


_KINDS = (
    _Kind("knn", KNN_TOP1, {"k": (KNN_K, integer), "temperature": (KNN_TEMPERATURE, number)}, {}),
    _Kind("linear", LINEAR_TOP1, {}, {}),
    _Kind(
        "few_shot",
        EPISODE_TOP1,
        {"ways": (EPISODE_WAYS, integer), "shots": (EPISODE_SHOTS, integer)},
        {},
    ),
    _Kind("classifier", "test" + TOP1, {}, {"split": "test"}),
    _Kind("classifier", "validation" + TOP1, {}, {"split": "validation"}),
)


class StandingLog:
    """Keeps the standing of one start on the disk, as far as the disk takes it."""

    def __init__(
        self, logs: Path, earlier: Iterable[Mapping[str, Any]], *, step: int, total_steps: int
    ) -> None:
        """Begin with what the rows before this start tell: the newest rates and scores.

        Args:
            logs: folder of this start's logs.
            earlier: rows of metrics.jsonl up to this step.
            step: number of steps done.
            total_steps: number of steps of the whole run.
        """
        self._file = logs / _FILE
        self._step, self._total_steps = step, total_steps
        self._rates: deque[float] = deque(maxlen=_RATE_ROWS)
        # Steps and seconds. The clock of the rows begins at 0 with each start.
        self._clock: deque[tuple[int, float]] = deque(maxlen=_PACE_ROWS)
        self._scores: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            for row in earlier:
                self._take(row)
        self.write()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row of this start. The file is written if the row has scores, or the last time is long ago."""
        self._step = row["step"]
        self._clock.append((row["step"], row["seconds"]))
        scored = self._take(row)
        if scored or time.monotonic() - self._written >= INTERVAL_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file now. Training goes on if the disk is full or gone."""
        self._written = time.monotonic()
        content = {
            "step": self._step,
            "total_steps": self._total_steps,
            "images_per_second": statistics.median(self._rates) if self._rates else None,
            "seconds_left": self._seconds_left(),
            **self._scores,
        }
        known = {name: value for name, value in content.items() if value is not None}
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps(known) + "\n", durable=False)

    def _take(self, row: Mapping[str, Any]) -> bool:
        """Take in the rate and the scores of a row; returns whether it has scores."""
        rate, scores = number(row.get("images_per_second")), _scores(row)
        if rate is not None:
            self._rates.append(rate)
        self._scores = scores or self._scores
        return bool(scores)

    def _seconds_left(self) -> float | None:
        if not self._clock:
            return None
        (first, begun), (last, now) = self._clock[0], self._clock[-1]
        if last <= first:
            return None
        return round((self._total_steps - last) * (now - begun) / (last - first), 1)


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies of the ensemble, or of a single network: by kNN and linear classifiers, over episodes, or of a
    supervised run.
    """
    scores: dict[str, Any] = {}
    for network in (ENSEMBLE, "0"):
        for kind in _KINDS:
            score = number(row.get(score_name(network, kind.figure)))
            if score is not None:
                found = {
                    "top1": score,
                    "network": measured_part(network),
                    "epoch": number(row.get("epoch")),
                    **{field: read(row.get(name)) for field, (name, read) in kind.logged.items()},
                    **kind.fixed,
                }
                scores |= {f"{kind.name}_{field}": value for field, value in found.items()}
        if scores:
            break
    return scores


def read_standing(logs: Path) -> Standing | None:
    """The standing that a start has written.

    Args:
        logs: folder of its logs.

    Returns:
        The standing, without what is damaged; None if the file is not there or cannot be read at all.
    """
    try:
        with open_regular(logs / _FILE) as file:
            content = dict(json.loads(file.read()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    values = {field.name: content.get(field.name) for field in fields(Standing)}
    sound = {
        field.name: values[field.name]
        for field in fields(Standing)
        if type(values[field.name]) in get_args(field.type)
    }
    return Standing(
        **{k: v for k, v in sound.items() if not isinstance(v, float) or math.isfinite(v)}
    )
