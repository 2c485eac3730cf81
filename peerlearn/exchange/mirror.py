"""Mirrors a run to an experiment tracker, from outside the training: each step once, whatever is killed.

RUN/mirror/id              the run's id in every tracker, made once
RUN/mirror/TRACKER.json    where the run is mirrored to, and how far
RUN/mirror/TRACKER.lock    held by the process that mirrors

What was noted may be behind what was sent, as a kill may come between the two: each connection asks the tracker first.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from peerlearn.errors import UserError
from peerlearn.exchange.run_news import (
    FOLDER,
    News,
    Position,
    Subject,
    news_of,
    subject_of,
)
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.standing import integer
from peerlearn.runs.stop import STOP_SIGNALS, stop_signals
from peerlearn.runs.terminal import say
from peerlearn.runs.text import printable
from peerlearn.runs.trackers import KINDS

_PROJECT = "peerlearn"
_POLL_SECONDS = 0.2


class Tracker(Protocol):
    """A connection to a tracker, for one run.

    Attributes:
        lasting: whether what was sent stays once `send` returns, so that it may be noted; else once `close` does.
    """

    lasting: bool

    def position(self, noted: Position) -> Position:
        """How much of the run the tracker has: what it tells itself or, where it cannot tell, what was noted."""

    def send(self, news: News) -> None:
        """Send what the tracker lacks."""

    def close(self, failed: bool | None) -> None:
        """End the connection. ``failed`` tells whether the run has failed; None while it goes on."""


class Destination(NamedTuple):
    """Where a run is mirrored to.

    Attributes:
        tracker: name of the tracker.
        project: project, or experiment, in it.
        uri: its server or folder; "" = the tracker's own default.
    """

    tracker: str
    project: str
    uri: str


def mirror(
    run: RunDirectory,
    destination: Destination,
    connect: Callable[[Subject, Destination], Tracker],
    *,
    follow: bool,
    interval_seconds: float,
) -> None:
    """Send what the tracker lacks.

    Args:
        run: the run.
        destination: where it is mirrored to.
        connect: function that opens a connection; it is called once there is anything to send.
        follow: whether to go on until the run has ended, or a signal asks to stop.
        interval_seconds: seconds from one look at the run to the next.

    Raises:
        UserError: the run or the tracker cannot be used, or another process mirrors the run to it. While it follows,
            a tracker that fails is tried again at the next look.
    """
    run.check_exists()
    with _locked(run, destination.tracker):
        state = _State(run, destination)
        with stop_signals(STOP_SIGNALS, "sending the rest") as stop:
            forwarder = _Forwarder(run, state, connect)
            last = False
            while not last:
                # Looked at first: what is written before the end is sent.
                last = not follow or stop.requested or _has_ended(run)
                forwarder.forward(may_wait=not last)
                deadline = time.monotonic() + interval_seconds
                while not last and not stop.requested and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
            forwarder.close()


def _has_ended(run: RunDirectory) -> bool:
    return run.done or run.failed_mark.exists()


class _Forwarder:
    """Looks at the run, and sends what is new."""

    def __init__(
        self,
        run: RunDirectory,
        state: "_State",
        connect: Callable[[Subject, Destination], Tracker],
    ) -> None:
        self._run = run
        self._state = state
        self._connect = connect
        self._tracker: Tracker | None = None
        self._position = state.position
        self._said = ""
        self._sent = False

    def forward(self, *, may_wait: bool) -> None:
        """One look. What fails is an error or, if it ``may_wait``, a line and another try at the next look."""
        try:
            self._forward()
        except Exception as error:  # Trackers and what they import raise what they like.
            self._drop()
            if not may_wait:
                raise self._failed(error) from error
            self._say(f"{self._failed(error)}; it is tried again")

    def _forward(self) -> None:
        news = news_of(self._run, self._position)
        if not news and self._tracker is None:
            self._say_ahead(news.newest_step)
            return
        if self._tracker is None:
            subject = subject_of(self._run)
            self._tracker = self._connect(subject, self._state.destination)
            self._position = self._tracker.position(self._state.position)
            news = news_of(self._run, self._position)
        self._say_ahead(news.newest_step)
        if not news:
            return
        self._tracker.send(news)
        self._sent = True
        self._position = Position(
            step=news.rows[-1].step if news.rows else self._position.step,
            events=len(news.events),
            results=(*self._position.results, *(result.name for result in news.results)),
        )
        if self._tracker.lasting:
            self._state.write(self._position)
        self._say(f"{news} sent to {self._state.destination.tracker}")

    def close(self) -> None:
        """End the connection, and note what was sent."""
        if self._tracker is None:
            if not self._sent:
                self._say("nothing new")
            return
        failed = None
        if _has_ended(self._run):
            failed = not self._run.done
        tracker, self._tracker = self._tracker, None
        try:
            tracker.close(failed)
        except Exception as error:
            raise self._failed(error) from error
        self._state.write(self._position)

    def _drop(self) -> None:
        """Leave a connection that has failed; what it may still have sent is asked for by the next one."""
        tracker, self._tracker = self._tracker, None
        self._position = self._state.position
        if tracker is not None:
            with contextlib.suppress(Exception):
                tracker.close(None)

    def _failed(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
        return UserError(f"{self._state.destination.tracker}: {reason}")

    def _say_ahead(self, newest: int) -> None:
        """After a restart the run may be behind what was sent."""
        if 0 <= newest < self._position.step:
            self._say(
                f"the run went back to step {newest}: its rows up to step {self._position.step} were sent before"
            )

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            say(f"{self._run.root}: {text}")


class _State:
    """RUN/mirror/TRACKER.json.

    Attributes:
        destination: where the run is mirrored to.
        position: what was noted.
    """

    def __init__(self, run: RunDirectory, destination: Destination) -> None:
        self.destination = destination
        self._file = _state_file(run, destination.tracker)
        noted = _noted(self._file)
        where = {"project": destination.project, "uri": without_secrets(destination.uri)}
        for key, value in where.items():
            if noted.get(key, value) != value:
                raise UserError(
                    f"{run.root} is mirrored to the {key} {noted[key]!r} of {destination.tracker}, not to {value!r}: "
                    f"give --{key} {noted[key]}, or remove {self._file} to begin anew there"
                )
        self._where = where
        self.position = Position(
            step=integer(noted.get("step", -1)) or 0,
            events=integer(noted.get("events")) or 0,
            results=tuple(noted.get("results", ())),
        )

    def write(self, position: Position) -> None:
        """Note what the tracker has."""
        self.position = position
        write_text(self._file, json.dumps(self._where | asdict(position), indent=2) + "\n")


def destination_of(
    run: RunDirectory, tracker: str, project: str | None, uri: str | None
) -> Destination:
    """Where a run is mirrored to: as given, else by the tracker's own variables, else as before.

    Args:
        run: the run.
        tracker: name of the tracker.
        project: project that was given; None = none was.
        uri: server or folder that was given; None = none was.
    """
    kind = KINDS[tracker]
    before = _noted(_state_file(run, tracker))
    return Destination(
        tracker,
        project or os.environ.get(kind.project_variable) or str(before.get("project", _PROJECT)),
        uri or os.environ.get(kind.uri_variable) or str(before.get("uri", "")),
    )


def _state_file(run: RunDirectory, tracker: str) -> Path:
    return run.root / FOLDER / f"{tracker}.json"


def _noted(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}: remove it, and all is sent again") from error


def without_secrets(uri: str) -> str:
    """The uri without a name and a password in it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri


@contextlib.contextmanager
def _locked(run: RunDirectory, tracker: str) -> Iterator[None]:
    """Keep other mirrors of this run to this tracker out."""
    folder = run.root / FOLDER
    lock = FileLock(folder / f"{tracker}.lock")
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{run.root}: another process mirrors it to {tracker}") from error
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}): a mirror notes there how far it is"
        ) from error
    try:
        yield
    finally:
        lock.release()
