"""Supervised training of a cohort: cross-entropy, contrastive terms within the batch, and peers' class probabilities.

Dimensions: M networks, B batch, D embedding size, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peerlearn.counter_random import NUM_NEGATIVES, random_bits
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import sampler_of
from peerlearn.data.recipes import Augmentation
from peerlearn.data.sampler import Sampler
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.evaluation.results import CLASSIFICATION, is_sound_result
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.score_names import score_name
from pretrain.accuracy import AccuracyMonitor
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.distill import (
    cl_ilr_by_network,
    dml_by_network,
    ensemble_teaching_by_network,
    ensemble_weights,
    okddip_by_network,
    one_by_network,
    ramp,
    vanilla_by_network,
)
from pretrain.exchange import Exchange
from pretrain.final_accuracy import write_final_accuracy
from pretrain.finite import require_finite
from pretrain.gates import scale_gradient
from pretrain.losses import MCLTerms, batch_terms_by_network
from pretrain.method import Method, Watch
from pretrain.terms import SupervisedTerms
from pretrain.training_data import TrainingData

# The ensemble's weights that are reported move slowly, by every so many training batches.
_WEIGHTS_EVERY_STEPS = 10
_WEIGHTS_MOMENTUM = 0.9
_FADED_IN = ("cl_ilr", "one", "okddip")


class Supervised(Method):
    """``L = L_vanilla + L_MCL + L_teaching`` (the paper, Eq. 10), each part as the config asks.

    Attributes:
        ensemble_weights: theta of Eq. 9, (M,) or (M, C) float32 on the CPU: a moving average over training batches.
    """

    views = 1
    labels = "classified"

    def __init__(
        self, cohort: Cohort, config: PretrainConfig, exchange: Exchange, *, steps_per_epoch: int
    ) -> None:
        super().__init__(cohort, config, exchange, steps_per_epoch=steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        networks = config.cohort.networks
        classes = cohort.get_parameter("classifiers.0.weight").shape[0]
        shape = (networks, classes) if config.supervised.weights_per_class else (networks,)
        self.ensemble_weights = torch.full(shape, 1 / networks)
        self._fresh_weights: Tensor | None = None
        self._step = 0

    @classmethod
    def sampler(cls, config: PretrainConfig, dataset: ImageDataset) -> Sampler:
        """Batches of the class-aware sampler (the paper, section 3.3), unless the config has them shuffled."""
        return sampler_of(
            dataset,
            batch_size_global=config.batch_size,
            seed=config.seed,
            images_per_class=config.supervised.images_per_class,
        )

    @classmethod
    def check(cls, config: PretrainConfig, data: TrainingData) -> None:
        """Make sure that every anchor has as many negatives as are to be drawn.

        Raises:
            UserError: it has not.
        """
        asked, m = config.supervised.num_negatives, config.supervised.images_per_class
        if asked is None or m is None or data.train.labels is None:
            return
        classes = len(data.train.labels.unique())
        largest = m * math.ceil(config.batch_size / m / classes)
        if asked > config.batch_size - largest:
            raise UserError(
                f"supervised.num_negatives {asked}: in a batch of {config.batch_size} images of {classes} classes an "
                f"anchor may have only {config.batch_size - largest} negatives: lower it, or raise batch_size"
            )

    def begin_step(self, step: int) -> None:
        """Nothing moves but the cohort itself."""
        self._step = step

    def terms(self, views: tuple[Tensor, ...], labels: Tensor | None) -> SupervisedTerms:
        """The terms of one batch, one view (B, channels, S, S) of each image and their labels (B,)."""
        assert labels is not None
        (images,) = views
        trunk = self.cohort.trunk(images)
        # CL-ILR: the trunk hears the mean of its heads, not their sum.
        shrunk = self.config.supervised.teaching == "cl_ilr"
        heard = scale_gradient(trunk, 1 / self.config.cohort.networks) if shrunk else trunk
        features = self.cohort.branches(heard)
        # What the ranks do together comes first: a check that fails on one of them must not keep the others waiting.
        logits = self.exchange.part(self.cohort.classify(features))
        mixing = self._mixing(trunk, features)
        whole_labels = self.exchange.labels(labels)
        together = self._logits_of_all_ranks(logits.detach(), whole_labels)
        contrastive = self._contrast(features, whole_labels)
        own_labels = self.exchange.own_part(whole_labels[None])[0]
        require_finite("cross_entropy", "logits", logits)
        self._fresh_weights = self._solve(together)
        return SupervisedTerms(
            *contrastive,
            vanilla_by_network(logits, own_labels),
            self._teach(logits, own_labels, mixing),
        )

    def _contrast(self, features: list[Tensor], labels: Tensor) -> MCLTerms:
        """The four contrastive terms of the global batch, with its labels; empty ones where none trains."""
        config = self.config
        if not config.contrastive:
            nothing = features[0].new_zeros(0, dtype=torch.float32)
            return MCLTerms(nothing, nothing, nothing, nothing)
        generator = torch.Generator()
        generator.manual_seed(int(random_bits(NUM_NEGATIVES, config.seed, self._step)))
        return batch_terms_by_network(
            self.exchange.whole(self.cohort.embed(features)),
            labels,
            temperature=config.temperature,
            soft_temperature=config.soft_temperature,
            same_sample_positive=config.same_sample_positive,
            num_negatives=_at_most(config.supervised.num_negatives, labels),
            generator=generator,
        )

    def _mixing(self, trunk: Tensor, features: list[Tensor]) -> Tensor | None:
        """What ONE and OKDDip mix logits by."""
        if self.cohort.gate is None:
            return None
        one = self.config.supervised.teaching == "one"
        mixing: Tensor = self.cohort.gate(trunk if one else torch.stack(features[:-1]))
        return mixing

    def _logits_of_all_ranks(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Logits (M, B, C) of the global batch, with its labels; None where this step needs no ensemble weights."""
        needed = self.config.supervised.teaching == "ensemble_teaching"
        if len(logits) == 1 or not (needed or self._step % _WEIGHTS_EVERY_STEPS == 0):
            return None
        return self.ranks.gather(logits, dim=1), labels

    def _solve(self, together: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Eq. 9 over the global batch."""
        if together is None:
            return None
        return ensemble_weights(*together, per_class=self.config.supervised.weights_per_class)

    def _teach(self, logits: Tensor, labels: Tensor, mixing: Tensor | None) -> Tensor:
        """(M,): what each network learns from its peers' logits; (0,) if nothing."""
        supervised = self.config.supervised
        # What the config leaves open is the method's own.
        settings: dict[str, Any] = {}
        if supervised.teaching_temperature is not None:
            settings["temperature"] = supervised.teaching_temperature
        if supervised.detach_teacher is not None and supervised.teaching != "ensemble_teaching":
            settings["detach"] = supervised.detach_teacher
        if supervised.teaching in _FADED_IN:
            settings["weight"] = self.teaching_weight
        match supervised.teaching:
            case "dml":
                return dml_by_network(logits, **settings)
            case "ensemble_teaching":
                return ensemble_teaching_by_network(
                    logits, labels, weights=self._fresh_weights, **settings
                )
            case "cl_ilr":
                return cl_ilr_by_network(logits, **settings)
            case "one":
                assert mixing is not None
                return one_by_network(logits, mixing, labels, **settings)
            case "okddip":
                assert mixing is not None
                return okddip_by_network(logits, mixing, **settings)
        return logits.new_zeros(0)

    @property
    def teaching_weight(self) -> float:
        """w(t) of the methods that fade their teaching in, t in whole epochs; 1 for the others."""
        if self.config.supervised.teaching not in _FADED_IN:
            return 1.0
        return ramp(self._step // self._steps_per_epoch, self.config.supervised.ramp_epochs)

    def end_step(self) -> None:
        """Let the reported weights follow those of this batch."""
        if self._fresh_weights is not None and self._step % _WEIGHTS_EVERY_STEPS == 0:
            fresh = self._fresh_weights.to("cpu", torch.float32)
            self.ensemble_weights.lerp_(fresh, 1 - _WEIGHTS_MOMENTUM)
        self.drop_step()

    def drop_step(self) -> None:
        """Forget the step's weights."""
        self._fresh_weights = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the cohort."""
        return {"ensemble": {"weights": self.ensemble_weights}}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        self.ensemble_weights.copy_(state["ensemble"]["weights"])

    def build_monitor(
        self, data: TrainingData, *, augmentation: Sequence[Augmentation], image_size: int
    ) -> Watch:
        """Accuracy on what is held out or, where nothing is, on the test split."""
        monitor = AccuracyMonitor(
            self.config, data, image_size=image_size, device=self.ranks.device
        )
        return lambda untrained: monitor.measure(self.cohort, self.ensemble_weights)

    def results(self, training: Any) -> dict[str, ClassificationScores]:
        """The accuracies of the last epoch, in result files."""
        return write_final_accuracy(training, self.ensemble_weights)

    @classmethod
    def lacks_results(cls, run: RunDirectory) -> bool:
        """Whether there is no result file (any more), or one is damaged."""
        files = list(run.results.glob(f"{CLASSIFICATION}-*.json"))
        return not files or not all(map(is_sound_result, files))

    def metrics(self) -> dict[str, float]:
        """How the reported ensemble weighs its networks (the mean over classes), and how much teaching counts."""
        row = {}
        if len(self.ensemble_weights) > 1:
            means = self.ensemble_weights.view(len(self.ensemble_weights), -1).mean(1)
            row = {
                score_name(m, "ensemble_weight"): weight for m, weight in enumerate(means.tolist())
            }
        if self.config.supervised.teaching != "none":
            row["teaching_weight"] = self.teaching_weight
        return row


def _at_most(num_negatives: int | None, labels: Tensor) -> int | None:
    """As many negatives as every anchor of the batch has: the substitute of an unreadable image may be of another class
    than the image, and leave fewer than the sampler promises."""
    if num_negatives is None:
        return None
    return min(num_negatives, len(labels) - int(labels.bincount().max()))
