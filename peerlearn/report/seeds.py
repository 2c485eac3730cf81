"""Scores over runs that differ by their seed alone, and paired differences where the seeds pair."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peerlearn.commands.runs_table import differing_keys, value_text
from peerlearn.evaluation.uncertainty import Spread, spread_over_runs
from peerlearn.report.parts import Part
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.scores import monitor_scores, result_scores
from peerlearn.report.tables import filled_table

_SEED = "seed"
# Keys in which runs of one kind may differ.
_OWN_KEYS = (_SEED, "run")

# What was measured, of which network, and how.
ScoreKey = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Runs of one config.

    Attributes:
        name: what tells it from the other groups.
        by_seed: scores of the run of each seed.
    """

    name: str
    by_seed: Mapping[int, Mapping[ScoreKey, float]]

    def values(self, key: ScoreKey) -> dict[int, float]:
        return {seed: scores[key] for seed, scores in self.by_seed.items() if key in scores}


def seed_tables(facts: Sequence[RunFacts], protocols: Mapping[str, str]) -> list[Part]:
    """Mean and spread of each score over seeds, and differences to the first group; none without several seeds.

    Args:
        facts: the runs.
        protocols: names of protocols by their text.
    """
    groups = _groups(facts)
    several = [group for group in groups if len(group.by_seed) > 1]
    keys = list(dict.fromkeys(k for group in several for s in group.by_seed.values() for k in s))
    means = tuple(
        (*_key_cells(group, key, protocols), *_spread_cells(spread_over_runs([*values.values()])))
        for key in keys
        for group in several
        if len(values := group.values(key)) > 1
    )
    parts: list[Part] = []
    if means:
        parts.append(
            filled_table(
                caption="Means over runs that differ by their seed alone. Std: the sample's. Half of 95 %: half the "
                "width of the mean's interval by Student's t, none of two runs.",
                headings=_HEADINGS,
                rows=means,
            )
        )
    return [*parts, *_differences(several, keys, protocols)]


_HEADINGS = (
    *("runs", "score", "network", "protocol"),
    *("mean", "std", "half of 95 %", "n (seeds)"),
)


def _key_cells(
    group: _Group, key: ScoreKey, protocols: Mapping[str, str]
) -> tuple[str, str, str, str | None]:
    score, network, protocol = key
    return group.name, score, network, protocols.get(protocol)


def _spread_cells(spread: Spread) -> tuple[float, float, float | None, int]:
    # Of two runs it is 25 standard errors wide, and says nothing.
    half = spread.ci95 if spread.runs > 2 and math.isfinite(spread.ci95) else None
    return spread.mean, spread.std, half, spread.runs


def _differences(
    groups: Sequence[_Group], keys: Sequence[ScoreKey], protocols: Mapping[str, str]
) -> list[Part]:
    rows = []
    for key in keys:
        for group in groups[1:]:
            first, own = groups[0].values(key), group.values(key)
            pairs = [own[seed] - first[seed] for seed in first.keys() & own.keys()]
            if len(pairs) > 1:
                rows.append(
                    (*_key_cells(group, key, protocols), *_spread_cells(spread_over_runs(pairs)))
                )
    if not rows:
        return []
    return [
        filled_table(
            caption=f"Differences to {groups[0].name}, paired by seed: mean over the seeds that both have.",
            headings=_HEADINGS,
            rows=tuple(rows),
        )
    ]


def _groups(facts: Sequence[RunFacts]) -> list[_Group]:
    """The runs by their configs without the seed, in their order. Of one seed twice, the last run counts."""
    found: dict[str, dict[int, RunFacts]] = {}
    for each in facts:
        config, seed = each.registered.config, each.registered.config.get(_SEED)
        if type(seed) is int:
            others = {key: value for key, value in config.items() if key not in _OWN_KEYS}
            found.setdefault(json.dumps(others, sort_keys=True), {})[seed] = each
    differing = differing_keys(
        [each.registered for runs in found.values() for each in runs.values()]
    )
    keys = [key for key in differing if key not in _OWN_KEYS]
    return [
        _Group(name=_name(runs, keys), by_seed={seed: _scores(run) for seed, run in runs.items()})
        for runs in found.values()
    ]


def _name(runs: Mapping[int, RunFacts], keys: Sequence[str]) -> str:
    """What tells the runs from those of other configs; their labels where nothing does."""
    config = next(iter(runs.values())).registered.config
    words = [f"{key} {value_text(config[key])}" for key in keys if key in config]
    return ", ".join(words) or ", ".join(each.label for each in runs.values())


def _scores(facts: RunFacts) -> dict[ScoreKey, float]:
    """The newest value of each score of a run."""
    scores: dict[ScoreKey, float] = {}
    for monitored in monitor_scores(facts):
        scores[f"last {monitored.score}", monitored.network, monitored.protocol] = monitored.last
    newest = sorted(result_scores(facts), key=lambda each: each.result.content["step"])
    for score in newest:
        key = (f"{score.result.score}, {score.metric}", score.result.network, score.result.protocol)
        scores[key] = score.value
    return scores
