"""What of a run an experiment tracker lacks: rows of metrics.jsonl, events and results, as plain figures and texts.

Rows have one step each, and their steps grow. After a restart the run cuts its last rows and writes them again, and
finds the same. So the last step that a tracker has tells which rows it lacks.
"""

import contextlib
import datetime
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peerlearn.errors import UserError
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from peerlearn.runs.files import read_json_lines, write_text
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.standing import integer, number
from peerlearn.runs.text import printable

FOLDER = "mirror"
_ID_BYTES = 8
# A study's runs lie below it, in a folder of their own.
_STUDY_ABOVE = 3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The run, as trackers show it.

    Attributes:
        id: id of the run in every tracker.
        name: name of its folder.
        group: name of its study; None without one.
        root: folder of the run.
        events: file of its events.
        config: resolved config, by dotted keys.
    """

    id: str
    name: str
    group: str | None
    root: Path
    events: Path
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the mirror's own files."""
        return self.root / FOLDER


class Row(NamedTuple):
    """A row of metrics.jsonl.

    Attributes:
        step: number of steps done.
        time_ms: time of the row in milliseconds since 1970.
        values: figures by name. NaN is a figure that was not finite.
    """

    step: int
    time_ms: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A file of results/.

    Attributes:
        name: name of the file, without its ending.
        step: step of the measured export.
        time_ms: time of the file in milliseconds since 1970.
        metrics: figures by name; those of a nested object by NAME/KEY.
        protocol: protocol of the measurement, as JSON.
    """

    name: str
    step: int
    time_ms: int
    metrics: dict[str, float]
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Position:
    """How much of a run a tracker has.

    Attributes:
        step: step of its last row; -1 = no row.
        events: number of its events.
        results: names of its results.
    """

    step: int = -1
    events: int = 0
    results: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class News:
    """What a tracker lacks.

    Attributes:
        rows: rows in the order of their steps.
        newest_step: step of the run's last row, sent or not; -1 = there is none.
        events: all events of the run, oldest first.
        events_before: number of events that the tracker has.
        results: results that it lacks.
    """

    rows: list[Row]
    newest_step: int
    events: list[dict[str, Any]]
    events_before: int
    results: list[Result]

    def __bool__(self) -> bool:
        return bool(self.rows or self.new_events or self.results)

    @property
    def new_events(self) -> list[dict[str, Any]]:
        """The events that it lacks."""
        return self.events[self.events_before :]

    def __str__(self) -> str:
        parts = []
        if self.rows:
            parts.append(f"{_count(len(self.rows), 'row')} up to step {self.rows[-1].step}")
        if self.new_events:
            parts.append(_count(len(self.new_events), "event"))
        if self.results:
            parts.append(_count(len(self.results), "result"))
        return ", ".join(parts)


def subject_of(run: RunDirectory) -> Subject:
    """The run, as trackers show it.

    Raises:
        UserError: its config is damaged, or its folder cannot be written.
    """
    root = run.root.resolve()
    try:
        config = dict(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{run.config} cannot be read: {printable(str(error), 200)}") from error
    studies = [
        above for above in list(root.parents)[:_STUDY_ABOVE] if (above / STUDY_FILE).is_file()
    ]
    return Subject(
        id=_own_id(root / FOLDER / "id"),
        name=root.name,
        group=studies[0].name if studies else None,
        root=root,
        events=run.event_log,
        config=dict(_flat(config, ".")),
    )


def _own_id(file: Path) -> str:
    """The id in the file. Two mirrors that make it at once agree on one."""
    if not file.exists():
        made = file.with_name(f".id.{secrets.token_hex(_ID_BYTES)}")
        write_text(made, secrets.token_hex(_ID_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(made, file)
        made.unlink()
    return file.read_text().strip()


def news_of(run: RunDirectory, position: Position) -> News:
    """What of a run lies beyond a position. Lines and files that are damaged are left out.

    Raises:
        OSError: a file cannot be read.
    """
    events = list(run.events())
    rows = [row for row in read_json_lines(run.metrics) if integer(row.get("step")) is not None]
    return News(
        rows=list(_rows_after(rows, position.step, events)),
        newest_step=rows[-1]["step"] if rows else -1,
        events=events,
        events_before=min(position.events, len(events)),
        results=[r for r in _results(run) if r.name not in position.results],
    )


def _rows_after(
    rows: list[dict[str, Any]], step: int, events: list[dict[str, Any]]
) -> Iterator[Row]:
    started = {
        event.get("attempt"): time_ms(event) for event in events if event["event"] == "started"
    }
    for row in rows:
        if row["step"] <= step:
            continue
        step = row["step"]
        seconds = number(row.get("seconds")) or 0.0
        begun = started.get(row.get("attempt"), 0)
        yield Row(step, begun + round(1000 * seconds), figures(row, but=("step",)))


def figures(row: Mapping[str, Any], but: tuple[str, ...] = ()) -> dict[str, float]:
    """The numbers of a row. A null stands for a number that was not finite."""
    values = {key: float("nan") if value is None else value for key, value in row.items()}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and key not in but
    }


def _results(run: RunDirectory) -> Iterator[Result]:
    for file in sorted(run.results.glob("*.json")):
        try:
            content, changed = read_json_object(file), file.stat().st_mtime
        except (OSError, ValueError):
            continue
        metrics = content.get("metrics")
        if isinstance(metrics, dict):
            yield Result(
                name=file.stem,
                step=integer(content.get("step")) or 0,
                time_ms=round(1000 * changed),
                metrics=figures(dict(_flat(metrics, "/"))),
                protocol=json.dumps(content.get("protocol")),
            )


def time_ms(event: Mapping[str, Any]) -> int:
    """The time of an event in milliseconds since 1970; 0 if it has none."""
    try:
        return round(1000 * datetime.datetime.fromisoformat(str(event.get("time"))).timestamp())
    except ValueError:
        return 0


def event_text(event: Mapping[str, Any]) -> str:
    """The facts of an event: ``attempt=1 step=0``."""
    return " ".join(
        f"{key}={printable(str(value), 200)}"
        for key, value in event.items()
        if key not in ("time", "event")
    )


def _flat(content: Mapping[str, Any], between: str, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, between, f"{before}{key}{between}")
        else:
            yield f"{before}{key}", value


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
