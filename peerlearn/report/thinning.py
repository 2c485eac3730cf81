"""Long series made short without a change of the picture: of each column of pixels its smallest and largest value."""

import numpy as np
from numpy.typing import NDArray

from peerlearn.report.series import Series

# Number of columns of a figure. Each is about two points wide.
COLUMNS = 150


def thinned(series: Series, first: int, last: int) -> Series:
    """At most two finite values of each column, the first and the last one of all, and NaN where a column has no other.

    Args:
        series: the series.
        first: step at the left end of the figure.
        last: step at the right end.
    """
    if len(series.steps) <= 2 * COLUMNS:
        return series
    order = np.argsort(series.steps, kind="stable")
    starts = np.flatnonzero(np.diff(columns_of(series.steps[order], first, last), prepend=-1))
    kept = []
    for places in np.split(order, starts[1:]):
        values = series.values[places]
        finite = np.isfinite(values)
        if finite.any():
            kept.append(places[np.where(finite, values, np.inf).argmin()])
            kept.append(places[np.where(finite, values, -np.inf).argmax()])
        else:
            kept.append(places[0])
    finite = np.flatnonzero(np.isfinite(series.values))
    places = np.unique([*kept, *finite[:1], *finite[-1:]])
    return Series(steps=series.steps[places], values=series.values[places])


def columns_of(steps: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """The column of each step, int64 (n,) within 0..COLUMNS - 1."""
    return (steps - first) * (COLUMNS - 1) // max(last - first, 1)


def marked_steps(steps: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """One step of each three columns that have any: where marks stand, which are wider than a column."""
    _, places = np.unique(columns_of(steps, first, last) // 3, return_index=True)
    return steps[places]
