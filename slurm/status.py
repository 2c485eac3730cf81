"""The states of runs: from their own files, and from Slurm if it answers.

No state follows from comparing times of two clocks. This module writes nothing that stays.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.file_ages import FileAges
from peerlearn.runs.files import read_json_lines
from peerlearn.runs.heartbeat import (
    SILENT_SECONDS,
    Beat,
    Sightings,
    beat_file,
    read_beat,
    read_beats,
    read_rank_step,
)
from peerlearn.runs.lock import living_owner, look_at_owner
from peerlearn.runs.standing import Standing, integer, read_standing
from slurm.client import JobState
from slurm.find_runs import READERS
from slurm.jobs import (
    JobKey,
    JobWatch,
    Record,
    job_key,
    may_appear,
    records_of,
    submission_of,
)
from slurm.outcome import Outcome, is_decided, outcome_of
from slurm.submission import (
    OUTCOMES_FOLDER,
    STARTS_BEFORE,
    TRAINING_VERBS,
    job_numbers,
    read_submission,
)

# The jobs that `peerlearn cancel` has ended: {"job", "time", "starts_before"}. Slurm does not remember them without
# accounting, and never remembers an array's task that was still waiting.
CANCELLED_FILE = Path(JOBS_FOLDER) / "cancelled.jsonl"

# Of the heartbeats of other machines, by run and rank.
_sightings = Sightings()
_POLL_SECONDS = 0.2
# The events that tell how a start began or ended.
_EVENTS = ("started", "stopped", "done", "failed", "requeued", "job_failed")


@dataclass(frozen=True, kw_only=True)
class RunStatus(Standing):
    """One run, as `peerlearn status` shows it, with its standing. None = unknown.

    Attributes:
        run: folder of the run, as the user named it.
        state: state of the run: pending, running, or Slurm's word for a job between these (configuring, ...);
            done; failed; stopped (saved, to be resumed); cancelled; preempted, timeout, ... (Slurm ended its job);
            dead (no process runs it, and nothing says why); submitted or requeued (Slurm says nothing of its job).
        reason: why the run waits, failed or is dead.
        live: whether the run goes on, or may go on, by itself.
        job: newest job that trains the run.
        restarts: number of starts after the first.
        heartbeat_age_seconds: age in seconds of the oldest heartbeat of a rank, by the file system's own clock; only
            while running.
        evaluations_pending: number of jobs that wait to evaluate the run.
        evaluations_running: number of jobs that evaluate the run now.
    """

    run: str
    state: str
    reason: str | None
    live: bool
    job: str | None
    restarts: int
    heartbeat_age_seconds: float | None
    evaluations_pending: int
    evaluations_running: int

    @property
    def text(self) -> str:
        """The state and its details for people: ``running, 2 restarts``."""
        restarts = {0: "", 1: ", 1 restart"}.get(self.restarts, f", {self.restarts} restarts")
        if self.reason is None:
            return f"{self.state}{restarts}"
        if self.live:
            return f"{self.state} ({self.reason}){restarts}"
        return f"{self.state}{restarts}: {self.reason}"


def read_statuses(runs: Sequence[Path], watch: JobWatch) -> list[RunStatus]:
    """The status of each run."""
    # Its threads are daemons: Ctrl-C does not wait for them.
    with ThreadPool(READERS) as readers:
        records = readers.map(records_of, runs, chunksize=1)
        states = watch.states(record for each in records for record in each)
        # All are looked at before one is waited for.
        histories = readers.starmap(_read_history, zip(runs, records, strict=True), chunksize=1)
        return readers.map(partial(_status_now, states, FileAges()), histories, chunksize=1)


def _status_now(
    states: Mapping[JobKey, JobState], ages: FileAges, history: "_History"
) -> RunStatus:
    status = _status(history, states, ages)
    if status.state == "dead":
        # It may have ended in good order between the readings of two of its files.
        status = _status(_read_history(history.run, history.records), states, ages)
    return status


def _status(history: "_History", states: Mapping[JobKey, JobState], ages: FileAges) -> RunStatus:
    job = history.newest_job(states)
    state, reason, live = _state(history, job, states.get(job_key(job)) if job else None, ages)
    if state == "failed" and job is not None and history.has_not_begun(job):
        # The job failed too early to write a reason into the run.
        outcome = _outcome(history.run, job)
        reason = outcome.reason if outcome and outcome.reason else reason
    between = state == "running" and history.attempt_ended
    runs_now = state == "running" and not between
    evaluations = [
        found.state
        for record in history.records
        if record["verb"] not in TRAINING_VERBS
        if (found := states.get(job_key(record))) is not None and found.live
    ]
    age = _oldest_beat_seconds(history, ages) if runs_now else None
    standing = replace(
        history.standing,
        step=history.step,
        total_steps=integer(history.started.get("total_steps")) or history.standing.total_steps,
        seconds_left=history.seconds_left if runs_now else None,
    )
    return RunStatus(
        **asdict(standing),
        run=str(history.run),
        state=state,
        reason=_between_starts(history, job) if between else reason,
        live=live,
        job=job["job"] if job else None,
        restarts=max(history.attempt - 1, history.requeues, 0),
        heartbeat_age_seconds=None if age is None else round(age, 1),
        evaluations_pending=evaluations.count("PENDING"),
        evaluations_running=len(evaluations) - evaluations.count("PENDING"),
    )


@dataclass(frozen=True, kw_only=True)
class _History:
    """The facts in a run's own files.

    Attributes:
        run: folder of the run.
        records: records of its jobs.
        attempt: number of the newest start; 0 before the first.
        standing: newest standing that a start has written.
        stood: number of that start.
        started: newest event `started`; empty before the first.
        last: name of the newest event that tells how a start began or ended; "" before the first.
        requeues: number of requeues by the jobs that train the run.
        owned: whether a process has written that it holds the run.
        mark: content of DONE or FAILED; None without both.
        beats: heartbeats of the newest attempt's ranks that can be read; empty where nothing depends on them.
        step: number of steps done: by the newest start or, before its first step, by earlier ones.
    """

    run: Path
    records: Sequence[Record]
    attempt: int
    standing: Standing
    stood: int
    started: Record
    last: str
    requeues: int
    owned: bool
    mark: "_Mark | None"
    beats: list[Beat]
    step: int | None

    @property
    def attempt_ended(self) -> bool:
        """Whether the newest start is known to be over, or has not reached its first step yet."""
        return self.last != "started" or self.started.get("attempt") != self.attempt

    @property
    def seconds_left(self) -> float | None:
        """The seconds left at the pace of the newest start; None if it has not told its pace."""
        then = self.standing
        if self.stood != self.attempt or self.step is None:
            return None
        if then.step is None or then.total_steps is None or then.seconds_left is None:
            return None
        steps_then, steps = then.total_steps - then.step, max(0, then.total_steps - self.step)
        return round(then.seconds_left * steps / steps_then, 1) if steps_then > 0 else 0.0

    def has_not_begun(self, job: Record) -> bool:
        """Whether a job has not started the program yet."""
        return has_not_begun(job, self.attempt, self.started)

    def newest_job(self, states: Mapping[JobKey, JobState]) -> Record | None:
        """The job that works on the run or waits to, else the last job that did."""
        training = [record for record in self.records if record["verb"] in TRAINING_VERBS]
        alive = [
            record
            for record in training
            if (state := states.get(job_key(record))) is not None and state.live
        ]
        known = alive or training
        return known[-1] if known else None


def _read_history(run: Path, records: Sequence[Record]) -> _History:
    """Read a run, each file once. Any of them may be missing or damaged."""
    directory = RunDirectory(run)
    owned = look_at_owner(run)
    mark = _read_mark(directory)
    try:
        events = list(directory.events(*_EVENTS))
    except OSError:
        events = []
    started: Record = next((e for e in reversed(events) if e["event"] == "started"), {})
    last: Record = events[-1] if events else {"event": ""}
    attempts = directory.attempt_numbers()
    attempt = attempts[-1] if attempts else 0
    stood, standing = _newest_standing(directory, attempts)
    # Where a mark or an event tells how it ended, no beat tells more. But whose mark is it, if there is an owner?
    beats = []
    if owned if mark is not None else last["event"] != "stopped":
        beats = read_beats(directory.logs(attempt))
        for beat in beats:
            if beat.lives() is None:
                _look(directory.logs(attempt), beat)
    steps = [integer(beat.step) for beat in beats]
    if stood == attempt:
        steps.append(standing.step)
    if started.get("attempt") == attempt:
        steps.append(integer(started.get("step")))
    if started.get("attempt") == attempt and last["event"] in ("done", "stopped"):
        steps.append(integer(last.get("step")))
    else:
        # Ranks go in step, and a beat of the furthest may be a little old.
        steps.append(read_rank_step(directory.logs(attempt), 0))
    return _History(
        run=run,
        records=records,
        attempt=attempt,
        standing=standing,
        stood=stood,
        started=started,
        last=last["event"],
        requeues=sum(event["event"] == "requeued" for event in events),
        owned=owned,
        mark=mark,
        beats=beats,
        step=max((step for step in steps if step is not None), default=standing.step),
    )


def _newest_standing(run: RunDirectory, attempts: Sequence[int]) -> tuple[int, Standing]:
    """The newest start that has written how it stands, and its standing; 0 and an empty one if none has."""
    for attempt in reversed(attempts):
        standing = read_standing(run.logs(attempt))
        if standing is not None:
            return attempt, standing
    return 0, Standing()


def _state(
    history: _History, job: Record | None, job_state: JobState | None, ages: FileAges
) -> tuple[str, str | None, bool]:
    """The state, its reason, and whether the run goes on by itself."""
    mark = history.mark
    over = mark is not None and job_state is not None and job_state.state == "COMPLETING"
    if job_state is not None and job_state.live and not over:
        return job_state.state.lower(), job_state.reason or None, True
    owner = living_owner(history.run) if history.owned else None
    # The mark of an earlier start stays until the owner's own start begins.
    if mark is not None and not (owner and not any(_is_of(owner, b) for b in history.beats)):
        return mark.state, mark.reason, False
    if owner:
        return "running", None, True
    if job is not None and (_said_slurm_cancelled(job_state) or _was_cancelled(history, job)):
        return "cancelled", None, False
    if history.last == "stopped":
        return "stopped", "resume continues", False
    if not history.attempt_ended and any(_is_alive(history, beat) for beat in history.beats):
        return "running", None, True
    if job is not None and (job_state is None or job_state.unknown):
        return _untold(history, job, job_state, ages)
    # A job that is done tells nothing about a later start by hand.
    if job_state is not None and job_state.state != "COMPLETED":
        return job_state.state.lower(), job_state.reason or None, False
    return _dead(history, job)


def _untold(
    history: _History, job: Record, job_state: JobState | None, ages: FileAges
) -> tuple[str, str | None, bool]:
    """The state of a run that no process works on, and whose job Slurm does not know (None) or cannot tell of."""
    waits = history.has_not_begun(job)
    decided = waits and is_decided(submission_of(history.run, job), job["job"])
    if decided and (outcome := _outcome(history.run, job)):
        return outcome.kind, outcome.reason, False
    if job_state is None and may_appear(history.run, job, None, ages):
        return "submitted", "Slurm does not know it yet", True
    if job_state is not None and history.last == "requeued":
        return "requeued", job_state.reason, True
    if job_state is not None and waits:
        return "submitted", job_state.reason, True
    return _dead(history, job)


def _said_slurm_cancelled(state: JobState | None) -> bool:
    return state is not None and state.state == "CANCELLED"


def _was_cancelled(history: _History, job: Record) -> bool:
    """Whether `peerlearn cancel` ended the job, and the run has not been started after that."""
    try:
        lines = list(read_json_lines(history.run / CANCELLED_FILE))
    except OSError:
        return False
    notes = [note for note in lines if note.get("job") == job["job"]]
    if not notes:
        return False
    before = integer(notes[-1].get(STARTS_BEFORE))
    if before is not None:
        return history.attempt <= before
    # Earlier versions noted the time alone.
    return str(notes[-1].get("time", "")) >= str(history.started.get("time", ""))


def _between_starts(history: _History, job: Record | None) -> str:
    """The state of a run whose job runs while no start of the program is under way."""
    if job and history.has_not_begun(job):
        return "starting"
    return {"stopped": "saved", "done": "finishing"}.get(history.last, "starting")


def _dead(history: _History, job: Record | None) -> tuple[str, str | None, bool]:
    """The state of a run that no process works on and that has neither DONE nor FAILED."""
    outcome = _local_outcome(job, history) if job else None
    if outcome is not None and outcome.kind in ("crashed", "failed"):
        return "failed", outcome.reason, False
    if job is not None and not RunDirectory(history.run).begun:
        where = "Slurm does not know" if job["executor"] == "slurm" else "this machine does not run"
        return "dead", f"{where} job {job['job']}, and the run never began", False
    since = max((beat.time_seconds for beat in history.beats), default=None)
    if since is None:
        return "dead", "it ended while it was starting", False
    return "dead", f"no sign of life since {_time_text(since)}", False


def _time_text(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return "a time that makes no sense"


class _Mark(NamedTuple):
    """The content of DONE or FAILED."""

    state: str
    reason: str | None


def _read_mark(run: RunDirectory) -> _Mark | None:
    if run.done:
        return _Mark("done", None)
    reason = run.failure()
    return None if reason is None else _Mark("failed", _printable(reason))


def _is_of(owner: Mapping[str, object], beat: Beat) -> bool:
    """Whether a heartbeat is of the owner's process."""
    own = (owner.get("host"), owner.get("pid"), owner.get("started"))
    return own == (beat.host, beat.pid, beat.started)


