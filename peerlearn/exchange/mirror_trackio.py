"""Trackio: a run in its store on this machine. `trackio sync` carries it on to a Space or a server.

Rows, results and alerts carry an id each, of which the store takes one only. So what is sent again changes nothing.
"""

import datetime
import json
import os

from peerlearn.errors import UserError
from peerlearn.exchange.mirror import Destination
from peerlearn.exchange.run_news import News, Position, Subject, event_text

# Events that tell of trouble.
_ERRORS = ("failed", "job_failed")
_WARNINGS = ("collapse", "step_skipped", "rolled_back", "save_missed", "export_missed")


def connect(subject: Subject, destination: Destination) -> "Trackio":
    """Open the store.

    Raises:
        UserError: the uri is that of a server.
    """
    if "://" in destination.uri:
        raise UserError(
            f"trackio: --uri is a folder, got {destination.uri}: mirror to a folder, and `trackio sync` carries it on"
        )
    if destination.uri:
        # It is read when trackio is imported.
        os.environ["TRACKIO_DIR"] = destination.uri
    import trackio.sqlite_storage  # noqa: F401

    return Trackio(subject, destination.project)


class Trackio:
    """A run in trackio's store."""

    lasting = True

    def __init__(self, subject: Subject, project: str) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._store = SQLiteStorage
        self._subject = subject
        self._project = project
        # The store keeps one config for a run, so that the protocols go with it each time.
        self._config = {**subject.config, "folder": str(subject.root)}
        if subject.group:
            self._config["study"] = subject.group

    def position(self, noted: Position) -> Position:
        """What was noted, unless the store has nothing of the run."""
        last = self._store.get_last_step(self._project, run_id=self._subject.id)
        return Position() if last is None else noted

    def send(self, news: News) -> None:
        """Send rows and results as metrics, and events as alerts."""
        name, run_id = self._subject.name, self._subject.id
        self._add([(row.step, row.time_ms, row.values, f"row-{row.step}") for row in news.rows])
        for result in news.results:
            figures = {f"results/{result.name}/{key}": each for key, each in result.metrics.items()}
            self._config = (
                self._store.get_run_config(self._project, name, run_id=run_id) or self._config
            )
            self._config[f"results/{result.name}"] = json.loads(result.protocol)
            self._add([(result.step, result.time_ms, figures, f"result-{result.name}")])
        events = list(enumerate(news.events))[news.events_before :]
        self._store.bulk_alert(
            self._project,
            name,
            titles=[event["event"] for _, event in events],
            texts=[event_text(event) for _, event in events],
            levels=[_level(event["event"]) for _, event in events],
            steps=[event.get("step") for _, event in events],
            timestamps=[str(event.get("time")) for _, event in events],
            alert_ids=[f"{run_id}-event-{number}" for number, _ in events],
            run_id=run_id,
        )

    def _add(self, rows: list[tuple[int, int, dict[str, float], str]]) -> None:
        """Add rows of step, time, figures, and what tells one from all others of the run."""
        self._store.bulk_log(
            self._project,
            self._subject.name,
            [values for _, _, values, _ in rows],
            steps=[step for step, _, _, _ in rows],
            timestamps=[
                datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).isoformat()
                for _, ms, _, _ in rows
            ],
            log_ids=[f"{self._subject.id}-{own}" for _, _, _, own in rows],
            config=self._config,
            run_id=self._subject.id,
        )

    def close(self, failed: bool | None) -> None:
        """All is written already."""


def _level(event: str) -> str:
    if event in _ERRORS:
        return "error"
    return "warn" if event in _WARNINGS else "info"
