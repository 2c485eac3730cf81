"""Tables of scores: of each run and network, and over runs that differ by their seed alone."""

from collections.abc import Sequence

from peerlearn.report.parts import Part, Section, Table
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.scores import monitor_scores, result_scores
from peerlearn.report.seeds import seed_tables


def score_section(facts: Sequence[RunFacts]) -> Section:
    """The scores with their baselines, their uncertainty and how they were measured."""
    parts: list[Part] = [*_results(facts), *_monitored(facts), *seed_tables(facts)]
    return Section(anchor="scores", title="Scores", parts=tuple(parts))


def _monitored(facts: Sequence[RunFacts]) -> list[Part]:
    rows = tuple(
        (
            *(each.label, score.score, score.network, score.untrained, score.pixels, score.last),
            *(score.standard_error, score.last_step, score.best, score.best_step, score.protocol),
        )
        for each in facts
        for score in monitor_scores(each)
    )
    if not rows:
        return []
    return [
        Table(
            caption="Accuracies while training, in %. Untrained: step 0. S.e.: standard error over the test images. "
            "The best of several epochs is chosen by the images that it is measured on, and so looks better than it "
            "is; the last is not chosen.",
            headings=(
                *("run", "score", "network", "untrained", "raw pixels", "last"),
                *("s.e. of last", "step", "best", "best step", "protocol"),
            ),
            rows=rows,
        )
    ]


def _results(facts: Sequence[RunFacts]) -> list[Part]:
    rows = tuple(
        (
            *(each.label, score.result.score, score.result.network, score.metric, score.value),
            *(score.low, score.high, score.result.content["metrics"].get("n")),
            *(score.result.content["step"], _seed_text(score.result.content.get("seed"))),
            score.result.protocol,
        )
        for each in facts
        for score in result_scores(each)
    )
    if not rows:
        return []
    return [
        Table(
            caption="Results of the evaluators. Low and high: 95 % interval of the score, over its n test images or "
            "few-shot episodes, or over runs where the seed is a list.",
            headings=(
                *("run", "score", "network", "metric", "value", "low", "high", "n", "step"),
                *("seed", "protocol"),
            ),
            rows=rows,
        )
    ]


def _seed_text(seed: object) -> str | int | None:
    return seed if isinstance(seed, int | None) else str(seed)
