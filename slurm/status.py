"""Which runs a command line means, and what is known of them: from their own files, and from Slurm where it answers.

Nothing is written.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, PIPELINE_FILE, RunDirectory
from peerlearn.runs.files import read_json_lines
from peerlearn.runs.heartbeat import INTERVAL_SECONDS, Beat, read_beats, read_step
from peerlearn.runs.lock import living_owner
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

# What `peerlearn cancel` has ended: {"job", "time"}. Slurm keeps no memory of it without accounting, and of an array's
# task that was still waiting not even then.
CANCELLED_FILE = Path(JOBS_FOLDER) / "cancelled.jsonl"

# A run lies so deep below a folder that is named for it, at most.
_LEVELS = 2
_FRESH_BEAT_SECONDS = 4 * INTERVAL_SECONDS
# Those that tell how a start began or ended.
_EVENTS = ("started", "stopped", "done", "failed", "requeued", "job_failed")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run, as `peerlearn status` shows it; None is unknown.

    Attributes:
        run: its folder, as it was named.
        state: pending, running, or Slurm's word for a job between these (configuring, completing, ...);
            done; failed; stopped (saved, to be resumed); cancelled; preempted, timeout, ... (how Slurm ended its job);
            dead (nobody runs it, and nothing says why); submitted or requeued (its job, of which Slurm says nothing).
        reason: why it waits, failed or is dead.
        live: whether it goes on, or may, without anybody's doing.
        job: the newest that trains it.
        restarts: how often it was started again.
        step: steps done.
        total_steps: of the whole run.
        images_per_second: of all processes, median of the last logged steps.
        seconds_left: at the pace of this start so far, with its evaluations and saves; only while running.
        knn_top1: the monitor's newest score, in percent.
        knn_network: whose: ensemble, or net/0 of a single network.
        knn_epoch: when, in epochs.
        knn_k: neighbours.
        knn_temperature: of the vote.
        classifier_top1: of a supervised run, its newest accuracy in percent.
        classifier_network: whose: ensemble (mean of logits), or net/0 of a single network.
        classifier_epoch: when, in epochs.
        classifier_split: on which images: test, or validation where some were held out.
        heartbeat_age_seconds: of the rank that has been silent longest; only while running.
        evaluations_pending: jobs that wait to evaluate it.
        evaluations_running: jobs that do.
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
    heartbeat_age_seconds: float | None
    evaluations_pending: int
    evaluations_running: int

    @property
    def text(self) -> str:
        """The state with what belongs to it: ``running, 2 restarts``."""
        restarts = {0: "", 1: ", 1 restart"}.get(self.restarts, f", {self.restarts} restarts")
        if self.reason is None:
            return f"{self.state}{restarts}"
        if self.live:
            return f"{self.state} ({self.reason}){restarts}"
        return f"{self.state}{restarts}: {self.reason}"


def read_statuses(runs: Sequence[Path], watch: JobWatch) -> list[RunStatus]:
    """The status of each run."""
    records = {run: records_of(run) for run in runs}
    states = watch.states(record for each in records.values() for record in each)
    return [read_status(run, records[run], states) for run in runs]


def read_status(
    run: Path, records: Sequence[Record], states: Mapping[JobKey, JobState]
) -> RunStatus:
    """The status of one run.

    Args:
        run: its folder; any file of it may be missing or damaged.
        records: of its jobs.
        states: of those jobs that somebody knows of.
    """
    history = _read_history(run, records)
    metrics = read_tail(RunDirectory(run).metrics)
    job = history.newest_job(states)
    state, reason, live = _state(history, job, states.get(job_key(job)) if job else None)
    if state == "failed" and job is not None and _is_newer(job, history.started):
        # A job that failed too early to leave a reason in the run.
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
    age = max((beat.age_seconds for beat in history.beats), default=None)
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
        heartbeat_age_seconds=round(max(0.0, age), 1) if runs_now and age is not None else None,
        evaluations_pending=evaluations.count("PENDING"),
        evaluations_running=len(evaluations) - evaluations.count("PENDING"),
        **metrics.scores,
    )


@dataclass(frozen=True, kw_only=True)
class _History:
    """What a run's own files tell.

    Attributes:
        run: its folder.
        training: the records of the jobs that train it.
        attempt: the newest start; 0 before the first.
        started: the newest event of that name; empty before the first.
        last: the name of the newest event that tells how a start began or ended; "" before the first.
        last_step: where that was.
        requeues: by the jobs that train it.
        beats: of the newest attempt's ranks, as far as they can be read.
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
        """Whether the newest start is known to be over, or has not come to its first step yet."""
        return self.last != "started" or self.started.get("attempt") != self.attempt

    def newest_job(self, states: Mapping[JobKey, JobState]) -> Record | None:
        """The one that works on the run or waits to, else the last that did."""
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
    """State, reason, and whether the run goes on by itself."""
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
    if any(_is_alive(beat) for beat in history.beats) and not history.attempt_ended:
        return "running", None, True
    if job_state == NOT_ASKED:
        if history.last == "requeued":
            return "requeued", "Slurm cannot be asked", True
        if job is not None and _is_newer(job, history.started):
            return "submitted", "Slurm cannot be asked", True
    # A job that has done its work says nothing of a start by hand that came after it.
    elif job_state is not None and job_state.state != "COMPLETED":
        return job_state.state.lower(), job_state.reason or None, False
    return _dead(history, job)


