"""What is known of runs: from their own files, and from Slurm where it answers. Nothing is written."""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from peerlearn.errors import UserError
from peerlearn.heartbeat import (
    INTERVAL_SECONDS,
    Beat,
    read_beat,
    read_step,
)
from peerlearn.run_dir import RunDirectory
from peerlearn.run_lock import living_owner
from slurm.client import JobState
from slurm.outcome import Outcome, read_outcomes, whole_outcome
from slurm.running import states_of
from slurm.submission import JOBS_FILE, TRAINING_VERBS, jobs_of

# What `peerlearn cancel` has ended: {"job", "time"}. Slurm keeps no memory of it without accounting, and of an array's
# task that was still waiting not even then.
CANCELLED_FILE = Path("slurm") / "cancelled.jsonl"
# The state of a job that Slurm could not be asked about.
NOT_ASKED = JobState(state="UNKNOWN")

_FRESH_BEAT_SECONDS = 4 * INTERVAL_SECONDS
_ASK_AGAIN_SECONDS = 60.0
_LEVELS = 2
_RATE_ROWS = 5
_WINDOW_ROWS = 200
_BLOCK_BYTES = 1 << 18
# So far back the last kNN score is looked for.
_TAIL_BYTES = 1 << 26
# How peerlearn.cli begins the line of an error.
_COMPLAINT = "peerlearn: "
_EVENTS_OF_THE_RUN = ("started", "stopped", "done", "failed")
_EVENTS_OF_ITS_JOB = ("requeued", "job_failed")

Record = dict[str, Any]
JobKey = tuple[str, str, Any]


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
    return (folder / "config.yaml").is_file() or (folder / JOBS_FILE).is_file()


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if (folder / "pipeline.yaml").is_file():
        levels = _LEVELS
    if levels == 0 or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs_below(path, levels - 1)


def records_of(run: Path) -> list[Record]:
    """The records of its jobs that can be read, oldest first."""
    try:
        records = list(jobs_of(run))
    except (OSError, ValueError):
        return []
    return [record for record in records if _is_whole(record)]


def _is_whole(record: Record) -> bool:
    texts = all(isinstance(record[key], str) for key in ("job", "verb", "executor", "folder"))
    return texts and (record["executor"] != "local" or record["job"].isdecimal())


def key_of(record: Record) -> JobKey:
    """What tells a job from all others: Slurm's numbers and those of processes overlap."""
    return record["executor"], record["job"], record.get("started")


def submission_of(run: Path, record: Record) -> Path:
    """The submission of a job, which moves with its run."""
    folder = Path(record["folder"])
    return folder if folder.is_dir() else run / "slurm" / folder.name


class JobWatch:
    """Asks what has become of jobs; where Slurm does not answer it says so once, and goes on without."""

    def __init__(self) -> None:
        self._ended: dict[JobKey, JobState] = {}
        self._ask_from = 0.0
        self._said = False

    def states(self, records: Iterable[Record]) -> dict[JobKey, JobState]:
        """The states of their jobs, by one question to Slurm; left out is what nobody knows of any more."""
        records = list(records)
        states: dict[JobKey, JobState] = {}
        for record in records:
            if record["executor"] == "local":
                states |= {key_of(record): state for state in states_of([record]).values()}
        slurm = [record for record in records if record["executor"] == "slurm"]
        # Accounting is spared the same question every few seconds.
        asked = [record for record in slurm if key_of(record) not in self._ended]
        found = self._ask(asked)
        for record in asked:
            state = NOT_ASKED if found is None else found.get(record["job"])
            if state is not None:
                states[key_of(record)] = state
            if found is not None and state is not None and not state.live:
                self._ended[key_of(record)] = state
        return states | {k: s for k, s in self._ended.items() if k in map(key_of, slurm)}

    def _ask(self, records: Sequence[Record]) -> dict[str, JobState] | None:
        """None if Slurm does not answer."""
        if time.monotonic() < self._ask_from:
            return None
        try:
            return states_of(records)
        except UserError as error:
            # A controller that is down keeps squeue waiting.
            self._ask_from = time.monotonic() + _ASK_AGAIN_SECONDS
            if not self._said:
                print(f"peerlearn: by the run directories alone: {error}", file=sys.stderr)
            self._said = True
            return None


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
    metrics = _read_metrics(run / "metrics.jsonl")
    job = history.newest_job(states)
    state, reason, live = _state(history, job, states.get(key_of(job)) if job else None)
    if state == "failed" and job is not None and _is_newer(job, history.started):
        reason = _complaint(run, job) or reason
    between = state == "running" and history.attempt_ended
    runs_now = state == "running" and not between
    evaluations = [
        found.state
        for record in records
        if record["verb"] not in TRAINING_VERBS
        if (found := states.get(key_of(record))) is not None and found.live
    ]
    step, total = _step(history, metrics), _integer(history.started.get("total_steps"))
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
        **metrics.knn,
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
            if (state := states.get(key_of(record))) is not None and state.live
        ]
        known = alive or self.training
        return known[-1] if known else None


def _read_history(run: Path, records: Sequence[Record]) -> _History:
    directory = RunDirectory(run)
    training = [record for record in records if record["verb"] in TRAINING_VERBS]
    jobs = {record["job"] for record in training}
    try:
        events = list(directory.events())
    except OSError:
        events = []
    events = [
        event
        for event in events
        if event["event"] in _EVENTS_OF_THE_RUN
        # Those of evaluations stand there too.
        or (event["event"] in _EVENTS_OF_ITS_JOB and str(event.get("job")) in jobs)
    ]
    attempt = directory.newest_attempt()
    return _History(
        run=run,
        training=training,
        attempt=attempt,
        started=next((e for e in reversed(events) if e["event"] == "started"), {}),
        last=events[-1]["event"] if events else "",
        last_step=_integer(events[-1].get("step")) if events else None,
        requeues=sum(event["event"] == "requeued" for event in events),
        beats=_read_beats(directory.logs(attempt)),
    )


