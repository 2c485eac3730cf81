"""What the trainings of a study have cost: processor time and memory, from the rows that the runs have logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.standing import number
from studies.study import Study


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of one training.

    Attributes:
        cpu_seconds: processor time of the main process, over all its starts.
        peak_memory_mb: most memory that it has held; None where that is not logged.
    """

    cpu_seconds: float
    peak_memory_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The mean cost of a config's trainings, beside its scores.

    Attributes:
        core_minutes: processor time of a run.
        peak_memory_mb: most memory of a run; None where a run does not tell.
    """

    core_minutes: float
    peak_memory_mb: float | None


def run_cost(folder: Path) -> RunCost | None:
    """The cost of a finished training; None if it is not finished, is damaged, or comes from an earlier version.

    Steps that a start repeats count once: the rows of a start that was killed end with its last save.
    """
    run = RunDirectory(folder)
    if not run.done:
        return None
    try:
        rows = list(run.metric_rows())
    except (UserError, OSError):
        return None
    seconds = over_starts(rows, "cpu_seconds")
    if seconds is None:
        return None
    memory = [each for row in rows if (each := number(row.get("peak_memory_mb"))) is not None]
    return RunCost(cpu_seconds=seconds, peak_memory_mb=max(memory, default=None))


def over_starts(rows: Sequence[Mapping[str, Any]], clock: str) -> float | None:
    """What a clock that begins anew with each start of a run has counted in all; None if a start does not tell."""
    # A later row of the same start takes the place of an earlier one.
    counted = {row.get("attempt"): number(row.get(clock)) for row in rows}
    told = [each for each in counted.values() if each is not None]
    return sum(told) if told and len(told) == len(counted) else None


def study_costs(study: Study) -> dict[str, dict[int, RunCost]]:
    """The costs of a study's runs by variant and seed, without those that are not known."""
    costs: dict[str, dict[int, RunCost]] = {}
    for run in study.runs:
        if (found := run_cost(run.folder)) is not None:
            costs.setdefault(run.variant.name, {})[run.seed] = found
    return costs


def mean_cost(costs: Sequence[RunCost]) -> Cost | None:
    """The mean of some runs' costs; None of none."""
    if not costs:
        return None
    memory = [each.peak_memory_mb for each in costs if each.peak_memory_mb is not None]
    return Cost(
        core_minutes=fmean(each.cpu_seconds for each in costs) / 60,
        peak_memory_mb=fmean(memory) if len(memory) == len(costs) else None,
    )
