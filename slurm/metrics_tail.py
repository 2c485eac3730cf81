"""The end of a run's metrics.jsonl, however long the file is: step, pace, newest accuracy."""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
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


_UNSCORED: dict[str, Any] = dict.fromkeys(
    (
        *("knn_top1", "knn_network", "knn_epoch", "knn_k", "knn_temperature"),
        *("classifier_top1", "classifier_network", "classifier_epoch", "classifier_split"),
        *("few_shot_top1", "few_shot_network", "few_shot_epoch", "few_shot_ways"),
        "few_shot_shots",
    )
)


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
        epoch = number(row.get("epoch"))
        if (score := number(row.get(score_name(network, KNN_TOP1)))) is not None:
            return _UNSCORED | {
                "knn_top1": score,
                "knn_network": measured_part(network),
                "knn_epoch": epoch,
                "knn_k": integer(row.get(KNN_K)),
                "knn_temperature": number(row.get(KNN_TEMPERATURE)),
            }
        if (score := number(row.get(score_name(network, EPISODE_TOP1)))) is not None:
            return _UNSCORED | {
                "few_shot_top1": score,
                "few_shot_network": measured_part(network),
                "few_shot_epoch": epoch,
                "few_shot_ways": integer(row.get(EPISODE_WAYS)),
                "few_shot_shots": integer(row.get(EPISODE_SHOTS)),
            }
        for split in ("test", "validation"):
            if (score := number(row.get(score_name(network, split + TOP1)))) is not None:
                return _UNSCORED | {
                    "classifier_top1": score,
                    "classifier_network": measured_part(network),
                    "classifier_epoch": epoch,
                    "classifier_split": split,
                }
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


def integer(value: object) -> int | None:
    """The value if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
