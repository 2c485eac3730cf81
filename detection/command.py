"""`peerlearn detect`: detectors trained on exported networks."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from detection.config import DetectConfig
from peerlearn.evaluation import training_run
from peerlearn.evaluation.evaluator import Evaluator, run
from peerlearn.evaluation.results import Score, mean_over_runs
from peerlearn.evaluation.score_table import Column, Runs, metric_column
from peerlearn.evaluation.selection import Selection

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks

SHIPPED = Path(__file__).parent / "configs"


def _score(config: DetectConfig, selection: Selection, ranks: "Ranks") -> Iterator[Score]:
    # Imported here: a wrong key should not wait for torch.
    from detection.evaluate import score

    return score(config, selection, ranks)


def _column(heading: str, metric: str) -> Column:
    """An average precision, with its deviation over the trials of one run or over several runs."""
    over_runs = metric_column(heading, metric)

    def cell(runs: Runs) -> str:
        text = over_runs.cell(runs)
        std = runs[0].get(f"{metric}_std")
        return text if std is None or len(runs) > 1 else f"{text} +- {std:.2f}"

    return over_runs._replace(cell=cell)


DETECT = Evaluator(
    verb="detect",
    config=DetectConfig,
    score=_score,
    columns=[_column("AP", "ap"), _column("AP50", "ap50"), _column("AP75", "ap75")],
    title=lambda config: f"detection, average precision (%), rule {config.chosen_rule}",
    description="Train Faster R-CNN on exported networks and score it, as transfer to Pascal VOC is measured.",
    example="peerlearn detect mini_voc --checkpoint runs/demo",
    essential=(
        *("checkpoint", "network", "backbone_weights", "trials", "run", "iterations"),
        *("batch_size", "base_lr", "device", "results", "model.detector", "model.norm"),
        *("data.name", "data.root", "data.train", "data.test", "data.train_percent"),
        "data.workers",
    ),
    shipped=SHIPPED,
    ensembles=False,
    detectors=True,
    average=partial(mean_over_runs, names=["ap", "ap50", "ap75"]),
    preview=lambda config: [config.scaling()],
)
main = partial(run, DETECT)
resume = partial(training_run.resume, DETECT)
