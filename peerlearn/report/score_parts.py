"""Tables of scores: of each run and network, and over runs that differ by their seed alone."""

from collections.abc import Mapping, Sequence

from peerlearn.report.parts import Part, Section, Table
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.scores import MonitorScore, ResultScore, monitor_scores, result_scores
from peerlearn.report.seeds import seed_tables
from peerlearn.report.tables import filled_table


def score_section(facts: Sequence[RunFacts]) -> Section:
    """The scores with their baselines, their uncertainty and how they were measured."""
    monitored = [score for each in facts for score in monitor_scores(each)]
    results = [score for each in facts for score in result_scores(each)]
    # Protocols are long. Each stands once, and scores name it.
    texts = [*(each.result.protocol for each in results), *(each.protocol for each in monitored)]
    protocols = {
        text: f"P{n}" for n, text in enumerate(dict.fromkeys(filter(None, texts)), start=1)
    }
    parts: list[Part] = []
    if results:
        parts.append(_results(results, protocols))
    if monitored:
        parts.append(_monitored(monitored, protocols))
    parts += seed_tables(facts, protocols)
    if protocols:
        parts.append(
            Table(
                caption="Protocols: how the scores were measured.",
                headings=("protocol", "how"),
                rows=tuple((name, text) for text, name in protocols.items()),
            )
        )
    return Section(anchor="scores", title="Scores", parts=tuple(parts))


def _monitored(scores: Sequence[MonitorScore], protocols: Mapping[str, str]) -> Table:
    given = dict.fromkeys(each.facts.label for each in scores if each.facts.starts_from_weights)
    told = f"At step 0: {', '.join(given)} started from weights." if given else "Untrained: step 0."
    return filled_table(
        caption=f"Accuracies while training. {told} S.e.: standard error over the n images of the protocol. The best "
        "of several epochs is chosen by the images that it is measured on, and so looks better than it is; the last "
        "is not chosen.",
        headings=(
            *("run", "score", "network", "at step 0" if given else "untrained", "raw pixels"),
            *("last", "s.e. of last", "step", "remark", "best", "best step", "protocol"),
        ),
        rows=tuple(
            (
                *(each.facts.label, each.score, each.network, each.at_step_0, each.pixels),
                *(each.last, each.standard_error, each.last_step, _remark(each)),
                *(each.best, each.best_step, protocols.get(each.protocol)),
            )
            for each in scores
        ),
    )


def _remark(score: MonitorScore) -> str | None:
    if score.skipped_step is None:
        return None
    return f"newest finite value; that of step {score.skipped_step:,} is not finite"


def _results(scores: Sequence[ResultScore], protocols: Mapping[str, str]) -> Table:
    return filled_table(
        caption="Results of the evaluators. Low and high: 95 % interval of the score, over its n test images or "
        "few-shot episodes, or over runs where the seed is a list; none of two runs.",
        headings=(
            *("run", "score", "network", "metric", "value", "low", "high", "n", "step"),
            *("seed", "protocol"),
        ),
        rows=tuple(
            (
                *(each.facts.label, each.result.score, each.result.network, each.metric),
                *(each.value, each.low, each.high, each.result.content["metrics"].get("n")),
                *(each.result.content["step"], _seed_text(each.result.content.get("seed"))),
                protocols.get(each.result.protocol),
            )
            for each in scores
        ),
    )


def _seed_text(seed: object) -> str | int | None:
    return seed if isinstance(seed, int | None) else str(seed)
