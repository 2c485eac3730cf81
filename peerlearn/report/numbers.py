"""Numbers of tables as text: those of one column with the same number of decimals."""

import math
import sys
from collections.abc import Sequence

from peerlearn.report.parts import Cell, Entry
from peerlearn.runs.text import printable

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
# Within these, two decimals tell a number; beyond, three significant digits do.
_SMALLEST, _LARGEST = 0.1, 1e6
# Of a longer whole number the middle is left out.
_MOST_DIGITS = 40


def is_number(value: Cell) -> bool:
    """Whether a cell is a number: it may be NaN or infinite."""
    value = value.number if isinstance(value, Entry) else value
    return isinstance(value, int | float) and not isinstance(value, bool)


def column_texts(values: Sequence[Cell]) -> list[str]:
    """The cells of a column as text: ``62.31``, ``1,200``, ``3e-05``, a dash for a missing one."""
    decimals = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v) and v != 0]
    plain = all(_SMALLEST <= value < _LARGEST for value in decimals)
    return [_text(value, plain=plain) for value in values]


def _text(value: Cell, *, plain: bool) -> str:
    if value is None:
        return MISSING
    if isinstance(value, Entry):
        return value.text
    if not isinstance(value, float):
        # A damaged file may hold what is neither text nor a number.
        return (
            _signed(printable(f"{value:,}", _MOST_DIGITS)) if isinstance(value, int) else str(value)
        )
    if math.isnan(value):
        return "NaN"
    return _signed(format(value, "z,.2f" if plain else ".3g"))


def _signed(text: str) -> str:
    return f"{_MINUS}{text[1:]}" if text.startswith("-") else text


def sort_key(value: Cell) -> str | None:
    """A number as JavaScript reads it, by which a browser sorts; None for text, missing cells and NaN."""
    value = value.number if isinstance(value, Entry) else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value:  # NaN; a whole number may be too large to ask `math`.
        return None
    return (
        repr(value) if abs(value) <= sys.float_info.max else f"{'-' if value < 0 else ''}Infinity"
    )
