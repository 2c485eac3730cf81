"""The states of runs in words, with what their heartbeats tell: a run that fell silent, one that ended without a word.

A heartbeat is silent that does not change while this process looks: the clocks of two machines differ.
"""

from datetime import UTC, datetime
from pathlib import Path

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import SILENT_SECONDS, Beat, Sightings, read_beats

# Of the heartbeats, by the folder of the logs and by rank.
_sightings = Sightings()


def state_text(run: RunDirectory, state: str, attempt: int) -> str:
    """The state of a run in words.

    Args:
        run: the run.
        state: its state in the registry: done, failed, running or stopped.
        attempt: number of its newest start; 0 before the first.
    """
    logs = run.logs(attempt)
    if state == "running":
        silent = max((_silent_seconds(logs, beat) for beat in read_beats(logs)), default=0.0)
        return f"running, silent for {silent:.0f} s" if silent >= SILENT_SECONDS else state
    if state == "stopped" and _ended_without_a_word(run, attempt):
        last = max((beat.time_seconds for beat in read_beats(logs)), default=None)
        return f"dead: no sign of life since {_time_text(last)}"
    return state


def _silent_seconds(logs: Path, beat: Beat) -> float:
    seconds, _ = _sightings.look((logs, beat.rank), beat)
    return seconds


def _ended_without_a_word(run: RunDirectory, attempt: int) -> bool:
    """Whether the newest start has neither saved and stopped nor ended. One of another kind of training may not say."""
    try:
        events = list(run.events("started", "stopped", "done", "failed"))
    except OSError:
        return False
    return bool(events) and events[-1]["event"] == "started" and attempt > 0


def _time_text(seconds: float | None) -> str:
    try:
        if seconds is not None:
            return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        pass
    return "its start"
