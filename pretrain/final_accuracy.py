"""The accuracies of a supervised run's last epoch, as result files. Dimensions: M networks, N images, C classes."""

import time
from functools import partial
from typing import Any

from torch import Tensor

from peerlearn.data.augment import EVALUATION_VIEW
from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.evaluation.results import CLASSIFICATION, Score, write_score
from peerlearn.export import export_hash
from peerlearn.runs.export_folders import network_folder
from peerlearn.runs.score_names import ENSEMBLE, WEIGHTED_ENSEMBLE
from peerlearn.runs.step_folders import step_folder
from pretrain.accuracy import cohort_logits, score_cohort
from pretrain.distill import ensemble_weights
from pretrain.state import Training


def write_final_accuracy(training: Training, weights: Tensor) -> dict[str, ClassificationScores]:
    """Measure the last epoch's networks on the whole test split and write a result file of each score.

    Neither an epoch nor a network is chosen by it. The weighted ensemble's theta is solved on the held-out images
    where there are any, else it is the moving average of training.

    Args:
        training: of the method supervised, at its last step, exported.
        weights: (M,) or (M, C), training's own theta.

    Raises:
        UserError: the folder of result files cannot be written.
    """
    start = time.monotonic()
    config, data, cohort = training.config, training.data, training.cohort
    assert data.test is not None
    measured = partial(
        cohort_logits,
        cohort,
        image_size=training.images.image_size,
        config=config,
        device=training.device,
    )
    if data.validation is not None and len(cohort.backbones) > 1:
        weights = ensemble_weights(
            *measured(data.validation), per_class=config.supervised.weights_per_class
        )
    scores = score_cohort(*measured(data.test), weights)
    seconds = time.monotonic() - start
    exports = training.run.exports / step_folder(training.step)
    names = map(str, range(len(cohort.backbones)))
    hashes = {name: export_hash(exports / network_folder(name)) for name in names}
    for network, each in scores.items():
        score = Score(
            network=network,
            dataset=data.test.title,
            metrics=each.metrics(),
            protocol=_protocol(training, network),
        )
        write_score(
            score,
            training.run.results,
            task=CLASSIFICATION,
            step=training.step,
            hashes=hashes,
            seed=config.seed,
            seconds=seconds,
        )
    return scores


def _protocol(training: Training, network: str) -> dict[str, Any]:
    """Under what a network's, or an ensemble's, final accuracy is measured."""
    config, data = training.config, training.data
    protocol = {
        "split": "test",
        "view": EVALUATION_VIEW,
        "image_size": training.images.image_size,
        "epoch": config.epochs,
        "epoch_chosen_by": "the config: the last",
        "train_split": data.train.split,
        "train_images": len(data.train),
    }
    if network == ENSEMBLE:
        protocol["ensemble"] = "mean of logits"
    elif network == WEIGHTED_ENSEMBLE:
        per_class = ", per class" if config.supervised.weights_per_class else ""
        protocol["ensemble"] = f"logits weighted by theta of Eq. 9{per_class}"
        protocol["theta_from"] = (
            "training batches, moving average"
            if data.validation is None
            else f"{len(data.validation)} held-out images"
        )
    return protocol
