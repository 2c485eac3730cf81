"""The metrics of a run as series: the values of each name with their steps."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peerlearn.runs.files import open_regular

# Fields of every row that are no metrics; the clocks begin anew with each start.
_HEADER = ("step", "epoch", "seconds", "cpu_seconds", "attempt")
# The differences and sums of smaller values are finite.
_LARGEST = 1e300


@dataclass(frozen=True, kw_only=True)
class Series:
    """A metric over the steps.

    Attributes:
        steps: step of each value, int64 (n,).
        values: values, float64 (n,). NaN is one that was not finite, or so large that no picture has room for it.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RunSeries:
    """The metrics of a run.

    Attributes:
        by_name: series of each name, in the order in which the names came up.
        restarts: steps at which later starts of the program went on.
        rows: number of rows.
        last_step: step of the newest row; None without one.
        last_epoch: epoch of the newest row; None without one.
        problems: what cannot be read, in words.
    """

    by_name: dict[str, Series]
    restarts: tuple[int, ...]
    rows: int
    last_step: int | None
    last_epoch: float | None
    problems: tuple[str, ...]


@dataclass
class _Collected:
    steps: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    values: array = field(default_factory=lambda: array("d"))  # type: ignore[type-arg]


def read_series(file: Path) -> RunSeries:
    """The series in metrics.jsonl. Lines and values that cannot be read are counted; a missing file has no series."""
    collected: dict[str, _Collected] = {}
    restarts: list[int] = []
    rows = damaged = 0
    last: dict[str, Any] = {}
    problems = []
    try:
        for row in _rows(file):
            if row is None:
                damaged += 1
                continue
            rows += 1
            if last and row.get("attempt") != last.get("attempt"):
                restarts.append(last["step"])
            last = row
            _take(row, collected)
    except FileNotFoundError:
        problems.append(f"{file.name} is not there: no step has been logged")
    except OSError as error:
        problems.append(f"{file.name} cannot be read ({error.strerror})")
    if damaged:
        lines = "1 line" if damaged == 1 else f"{damaged:,} lines"
        problems.append(f"{file.name} has {lines} that cannot be read")
    epoch = last.get("epoch")
    return RunSeries(
        by_name={
            name: Series(steps=np.array(each.steps), values=np.array(each.values))
            for name, each in collected.items()
        },
        restarts=tuple(restarts),
        rows=rows,
        last_step=last.get("step"),
        last_epoch=epoch if isinstance(epoch, int | float) else None,
        problems=tuple(problems),
    )


def _rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """The rows; None for a line that is none. A last line without its end is being written, and left out."""
    with open_regular(file) as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) < 2**53:
                yield row
            elif line.endswith(b"\n"):
                yield None


def _take(row: dict[str, Any], collected: dict[str, _Collected]) -> None:
    step = row["step"]
    for name, value in row.items():
        if name in _HEADER or isinstance(value, bool):
            continue
        if value is None:
            value = np.nan
        elif not isinstance(value, int | float):
            continue
        into = collected.get(name)
        if into is None:
            into = collected[name] = _Collected()
        into.values.append(value if abs(value) <= _LARGEST else math.nan)
        into.steps.append(step)
