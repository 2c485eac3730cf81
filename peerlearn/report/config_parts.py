"""Configs of runs: what differs between them, and each as a whole."""

from collections.abc import Sequence

from peerlearn.commands.runs_table import differing_keys, value_text
from peerlearn.report.parts import Paragraph, Part, Section, Table
from peerlearn.report.run_facts import RunFacts


def config_section(facts: Sequence[RunFacts]) -> Section:
    """Keys as rows and runs as columns: those that differ, and folded, all of each run."""
    known = [each for each in facts if each.registered.config]
    parts: list[Part] = []
    if len(known) > 1:
        keys = differing_keys([each.registered for each in known])
        parts.append(
            _differences(known, keys) if keys else Paragraph(text="The configs are equal.")
        )
    parts += [_whole(each) for each in known]
    return Section(anchor="config", title="Config", parts=tuple(parts))


def _differences(facts: Sequence[RunFacts], keys: Sequence[str]) -> Table:
    return Table(
        caption="Keys whose values differ between the runs; a dash: the run is of a version without the key.",
        headings=("key", *(each.label for each in facts)),
        rows=tuple((key, *(_cell(each, key) for each in facts)) for key in keys),
    )


def _cell(facts: RunFacts, key: str) -> str | None:
    config = facts.registered.config
    return value_text(config[key]) if key in config else None


def _whole(facts: RunFacts) -> Table:
    return Table(
        caption=f"All keys of {facts.label}",
        headings=("key", "value"),
        rows=tuple((key, value_text(value)) for key, value in facts.registered.config.items()),
        is_folded=True,
    )
