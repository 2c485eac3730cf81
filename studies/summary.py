"""The scores of a pipeline over its seeds, and what is missing."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.evaluation.results import read_result
from peerlearn.evaluation.uncertainty import spread_over_runs
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import best_step
from slurm.jobs import job_key
from studies.ledger import Entry
from studies.pipeline import Pipeline, PlannedRun
from studies.watch import (
    Survey,
    evaluations_of,
    failure_of,
    missing_results,
    settle,
    training_jobs,
    training_of,
    wanted,
)

_FIELDS = ("task", "dataset", "network", "step", "protocol", "metrics")
_CHOSEN = "chosen"
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric over the seeds of a pretraining.

    Attributes:
        pretrain: line of the pretraining.
        evaluation: line of the evaluation.
        task: name of the task in the result files.
        dataset: data set of the score.
        network: name of the network: 0, 1, ..., key-0, ..., ensemble.
        variant: what tells the scores of one network in an evaluation apart, "5-way 1-shot" say; "" for a single one.
        step: step of the checkpoint; the last of the seeds' where validation chose it.
        chosen: whether validation chose every seed's step.
        metric: name of the metric in the result files.
        mean: mean over the seeds.
        std: sample standard deviation over the seeds; None for one seed.
        ci95: half the width of the 95 % interval of the mean; None for one seed.
        values: values by seed.
        n: number of test images, if the result files tell it.
        protocol: protocol of all values.
    """

    pretrain: str
    evaluation: str
    task: str
    dataset: str
    network: str
    variant: str
    step: int
    chosen: bool
    metric: str
    mean: float
    std: float | None
    ci95: float | None
    values: dict[int, float]
    n: int | None
    protocol: dict[str, Any]

    @property
    def moment(self) -> tuple[bool, int]:
        """Its place among the steps of a pretraining; that of what validation chose is one, after all of them."""
        return self.chosen, 0 if self.chosen else self.step


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A score that is missing.

    Attributes:
        run: name of the run directory.
        what: the pretraining, or the line and step of an evaluation.
        why: reason in one line.
    """

    run: str
    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The scores of a pipeline so far.

    Attributes:
        scores: scores in the order of pretraining, evaluation, network, step and metric, main metrics first.
        problems: scores that failed, are missing, or are not done yet.
    """

    scores: list[Score]
    problems: list[Problem]

    def latest(self) -> list[Score]:
        """The main metric of the steps that validation chose, or of each pretraining's last evaluated step."""
        last: dict[str, tuple[bool, int]] = {}
        for score in self.scores:
            last[score.pretrain] = max(score.moment, last.get(score.pretrain, score.moment))
        return [score for score in self.main() if score.moment == last[score.pretrain]]

    def main(self) -> list[Score]:
        """The first metric of each score, at every step."""
        return list({_identity(score): score for score in reversed(self.scores)}.values())[::-1]


def _identity(score: Score) -> tuple[Any, ...]:
    protocol = json.dumps(score.protocol, sort_keys=True)
    return score.pretrain, score.evaluation, score.dataset, score.network, score.moment, protocol


def sum_up(pipeline: Pipeline) -> Summary:
    """Read every result that the pipeline's evaluations have left.

    Raises:
        UserError: a ledger cannot be written.
    """
    try:
        survey = pipeline.survey()
    except UserError:
        # Without Slurm no job is live, and the ledgers hold what was known before.
        survey = Survey(
            asked=frozenset(map(job_key, training_jobs([run.folder for run in pipeline.runs])))
        )
    else:
        for ledger in pipeline.ledgers():
            settle(ledger, survey)
    groups: dict[tuple[str, ...], dict[int, Result]] = defaultdict(dict)
    problems: list[Problem] = []
    for run in pipeline.runs:
        best = best_step(RunDirectory(run.folder).exports)
        for line, result in _results(pipeline, run, survey, problems):
            names = [str(result[name]) for name in ("task", "dataset", "network")]
            protocol = json.dumps(result["protocol"], sort_keys=True)
            moments = [str(result["step"]), *([_CHOSEN] if result["step"] == best else [])]
            for moment in moments:
                groups[(moment, run.line, line, *names, protocol)][run.seed] = result
    scores = [
        score
        for (moment, pretrain, line, *_), group in groups.items()
        for score in _scores(pretrain, line, group, chosen=moment == _CHOSEN)
    ]
    lines, evaluations = pipeline.config.pretrain, [e.line for e in pipeline.evaluations]
    scores.sort(key=lambda s: (lines.index(s.pretrain), evaluations.index(s.evaluation), s.moment))
    return Summary(scores=scores, problems=problems)