def _is_alive(history: _History, beat: Beat) -> bool:
    """Whether a rank lives. One of another machine is looked at until it beats, or has missed beats."""
    logs = RunDirectory(history.run).logs(history.attempt)
    while not beat.failed:
        lives = beat.lives()
        if lives is not None:
            return lives
        seconds, moved = _look(logs, beat)
        if seconds >= SILENT_SECONDS or moved:
            return seconds < SILENT_SECONDS
        time.sleep(_POLL_SECONDS)
        beat = read_beat(logs, beat.rank) or beat
    return False


def _look(logs: Path, beat: Beat) -> tuple[float, bool]:
    """Note the signs of life of a rank of another machine, as `Sightings.look` does. Its step changes most often."""
    return _sightings.look((logs, beat.rank), (beat, read_rank_step(logs, beat.rank)))


def _oldest_beat_seconds(history: _History, ages: FileAges) -> float | None:
    """The age of the rank's heartbeat that is the oldest; None if one is unknown, or there is none."""
    logs = RunDirectory(history.run).logs(history.attempt)
    found = [ages.age_seconds(beat_file(logs, beat.rank)) for beat in history.beats]
    known = [age for age in found if age is not None]
    return max(known) if known and len(known) == len(found) else None


def has_not_begun(job: Record, attempt: int, started: Record) -> bool:
    """Whether a job has not started the program yet.

    Args:
        job: record of the job.
        attempt: number of the run's newest start.
        started: event of the newest start.
    """
    before = integer(job.get(STARTS_BEFORE))
    if before is not None:
        return attempt <= before
    # Earlier versions recorded the time alone.
    return str(job.get("time", "")) > str(started.get("time", ""))


