"""Comparisons of scores over seeds: paired differences, and p values of many comparisons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peerlearn.evaluation.uncertainty import spread_over_runs

# Differences below this are due to rounding alone.
_NO_SPREAD = 1e-9


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a score from its baseline, paired over the seeds that both have.

    Attributes:
        mean: mean of the differences.
        ci95: half the width of the mean's 95 % interval, by Student's t; None for one seed, and if all differences
            are the same.
        p: p value of the two-sided paired t-test; None for one seed, and if all differences are the same.
        p_holm: p value corrected for all comparisons of its table by Holm's method; None outside of tables.
        seeds: seeds that both have.
    """

    mean: float
    ci95: float | None
    p: float | None
    p_holm: float | None = None
    seeds: list[int]


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
    from scipy.special import stdtr

    # Student's distribution function, on both sides.
    t = spread.mean / (spread.std / math.sqrt(spread.runs))
    p = 2 * float(stdtr(spread.runs - 1, -abs(t)))
    return Difference(mean=spread.mean, ci95=spread.ci95, p=p, seeds=seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for how many they are, in the same order (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on. None is below a smaller one's, none above 1.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for done, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[place]))
        corrected[place] = largest
    return corrected


def p_text(p: float | None) -> str:
    """A p value with three decimals; "" for none."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
