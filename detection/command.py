"""`peerlearn detect`: detectors trained on exported networks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection import show
from detection.class_table import show_classes
from detection.config import DetectConfig
from peerlearn.evaluation import training_run
from peerlearn.evaluation.evaluator import Evaluator, run
from peerlearn.evaluation.results import Score, mean_over_runs
from peerlearn.evaluation.score_table import Column, Runs, metric_column
from peerlearn.evaluation.selection import Selection
from peerlearn.runs.export_folders import detector_in

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks

SHIPPED = Path(__file__).parent / "configs"


def _score(config: DetectConfig, selection: Selection, ranks: "Ranks") -> Iterator[Score]:
    # Imported here: a wrong key should not wait for torch.
    from detection.evaluate import score

    return score(config, selection, ranks)


def _preview(config: DetectConfig) -> list[str]:
    """The scaled learning rate and steps, and the images; those of the miniature are only written by a training."""
    trains = not all(detector_in(Path(each)) for each in config.checkpoints())
    lines = [config.scaling()] if trains else []
    if config.data.name == "mini_voc":
        return lines
    from detection.data import read_data, read_test_images

    if not trains:
        test = read_test_images(config.data)
        return [f"{test.title}: {len(test):,} images to score on"]
    data = read_data(config.data)
    images = f"{len(data.train):,} images to learn from and {len(data.test):,} to score on"
    return [*lines, f"{data.train.title}: {images}"]


def _column(heading: str, metric: str) -> Column:
    """An average precision, with its deviation over the trials of one run or over several runs."""
    over_runs = metric_column(heading, metric)

    def cell(runs: Runs) -> str:
        text = over_runs.cell(runs)
        std = runs[0].get(f"{metric}_std")
        return text if std is None or len(runs) > 1 else f"{text} +- {std:.2f}"

    return over_runs._replace(cell=cell)


def _show_classes(result: Mapping[str, Any]) -> None:
    ap50, objects = (result["metrics"][f"per_class_{name}"] for name in ("ap50", "objects"))
    show_classes(
        list(ap50),
        list(objects.values()),
        [math.nan if value is None else value for value in ap50.values()],
        title=f"AP50 (%) by class, rule {result['protocol']['rule']}",
    )


DETECT = Evaluator(
    verb="detect",
    config=DetectConfig,
    score=_score,
    columns=[_column("AP", "ap"), _column("AP50", "ap50"), _column("AP75", "ap75")],
    title=lambda config: f"detection, average precision (%), rule {config.chosen_rule}",
    description="Train Faster R-CNN on exported networks and score it, as transfer to Pascal VOC is measured. "
    "`peerlearn detect show IMAGES --checkpoint DETECTOR` draws what a trained detector finds in your own images.",
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
    preview=_preview,
    details=_show_classes,
)
resume = partial(training_run.resume, DETECT)


def main(argv: Sequence[str]) -> int:
    """`peerlearn detect [CONFIG] --checkpoint ...` and `peerlearn detect show IMAGE ...`. Returns the exit code."""
    return show.main(argv[1:]) if argv[:1] == ["show"] else run(DETECT, argv)
