"""A linear classifier on each network's features, which learns beside it: the online linear probe.

It sees the labels, the networks never do: features reach it without gradient, it draws nothing at random, and it
changes nothing that the networks read. So a run's networks are bit for bit those of the run without it.

Dimensions: M networks, B batch, D features, C classes.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.compute.optimizers import bytes_to_come, load_optimizer_tensors, optimizer_tensors
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.published import is_split_by_class
from peerlearn.runs.score_names import score_name
from pretrain.cohort import Cohort, load_named_state, named_state
from pretrain.training_data import because, is_labelled

# A standardised row has a squared norm of about D, so that the loss has a curvature of at most about D / 2, and SGD
# with momentum 0.9 is stable below 2 (1 + 0.9) / (D / 2) = 7.6 / D, whatever the network. The rate does not decay: the
# features go on changing.
_LEARNING_RATE_TIMES_WIDTH = 3.0
_MOMENTUM = 0.9
# The share of the newest batch in the moving mean and variance.
_STATISTICS_SHARE = 0.1
# Added to the variance of a feature, as a share of the mean variance: one that never varies stays 0.
_SMALLEST_VARIANCE = 1e-5

logger = logging.getLogger(__name__)


def build_probe(
    cohort: Cohort,
    dataset: ImageDataset,
    ranks: Ranks,
    *,
    main: bool = True,
    dtype: torch.dtype = torch.float32,
) -> "OnlineProbe | None":
    """The probe of a cohort that is trained on these images; None where they have no labels, and ``main`` says so."""
    why = None
    if not is_labelled(dataset):
        why = f"{dataset.title} {dataset.split} has not a label for every image{because(dataset)}"
    elif is_split_by_class(dataset.name):
        why = f"the splits of {dataset.title} are of different classes"
    if why is None:
        widths = [int(backbone.num_features) for backbone in cohort.backbones]  # type: ignore[arg-type]
        return OnlineProbe(widths, dataset.num_classes, ranks, here=cohort.here, dtype=dtype)
    if main:
        logger.warning("the linear probe is off: %s", why)
    return None


class OnlineProbe:
    """M linear classifiers, each on the standardised features of its network, trained by SGD.

    Every rank gathers the features of all and takes the same step, so that the classifiers do not depend on the number
    of ranks.

    A step's micro-batches go in by `see`; then comes one call of `step` or `drop_step`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        ranks: Ranks,
        *,
        here: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Begin with weights of 0.

        Args:
            widths: D of each network.
            num_classes: C.
            ranks: the processes that train these networks together.
            here: numbers of the networks that this process trains, as of `Cohort`; None = all.
            dtype: number format of the classifiers, whatever the networks'.
        """
        self._ranks = ranks
        self._classifiers: Any = nn.ModuleList(_Classifier(d, num_classes) for d in widths)
        self._here = range(len(widths)) if here is None else here
        for m, classifier in enumerate(self._classifiers):
            classifier.to(ranks.device if m in self._here else "meta", dtype)
        self._optimizer = torch.optim.SGD(
            [
                {"params": list(each.parameters()), "lr": _LEARNING_RATE_TIMES_WIDTH / d}
                for d, each in zip(widths, self._classifiers, strict=True)
            ],
            lr=0.0,
            momentum=_MOMENTUM,
        )
        self._seen: list[tuple[list[Tensor], Tensor]] = []
        self._losses: Tensor | None = None

    def see(self, features: Sequence[Tensor], labels: Tensor) -> None:
        """Keep every network's features (B, D) of a micro-batch, without gradient, and its labels (B,)."""
        self._seen.append(([each.detach() for each in features], labels))

    def step(self) -> None:
        """Learn from what was seen: one SGD step on the mean cross-entropy over the micro-batches of all ranks."""
        assert self._seen, "a method that is probed encodes its batches by Method.embed"
        labels = self._ranks.gather(torch.cat([labels for _, labels in self._seen]))
        losses = []
        for i, m in enumerate(self._here):
            classifier = self._classifiers[m]
            own = torch.cat([features[i] for features, _ in self._seen]).to(self._weight)
            together = self._ranks.gather(own)
            classifier.follow(together)
            losses.append(F.cross_entropy(classifier(together), labels))
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        self._optimizer.step()
        self._losses = torch.stack(losses).detach()
        self.drop_step()

    def drop_step(self) -> None:
        """Forget what was seen: the step is left out."""
        self._seen.clear()

    def metrics(self) -> dict[str, float]:
        """The cross-entropy of every network's classifier on the newest batch, before it learned from it."""
        if self._losses is None:
            return {}
        losses = zip(self._here, self._losses.tolist(), strict=True)
        return {score_name(m, "linear_loss"): loss for m, loss in losses}

    @torch.no_grad()
    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (M, N, C) on the CPU of every network's features (N, D)."""
        pairs = zip(self._classifiers, features, strict=True)
        return torch.stack([classifier(each.to(self._weight)).cpu() for classifier, each in pairs])

    @property
    def _weight(self) -> Tensor:
        """A weight, whose device and number format are those of the classifiers."""
        weight: Tensor = self._classifiers[self._here[0]].weight
        return weight

    def bytes_to_come(self) -> int:
        """Size of the state that its optimiser will have after the first step."""
        return bytes_to_come(self._optimizer)

    @property
    def module(self) -> nn.Module:
        """The classifiers of all networks, those of other processes on the device "meta"."""
        classifiers: nn.Module = self._classifiers
        return classifiers

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it."""
        return {
            "linear_probe": named_state(self._classifiers),
            "linear_probe_optimizer": optimizer_tensors(self._optimizer),
        }

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        load_named_state(self._classifiers, state["linear_probe"])
        load_optimizer_tensors(self._optimizer, state["linear_probe_optimizer"])


class _Classifier(nn.Module):
    """A linear layer with a bias on features (B, D), standardised by their mean and variance of late."""

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        for name, size in (("mean", width), ("variance", width), ("steps", 1)):
            self.register_buffer(name, torch.zeros(size))

    @torch.no_grad()
    def follow(self, features: Tensor) -> None:
        """Let mean and variance follow those of a batch: their plain average at first, then a moving one."""
        self.steps += 1
        share = (1 / self.steps).clamp_min(_STATISTICS_SHARE)
        variance, mean = torch.var_mean(features, dim=0, correction=0)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)

    def forward(self, features: Tensor) -> Tensor:
        floor = _SMALLEST_VARIANCE * self.variance.mean()
        scale = (self.variance + floor).clamp_min(_SMALLEST_VARIANCE**2).rsqrt()
        return F.linear((features - self.mean) * scale, self.weight, self.bias)
