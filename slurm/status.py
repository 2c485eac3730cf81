"""The runs that a command line names, and their states: from their own files, and from Slurm if it answers.

This module writes nothing.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, PIPELINE_FILE, RunDirectory
from peerlearn.runs.files import read_json_lines
from peerlearn.runs.heartbeat import (
    SILENT_SECONDS,
    Beat,
    Sightings,
    read_beat,
    read_beats,
    read_step,
)
from peerlearn.runs.lock import living_owner, look_at_owners
from slurm.client import JobState
from slurm.jobs import NOT_ASKED, JobKey, JobWatch, Record, job_key, records_of, submission_of
from slurm.metrics_tail import MetricsTail, integer, number, read_tail
from slurm.outcome import Outcome, outcome_of
from slurm.submission import (
    JOBS_FILE,
    OUTCOMES_FOLDER,
    TRAINING_VERBS,
    job_numbers,
    read_submission,
)

# The jobs that `peerlearn cancel` has ended: {"job", "time"}. Slurm does not remember them without accounting, and
# never remembers an array's task that was still waiting.
CANCELLED_FILE = Path(JOBS_FOLDER) / "cancelled.jsonl"

# The largest depth of a run below a folder on the command line.
_LEVELS = 2
# Of the heartbeats of other machines, by run and rank.
_sightings = Sightings()
_POLL_SECONDS = 0.2
# The events that tell how a start began or ended.
_EVENTS = ("started", "stopped", "done", "failed", "requeued", "job_failed")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run, as `peerlearn status` shows it. None = unknown.

    Attributes:
        run: folder of the run, as the user named it.
        state: state of the run: pending, running, or Slurm's word for a job between these (configuring, ...);
            done; failed; stopped (saved, to be resumed); cancelled; preempted, timeout, ... (Slurm ended its job);
            dead (no process runs it, and nothing says why); submitted or requeued (Slurm says nothing of its job).
        reason: why the run waits, failed or is dead.
        live: whether the run goes on, or may go on, by itself.
        job: newest job that trains the run.
        restarts: number of starts after the first.
        step: number of steps done.
        total_steps: number of steps of the whole run.
        images_per_second: images per second over all processes, median of the last logged steps.
        seconds_left: seconds left at the pace of this start, with its evaluations and saves; only while running.
        knn_top1: newest kNN score of the monitor in percent.
        knn_network: network of that score: ensemble, or net/0 of a single network.
        knn_epoch: epoch of that score.
        knn_k: number of neighbours of that score.
        knn_temperature: temperature of that score's votes.
        classifier_top1: newest accuracy of a supervised run in percent.
        classifier_network: network of that accuracy: ensemble (mean of logits), or net/0 of a single network.
        classifier_epoch: epoch of that accuracy.
        classifier_split: images of that accuracy: test, or validation if some were held out.
        few_shot_top1: newest accuracy over validation episodes in percent.
        few_shot_network: network of that accuracy: ensemble, or net/0 of a single network.
        few_shot_epoch: epoch of that accuracy.
        few_shot_ways: number of classes of its episodes.
        few_shot_shots: number of support images of each class of its episodes.
        heartbeat_age_seconds: age in seconds of the oldest heartbeat of a rank; only while running.
        evaluations_pending: number of jobs that wait to evaluate the run.
        evaluations_running: number of jobs that evaluate the run now.
    """

    run: str
    state: str
    reason: str | None
    live: bool
    job: str | None
    restarts: int
    step: int | None
    total_steps: int | None
    images_per_second: float | None
    seconds_left: float | None
    knn_top1: float | None
    knn_network: str | None
    knn_epoch: float | None
    knn_k: int | None
    knn_temperature: float | None
    classifier_top1: float | None
    classifier_network: str | None
    classifier_epoch: float | None
    classifier_split: str | None
    few_shot_top1: float | None
    few_shot_network: str | None
    few_shot_epoch: float | None
    few_shot_ways: int | None
    few_shot_shots: int | None
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
    records = {run: records_of(run) for run in runs}
    look_at_owners(runs)
    for run in runs:
        for beat in _read_history(run, records[run]).beats:
            _sightings.look((run, beat.rank), beat)
    states = watch.states(record for each in records.values() for record in each)
    return [read_status(run, records[run], states) for run in runs]


