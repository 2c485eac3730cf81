"""How long a study would take on this machine: `peerlearn study NAME --dry_run --minutes`.

Of each config with runs that have not begun, a few steps are trained and timed, with as many processes and threads as
the study would use. Where a run of the config is done, its own time counts.
"""

import contextlib
import heapq
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn import HOME
from peerlearn.config import config_to_yaml
from peerlearn.errors import UsageError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.launcher import module_words
from peerlearn.runs.output import show
from peerlearn.runs.terminal import wrapped
from peerlearn.runs.text import printable
from studies.config import StudyConfig
from studies.cost import over_starts
from studies.here import THREADS, variables_of_run
from studies.runner import place_of
from studies.study import Study, Variant, all_seeds

if TYPE_CHECKING:
    from rich.table import Table

_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the runs of a config train.

    Attributes:
        step_seconds: seconds of a step.
        steps: number of steps of a run.
        is_measured: whether runs that are done tell it, with their saves and their monitor.
    """

    step_seconds: float
    steps: int
    is_measured: bool = False

    @property
    def run_seconds(self) -> float:
        """The seconds of a run."""
        return self.steps * self.step_seconds


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config of the study, with its runs that have not begun.

    Attributes:
        variant: the config.
        title: titles of its cells.
        runs: number of its runs that have not begun.
        pace: how fast they train; None = unknown.
        reason: why it is unknown.
    """

    variant: Variant
    title: str
    runs: int
    pace: Pace | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each of the runs that go on at once has of this machine.

    Attributes:
        at_once: number of runs at once.
        variables: environment of a run.
        cores: number of cores of this machine.
    """

    at_once: int
    variables: Mapping[str, str]
    cores: int

    @property
    def threads(self) -> int:
        """The number of threads of a run."""
        first = self.variables[THREADS].partition(",")[0].strip()
        return int(first) if first.isdecimal() and int(first) else self.cores

    @property
    def cores_of_run(self) -> float:
        """The number of cores that a run has: fewer than its threads where all runs have more threads than cores."""
        return min(self.threads, self.cores / self.at_once)


# How fast a config trains: by so many processes at once, in this environment. It raises UserError with the reason
# where that is unknown.
Timer = Callable[[Variant, int, Mapping[str, str]], Pace]


def check_here(config: StudyConfig) -> None:
    """Make sure that the study runs on this machine.

    Raises:
        UsageError: it runs on a cluster.
    """
    if place_of(config.cluster).executor == "slurm":
        raise UsageError(
            f"--minutes: cluster {config.cluster} is another machine, and this one cannot time its runs: "
            "leave --minutes out, or add --cluster here"
        )


def print_minutes(study: Study) -> None:
    """Time the configs of the runs that have not begun; print a table of them and how long they take together."""
    share = share_of(study.config)
    rows = estimate(study, share, time_variant)
    if not rows:
        print("minutes: no run is still to begin")
        return
    show(_table(rows))
    for line in _remarks(study, rows, share):
        print(line)


def share_of(config: StudyConfig) -> Share:
    """What a run of the study has of this machine, as `studies.here` divides it."""
    place, at_once = place_of(config.cluster), config.throttle or 1
    variables = variables_of_run(at_once)
    if place.executor == "local":
        # The study is a job of this machine then, and the job's variables are handed down to its runs.
        variables = {THREADS: str(place.cpus_per_task), **os.environ, **place.variables()}
    return Share(at_once=at_once, variables=variables, cores=os.cpu_count() or 1)


def estimate(study: Study, share: Share, timer: Timer) -> list[Row]:
    """A row for each config with runs that have not begun, in the study's order. stderr tells how far it is."""
    left = [run.variant.name for run in study.runs if not RunDirectory(run.folder).begun]
    seeds = all_seeds(study)
    variants = [variant for variant in study.variants if variant.name in left]
    rows = []
    for place, variant in enumerate(variants, start=1):
        title = "; ".join(cell.title for cell in study.cells if cell.variant.name == variant.name)
        pace = measured_pace([study.run_of(variant, seed).folder for seed in seeds])
        doing = "a run of it is done" if pace else "timing a few steps"
        line = f"minutes: config {place} of {len(variants)}: {printable(title)}: {doing}"
        print(wrapped(line, sys.stderr), file=sys.stderr, flush=True)
        reason = ""
        if pace is None:
            try:
                pace = timer(variant, min(share.at_once, len(left)), share.variables)
            except UserError as error:
                reason = str(error)
        runs = left.count(variant.name)
        rows.append(Row(variant=variant, title=title, runs=runs, pace=pace, reason=reason))
    return rows


