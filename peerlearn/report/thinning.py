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
    column = columns_of(series.steps, first, last)
    finite = np.isfinite(series.values)
    kept = [*_ends(finite)]
    for number in np.unique(column):
        places = np.flatnonzero(column == number)
        there = places[finite[places]]
        if len(there):
            values = series.values[there]
            kept += [int(there[values.argmin()]), int(there[values.argmax()])]
        else:
            kept.append(int(places[0]))
    places = np.unique(kept)
    return Series(steps=series.steps[places], values=series.values[places])


def _ends(finite: NDArray[np.bool_]) -> list[int]:
    places = np.flatnonzero(finite)
    return [int(places[0]), int(places[-1])] if len(places) else []


def columns_of(steps: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """The column of each step, int64 (n,) within 0..COLUMNS - 1."""
    return (steps - first) * (COLUMNS - 1) // max(last - first, 1)


def marked_steps(steps: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """One step of each column that has any: where marks stand."""
    _, places = np.unique(columns_of(steps, first, last), return_index=True)
    return steps[places]