def _said_slurm_cancelled(state: JobState | None) -> bool:
    return state is not None and state.state == "CANCELLED"


def _was_cancelled(history: _History, job: Record) -> bool:
    """Whether `peerlearn cancel` ended the job, and the run has not been started since."""
    times = [
        str(note.get("time", ""))
        for note in read_json_lines(history.run / CANCELLED_FILE)
        if note.get("job") == job["job"]
    ]
    return bool(times) and times[-1] >= str(history.started.get("time", ""))


def _between_starts(history: _History, job: Record | None) -> str:
    """What a job does that runs while no start of the program is under way."""
    if job and _is_newer(job, history.started):
        return "starting"
    return {"stopped": "saved", "done": "finishing"}.get(history.last, "starting")


def _dead(history: _History, job: Record | None) -> tuple[str, str | None, bool]:
    """Nobody works on the run, and it has left no mark."""
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
    """DONE or FAILED."""

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


def _is_alive(beat: Beat) -> bool:
    return beat.age_seconds < _FRESH_BEAT_SECONDS and not beat.failed and not beat.gone()


def _is_newer(job: Record, started: Record) -> bool:
    """Whether a job was submitted after the run was last started."""
    return str(job.get("time", "")) > str(started.get("time", ""))


def _outcome(run: Path, job: Record) -> Outcome | None:
    """How a job ended, by what its submission holds; None if that does not tell."""
    folder = submission_of(run, job)
    try:
        task = job_numbers(folder).index(job["job"])
        return outcome_of(read_submission(folder), task, "")
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _local_outcome(job: Record, history: _History) -> Outcome | None:
    """How a job of this machine ended, if it says so and the run has not been started since."""
    if job["executor"] == "slurm":
        return None
    files = (submission_of(history.run, job) / OUTCOMES_FOLDER).glob("*-0-*.json")
    written = max((file.stat().st_mtime for file in files), default=None)
    if written is None or any(beat.time_seconds > written for beat in history.beats):
        return None
    return _outcome(history.run, job)


def _step(history: _History, metrics: MetricsTail) -> int | None:
    """How many are done, by the newest start; before its first, by what was left."""
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
    """Seconds since 1970; 0 if it cannot be read."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _printable(line: str) -> str:
    """Without what would move the cursor of a terminal."""
    return "".join(character if character.isprintable() else " " for character in line)


def find_runs(words: Sequence[Path]) -> list[Path]:
    """The runs named, and those of folders named: a sweep, a pipeline, `runs`.

    Raises:
        UserError: a folder is not there, or none of them holds a run.
    """
    for word in words:
        if not word.exists():
            raise UserError(f"{word} is not there: name run directories, or a folder that has some")
    found = [run for word in words for run in _runs_below(word, _LEVELS)]
    if not found:
        raise UserError(f"no run in {', '.join(map(str, words))}: name run directories")
    return list({run.absolute(): run for run in found}.values())


def is_run(folder: Path) -> bool:
    """Whether it is a run, or has been submitted to become one."""
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
