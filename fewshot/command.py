"""`peerlearn fewshot`: how well exported networks tell classes apart by few images of each."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from fewshot.config import FewShotConfig
from peerlearn.evaluation.evaluator import Evaluator, run
from peerlearn.evaluation.results import Score, mean_over_runs
from peerlearn.evaluation.score_table import ci95_column
from peerlearn.evaluation.selection import Selection

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks


def _score(config: FewShotConfig, selection: Selection, ranks: "Ranks") -> Iterator[Score]:
    # Imported here: a wrong key should not wait for torch.
    from fewshot.evaluate import score

    return score(config, selection, ranks)


def _title(config: FewShotConfig) -> str:
    # Of several runs the caption says what the interval is over.
    over = ", 95 % interval over episodes" if len(config.checkpoints()) == 1 else ""
    return f"few-shot accuracy (%){over}"


FEWSHOT = Evaluator(
    verb="fewshot",
    config=FewShotConfig,
    score=_score,
    columns=[ci95_column("accuracy", "accuracy", "accuracy_ci95")],
    title=_title,
    description="Score exported networks by few-shot episodes: classes told apart by few images of each.",
    example="peerlearn fewshot --checkpoint runs/demo --ways 5 --shots 1 5 --episodes 600",
    essential=(
        *("checkpoint", "network", "ways", "shots", "queries", "episodes", "distance", "features"),
        *("device", "results", "data.name", "data.root", "data.split", "data.base_split"),
    ),
    average=partial(mean_over_runs, names=["accuracy"]),
)
main = partial(run, FEWSHOT)
