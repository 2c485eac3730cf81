"""Linear classifiers trained by SGD, many at once on the same features.

A head costs its share of one wide matrix product, so that a sweep over learning rates takes about as long as one of
them wherever features have to be computed by a network. The gradient of softmax cross-entropy is written out.

Dimension letters: H heads, B batch, D feature dimensions, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peerlearn.compute.device import full_float32
from peerlearn.counter_random import INITIAL_WEIGHTS, random_bits

# Of the initial weights; biases start at 0 (MoCo, main_lincls.py).
_INITIAL_STD = 0.01


class LinearHeads:
    """H classifiers that differ in their learning rates and, with the same start, learn side by side.

    Attributes:
        weight: (D, H, C), of normal distribution with deviation 0.01 at the start, the same for every head.
        bias: (H, C), 0 at the start.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        lrs: Sequence[float],
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, features)))
        start = _INITIAL_STD * torch.randn((features, 1, classes), generator=generator)
        self.weight = start.repeat(1, len(lrs), 1).to(device)
        self.bias = torch.zeros((len(lrs), classes), device=device)
        self._velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._lrs = torch.tensor(lrs, device=device).view(-1, 1)
        self._momentum, self._weight_decay, self._nesterov = momentum, weight_decay, nesterov

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) to (B, H, C)."""
        with full_float32(features.device):
            flat: Tensor = torch.addmm(self.bias.flatten(), features, self.weight.flatten(1))
        logits: Tensor = flat.unflatten(1, self.bias.shape)
        return logits

    def step(self, features: Tensor, labels: Tensor, *, factor: float) -> Tensor:
        """One step of SGD for every head.

        Args:
            features: (B, D) float32.
            labels: (B,) integers below C.
            factor: where the schedule stands; a head's learning rate is its own times this.

        Returns:
            (H,) mean cross-entropy of each head, before the step. A head that diverges does not touch the others.
        """
        log_probabilities = self.logits(features).log_softmax(dim=-1)
        target = labels.view(-1, 1, 1).expand(-1, len(self.bias), 1)
        loss = -log_probabilities.gather(2, target).squeeze(2).mean(0)
        # The gradient at the logits, softmax - one-hot, over B.
        error = log_probabilities.exp_()
        error.scatter_add_(2, target, error.new_full((), -1.0).expand(target.shape))
        error /= len(features)
        with full_float32(features.device):
            weight_gradient = (features.T @ error.flatten(1)).unflatten(1, self.bias.shape)
        gradients = (weight_gradient, error.sum(0))
        for parameter, gradient, velocity in zip(
            (self.weight, self.bias), gradients, self._velocity, strict=True
        ):
            if self._weight_decay:
                gradient.add_(parameter, alpha=self._weight_decay)
            velocity.mul_(self._momentum).add_(gradient)
            update = gradient.add_(velocity, alpha=self._momentum) if self._nesterov else velocity
            parameter.sub_(update * (self._lrs * factor))
        return loss
