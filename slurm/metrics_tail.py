"""The end of a run's metrics.jsonl, however long the file is: step, pace, newest accuracy."""

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peerlearn.runs.score_names import (
    ENSEMBLE,
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TOP1,
    TOP1,
    measured_part,
    score_name,
)

_RATE_ROWS = 5
_WINDOW_ROWS = 200
_BLOCK_BYTES = 1 << 18
# How far back from the end the last accuracy is looked for.
_TAIL_BYTES = 1 << 26

Row = dict[str, Any]


class MetricsTail(NamedTuple):
    """The end of metrics.jsonl. ``scores`` holds the fields of RunStatus for every kind of score."""

    step: int | None
    attempt: int | None
    images_per_second: float | None
    steps_per_second: float | None
    scores: dict[str, Any]


def integer(value: object) -> int | None:
    """The value if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


class _Kind(NamedTuple):
    """A kind of score, whose fields of RunStatus begin with its name.

    Attributes:
        name: beginning of the fields: NAME_top1, NAME_network, NAME_epoch, and those of its protocol.
        figure: figure of a network in metrics.jsonl.
        logged: fields of the protocol that stand in the row: their names there, and how they are read.
        fixed: fields of the protocol that the figure tells.
    """

    name: str
    figure: str
    logged: dict[str, tuple[str, Callable[[object], float | None]]]
    fixed: dict[str, str]


_KINDS = (
    _Kind("knn", KNN_TOP1, {"k": (KNN_K, integer), "temperature": (KNN_TEMPERATURE, number)}, {}),
    _Kind(
        "few_shot",
        EPISODE_TOP1,
        {"ways": (EPISODE_WAYS, integer), "shots": (EPISODE_SHOTS, integer)},
        {},
    ),
    _Kind("classifier", "test" + TOP1, {}, {"split": "test"}),
    _Kind("classifier", "validation" + TOP1, {}, {"split": "validation"}),
)
_UNSCORED: dict[str, Any] = {
    f"{kind.name}_{field}": None
    for kind in _KINDS
    for field in ("top1", "network", "epoch", *kind.logged, *kind.fixed)
}


def read_tail(file: Path) -> MetricsTail:
    """Read the end of the file, and no more than necessary. Lines that cannot be read are left out."""
    rows: list[Row] = []
    scores = _UNSCORED
    for line in _lines_backwards(file):
        scored = scores is _UNSCORED and TOP1.encode() in line
        if len(rows) >= _WINDOW_ROWS and not scored:
            if scores is not _UNSCORED:
                break
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if integer(row.get("step")) is None:
            continue
        if len(rows) < _WINDOW_ROWS:
            rows.append(row)
        if scored:
            scores = _scores(row)
    rates = [r for row in rows if (r := number(row.get("images_per_second"))) is not None]
    newest = rows[0] if rows else {}
    return MetricsTail(
        step=integer(newest.get("step")),
        attempt=integer(newest.get("attempt")),
        images_per_second=statistics.median(rates[:_RATE_ROWS]) if rates else None,
        steps_per_second=_pace(rows),
        scores=scores,
    )


def _pace(rows: Sequence[Row]) -> float | None:
    """Steps per second of the newest start over these rows, which come newest first."""
    if not rows:
        return None
    last = first = rows[0]
    for row in rows[1:]:
        seconds, later = number(row.get("seconds")), number(first.get("seconds"))
        # The clock begins at 0 with each start, and again when training goes back to a save.
        if row.get("attempt") != last.get("attempt") or seconds is None or later is None:
            break
        if seconds >= later or row["step"] >= first["step"]:
            break
        first = row
    if first is last:
        return None
    return float((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))


def _scores(row: Row) -> dict[str, Any]:
    """The accuracy of the ensemble, or of a single network: by kNN, over episodes, or of a supervised run."""
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
                return _UNSCORED | {f"{kind.name}_{field}": value for field, value in found.items()}
    return _UNSCORED


def _lines_backwards(file: Path) -> Iterator[bytes]:
    """The lines of a file, last line first, read in blocks from its end. Of a large file only the last part is read.

    Lines that another process changes at the same time may come in parts.
    """
    try:
        opened = file.open("rb")
    except OSError:
        return
    with opened:
        position = opened.seek(0, os.SEEK_END)
        end = max(0, position - _TAIL_BYTES)
        rest = b""
        while position > end:
            size = min(_BLOCK_BYTES, position - end)
            position -= size
            try:
                opened.seek(position)
                block = opened.read(size)
            except OSError:
                return
            rest, *lines = (block + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest
