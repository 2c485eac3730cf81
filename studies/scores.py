"""The scores of a study: what its runs and evaluations have measured, over seeds and against the baseline of a row."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from peerlearn.errors import UserError
from peerlearn.evaluation.results import CLASSIFICATION, OF_TRAINING
from peerlearn.evaluation.uncertainty import interval_over_runs, spread_over_runs
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_log import chosen_step
from peerlearn.runs.score_names import ENSEMBLE, WEIGHTED_ENSEMBLE
from peerlearn.runs.text import printable
from studies.evaluations import Problem, read_outcomes, read_result_of
from studies.statistics import Difference, paired_difference
from studies.study import Cell, Study, StudyRun

INDIVIDUAL = "individual"
_JOINT = (INDIVIDUAL, ENSEMBLE, WEIGHTED_ENSEMBLE)
# What the final accuracy of a training tells of the training itself: studies compare trainings that differ in it.
_OWN = "its own accuracy"
_LONGEST_VALUE = 40


class Key(NamedTuple):
    """What was measured. Scores of the same key are compared.

    line: command line of the evaluation; "" for the training's own final accuracy.
    task: name of the task in result files.
    dataset: data set of the score.
    variant: what tells the scores of one network in an evaluation apart; "" for a single one.
    network: individual (the mean over the networks of a run), ensemble, weighted-ensemble, 0, 1, ..., key-0, ...
    """

    line: str
    task: str
    dataset: str
    variant: str
    network: str


# (False, step), or (True, 0) for the step that validation chose, which differs from seed to seed.
Moment = tuple[bool, int]
_CHOSEN: Moment = (True, 0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One result of one run.

    Attributes:
        run: run that it is of.
        key: what was measured.
        step: step of the networks.
        metrics: decimal numbers by name.
        others: what else stands among the metrics.
        n: number of test images or episodes, if the result file tells it.
        protocol: all that decides the metrics beside the networks.
    """

    run: StudyRun
    key: Key
    step: int
    metrics: dict[str, float]
    others: dict[str, Any]
    n: int | None
    protocol: dict[str, Any]

    @property
    def what(self) -> str:
        return f"{self.key.line}, step {self.step}" if self.key.line else _OWN

    @property
    def compared(self) -> dict[str, Any]:
        """What has to be alike in results that are compared."""
        of_training = () if self.key.line else OF_TRAINING
        return {k: v for k, v in self.protocol.items() if k not in of_training} | {"n": self.n}