def _results(
    pipeline: Pipeline, run: PlannedRun, survey: Survey, problems: list[Problem]
) -> Iterator[tuple[str, Result]]:
    """The content of each result file of a run, with the line of its evaluation. Problems are added to the list."""
    training = training_of(run.folder, survey)
    why = {"none": "it has not begun", "live": "it is not done yet", "dead": failure_of(run.folder)}
    if training in why:
        problems.append(Problem(run=run.folder.name, what="pretraining", why=why[training]))
    keys = wanted(run.folder, pipeline.watched, survey)
    present = {(evaluation.line, export.step): key for key, (export, evaluation) in keys.items()}
    entries = evaluations_of(run.folder).entries()
    lines = {evaluation.line for evaluation in pipeline.evaluations}
    for entry in entries.values():
        name = (entry.facts["evaluation"], entry.facts["step"])
        # An export may be deleted once it is evaluated. If another export has taken its place, that one counts.
        if name[0] in lines:
            present.setdefault(name, entry.key)
    for (line, step), key in sorted(present.items()):
        if why_not := _shortcoming(entries.get(key)):
            what = f"{line}, step {step}"
            problems.append(Problem(run=run.folder.name, what=what, why=why_not))
        for path in entries[key].results if key in entries else ():
            if result := _read(path, run, problems):
                yield line, result


def _read(path: Path, run: PlannedRun, problems: list[Problem]) -> Result | None:
    try:
        result = read_result(path)
        # Files of earlier versions have no variant.
        return {name: result[name] for name in _FIELDS} | {"variant": result.get("variant", "")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        why = f"not a result file: {type(error).__name__}: {error}"
        problems.append(Problem(run=run.folder.name, what=path.name, why=why))
        return None


def _shortcoming(entry: Entry | None) -> str:
    """The reason why an evaluation has no whole result; "" if it has one."""
    if entry is None or entry.due or entry.job is None:
        refused = entry.refused if entry else None
        return f"not submitted: {refused}" if refused else "not submitted"
    if entry.kind is None:
        return f"job {entry.job['job']} has not ended"
    if entry.kind != "done":
        return f"job {entry.job['job']}: {entry.reason} (slurm/{entry.folder.name})"
    gone = [path.name for path in missing_results(entry)]
    if gone:
        return f"its result is gone: {', '.join(gone)}"
    return "" if entry.results else "it left no result"


def _scores(
    pretrain: str, evaluation: str, by_seed: dict[int, Result], *, chosen: bool
) -> Iterator[Score]:
    first = next(iter(by_seed.values()))
    for metric, value in first["metrics"].items():
        if not isinstance(value, float):
            continue
        values = {
            seed: result["metrics"][metric]
            for seed, result in by_seed.items()
            if isinstance(result["metrics"].get(metric), float)
        }
        spread = spread_over_runs(list(values.values()))
        yield Score(
            pretrain=pretrain,
            evaluation=evaluation,
            task=first["task"],
            dataset=first["dataset"],
            network=first["network"],
            variant=first["variant"],
            step=max(result["step"] for result in by_seed.values()),
            chosen=chosen,
            metric=metric,
            mean=spread.mean,
            std=spread.std if spread.runs > 1 else None,
            ci95=spread.ci95 if spread.runs > 1 else None,
            values=values,
            n=first["metrics"].get("n"),
            protocol=first["protocol"],
        )
