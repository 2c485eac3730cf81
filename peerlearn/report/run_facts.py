"""All that a page tells of a run, read once: whatever is damaged is a problem in words, and the rest is there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlearn.report.run_results import RunResult, read_results
from peerlearn.report.series import RunSeries, read_series
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.notes import Notes
from peerlearn.runs.registry import RegisteredRun, read_registry
from peerlearn.runs.text import printable


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a page tells of a run.

    Attributes:
        run: run directory.
        label: short name of the run, which no other run of the page has.
        registered: state, config, notes and problems of the run.
        series: metrics of the run over its steps.
        results: result files of the run.
        events: events of the run, oldest first.
        environment: content of env.json; empty where it cannot be read.
        problems: what cannot be read of the run, in words.
    """

    run: RunDirectory
    label: str
    registered: RegisteredRun
    series: RunSeries
    results: tuple[RunResult, ...]
    events: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    problems: tuple[str, ...]

    @property
    def starts_from_weights(self) -> bool:
        """Whether any network started from weights: step 0 is not untrained then."""
        training = self.environment.get("training")
        loaded = training.get("initial_weights") if isinstance(training, dict) else None
        # Before its first start, and in files of earlier versions, the config alone tells.
        words = self.registered.config.get("cohort.init") if loaded is None else loaded
        named = words if isinstance(words, list) else [words]
        return any(word not in (None, "random") for word in named)


def read_facts(runs: Sequence[RunDirectory]) -> list[RunFacts]:
    """The facts of the runs, in their order. A run that is named twice stands once.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    unique = [RunDirectory(folder) for folder in unique_folders([run.root for run in runs])]
    # A folder without a config is no run to the registry: its config alone may be lost.
    begun = [run.root for run in unique if run.begun]
    registered = {each.name: each for each in (read_registry(begun) if begun else [])}
    labels = short_labels([run.root for run in unique])
    return [
        _facts(run, label, registered.get(str(run.root)))
        for run, label in zip(unique, labels, strict=True)
    ]


def _facts(run: RunDirectory, label: str, registered: RegisteredRun | None) -> RunFacts:
    problems = []
    if registered is None:
        registered = _unregistered(run)
    series = read_series(run.metrics)
    results, damaged = read_results(run)
    # The registry has told of some of them, with fewer words.
    told = [p for p in registered.problems if not p.startswith(f"{run.results.name}/")]
    environment: dict[str, Any] = {}
    try:
        environment = read_json_object(run.env)
    except FileNotFoundError:
        problems.append(f"{run.env.name} is not there")
    except OSError as error:
        problems.append(f"{run.env.name} cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{run.env.name} is damaged ({error})")
    events: tuple[dict[str, Any], ...] = ()
    try:
        events = tuple(run.events())
    except OSError as error:
        problems.append(f"{run.event_log.name} cannot be read ({error.strerror})")
    return RunFacts(
        run=run,
        label=label,
        registered=registered,
        series=series,
        results=results,
        events=events,
        environment=environment,
        problems=tuple(dict.fromkeys([*told, *series.problems, *damaged, *problems])),
    )


def _unregistered(run: RunDirectory) -> RegisteredRun:
    return RegisteredRun(
        name=str(run.root),
        state="stopped",
        reason=None,
        step=None,
        config={},
        scores={},
        notes=Notes(),
        problems=(f"{run.config.name} is not there",),
    )


def unique_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders in their order, one that is named several times once, by its first name."""
    unique: dict[str, Path] = {}
    for folder in folders:
        unique.setdefault(os.path.realpath(folder), folder)
    return list(unique.values())


def full_path(folder: Path) -> Path:
    """The path from the root, by which a folder is called. A link keeps its name; ``..`` has none of its own."""
    return folder.resolve() if ".." in folder.parts else folder.absolute()


def short_labels(folders: Sequence[Path]) -> list[str]:
    """The folders without what all of them begin with: the name alone of a single one."""
    parts = [full_path(folder).parts for folder in folders]
    common = 0
    while all(len(each) > common + 1 for each in parts) and (
        len({each[common] for each in parts}) == 1
    ):
        common += 1
    return [printable(os.path.join(*each[common:])) for each in parts]