# The results of one variant by what, when and seed.
Results = dict[Key, dict[Moment, dict[int, Measured]]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a cell over seeds.

    Attributes:
        cell: cell of the score.
        key: what was measured.
        metric: name of the metric in the result files.
        step: step of the networks; the last of the seeds' where validation chose it.
        chosen: whether validation chose the step of every seed.
        shown: whether tables show this step: the chosen one, else the variant's last.
        values: values by seed.
        mean: mean over the seeds.
        std: sample standard deviation over the seeds; None for one seed.
        interval: 95 % interval of the mean, by Student's t, within 0..100 for a percentage; None for one seed, or two.
        n: number of test images or episodes, if the result files tell it.
        protocol: protocol of all values.
        difference: difference from the baseline of the row; None for the baseline itself and for want of one.
    """

    cell: Cell
    key: Key
    metric: str
    step: int
    chosen: bool
    shown: bool
    values: dict[int, float]
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    n: int | None
    protocol: dict[str, Any]
    difference: Difference | None

    @property
    def name(self) -> str:
        """The name of the score in the config: TASK/METRIC."""
        return f"{self.key.task}/{self.metric}"


def score_study(study: Study) -> tuple[list[Score], list[Problem]]:
    """Read what the runs have measured.

    Returns:
        The scores in the order of cells, evaluations, networks, steps and metrics; and what could not be read or
        compared.
    """
    problems: list[Problem] = []
    by_variant: dict[str, Results] = {variant.name: {} for variant in study.variants}
    for run in study.runs:
        # A spoilt `best` is said where the exports are looked for.
        best = None
        with contextlib.suppress(UserError):
            best = chosen_step(RunDirectory(run.folder))
        for found in _results_of(run, study.config.evaluate, problems):
            moments = by_variant[run.variant.name].setdefault(found.key, {})
            for moment in [(False, found.step), *([_CHOSEN] if found.step == best else [])]:
                others = moments.setdefault(moment, {})
                if _are_alike(found, others, problems):
                    others[run.seed] = found
    problems += _without_numbers(by_variant.values())
    scores: list[Score] = []
    results = {
        (cell.grid, study.row_of(cell), study.compared_label(cell)): own
        for cell, own in zip(study.cells, _results_of_cells(study.cells, by_variant), strict=True)
    }
    for cell in study.cells:
        label = study.config.compare.baseline[cell.grid]
        place = cell.grid, study.row_of(cell)
        ours, baseline = results[*place, study.compared_label(cell)], results[*place, label]
        theirs = {} if study.compared_label(cell) == label else baseline
        scores += _cell_scores(cell, ours, theirs, label, problems)
    # A variant may stand in several cells.
    return scores, list(dict.fromkeys(problems))


def _results_of_cells(
    cells: Sequence[Cell], by_variant: Mapping[str, Results]
) -> Iterator[Results]:
    """The results of each cell. A lone network is its own ensemble where others of its grid have ensembles."""
    joint = {
        (cell.grid, key)
        for cell in cells
        for key in by_variant[cell.variant.name]
        if key.network == ENSEMBLE
    }
    for cell in cells:
        is_alone = cell.variant.config.cohort.networks == 1
        own: Results = {}
        for key, moments in by_variant[cell.variant.name].items():
            own[key] = moments
            ensemble = key._replace(network=ENSEMBLE)
            if is_alone and key.network == INDIVIDUAL and (cell.grid, ensemble) in joint:
                own[ensemble] = moments
        yield own


def _without_numbers(variants: Iterable[Results]) -> Iterator[Problem]:
    """The results that have something else where others of the same evaluation have a number."""
    found = [
        each
        for results in variants
        for moments in results.values()
        for by_seed in moments.values()
        for each in by_seed.values()
    ]
    numbers: dict[Key, set[str]] = {}
    for each in found:
        numbers.setdefault(each.key._replace(network=""), set()).update(each.metrics)
    for each in found:
        for name in each.others.keys() & numbers[each.key._replace(network="")]:
            value = printable(json.dumps(each.others[name]), _LONGEST_VALUE)
            why = f"network {each.key.network}: its {name} is {value}: remove the result, and measure it again"
            yield Problem(run=each.run.folder.name, what=each.what, why=why)


def _cell_scores(
    cell: Cell, ours: Results, theirs: Results, label: str, problems: list[Problem]
) -> Iterator[Score]:
    for key in ours:
        shown, their_shown = _shown(ours, key), _shown(theirs, key)
        for moment, by_seed in sorted(ours[key].items()):
            opposite = their_shown if moment == shown else moment
            baseline = theirs.get(key, {}).get(opposite, {}) if opposite else {}
            first = next(iter(by_seed.values()))
            if unlike := _unlike(first, next(iter(baseline.values()), first)):
                why = f"it is not compared with {label}: {unlike}"
                problems.append(Problem(run=cell.variant.name, what=first.what, why=why))
                baseline = {}
            for metric in dict.fromkeys(name for each in by_seed.values() for name in each.metrics):
                values = _values(by_seed, metric)
                spread = spread_over_runs(list(values.values()))
                yield Score(
                    cell=cell,
                    key=key,
                    metric=metric,
                    step=max(each.step for each in by_seed.values()),
                    chosen=moment == _CHOSEN,
                    shown=moment == shown,
                    values=values,
                    mean=spread.mean,
                    std=spread.std if spread.runs > 1 else None,
                    interval=interval_over_runs(list(values.values()), metric),
                    n=first.n,
                    protocol=first.protocol,
                    difference=paired_difference(values, _values(baseline, metric)),
                )


def _values(by_seed: Mapping[int, Measured], metric: str) -> dict[int, float]:
    return {seed: each.metrics[metric] for seed, each in by_seed.items() if metric in each.metrics}


def _shown(results: Results, key: Key) -> Moment | None:
    """The moment of a key that tables show: that which validation chose, else the variant's last if it is there."""
    if not results.get(key):
        return None
    last = max(step for moments in results.values() for _, step in moments)
    wanted = _CHOSEN if _CHOSEN in results[key] else (False, last)
    return wanted if wanted in results[key] else None


def network_rank(network: str) -> tuple[int, int, str]:
    """The place of a network in tables: individual, ensembles, then the networks by number, then the others."""
    if network in _JOINT:
        return 0, _JOINT.index(network), ""
    return (1, int(network), "") if network.isdecimal() else (2, 0, network)


def _are_alike(found: Measured, others: Mapping[int, Measured], problems: list[Problem]) -> bool:
    """Whether a result can be averaged with those of other seeds. If not, it is a problem."""
    why = ""
    for seed, other in others.items():
        if unlike := _unlike(found, other):
            why = f"it is left out: measured otherwise than seed {seed}: {unlike}"
        elif seed == found.run.seed and found.metrics != other.metrics:
            why = "it has two results: remove the wrong one, and its folder in evaluations/"
    if why:
        problems.append(Problem(run=found.run.folder.name, what=found.what, why=why))
    return not why


def _unlike(ours: Measured, theirs: Measured) -> str:
    """What differs in the protocols of two results; "" if nothing does."""
    one, other = ours.compared, theirs.compared
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    if 1 in (each.run.variant.config.cohort.networks for each in (ours, theirs)):
        # A lone network stands for its own ensemble, whatever joins the networks of others.
        keys = [key for key in keys if key != "ensemble"]
    return ", ".join(f"{key} {_value(one, key)}, not {_value(other, key)}" for key in keys)


def _value(facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key)
    return "none" if value is None else printable(str(value), _LONGEST_VALUE)


def _results_of(run: StudyRun, lines: Sequence[str], problems: list[Problem]) -> Iterator[Measured]:
    """The results of a run, and the means over its networks. What cannot be read is a problem."""
    files = [(_OWN, "", _own_files(run, problems))]
    for outcome in read_outcomes(run.folder):
        if outcome.kind == "done" and outcome.line in lines:
            what = f"{outcome.line}, step {outcome.step}"
            files.append((what, outcome.line, outcome.files(run.folder)))
    for what, line, paths in files:
        found, troubles = [], []
        for path in paths:
            try:
                found.append(_read(run, line, path))
            except UserError as error:
                troubles.append(str(error))
        if several := _measured_twice(found):
            troubles.append(
                f"network {several} has several results: remove all but the one that counts"
            )
            found = []
        try:
            found += list(_individual(found, run.variant.config.cohort.networks))
        except UserError as error:
            # A network without a result may be one whose file is damaged: that is said already.
            troubles = troubles or [str(error)]
        problems += [Problem(run=run.folder.name, what=what, why=why) for why in troubles]
        yield from sorted(found, key=lambda each: network_rank(each.key.network))


def _own_files(run: StudyRun, problems: list[Problem]) -> list[Path]:
    """The result files that supervised training itself leaves of its last step."""
    directory = RunDirectory(run.folder)
    if not directory.done:
        return []
    steps = []
    with contextlib.suppress(OSError):
        steps = [event.get("step") for event in directory.events("done")]
    step = steps[-1] if steps and type(steps[-1]) is int else None
    files = sorted(directory.results.glob(f"{CLASSIFICATION}-*.json"))
    last = [file for file in files if step is not None and f"-{step:08d}-" in file.name]
    if not last and run.variant.config.method == "supervised":
        why = f"it has no result of its last step {'(unknown)' if step is None else step}"
        problems.append(Problem(run=run.folder.name, what=_OWN, why=why))
    return last


def _read(run: StudyRun, line: str, file: Path) -> Measured:
    """The content of a result file.

    Raises:
        UserError: the file is gone or damaged.
    """
    result = read_result_of(run.folder, file)
    metrics = result["metrics"]
    texts = (result[key] for key in ("task", "dataset", "variant", "network"))
    return Measured(
        run=run,
        key=Key(line, *texts),
        step=result["step"],
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},
        others={key: value for key, value in metrics.items() if not isinstance(value, float)},
        n=metrics.get("n"),
        protocol=result["protocol"],
    )


def _measured_twice(found: Sequence[Measured]) -> str | None:
    """A network that has several results; None if there is none."""
    by_key = {each.key: each for each in found}
    return next((each.key.network for each in found if by_key[each.key] is not each), None)


def _individual(found: Sequence[Measured], networks: int) -> Iterator[Measured]:
    """The mean over the networks of a run for everything that all of them were measured by.

    Raises:
        UserError: a network has none of the training's own results, or was measured otherwise.
    """
    by_key = {each.key: each for each in found}
    for key in dict.fromkeys(key._replace(network=INDIVIDUAL) for key in by_key):
        own = [by_key.get(key._replace(network=str(m))) for m in range(networks)]
        there = [each for each in own if each is not None]
        if len(there) < networks:
            # Of an evaluation, one network may be all that was asked for.
            if not key.line:
                raise UserError(f"its network {own.index(None)} has no result")
            continue
        for other in there:
            if unlike := _unlike(there[0], other):
                name = other.key.network
                raise UserError(f"network 0 was measured otherwise than {name}: {unlike}")
        metrics = {
            name: sum(each.metrics[name] for each in there) / networks
            for name in there[0].metrics
            if all(name in each.metrics for each in there)
        }
        yield replace(there[0], key=key, metrics=metrics, others={})
