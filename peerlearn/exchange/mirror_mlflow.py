"""MLflow: a run that is found again by its tag, metrics with their steps, the config as params.

MLflow itself tells how far it is. Its SQL store takes equal metrics once, and a batch wholly or not at all.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from peerlearn.errors import UserError
from peerlearn.exchange.mirror import Destination
from peerlearn.exchange.run_news import News, Position, Result, Row, Subject, event_text

_ID_TAG = "peerlearn.id"
_EVENTS_TAG = "events"
_RESULT = "results/"
# The figure that every row has. It is sent last of its row, so that a step that has it has all of them.
_LAST_FIGURE = "epoch"
# Limits of MLflow for one request, and of what is kept whole in all its stores.
_METRICS, _PARAMS, _TEXT = 1000, 100, 5000
_PARAM_TEXT = 500
# Otherwise a server that is not there is asked for minutes, and each new data base tells how it is made.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def connect(subject: Subject, destination: Destination) -> "Mlflow":
    """Open the run, or make it.

    Raises:
        UserError: no server is named.
    """
    if not destination.uri:
        raise UserError(
            "mlflow needs --uri or MLFLOW_TRACKING_URI: http://HOST:PORT, or sqlite:////FOLDER/mlflow.db"
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=destination.uri)
    experiment = _experiment(client, destination.project)
    found = client.search_runs([experiment], f"tags.`{_ID_TAG}` = '{subject.id}'")
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {_ID_TAG: subject.id, "folder": str(subject.root)}
        if subject.group:
            tags["study"] = subject.group
        run_id = client.create_run(experiment, tags=tags, run_name=subject.name).info.run_id
    return Mlflow(client, run_id, subject)


def _experiment(client: Any, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except Exception:
        # Another mirror may have made it meanwhile.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


class Mlflow:
    """A connection to a run of MLflow."""

    lasting = True

    def __init__(self, client: Any, run_id: str, subject: Subject) -> None:
        self._client = client
        self._run_id = run_id
        self._send_config(subject)

    def _send_config(self, subject: Subject) -> None:
        """Send the config as params. MLflow keeps a param as it is: what has changed since becomes a tag."""
        from mlflow.entities import Param

        config = {key: str(value)[:_PARAM_TEXT] for key, value in subject.config.items()}
        sent = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in config.items() if key not in sent]
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(self._run_id, params=new[start : start + _PARAMS])
        for key, value in config.items():
            if sent.get(key, value) != value:
                self._client.set_tag(self._run_id, f"config/{key}", value)

    def position(self, noted: Position) -> Position:
        """How far MLflow is."""
        history = self._client.get_metric_history(self._run_id, _LAST_FIGURE)
        tags = self._client.get_run(self._run_id).data.tags
        return Position(
            step=max((metric.step for metric in history), default=-1),
            events=noted.events if _EVENTS_TAG in tags else 0,
            results=tuple(tag.removeprefix(_RESULT) for tag in tags if tag.startswith(_RESULT)),
        )

    def send(self, news: News) -> None:
        """Send rows and results as metrics, and the newest events as a tag."""
        for batch in _batches(news.rows):
            self._client.log_batch(self._run_id, metrics=batch)
        for result in news.results:
            self._client.log_batch(self._run_id, metrics=_of_result(result))
            # It comes after the figures: a result that has it is whole.
            self._client.set_tag(self._run_id, _RESULT + result.name, result.protocol[:_TEXT])
        if news.new_events:
            lines = (f"{e.get('time')} {e['event']} {event_text(e)}" for e in news.events)
            self._client.set_tag(self._run_id, _EVENTS_TAG, "\n".join(lines)[-_TEXT:])

    def close(self, failed: bool | None) -> None:
        """Tell MLflow how the run stands."""
        from mlflow.entities import RunStatus

        if failed is not None:
            status = RunStatus.FAILED if failed else RunStatus.FINISHED
            self._client.set_terminated(self._run_id, RunStatus.to_string(status))


def _batches(rows: Sequence[Row]) -> Iterator[list[Any]]:
    """The metrics of rows in their order. Rows go together as far as a request takes them."""
    from mlflow.entities import Metric

    batch: list[Any] = []
    for row in rows:
        names = sorted(row.values, key=lambda name: name == _LAST_FIGURE)
        metrics = [Metric(name, float(row.values[name]), row.time_ms, row.step) for name in names]
        if batch and len(batch) + len(metrics) > _METRICS:
            yield batch
            batch = []
        batch = batch + metrics
        while len(batch) > _METRICS:
            yield batch[:_METRICS]
            batch = batch[_METRICS:]
    if batch:
        yield batch


def _of_result(result: Result) -> list[Any]:
    from mlflow.entities import Metric

    return [
        Metric(f"{_RESULT}{result.name}/{name}", float(value), result.time_ms, result.step)
        for name, value in result.metrics.items()
    ]
