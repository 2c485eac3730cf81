"""What happened to runs, by their events."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from peerlearn.report.parts import Part, Section, Table
from peerlearn.report.run_facts import RunFacts
from peerlearn.runs.text import printable

# Events that come again and again, and that the counts tell enough of.
_USUAL = ("saved", "exported")
_MOST_EVENTS, _LONGEST_FACTS = 100, 300
_MOST_NAMES, _LONGEST_NAME = 100, 100


def event_section(facts: Sequence[RunFacts]) -> Section:
    """How often each event came, and, folded, the newest ones of each run that are no saves."""
    counts = [Counter(str(event["event"]) for event in each.events) for each in facts]
    names = list(dict.fromkeys(name for count in counts for name in count))
    parts: list[Part] = []
    if names:
        parts.append(
            Table(
                caption=f"How often each event came{_which(len(names))}.",
                headings=("event", *(each.label for each in facts)),
                rows=tuple(
                    (printable(name, _LONGEST_NAME), *(count[name] for count in counts))
                    for name in names[:_MOST_NAMES]
                ),
            )
        )
    return Section(
        anchor="events",
        title="Events",
        parts=(*parts, *(table for each in facts if (table := _events(each)) is not None)),
    )


def _which(names: int) -> str:
    return f", the first {_MOST_NAMES} of {names:,} names" if names > _MOST_NAMES else ""


def _events(facts: RunFacts) -> Table | None:
    told = [event for event in facts.events if event["event"] not in _USUAL]
    if not told:
        return None
    rows = tuple(
        (
            printable(str(event.get("time", "")), _LONGEST_NAME),
            printable(str(event["event"]), _LONGEST_NAME),
            _step(event),
            _facts_text(event),
        )
        for event in told[-_MOST_EVENTS:]
    )
    which = f"newest {len(rows)} of {len(told):,} events" if len(rows) < len(told) else "all events"
    return Table(
        caption=f"{facts.label}: {which} but saves and exports",
        headings=("time", "event", "step", "facts"),
        rows=rows,
        is_folded=True,
    )


def _step(event: dict[str, Any]) -> int | None:
    step = event.get("step")
    return step if type(step) is int else None


def _facts_text(event: dict[str, Any]) -> str:
    facts = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
    return printable(", ".join(f"{key} {value}" for key, value in facts.items()), _LONGEST_FACTS)
