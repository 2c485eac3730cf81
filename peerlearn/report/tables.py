"""Tables without columns in which nothing stands."""

from collections.abc import Sequence

from peerlearn.report.parts import Cell, Table


def filled_table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    is_folded: bool = False,
) -> Table:
    """A table of the columns alone that have any cell which is not missing; the first one always stays."""
    columns = list(zip(*rows, strict=True))
    kept = [n for n, column in enumerate(columns) if n == 0 or {*column} != {None}]
    return Table(
        caption=caption,
        headings=tuple(headings[n] for n in kept),
        rows=tuple(tuple(row[n] for n in kept) for row in rows),
        is_folded=is_folded,
    )
