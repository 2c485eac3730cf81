"""Curves of runs over their steps: a picture for each kind of metric, with its numbers.

One run: a colour for each network. Few runs: colours tell runs apart, lines tell networks apart. More runs: one curve
each, that of the ensemble or else the mean over the networks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlearn.evaluation.plots import COLORS, LINES
from peerlearn.report.curve_picture import Curve, Panel, picture_of
from peerlearn.report.failures import reason_text
from peerlearn.report.metric_kinds import (
    ACCURACY,
    GROUPS,
    PROTOCOLS,
    Metric,
    drawn,
    kind,
    network_text,
    rank,
)
from peerlearn.report.parts import Paragraph, Part, Picture, Section
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.series import Series
from peerlearn.runs.score_names import (
    ENSEMBLE,
    PIXELS,
    WEIGHTED_ENSEMBLE,
    measured_part,
    score_name,
)
from peerlearn.runs.text import file_name_part, printable

# Up to so many curves, several runs show each network.
_MOST_CURVES = 8
# More figures of one group would take minutes, and nobody would look at them.
_MOST_FIGURES = 60
_LONGEST_NAME = 60
_ENSEMBLES = (ENSEMBLE, WEIGHTED_ENSEMBLE)


def curve_sections(facts: Sequence[RunFacts]) -> list[Section]:
    """A section for each group of metrics; one of which the runs have none is empty."""
    metrics = list(dict.fromkeys(drawn(name for each in facts for name in each.series.by_name)))
    figures: dict[tuple[str, bool], list[str]] = {}
    for each in metrics:
        figures.setdefault((each.figure, bool(each.network)), []).append(each.network)
    parts: dict[str, list[Part]] = {group: [] for group in GROUPS}
    left_out: Counter[str] = Counter()
    for number, ((figure, is_of_networks), networks) in enumerate(figures.items()):
        group = kind(Metric(figure, networks[0])).group
        if len(parts[group]) >= _MOST_FIGURES:
            left_out[group] += 1
            continue
        panel = _panel(facts, figure, networks if is_of_networks else [""], number)
        if panel is not None:
            parts[group].append(_drawn(panel))
    for group, count in left_out.items():
        text = f"The first {_MOST_FIGURES} metrics are drawn; {count:,} more are in metrics.jsonl."
        parts[group].append(Paragraph(text=text))
    return [
        Section(
            anchor=f"curves-{file_name_part(group).replace('_', '-').lower()}",
            title=group,
            parts=tuple(found),
        )
        for group, found in parts.items()
    ]


def _drawn(panel: Panel) -> Picture | Paragraph:
    """The picture of a panel; where it cannot be drawn, why not."""
    try:
        return picture_of(panel)
    except Exception as error:  # A drawing library raises what it likes.
        return Paragraph(text=f"{panel.title} cannot be drawn ({reason_text(error)}).")


def _panel(
    facts: Sequence[RunFacts], figure: str, networks: Sequence[str], number: int
) -> Panel | None:
    """The panel of a kind of metric; None where none of its values is a number."""
    own = [network for network in networks if network != PIXELS]
    curves = list(_curves(facts, figure, own))
    if not curves:
        return None
    told = kind(Metric(figure, networks[0]))
    title = printable(told.title, _LONGEST_NAME)
    baselines = _baselines(facts, figure) if PIXELS in networks else []
    is_mean = len(facts) > 1 and not _shows_networks(facts, own) and len(own) > 1
    return Panel(
        key=f"curve-{number}",
        title=title,
        about=" ".join(
            filter(
                None,
                [
                    f"{title}.",
                    told.about,
                    _protocol(facts, figure),
                    _step_0(facts) if told.group == ACCURACY else "",
                    _reduction(own) if is_mean else "",
                ],
            )
        ),
        curves=curves,
        baselines=baselines,
        is_percentage="(%)" in told.title,
    )


def _step_0(facts: Sequence[RunFacts]) -> str:
    given = [each.label for each in facts if each.starts_from_weights]
    if not given:
        return "Step 0: untrained networks."
    others = "" if len(given) == len(facts) else "; untrained networks of the other runs"
    return f"At step 0: the weights that {', '.join(given)} started from{others}."


def _reduction(networks: Sequence[str]) -> str:
    if ENSEMBLE in networks:
        return "Each curve is that of a run's ensemble, or of its single network."
    return "Each curve is the mean over a run's networks."


def _shows_networks(facts: Sequence[RunFacts], networks: Sequence[str]) -> bool:
    return len(facts) * len(networks) <= _MOST_CURVES and len(networks) <= len(LINES)


@dataclass(frozen=True, kw_only=True)
class _Found:
    facts: RunFacts
    network: str
    series: Series


def _curves(facts: Sequence[RunFacts], figure: str, networks: Sequence[str]) -> Iterator[Curve]:
    by_run = [
        [
            _Found(facts=each, network=network, series=each.series.by_name[name])
            for network in networks
            if (name := score_name(network, figure) if network else figure) in each.series.by_name
        ]
        for each in facts
    ]
    if len(facts) > 1 and not _shows_networks(facts, networks):
        by_run = [[_reduced(found)] for found in by_run if found]
    order = sorted({one.network for found in by_run for one in found}, key=_first_ensembles)
    for found in by_run:
        for one in found:
            place = next(n for n, each in enumerate(facts) if each is one.facts)
            yield Curve(
                run="" if len(facts) == 1 else one.facts.label,
                network=printable(network_text(one.network), _LONGEST_NAME),
                series=one.series,
                marks=_marks(one.facts),
                **_look(len(facts), place, order, one.network),
            )


def _first_ensembles(network: str) -> tuple[bool, tuple[bool, str]]:
    return network not in _ENSEMBLES, rank(network)


def _reduced(found: Sequence[_Found]) -> _Found:
    """One curve for a run: the ensemble's, else the mean of the networks at the steps that all have."""
    ensemble = [one for one in found if one.network == ENSEMBLE]
    if ensemble or len(found) == 1:
        chosen = (ensemble or list(found))[0]
        return _Found(facts=chosen.facts, network="", series=chosen.series)
    first, *others = (one.series for one in found)
    steps = first.steps
    for other in others:
        steps = np.intersect1d(steps, other.steps)
    # Where a step stands twice in a file, its last value counts.
    values = [
        one.series.values[np.searchsorted(one.series.steps, steps, "right") - 1] for one in found
    ]
    mean = Series(steps=steps, values=np.mean(values, axis=0))
    return _Found(facts=found[0].facts, network="", series=mean)


