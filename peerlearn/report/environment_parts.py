"""Versions, machines and facts of runs, by their env.json."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peerlearn.report.parts import Cell, Section, Table
from peerlearn.report.run_facts import RunFacts
from peerlearn.runs.text import printable

_LONGEST_VALUE = 120
_DEEPEST = 4


def environment_section(facts: Sequence[RunFacts]) -> Section:
    """What each run ran on: facts as rows, runs as columns."""
    found = [dict(_flat(each.environment)) for each in facts]
    keys = list(dict.fromkeys(key for values in found for key in values))
    table = Table(
        caption="What the last start of each run ran on",
        headings=("fact", *(each.label for each in facts)),
        rows=tuple((printable(key), *(values.get(key) for values in found)) for key in keys),
        is_folded=True,
    )
    return Section(anchor="environment", title="Environment", parts=(table,) if keys else ())


def _flat(
    group: Mapping[str, Any], before: str = "", levels: int = _DEEPEST
) -> Iterator[tuple[str, Cell]]:
    for key, value in group.items():
        if isinstance(value, dict) and value and levels:
            yield from _flat(value, f"{before}{key}.", levels - 1)
        elif value is not None:
            yield f"{before}{key}", printable(str(value), _LONGEST_VALUE)