def _read_beats(folder: Path) -> list[Beat]:
    names = (file.name.split(".")[0] for file in folder.glob("rank-*.heartbeat.json"))
    ranks = [int(name.removeprefix("rank-")) for name in names if name[5:].isdecimal()]
    beats = [read_beat(folder, rank) for rank in ranks]
    return [
        beat
        for beat in beats
        if beat and _number(beat.time_seconds) is not None and _integer(beat.pid) is not None
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
        for note in _json_lines(history.run / CANCELLED_FILE)
        if note.get("job") == job["job"]
    ]
    return bool(times) and times[-1] >= str(history.started.get("time", ""))


def _json_lines(file: Path) -> list[Record]:
    """The objects of a small file of lines; what cannot be read is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.append(dict(json.loads(line)))
    return found


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
    if job is not None and not (history.run / "config.yaml").is_file():
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
    done, failed = run / "DONE", run / "FAILED"
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


def _local_outcome(job: Record, history: _History) -> Outcome | None:
    """How a job of this machine ended, if the run has not been started since."""
    if job["executor"] == "slurm":
        return None
    folder = Path(job["folder"])
    try:
        task = json.loads((folder / "jobs.json").read_text()).index(job["job"])
        written = max(
            file.stat().st_mtime for file in (folder / "outcomes").glob(f"{task}-0-*.json")
        )
        outcomes = read_outcomes(folder, task=task, restart=0)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    if any(beat.time_seconds > written for beat in history.beats):
        return None
    ended_well = not any(outcome.code for outcome in outcomes.values())
    return whole_outcome(outcomes, code=0 if ended_well else 1, processes=len(outcomes))


def _complaint(run: Path, job: Record) -> str | None:
    """The error that a job has printed last, where it failed too early to leave one in the run."""
    for line in lines_backwards(submission_of(run, job) / f"{job['job']}_0_log.out"):
        text = line.decode(errors="replace")
        if text.startswith(_COMPLAINT):
            return _printable(text.removeprefix(_COMPLAINT).strip())
    return None


class _Metrics(NamedTuple):
    """What the end of metrics.jsonl tells; ``knn`` holds the fields of RunStatus of that name."""

    step: int | None
    attempt: int | None
    images_per_second: float | None
    steps_per_second: float | None
    knn: dict[str, Any]


_NO_KNN: dict[str, Any] = dict.fromkeys(
    ("knn_top1", "knn_network", "knn_epoch", "knn_k", "knn_temperature")
)


def _read_metrics(file: Path) -> _Metrics:
    rows: list[Record] = []
    knn = _NO_KNN
    for line in lines_backwards(file):
        scored = knn is _NO_KNN and b"knn_top1" in line
        if len(rows) >= _WINDOW_ROWS and not scored:
            if knn is not _NO_KNN:
                break
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if _integer(row.get("step")) is None:
            continue
        if len(rows) < _WINDOW_ROWS:
            rows.append(row)
        if scored:
            knn = _knn(row)
    rates = [r for row in rows if (r := _number(row.get("images_per_second"))) is not None]
    newest = rows[0] if rows else {}
    return _Metrics(
        step=_integer(newest.get("step")),
        attempt=_integer(newest.get("attempt")),
        images_per_second=statistics.median(rates[:_RATE_ROWS]) if rates else None,
        steps_per_second=_pace(rows),
        knn=knn,
    )


def _pace(rows: Sequence[Record]) -> float | None:
    """Steps per second over the newest start's part of these rows, newest first."""
    if not rows:
        return None
    last = first = rows[0]
    for row in rows[1:]:
        seconds, later = _number(row.get("seconds")), _number(first.get("seconds"))
        # The clock begins anew with a start, and when training goes back to a save.
        if row.get("attempt") != last.get("attempt") or seconds is None or later is None:
            break
        if seconds >= later or row["step"] >= first["step"]:
            break
        first = row
    if first is last:
        return None
    return float((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))


def _knn(row: Record) -> dict[str, Any]:
    for network in ("ensemble", "net/0"):
        score = _number(row.get(f"{network}/knn_top1"))
        if score is not None:
            return {
                "knn_top1": score,
                "knn_network": network,
                "knn_epoch": _number(row.get("epoch")),
                "knn_k": _integer(row.get("knn/k")),
                "knn_temperature": _number(row.get("knn/temperature")),
            }
    return _NO_KNN


def _step(history: _History, metrics: _Metrics) -> int | None:
    """How many are done, by the newest start; before its first, by what was left."""
    steps = [read_step(RunDirectory(history.run).logs(history.attempt))]
    if metrics.attempt == history.attempt:
        steps.append(metrics.step)
    if history.started.get("attempt") == history.attempt:
        steps.append(_integer(history.started.get("step")))
        if history.last in ("done", "stopped"):
            steps.append(history.last_step)
    known = [step for step in steps if step is not None]
    return max(known) if known else metrics.step


def lines_backwards(file: Path) -> Iterator[bytes]:
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


def _time_of(text: object) -> float:
    """Seconds since 1970; 0 if it cannot be read."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _printable(line: str) -> str:
    """Without what would move the cursor of a terminal."""
    return "".join(character if character.isprintable() else " " for character in line)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
