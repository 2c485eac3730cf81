"""Scores over runs that differ by their seed alone, and paired differences where the seeds pair.

Runs enter one mean at the same step alone, or each at the step that its validation chose.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peerlearn.commands.runs_table import differing_keys, value_text
from peerlearn.errors import UserError
from peerlearn.evaluation.results import OF_TRAINING
from peerlearn.evaluation.uncertainty import spread_over_runs
from peerlearn.report.parts import Cell, Part
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.run_results import protocol_text
from peerlearn.report.scores import ResultScore, monitor_scores, result_scores
from peerlearn.report.tables import filled_table
from peerlearn.runs.export_log import chosen_step

_SEED = "seed"
# Keys in which runs of one kind may differ.
_OWN_KEYS = (_SEED, "run")

# What was measured, of which network, and how.
ScoreKey = tuple[str, str, str]
# The step of a score, or that its run's validation chose it: the step may differ from seed to seed then.
Moment = int | None
_CHOSEN = None


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A score of a run at a moment.

    Attributes:
        value: value of the score.
        step: step of the score.
        protocol: how it was measured, in words.
    """

    value: float
    step: int
    protocol: str


_Scores = Mapping[ScoreKey, Mapping[Moment, _Value]]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Runs of one config.

    Attributes:
        name: what tells it from the other groups.
        labels: label of the run of each seed.
        by_seed: scores of the run of each seed.
    """

    name: str
    labels: Mapping[int, str]
    by_seed: Mapping[int, _Scores]

    def values(self, key: ScoreKey) -> dict[int, Mapping[Moment, _Value]]:
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
        _mean_row(group, key, protocols)
        for key in keys
        for group in several
        if len(group.values(key)) > 1
    )
    parts: list[Part] = []
    if means:
        parts.append(
            filled_table(
                caption="Means over runs that differ by their seed alone, at the same step or each at the one that its "
                "validation chose. Left out: runs without the score at that step. Std: the sample's. Half of 95 %: "
                "half the width of the mean's interval by Student's t, none of two runs.",
                headings=_HEADINGS,
                rows=means,
            )
        )
    return [*parts, *_differences(several, keys, protocols)]


_HEADINGS = (
    *("runs", "score", "network", "protocol", "step"),
    *("mean", "std", "half of 95 %", "n (seeds)", "seeds", "left out"),
)


def _mean_row(group: _Group, key: ScoreKey, protocols: Mapping[str, str]) -> tuple[Cell, ...]:
    values = group.values(key)
    moment = _shared_moment(values.values())
    entered = {seed: found[moment] for seed, found in values.items() if moment in found}
    if len(entered) < 2:
        entered = {}
    return (
        *_key_cells(group, key, list(entered.values()), protocols),
        *_spread_cells([each.value for each in entered.values()]),
        _seeds_text(entered),
        _left_out(group, values, entered),
    )


def _shared_moment(found: Iterable[Mapping[Moment, _Value]]) -> Moment:
    """The moment of most runs: of several, the one that validation chose, else the newest."""
    counts = Counter(moment for each in found for moment in each)
    return max(counts, key=lambda each: (counts[each], math.inf if each is _CHOSEN else each))


def _key_cells(
    group: _Group, key: ScoreKey, values: Sequence[_Value], protocols: Mapping[str, str]
) -> tuple[Cell, ...]:
    score, network, _ = key
    names = dict.fromkeys(name for each in values if (name := protocols.get(each.protocol)))
    steps = list(dict.fromkeys(each.step for each in values))
    step: Cell = None
    if steps:
        step = steps[0] if len(steps) == 1 else f"chosen: {', '.join(f'{n:,}' for n in steps)}"
    return group.name, score, network, ", ".join(names) or None, step


def _seeds_text(seeds: Iterable[int]) -> str | None:
    return ", ".join(map(str, sorted(seeds))) or None


def _left_out(
    group: _Group, values: Mapping[int, Mapping[Moment, _Value]], entered: Iterable[int]
) -> str | None:
    """The runs that have the score and did not enter, with the steps of theirs."""
    told = []
    for seed in [seed for seed in values if seed not in set(entered)]:
        steps = sorted({each.step for each in values[seed].values()})
        told.append(f"{group.labels[seed]} (step {', '.join(f'{step:,}' for step in steps)})")
    return ", ".join(told) or None


def _spread_cells(values: Sequence[float]) -> tuple[float | None, float | None, float | None, int]:
    if not values:
        return None, None, None, 0
    spread = spread_over_runs(values)
    # Of two runs it is 25 standard errors wide, and says nothing.
    half = spread.ci95 if spread.runs > 2 and math.isfinite(spread.ci95) else None
    return spread.mean, spread.std, half, spread.runs


def _differences(
    groups: Sequence[_Group], keys: Sequence[ScoreKey], protocols: Mapping[str, str]
) -> list[Part]:
    rows = [
        row
        for key in keys
        for group in groups[1:]
        if (row := _difference_row(groups[0], group, key, protocols)) is not None
    ]
    if not rows:
        return []
    return [
        filled_table(
            caption=f"Differences to {groups[0].name}, paired by seed: mean over the seeds that both have, at the same "
            "step or each at the one that its validation chose. Left out: runs without such a pair.",
            headings=_HEADINGS,
            rows=tuple(rows),
        )
    ]


def _difference_row(
    baseline: _Group, group: _Group, key: ScoreKey, protocols: Mapping[str, str]
) -> tuple[Cell, ...] | None:
    """The row of a group; None where fewer than two seeds have the score in both groups."""
    first, own = baseline.values(key), group.values(key)
    both = [seed for seed in own if seed in first]
    if len(both) < 2:
        return None
    shared = [{m: v for m, v in own[seed].items() if m in first[seed]} for seed in both]
    pairs: dict[int, tuple[_Value, _Value]] = {}
    if any(shared):
        moment = _shared_moment(shared)
        pairs = {
            seed: (own[seed][moment], first[seed][moment])
            for seed, found in zip(both, shared, strict=True)
            if moment in found
        }
    if len(pairs) < 2:
        pairs = {}
    left_out = [_left_out(each, each.values(key), pairs) for each in (baseline, group)]
    return (
        *_key_cells(group, key, [each for pair in pairs.values() for each in pair], protocols),
        *_spread_cells([value.value - base.value for value, base in pairs.values()]),
        _seeds_text(pairs),
        ", ".join(filter(None, left_out)) or None,
    )


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
        _Group(
            name=_name(runs, keys),
            labels={seed: run.label for seed, run in runs.items()},
            by_seed={seed: _scores(run) for seed, run in runs.items()},
        )
        for runs in found.values()
    ]


def _name(runs: Mapping[int, RunFacts], keys: Sequence[str]) -> str:
    """What tells the runs from those of other configs; their labels where nothing does."""
    config = next(iter(runs.values())).registered.config
    words = [f"{key} {value_text(config[key])}" for key in keys if key in config]
    return ", ".join(words) or ", ".join(each.label for each in runs.values())


def _scores(facts: RunFacts) -> _Scores:
    """The scores of a run by their moments: of those while training, the newest finite value."""
    scores: dict[ScoreKey, dict[Moment, _Value]] = {}
    for each in monitor_scores(facts):
        value = _Value(value=each.last, step=each.last_step, protocol=each.protocol)
        scores[f"last {each.score}", each.network, each.protocol] = {each.last_step: value}
    for key, moment, value in _result_values(facts):
        scores.setdefault(key, {})[moment] = value
    return scores


def _result_values(facts: RunFacts) -> Iterator[tuple[ScoreKey, Moment, _Value]]:
    # A spoilt `best` is told where exports are looked for.
    best = None
    with contextlib.suppress(UserError):
        best = chosen_step(facts.run)
    for each in sorted(result_scores(facts), key=lambda each: each.result.content["step"]):
        step, is_chosen = each.result.content["step"], _is_chosen(each, best)
        protocol = each.result.content["protocol"]
        if is_chosen:
            # The epoch differs from seed to seed, and the runs are alike nonetheless.
            protocol = {k: v for k, v in protocol.items() if k not in OF_TRAINING}
        score = f"{each.result.score}, {each.metric}"
        key = (score, each.result.network, protocol_text(protocol))
        value = _Value(value=each.value, step=step, protocol=each.result.protocol)
        yield key, step, value
        if is_chosen:
            yield key, _CHOSEN, value


def _is_chosen(score: ResultScore, best: int | None) -> bool:
    """Whether a run's validation chose the epoch of a score: by its step ``best``, or by its protocol."""
    content = score.result.content
    return content["step"] == best or "validation" in str(
        content["protocol"].get("epoch_chosen_by", "")
    )