def read_status(
    run: Path, records: Sequence[Record], states: Mapping[JobKey, JobState]
) -> RunStatus:
    """The status of one run.

    Args:
        run: folder of the run; any of its files may be missing or damaged.
        records: records of its jobs.
        states: states of those jobs that are still known.
    """
    history = _read_history(run, records)
    metrics = read_tail(RunDirectory(run).metrics)
    job = history.newest_job(states)
    state, reason, live = _state(history, job, states.get(job_key(job)) if job else None)
    if state == "failed" and job is not None and _is_newer(job, history.started):
        # The job failed too early to write a reason into the run.
        outcome = _outcome(run, job)
        reason = outcome.reason if outcome and outcome.reason else reason
    between = state == "running" and history.attempt_ended
    runs_now = state == "running" and not between
    evaluations = [
        found.state
        for record in records
        if record["verb"] not in TRAINING_VERBS
        if (found := states.get(job_key(record))) is not None and found.live
    ]
    step, total = _step(history, metrics), integer(history.started.get("total_steps"))
    seconds_left = None
    if runs_now and metrics.steps_per_second and step is not None and total is not None:
        seconds_left = round(max(0, total - step) / metrics.steps_per_second, 1)
    age = None
    if runs_now:
        age = max((_silent_seconds(history, beat) for beat in history.beats), default=None)
    return RunStatus(
        run=str(run),
        state=state,
        reason=_between_starts(history, job) if between else reason,
        live=live,
        job=job["job"] if job else None,
        restarts=max(history.attempt - 1, history.requeues, 0),
        step=step,
        total_steps=total,
        images_per_second=metrics.images_per_second,
        seconds_left=seconds_left,
        heartbeat_age_seconds=None if age is None else round(age, 1),
        evaluations_pending=evaluations.count("PENDING"),
        evaluations_running=len(evaluations) - evaluations.count("PENDING"),
        **metrics.scores,
    )


@dataclass(frozen=True, kw_only=True)
class _History:
    """The facts in a run's own files.

    Attributes:
        run: folder of the run.
        training: records of the jobs that train the run.
        attempt: number of the newest start; 0 before the first.
        started: newest event `started`; empty before the first.
        last: name of the newest event that tells how a start began or ended; "" before the first.
        last_step: step of that event.
        requeues: number of requeues by the jobs that train the run.
        beats: heartbeats of the newest attempt's ranks that can be read.
    """

    run: Path
    training: list[Record]
    attempt: int
    started: Record
    last: str
    last_step: int | None
    requeues: int
    beats: list[Beat]

    @property
    def attempt_ended(self) -> bool:
        """Whether the newest start is known to be over, or has not reached its first step yet."""
        return self.last != "started" or self.started.get("attempt") != self.attempt

    def newest_job(self, states: Mapping[JobKey, JobState]) -> Record | None:
        """The job that works on the run or waits to, else the last job that did."""
        alive = [
            record
            for record in self.training
            if (state := states.get(job_key(record))) is not None and state.live
        ]
        known = alive or self.training
        return known[-1] if known else None


def _read_history(run: Path, records: Sequence[Record]) -> _History:
    directory = RunDirectory(run)
    training = [record for record in records if record["verb"] in TRAINING_VERBS]
    try:
        events = list(directory.events())
    except OSError:
        events = []
    events = [event for event in events if event["event"] in _EVENTS]
    attempt = directory.newest_attempt()
    return _History(
        run=run,
        training=training,
        attempt=attempt,
        started=next((e for e in reversed(events) if e["event"] == "started"), {}),
        last=events[-1]["event"] if events else "",
        last_step=integer(events[-1].get("step")) if events else None,
        requeues=sum(event["event"] == "requeued" for event in events),
        beats=_read_beats(directory.logs(attempt)),
    )


def _read_beats(folder: Path) -> list[Beat]:
    return [
        beat
        for beat in read_beats(folder)
        if number(beat.time_seconds) is not None and integer(beat.pid) is not None
    ]


def _state(
    history: _History, job: Record | None, job_state: JobState | None
) -> tuple[str, str | None, bool]:
    """The state, its reason, and whether the run goes on by itself."""
    run = history.run
    mark = _read_mark(run)
    over = mark is not None and job_state is not None and job_state.state == "COMPLETING"
    if job_state is not None and job_state.live and not over:
        return job_state.state.lower(), job_state.reason or None, True
    owner = living_owner(run)
    if mark is not None and not (owner and mark.time_seconds < _time_of(owner.get("since"))):
        return mark.state, mark.reason, False
    if owner:
        return "running", None, True
    if job is not None and (_said_slurm_cancelled(job_state) or _was_cancelled(history, job)):
        return "cancelled", None, False
    if history.last == "stopped":
        return "stopped", "resume continues", False
    if not history.attempt_ended and any(_is_alive(history, beat) for beat in history.beats):
        return "running", None, True
    if job_state == NOT_ASKED:
        if history.last == "requeued":
            return "requeued", "Slurm cannot be asked", True
        if job is not None and _is_newer(job, history.started):
            return "submitted", "Slurm cannot be asked", True
    # A job that is done tells nothing about a later start by hand.
    elif job_state is not None and job_state.state != "COMPLETED":
        return job_state.state.lower(), job_state.reason or None, False
    return _dead(history, job)


def _said_slurm_cancelled(state: JobState | None) -> bool:
    return state is not None and state.state == "CANCELLED"


def _was_cancelled(history: _History, job: Record) -> bool:
    """Whether `peerlearn cancel` ended the job, and the run has not been started after that."""
    times = [
        str(note.get("time", ""))
        for note in read_json_lines(history.run / CANCELLED_FILE)
        if note.get("job") == job["job"]
    ]
    return bool(times) and times[-1] >= str(history.started.get("time", ""))


