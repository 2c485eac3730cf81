"""TensorBoard: a folder of event files with the rows, as RUN/tb has them, and with config, events and results.

The files themselves tell how far they are.
"""

from pathlib import Path

from peerlearn.exchange.mirror import Destination
from peerlearn.exchange.run_news import News, Position, Subject, event_text

# The figure that every row has. It is written last of its row, so that a step that has it has all of them.
_LAST_FIGURE = "epoch"
# So much of the run's id tells runs of one name apart.
_ID_LETTERS = 6
_EVENTS, _RESULT = "events", "results/"
# How the files name a text.
_TEXT = "/text_summary"


def connect(subject: Subject, destination: Destination) -> "TensorBoard":
    """Open the folder for writing: one of the run's own, as event files of several runs would be one curve."""
    if not destination.uri:
        return TensorBoard(subject, str(subject.folder / "tensorboard"))
    return TensorBoard(
        subject, str(Path(destination.uri) / f"{subject.name}-{subject.id[:_ID_LETTERS]}")
    )


class TensorBoard:
    """An event file that is written, beside those that are there."""

    lasting = True

    def __init__(self, subject: Subject, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        self._there = _position(folder)
        self._writer = SummaryWriter(folder)
        if self._there == Position():
            self._write_config(subject)

    def _write_config(self, subject: Subject) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in subject.config.items()
        }
        file = self._writer._get_file_writer()  # type: ignore[no-untyped-call]
        for summary in hparams(plain, {}):
            file.add_summary(summary)

    def position(self, noted: Position) -> Position:
        """How far the files are."""
        return self._there

    def send(self, news: News) -> None:
        """Write rows and results as scalars, events and protocols as texts, and wait until the files have them."""
        for row in news.rows:
            for name in sorted(row.values, key=lambda name: name == _LAST_FIGURE):
                self._writer.add_scalar(name, row.values[name], row.step, row.time_ms / 1000)
        for number, event in enumerate(news.new_events, start=news.events_before + 1):
            text = f"{event.get('time')} **{event['event']}** {event_text(event)}"
            self._writer.add_text(_EVENTS, text, number)
        for result in news.results:
            for name, value in result.metrics.items():
                tag = f"{_RESULT}{result.name}/{name}"
                self._writer.add_scalar(tag, value, result.step, result.time_ms / 1000)
            self._writer.add_text(_RESULT + result.name, result.protocol, result.step)
        self._writer.flush()

    def close(self, failed: bool | None) -> None:
        """Close the file."""
        self._writer.close()


def _position(folder: str) -> Position:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder, {"scalars": 0, "tensors": 0})
    found.Reload()
    tags = found.Tags()
    rows = found.Scalars(_LAST_FIGURE) if _LAST_FIGURE in tags["scalars"] else []
    events = found.Tensors(_EVENTS + _TEXT) if _EVENTS + _TEXT in tags["tensors"] else []
    names = (tag.removesuffix(_TEXT) for tag in tags["tensors"])
    return Position(
        step=max((row.step for row in rows), default=-1),
        events=max((event.step for event in events), default=0),
        results=tuple(name.removeprefix(_RESULT) for name in names if name.startswith(_RESULT)),
    )
