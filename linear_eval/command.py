"""`peerlearn linear`: linear classifiers on exported networks, and fine-tuning."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from linear_eval.config import LinearConfig
from peerlearn.evaluation import training_run
from peerlearn.evaluation.evaluator import Evaluator, run
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.score_table import ACCURACY_COLUMNS, metric_column
from peerlearn.evaluation.selection import Selection

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks

SHIPPED = Path(__file__).parent / "configs"
_TITLES = {
    "sgd": "linear probe",
    "logistic_regression": "logistic regression",
    "finetune": "fine-tuning",
}


def _score(config: LinearConfig, selection: Selection, ranks: "Ranks") -> Iterator[Score]:
    # Imported here: a wrong key should not wait for torch.
    from linear_eval.evaluate import score

    return score(config, selection, ranks)


LINEAR = Evaluator(
    verb="linear",
    config=LinearConfig,
    score=_score,
    columns=(*ACCURACY_COLUMNS, metric_column("calibration error", "calibration_error")),
    title=lambda config: f"{_TITLES[config.method]}, accuracy (%)",
    description="Train a linear classifier on exported networks, or fine-tune them, and score it on test images.",
    example="peerlearn linear logistic_regression --checkpoint runs/demo",
    essential=(
        *("checkpoint", "network", "method", "epochs", "batch_size", "base_lr", "penalties_c"),
        *("device", "results", "data.name", "data.root", "data.limit", "data.validation_images"),
        *("data.shots", "data.train_percent", "data.workers"),
    ),
    shipped=SHIPPED,
)
main = partial(run, LINEAR)
resume = partial(training_run.resume, LINEAR)