def _between_starts(history: _History, job: Record | None) -> str:
    """The state of a run whose job runs while no start of the program is under way."""
    if job and _is_newer(job, history.started):
        return "starting"
    return {"stopped": "saved", "done": "finishing"}.get(history.last, "starting")


def _dead(history: _History, job: Record | None) -> tuple[str, str | None, bool]:
    """The state of a run that no process works on and that has neither DONE nor FAILED."""
    outcome = _local_outcome(job, history) if job else None
    if outcome is not None and outcome.kind in ("crashed", "failed"):
        return "failed", outcome.reason, False
    if job is not None and not RunDirectory(history.run).begun:
        return "dead", f"job {job['job']} is gone, and the run never began", False
    since = max((beat.time_seconds for beat in history.beats), default=None)
    if since is None:
        return "dead", "it ended while it was starting", False
    then = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
    return "dead", f"no sign of life since {then}", False


class _Mark(NamedTuple):
    """The content of DONE or FAILED."""

    state: str
    reason: str | None
    time_seconds: float


def _read_mark(run: Path) -> _Mark | None:
    done, failed = RunDirectory(run).done_mark, RunDirectory(run).failed_mark
    with contextlib.suppress(OSError):
        return _Mark("done", None, done.stat().st_mtime)
    with contextlib.suppress(OSError):
        lines = failed.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it does not say why")
        return _Mark("failed", _printable(last.strip()), failed.stat().st_mtime)
    return None


def _is_alive(history: _History, beat: Beat) -> bool:
    if beat.failed or beat.gone():
        return False
    return _silent_seconds(history, beat) < SILENT_SECONDS


def _silent_seconds(history: _History, beat: Beat) -> float:
    """How long a rank has been silent. One of another machine is looked at until it beats, or has missed beats."""
    if beat.age_seconds is not None:
        return beat.age_seconds
    while True:
        seconds, moved = _sightings.look((history.run, beat.rank), beat)
        if moved or seconds >= SILENT_SECONDS:
            return seconds
        time.sleep(_POLL_SECONDS)
        newest = read_beat(RunDirectory(history.run).logs(history.attempt), beat.rank)
        beat = newest or beat


def _is_newer(job: Record, started: Record) -> bool:
    """Whether a job was submitted after the run was last started."""
    return str(job.get("time", "")) > str(started.get("time", ""))


def _outcome(run: Path, job: Record) -> Outcome | None:
    """The outcome of a job, from the files of its submission; None if they do not tell."""
    folder = submission_of(run, job)
    try:
        task = job_numbers(folder).index(job["job"])
        return outcome_of(read_submission(folder), task, "")
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _local_outcome(job: Record, history: _History) -> Outcome | None:
    """The outcome of a local job, if it wrote one and the run has not been started after that."""
    if job["executor"] == "slurm":
        return None
    files = (submission_of(history.run, job) / OUTCOMES_FOLDER).glob("*-0-*.json")
    written = max((file.stat().st_mtime for file in files), default=None)
    if written is None or any(beat.time_seconds > written for beat in history.beats):
        return None
    return _outcome(history.run, job)


def _step(history: _History, metrics: MetricsTail) -> int | None:
    """The number of steps done: by the newest start or, before its first step, by earlier files."""
    steps = [read_step(RunDirectory(history.run).logs(history.attempt))]
    if metrics.attempt == history.attempt:
        steps.append(metrics.step)
    if history.started.get("attempt") == history.attempt:
        steps.append(integer(history.started.get("step")))
        if history.last in ("done", "stopped"):
            steps.append(history.last_step)
    known = [step for step in steps if step is not None]
    return max(known) if known else metrics.step


def _time_of(text: object) -> float:
    """The time in seconds since 1970; 0 if it cannot be read."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _printable(line: str) -> str:
    """The text without characters that would move the cursor of a terminal."""
    return "".join(character if character.isprintable() else " " for character in line)


def find_runs(words: Sequence[Path]) -> list[Path]:
    """The named runs, and the runs in named folders: a sweep, a pipeline, `runs`.

    Raises:
        UserError: a folder is missing, or no folder holds a run.
    """
    for word in words:
        if not word.exists():
            raise UserError(f"{word} is not there: name run directories, or a folder that has some")
    found = [run for word in words for run in _runs_below(word, _LEVELS)]
    if not found:
        raise UserError(f"no run in {', '.join(map(str, words))}: name run directories")
    return list({run.absolute(): run for run in found}.values())


def is_run(folder: Path) -> bool:
    """Whether the folder is a run, or was submitted to become one."""
    return RunDirectory(folder).begun or (folder / JOBS_FILE).is_file()


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if (folder / PIPELINE_FILE).is_file():
        levels = _LEVELS
    if levels == 0 or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs_below(path, levels - 1)
