"""`peerlearn linear`: linear classifiers on exported networks, and fine-tuning."""

from collections.abc import Sequence
from pathlib import Path

from linear_eval.config import LinearConfig
from peerlearn.config import config_to_yaml, parse_config
from peerlearn.evaluation.selection import select_runs

SHIPPED = Path(__file__).parent / "configs"
_TITLES = {
    "sgd": "linear probe",
    "logistic_regression": "logistic regression",
    "finetune": "fine-tuning",
}


def main(argv: Sequence[str]) -> int:
    """`peerlearn linear [CONFIG] --checkpoint RUN ... [--key value ...]`. Returns the exit code."""
    config, dry_run = parse_config(
        LinearConfig,
        argv,
        verb="linear",
        description="Train a linear classifier on exported networks, or fine-tune them, and score it on test images.",
        example="peerlearn linear logistic_regression --checkpoint runs/demo",
        shipped=SHIPPED,
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    selections = select_runs(config.checkpoints(), config.network)
    # Imported here: a wrong key should not wait for torch.
    from linear_eval.evaluate import evaluate
    from peerlearn.compute.dist import joined_ranks
    from peerlearn.evaluation.score_table import report_scores

    with joined_ranks(config.device) as ranks:
        found = [evaluate(config, selection, ranks) for selection in selections]
        if ranks.main:
            report_scores(
                found,
                {"top-1": "top1", "calibration error": "calibration_error"},
                title=f"{_TITLES[config.method]}, accuracy (%)",
                folder=Path(config.results or "results"),
            )
    return 0
