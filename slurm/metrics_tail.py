"""The end of a run's metrics.jsonl, however long the file is: step, pace, newest kNN score."""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_RATE_ROWS = 5
_WINDOW_ROWS = 200
_BLOCK_BYTES = 1 << 18
# So far back the last kNN score is looked for.
_TAIL_BYTES = 1 << 26

Row = dict[str, Any]


class MetricsTail(NamedTuple):
    """What the end of metrics.jsonl tells; ``knn`` holds the fields of RunStatus of that name."""

    step: int | None
    attempt: int | None
    images_per_second: float | None
    steps_per_second: float | None
    knn: dict[str, Any]


_NO_KNN: dict[str, Any] = dict.fromkeys(
    ("knn_top1", "knn_network", "knn_epoch", "knn_k", "knn_temperature")
)


def read_tail(file: Path) -> MetricsTail:
    """Read no more of the file than that takes; lines that cannot be read are left out."""
    rows: list[Row] = []
    knn = _NO_KNN
    for line in _lines_backwards(file):
        scored = knn is _NO_KNN and b"knn_top1" in line
        if len(rows) >= _WINDOW_ROWS and not scored:
            if knn is not _NO_KNN:
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
            knn = _knn(row)
    rates = [r for row in rows if (r := number(row.get("images_per_second"))) is not None]
    newest = rows[0] if rows else {}
    return MetricsTail(
        step=integer(newest.get("step")),
        attempt=integer(newest.get("attempt")),
        images_per_second=statistics.median(rates[:_RATE_ROWS]) if rates else None,
        steps_per_second=_pace(rows),
        knn=knn,
    )


def _pace(rows: Sequence[Row]) -> float | None:
    """Steps per second over the newest start's part of these rows, newest first."""
    if not rows:
        return None
    last = first = rows[0]
    for row in rows[1:]:
        seconds, later = number(row.get("seconds")), number(first.get("seconds"))
        # The clock begins anew with a start, and when training goes back to a save.
        if row.get("attempt") != last.get("attempt") or seconds is None or later is None:
            break
        if seconds >= later or row["step"] >= first["step"]:
            break
        first = row
    if first is last:
        return None
    return float((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))


def _knn(row: Row) -> dict[str, Any]:
    for network in ("ensemble", "net/0"):
        score = number(row.get(f"{network}/knn_top1"))
        if score is not None:
            return {
                "knn_top1": score,
                "knn_network": network,
                "knn_epoch": number(row.get("epoch")),
                "knn_k": integer(row.get("knn/k")),
                "knn_temperature": number(row.get("knn/temperature")),
            }
    return _NO_KNN


def _lines_backwards(file: Path) -> Iterator[bytes]:
    """The lines of a file, the last first, read in blocks from its end; of a large one only so many.

    What another process cuts short or adds meanwhile may come in parts.
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
    """The value, if it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """The value, if it is a number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
