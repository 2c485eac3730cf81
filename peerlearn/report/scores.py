"""Scores of runs, from their metrics and from their result files, in one form."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlearn.evaluation.uncertainty import accuracy_metrics, score_interval
from peerlearn.report.metric_kinds import IMAGES_WORDS, PROTOCOLS, kind, metric, network_text, rank
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.run_results import RunResult
from peerlearn.runs.score_names import PIXELS, TOP1, measured_part
from peerlearn.runs.standing import number

# The figures of result files that tell how good a network is.
_RESULT_METRICS = {
    "top1": "top-1 (%)",
    "accuracy": "accuracy (%)",
    "ap": "AP (%)",
    "ap50": "AP50 (%)",
    "ap75": "AP75 (%)",
}


@dataclass(frozen=True, kw_only=True)
class MonitorScore:
    """An accuracy of a network over its training.

    Attributes:
        facts: its run.
        score: what was measured.
        network: network that it is of.
        at_step_0: accuracy before the first step, in percent; None where it was not measured.
        pixels: accuracy of the raw pixels, in percent; None where it was not measured.
        best: largest accuracy after the first step.
        best_step: step of the largest accuracy.
        last: newest finite accuracy.
        last_step: step of the newest finite accuracy.
        skipped_step: step of the newest accuracy where that was not finite; None where it is the last one.
        standard_error: standard error of the last accuracy over its n images; None where n is unknown.
        protocol: how it was measured, in words.
    """

    facts: RunFacts
    score: str
    network: str
    at_step_0: float | None
    pixels: float | None
    best: float
    best_step: int
    last: float
    last_step: int
    skipped_step: int | None
    standard_error: float | None
    protocol: str


@dataclass(frozen=True, kw_only=True)
class ResultScore:
    """A figure of a result file.

    Attributes:
        facts: its run.
        result: its file.
        metric: name of the figure with its unit.
        value: value of the figure.
        low: lower end of the 95 % interval; None where the file tells none.
        high: upper end of that interval.
    """

    facts: RunFacts
    result: RunResult
    metric: str
    value: float
    low: float | None
    high: float | None


def monitor_scores(facts: RunFacts) -> list[MonitorScore]:
    """The accuracies in a run's metrics, network by network."""
    names = [name for name in facts.series.by_name if name.endswith(TOP1) and metric(name).network]
    found = [score for name in names if (score := _monitor_score(facts, name)) is not None]
    return sorted(found, key=lambda each: each.score)


def _monitor_score(facts: RunFacts, name: str) -> MonitorScore | None:
    figure, network = metric(name)
    series = facts.series.by_name[name]
    finite = np.isfinite(series.values)
    later = finite & (series.steps > 0)
    if network == PIXELS or not later.any():
        return None
    steps, values = series.steps[later], series.values[later]
    before = series.values[finite & (series.steps == 0)]
    protocol = _protocol(facts, figure)
    last = float(values[-1])
    images = next((protocol[word] for word in IMAGES_WORDS if word in protocol), None)
    error = None
    if images is not None and images >= 1 and 0 <= last <= 100:
        error = float(accuracy_metrics(last, int(images))["top1_standard_error"])
    pixels = facts.series.by_name.get(f"{measured_part(PIXELS)}/{figure}")
    return MonitorScore(
        facts=facts,
        score=kind(metric(name)).title,
        network=network_text(network),
        at_step_0=float(before[0]) if len(before) else None,
        pixels=None if pixels is None else _finite(pixels.values[-1]),
        best=float(values.max()),
        best_step=int(steps[values.argmax()]),
        last=last,
        last_step=int(steps[-1]),
        skipped_step=None if finite[-1] else int(series.steps[-1]),
        standard_error=error,
        protocol=", ".join(f"{word} {value:,g}" for word, value in protocol.items()),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _protocol(facts: RunFacts, figure: str) -> dict[str, float]:
    """The newest values of what tells how a figure was measured."""
    found = {
        word: facts.series.by_name[name].values[-1]
        for name, word in PROTOCOLS.get(figure, {}).items()
        if name in facts.series.by_name
    }
    return {word: float(value) for word, value in found.items() if math.isfinite(value)}


def result_scores(facts: RunFacts) -> list[ResultScore]:
    """The figures in a run's result files."""
    scores = [score for result in facts.results for score in _scores_of(facts, result)]
    return sorted(
        scores, key=lambda each: (each.result.score, rank(each.result.content["network"]))
    )


def _scores_of(facts: RunFacts, result: RunResult) -> Iterator[ResultScore]:
    metrics = result.content["metrics"]
    for name, heading in _RESULT_METRICS.items():
        value = metrics.get(name)
        interval = _interval(metrics, name)
        if isinstance(value, dict):
            # Of several runs: mean, std, ci95, values.
            runs = value.get("values")
            # Of two runs it is 25 standard errors wide, and says nothing.
            is_told = isinstance(runs, list) and len(runs) > 2
            interval = _around(value.get("mean"), value.get("ci95"), name) if is_told else None
            value = value.get("mean")
        if _is_number(value):
            low, high = interval or (None, None)
            yield ResultScore(
                facts=facts, result=result, metric=heading, value=float(value), low=low, high=high
            )


def _is_number(value: Any) -> bool:
    return number(value) is not None


def _interval(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95 % interval that a file tells of a figure: over images, or over episodes."""
    wilson: Sequence[Any] | Any = metrics.get(f"{name}_wilson95")
    if isinstance(wilson, list) and len(wilson) == 2 and all(map(_is_number, wilson)):
        return float(wilson[0]), float(wilson[1])
    return _around(metrics.get(name), metrics.get(f"{name}_ci95"), name)


def _around(mean: Any, ci95: Any, name: str) -> tuple[float, float] | None:
    if _is_number(mean) and _is_number(ci95):
        return score_interval(float(mean), float(ci95), name)
    return None