def measured_pace(folders: Sequence[Path]) -> Pace | None:
    """The pace of those runs that are done, the median of several; None if none is."""
    paces = [pace for folder in folders if (pace := _pace_of_run(RunDirectory(folder)))]
    if not paces:
        return None
    return sorted(paces, key=lambda pace: pace.run_seconds)[len(paces) // 2]


def _pace_of_run(run: RunDirectory) -> Pace | None:
    """The pace of a run by its metrics, over all its attempts; None unless it is done and they tell."""
    if not run.done:
        return None
    try:
        rows = list(run.metric_rows())
    except UserError:
        return None
    seconds = over_starts(rows, "seconds")
    steps = max((row["step"] for row in rows), default=0)
    if seconds is None or steps < 1:
        return None
    return Pace(step_seconds=seconds / steps, steps=steps, is_measured=True)


def time_variant(variant: Variant, processes: int, variables: Mapping[str, str]) -> Pace:
    """Train the first steps of a config in a temporary folder, by so many processes side by side, and time them.

    Raises:
        UserError: the config cannot be trained; the message tells why.
    """
    with (
        tempfile.TemporaryDirectory(prefix="peerlearn-minutes-") as place,
        contextlib.ExitStack() as running,
    ):
        config = Path(place, "variant.yaml")
        config.write_text(config_to_yaml(variant.config))
        timers = []
        for process in range(processes):
            run = Path(place, str(process))
            run.mkdir()
            timers.append(running.enter_context(_timing_process(config, run, variables)))
        for timer in timers:
            if (said := _answer(timer)) != "ready":
                raise UserError(_reason(said))
        for timer in timers:
            assert timer.stdin is not None
            timer.stdin.close()
        seconds: list[float] = []
        for timer in timers:
            said = _answer(timer)
            if '"seconds"' not in said:
                raise UserError(_reason(said))
            told = json.loads(said)
            seconds += told["seconds"]
    return Pace(step_seconds=statistics.median(seconds), steps=told["steps"])


@contextlib.contextmanager
def _timing_process(
    config: Path, run: Path, variables: Mapping[str, str]
) -> Iterator["subprocess.Popen[str]"]:
    """A process of `pretrain.step_seconds`, ended with the block."""
    process = subprocess.Popen(
        [*module_words(HOME, "pretrain.step_seconds"), str(config), str(run)],
        env=dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Ctrl-C is for this process, which ends the other.
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _answer(timer: "subprocess.Popen[str]") -> str:
    assert timer.stdout is not None
    return timer.stdout.readline().strip()


def _reason(said: str) -> str:
    """Why a process did not tell what it was asked for."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(said)["reason"])
    return "its process ended without an answer: is there too little memory?"


def wall_seconds(runs: Sequence[float], at_once: int) -> float:
    """The seconds from the first start to the last end, if each run begins once one of so many places is free."""
    free = [0.0] * at_once
    for seconds in runs:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def total_text(study: Study, rows: Sequence[Row], share: Share) -> str:
    """Core-hours and hours of all runs that have not begun, in the order in which they start."""
    by_name = {row.variant.name: row.pace for row in rows if row.pace}
    lacking = sum(row.runs for row in rows if row.pace is None)
    seconds = [
        by_name[run.variant.name].run_seconds
        for run in study.runs
        if run.variant.name in by_name and not RunDirectory(run.folder).begun
    ]
    at_once = f"{share.at_once} at once, {share.threads} thread{'s' * (share.threads > 1)} each"
    if not seconds:
        return f"total: unknown ({at_once})"
    core_hours = sum(seconds) * share.cores_of_run / 3600
    hours = wall_seconds(seconds, share.at_once) / 3600
    lacks = f"; without {lacking} runs whose time is unknown" if lacking else ""
    return (
        f"total: {len(seconds)} runs, {_figure(core_hours)} core-hours, {_figure(hours)} hours from start to end "
        f"({at_once}){lacks}"
    )


def _table(rows: Sequence[Row]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("config", overflow="fold")
    for heading in ("seeds", "steps", "s per step", "min a run", "min in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("how", no_wrap=True)
    for row in rows:
        figures, how = ["-"] * 4, "unknown"
        if row.pace is not None:
            minutes = row.pace.run_seconds / 60
            told = map(_figure, (row.pace.step_seconds, minutes, row.runs * minutes))
            figures = [f"{row.pace.steps:,}", *told]
            how = "measured" if row.pace.is_measured else "timed"
        cells = [printable(row.title), str(row.runs), *figures, how]
        table.add_row(*map(Text, cells))
    return table


def _remarks(study: Study, rows: Sequence[Row], share: Share) -> Iterator[str]:
    for row in rows:
        if row.reason:
            yield printable(f"unknown: {row.title}: {row.reason}")
    if any(row.pace and row.pace.is_measured for row in rows):
        yield "measured: by runs of the config that are done, with their saves and their monitor"
    yield "not timed: the monitor, the evaluations, starts, saves, exports, and runs that have begun"
    yield total_text(study, rows, share)


def _figure(value: float) -> str:
    """A positive number with three digits: ``0.00512``, ``12.3``, ``1,235``."""
    decimals = _DIGITS - 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, decimals)}f}"
