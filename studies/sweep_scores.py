"""The scores of a sweep's runs at their last step: over seeds, and compared with the baseline of their row."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlearn.data.titles import dataset_title
from peerlearn.errors import UserError
from peerlearn.evaluation.results import read_result
from peerlearn.evaluation.uncertainty import spread_over_runs
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.score_names import (
    ENSEMBLE,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    KNN_TRAIN_IMAGES,
    WEIGHTED_ENSEMBLE,
    parse_score_name,
    score_name,
)
from peerlearn.runs.training_facts import TrainingFacts
from studies.sweep import Cell, Sweep, SweptRun
from studies.sweep_run import why_not_done

INDIVIDUAL = "individual"
_METRICS = ("top1", "top5")
# Differences below this are due to rounding alone.
_NO_SPREAD = 1e-9

# (network, metric): individual, ensemble, weighted-ensemble, 0, 1, ... x top1, top5.
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """The scores of one run.

    Attributes:
        measured: protocol and images of the scores, in words; only scores with equal words are compared.
        values: scores in percent.
    """

    measured: str
    values: dict[Key, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a variant from its baseline, paired over the seeds that both have.

    Attributes:
        mean: mean of the differences.
        ci95: half the width of the mean's 95 % interval, by Student's t; None for one seed, and if all differences
            are the same.
        p: p value of the two-sided paired t-test; None for one seed, and if all differences are the same.
        seeds: seeds that both have.
    """

    mean: float
    ci95: float | None
    p: float | None
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score of a cell over seeds.

    Attributes:
        cell: cell of the score.
        network: individual (the mean over the networks), ensemble, weighted-ensemble, or a network's number.
        metric: name of the metric: top1 or top5, in percent.
        measured: protocol and images of the score, in words.
        values: values by seed.
        mean: mean over the seeds.
        std: sample standard deviation over the seeds; None for one seed.
        baseline: label that the cell is compared with.
        difference: difference from the baseline; None for the baseline itself and if there is nothing to compare.
    """

    cell: Cell
    network: str
    metric: str
    measured: str
    values: dict[int, float]
    mean: float
    std: float | None
    baseline: str
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A run without scores, or with scores that cannot be compared.

    Attributes:
        run: name of the run directory.
        cells: titles of the cells that miss the run.
        why: reason in one line.
    """

    run: str
    cells: list[str]
    why: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The scores of a sweep so far.

    Attributes:
        scores: scores by cell, in the order of the grids; for each cell individual and ensembles first.
        problems: runs that are missing, failed or cannot be compared.
    """

    scores: list[Score]
    problems: list[Problem]


def score_sweep(sweep: Sweep) -> Findings:
    """Read the scores of every run."""
    found: dict[str, dict[int, RunScores]] = {variant.name: {} for variant in sweep.variants}
    problems = []
    for run in sweep.runs:
        titles = [cell.title for cell in sweep.cells if cell.variant.name == run.variant.name]
        try:
            if why := why_not_done(run):
                raise UserError(why)
            own = read_scores(run)
            _check_alike(own, found[run.variant.name])
        except UserError as error:
            problems.append(Problem(run=run.folder.name, cells=titles, why=str(error)))
        else:
            found[run.variant.name][run.seed] = own
    scores: list[Score] = []
    for cell in sweep.cells:
        label = sweep.config.baseline[cell.grid]
        baseline = _baseline_of(cell, label, sweep.cells)
        scores += _cell_scores(
            cell, label, found[cell.variant.name], found[baseline.variant.name] if baseline else {}
        )
    return Findings(scores=scores, problems=problems)


def _check_alike(scores: RunScores, others: Mapping[int, RunScores]) -> None:
    for other in others.values():
        if other.measured != scores.measured:
            raise UserError(
                f"it was measured by {scores.measured}, another seed by {other.measured}"
            )


def _baseline_of(cell: Cell, label: str, cells: Sequence[Cell]) -> Cell | None:
    """The cell of the same row that a cell is compared with; None for the baseline itself."""
    if cell.labels[-1] == label:
        return None
    wanted = (cell.grid, (*cell.labels[:-1], label))
    return next(each for each in cells if (each.grid, each.labels) == wanted)


def _cell_scores(
    cell: Cell,
    label: str,
    runs: Mapping[int, RunScores],
    baseline: Mapping[int, RunScores],
) -> Iterator[Score]:
    measured = next((run.measured for run in runs.values()), "")
    keys = dict.fromkeys(key for run in runs.values() for key in run.values)
    for key in sorted(keys, key=_rank):
        values = {seed: run.values[key] for seed, run in runs.items() if key in run.values}
        theirs = {
            seed: run.values[key]
            for seed, run in baseline.items()
            if key in run.values and run.measured == measured
        }
        spread = spread_over_runs(list(values.values()))
        yield Score(
            cell=cell,
            network=key[0],
            metric=key[1],
            measured=measured,
            values=values,
            mean=spread.mean,
            std=spread.std if spread.runs > 1 else None,
            baseline=label,
            difference=paired_difference(values, theirs),
        )


def _rank(key: Key) -> tuple[int, int, int]:
    network, metric = key
    named = (INDIVIDUAL, ENSEMBLE, WEIGHTED_ENSEMBLE)
    place = (named.index(network), 0) if network in named else (len(named), int(network))
    return _METRICS.index(metric), *place


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference | None:
    """The difference of ``values`` from ``baseline``, paired by seed; None if they have no seed in common."""
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    spread = spread_over_runs(differences)
    if max(differences) - min(differences) < _NO_SPREAD:
        return Difference(mean=spread.mean, ci95=None, p=None, seeds=seeds)
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():
        # SciPy warns that p is not exact if the differences are nearly the same.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = ttest_rel([values[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return Difference(mean=spread.mean, ci95=spread.ci95, p=float(test.pvalue), seeds=seeds)


def read_scores(run: SweptRun) -> RunScores:
    """The scores of a run's last step, from its classification results or, without those, from its last kNN.

    Raises:
        UserError: that step has no scores, a score is missing, or a file is damaged.
    """
    networks = run.variant.config.cohort.networks
    directory = RunDirectory(run.folder)
    step = _last_step(directory)
    files = sorted(directory.results.glob("classification-*.json"))
    if files:
        measured, values = _classified(files, step)
    else:
        measured, values = _knn(directory, step)
        if networks == 1:
            # The features of one network are no ensemble.
            values = {key: value for key, value in values.items() if key[0] != ENSEMBLE}
    individual = {}
    for metric in _METRICS:
        own = [values.get((str(m), metric)) for m in range(networks)]
        present = [value for value in own if value is not None]
        if len(present) == networks:
            individual[(INDIVIDUAL, metric)] = sum(present) / networks
        elif present or metric == "top1":
            raise UserError(f"its network {own.index(None)} has no {metric} at step {step}")
    return RunScores(measured=measured, values=individual | values)


def _last_step(directory: RunDirectory) -> int:
    """The last step of the run."""
    steps = [event.get("step") for event in directory.events() if event["event"] == "done"]
    if not steps or not isinstance(steps[-1], int):
        raise UserError("its events.jsonl does not tell at which step it ended")
    return steps[-1]


def _classified(files: Sequence[Path], last_step: int) -> tuple[str, dict[Key, float]]:
    """The scores in the classification results of the last step."""
    results = [_read(file) for file in files]
    newest = max(result["step"] for result in results)
    if newest != last_step:
        raise UserError(f"its results are of step {newest}, but it ended at step {last_step}")
    values: dict[Key, float] = {}
    measured = set()
    for file, result in zip(files, results, strict=True):
        if result["step"] != last_step:
            continue
        measured.add(
            f"top-1 on {result['dataset']} {result['protocol'].get('split', 'test')} (n {result['metrics']['n']:,})"
        )
        for metric in _METRICS:
            value = result["metrics"].get(metric)
            if value is None:
                continue
            key = (result["network"], metric)
            if key in values:
                raise UserError(
                    f"network {key[0]} has several results of step {last_step}, {file.name} is one: "
                    "remove all but the one that counts"
                )
            values[key] = value
    if len(measured) > 1:
        raise UserError(f"its networks were measured differently: {' and '.join(sorted(measured))}")
    return measured.pop(), values


def _read(file: Path) -> dict[str, Any]:
    try:
        result = read_result(file)
        metrics = result["metrics"]
        known = result["network"] in (ENSEMBLE, WEIGHTED_ENSEMBLE) or result["network"].isdecimal()
        sound = (
            known
            and isinstance(result["protocol"], dict)
            and isinstance(result["dataset"], str)
            and type(result["step"]) is int
            and type(metrics["n"]) is int
            and _is_score(metrics["top1"])
            and (metrics.get("top5") is None or _is_score(metrics["top5"]))
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"results/{file.name} is damaged: restore or remove it")
    return result


def _is_score(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _knn(directory: RunDirectory, last_step: int) -> tuple[str, dict[Key, float]]:
    """The scores in the monitor's last row."""
    rows = [row for row in directory.metric_rows() if score_name(ENSEMBLE, KNN_TOP1) in row]
    if not rows or rows[-1]["step"] != last_step:
        raise UserError(
            f"it has no classification result of its last step {last_step} (method supervised), nor kNN in "
            "metrics.jsonl (the others: monitor.every_epochs must be above 0)"
        )
    row = rows[-1]
    values: dict[Key, float] = {}
    for key, value in row.items():
        network, figure = parse_score_name(key) or ("", key)
        if figure == KNN_TOP1 and (network == ENSEMBLE or network.isdecimal()):
            if not _is_score(value):
                raise UserError(f"metrics.jsonl: {key} of step {last_step} is no number")
            values[(network, "top1")] = value
    try:
        facts = TrainingFacts.read(directory.env)
        title = dataset_title(facts.dataset, facts.data_root)
        measured = (
            f"kNN top-1 on {title} (k {row[KNN_K]}, temperature {row[KNN_TEMPERATURE]}, "
            f"{row[KNN_TRAIN_IMAGES]:,} neighbours, n {row[KNN_TEST_IMAGES]:,})"
        )
    except (UserError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"env.json or metrics.jsonl lacks what the kNN was measured by: {type(error).__name__}: {error}"
        ) from error
    return measured, values