def _outcome(run: Path, job: Record) -> Outcome | None:
    """The outcome of a job, from the files of its submission; None if they do not tell."""
    folder = submission_of(run, job)
    try:
        task = job_numbers(folder).index(job["job"])
        return outcome_of(read_submission(folder), task, None)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _local_outcome(job: Record, history: _History) -> Outcome | None:
    """The outcome of a local job, if it wrote one and the run has not been started after that."""
    if job["executor"] == "slurm":
        return None
    files = list((submission_of(history.run, job) / OUTCOMES_FOLDER).glob("*-0-*.json"))
    before = integer(job.get(STARTS_BEFORE))
    # A job of this machine starts the program once.
    if before is not None:
        is_last = bool(files) and history.attempt <= before + 1
    else:
        # Earlier versions recorded the time alone. These are times of one file system.
        logs = RunDirectory(history.run).logs(history.attempt)
        beats = [beat_file(logs, beat.rank) for beat in history.beats]
        is_last = bool(files) and _newest_seconds(files) >= _newest_seconds(beats)
    return _outcome(history.run, job) if is_last else None


def _newest_seconds(files: Iterable[Path]) -> float:
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _printable(line: str) -> str:
    """The text without characters that would move the cursor of a terminal."""
    return "".join(character if character.isprintable() else " " for character in line)