def _look(runs: int, place: int, order: Sequence[str], network: str) -> dict[str, Any]:
    if runs == 1:
        if network in _ENSEMBLES:
            return {"color": "#000000", "line": LINES[_ENSEMBLES.index(network)]}
        own = [each for each in order if each not in _ENSEMBLES]
        number, kinds = own.index(network), len(COLORS) - 1
        return {"color": COLORS[number % kinds], "line": LINES[number // kinds % len(LINES)]}
    if len(order) > 1:
        return {"color": COLORS[place % len(COLORS)], "line": LINES[order.index(network)]}
    return {
        "color": COLORS[place % len(COLORS)],
        "line": LINES[place // len(COLORS) % len(LINES)],
    }


def _marks(facts: RunFacts) -> dict[str, tuple[int, ...]]:
    """Steps at which something happened to a run, by what it was."""
    skipped, rolled_back = (
        tuple(
            step
            for event in facts.events
            if event["event"] == name and type(step := event.get("step")) is int
        )
        for name in ("step_skipped", "rolled_back")
    )
    return {
        "restart": facts.series.restarts,
        "skipped step": skipped,
        "back to a save": rolled_back,
    }


def _baselines(facts: Sequence[RunFacts], figure: str) -> list[tuple[str, float]]:
    """What the raw pixels reach, run by run; once where it is the same for all."""
    found: dict[float, list[str]] = {}
    for each in facts:
        series = each.series.by_name.get(f"{measured_part(PIXELS)}/{figure}")
        if series is not None and np.isfinite(series.values[-1]):
            found.setdefault(float(series.values[-1]), []).append(each.label)
    if len(found) == 1:
        return [("raw pixels", value) for value in found]
    return [(f"raw pixels, {', '.join(labels)}", value) for value, labels in found.items()]


def _protocol(facts: Sequence[RunFacts], figure: str) -> str:
    """How a kind of accuracy was measured, where it was the same for all runs; else that it was not."""
    words = []
    for name, word in PROTOCOLS.get(figure, {}).items():
        found = [each.series.by_name[name].values for each in facts if name in each.series.by_name]
        values = {float(value) for each in found for value in each}
        if len(values) == 1:
            words.append(f"{word} {values.pop():,g}")
        elif values:
            words.append(f"{word} differs, {min(values):,g} to {max(values):,g}")
    return f"Protocol: {'; '.join(words)}." if words else ""
