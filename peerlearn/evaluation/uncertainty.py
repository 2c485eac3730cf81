"""How far a score can be trusted: over test images, and over runs."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

# Metrics in percent, and what is told of them: their standard errors, say.
_PERCENTAGE = re.compile(r"(top1|top5|accuracy|ap|ap50|ap75|calibration_error)(_.*)?")


class Spread(NamedTuple):
    """A score over several runs, each with a seed of its own.

    mean: over the runs.
    std: the sample's, with n - 1; NaN for one run.
    ci95: half the width of the 95 % interval of the mean, by Student's t; NaN for one run.
    runs: n.
    """

    mean: float
    std: float
    ci95: float
    runs: int


def spread_over_runs(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and 95 % interval of the mean of at least one score."""
    runs = len(values)
    if runs < 2:
        return Spread(values[0], math.nan, math.nan, runs)
    from scipy.special import stdtrit

    std = statistics.stdev(values)
    ci95 = float(stdtrit(runs - 1, 0.975)) * std / math.sqrt(runs)
    return Spread(statistics.fmean(values), std, ci95, runs)


def interval_over_runs(values: Sequence[float], metric: str) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a metric over runs, as `score_interval` has it; None for one run, and for two.

    By Student's t, the interval of two is 25 standard errors wide: it would say nothing of a score.
    """
    if len(values) < 3:
        return None
    spread = spread_over_runs(values)
    return score_interval(spread.mean, spread.ci95, metric)


def score_interval(mean: float, ci95: float, metric: str) -> tuple[float, float]:
    """mean - ci95 and mean + ci95; of a metric in percent, what of it lies within 0..100."""
    low, high = mean - ci95, mean + ci95
    if is_percentage(metric):
        return min(max(low, 0.0), 100.0), min(max(high, 0.0), 100.0)
    return low, high


def is_percentage(metric: str) -> bool:
    """Whether a metric of the evaluators lies within 0..100."""
    return _PERCENTAGE.fullmatch(metric) is not None


def interval_of_mean(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean of many values: 1.96 sample deviations / sqrt(n); NaN for one."""
    if len(values) < 2:
        return math.nan
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, in percent (Wilson 1927): ``correct`` of ``n`` >= 1 test images.

    Unlike mean +- 1.96 standard errors it stays within 0..100 and has a width at 0 and at 100.
    """
    # Not by scipy.stats: importing it takes longer than a search of neighbours.
    z, share = statistics.NormalDist().inv_cdf(0.975), correct / n
    scale = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding must not put an accuracy of 0 or 100 outside its own interval.
    return 100 * max(0.0, min(share, centre - half)), 100 * min(1.0, max(share, centre + half))


def accuracy_metrics(top1: float, n: int) -> dict[str, Any]:
    """What a result file tells of an accuracy, ``top1`` in percent of ``n`` test images."""
    share = top1 / 100
    return {
        "top1": top1,
        "n": n,
        "top1_standard_error": 100 * math.sqrt(share * (1 - share) / n),
        "top1_wilson95": wilson_interval(round(share * n), n),
    }
