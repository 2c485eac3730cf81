"""Keeping what is not finite out of the networks, and out of what is saved.

A step whose losses or gradients hold NaN or Inf is skipped, on all ranks alike: weights, optimiser, queue and
batch-norm statistics stay as they were before it. Too many in a row mean that training has diverged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.cohort import Cohort
from pretrain.losses import NonFiniteError
from pretrain.terms import Terms


class DivergedError(Exception):
    """Too many steps in a row were skipped.

    Attributes:
        first_step: the first of them, counted from 0.
    """

    def __init__(self, message: str, first_step: int) -> None:
        super().__init__(message)
        self.first_step = first_step


class StepGuard:
    """Remembers the buffers of before a step, and counts the steps that were skipped.

    Attributes:
        skipped: how many since the start of the run.
        in_a_row: how many of them since the last good step.
    """

    def __init__(self, modules: Sequence[nn.Module], *, max_skipped_in_a_row: int) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._remembered = [torch.empty_like(buffer) for buffer in self._buffers]
        self._max_in_a_row = max_skipped_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the batch-norm statistics of before the step."""
        torch._foreach_copy_(self._remembered, self._buffers)

    @torch.no_grad()
    def skip(self, step: int, reason: str) -> None:
        """Undo what the forward passes of this step did to the buffers, and count it.

        Raises:
            DivergedError: as many steps in a row were skipped as are allowed.
        """
        torch._foreach_copy_(self._buffers, self._remembered)
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self._max_in_a_row:
            raise DivergedError(
                f"{self.in_a_row} steps in a row gave NaN or Inf, the last at step {step}: {reason}",
                first_step=step + 1 - self.in_a_row,
            )

    def passed(self) -> None:
        """The step was good."""
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, plain values."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def checked_terms(compute: Callable[[], Terms]) -> tuple[Terms | None, str | None]:
    """The (M,) terms of a batch, or None and which term of which network is not finite."""
    try:
        terms = compute()
    except NonFiniteError as error:
        return None, str(error)
    finite = torch.isfinite(torch.cat([term.detach() for term in terms]))
    if bool(finite.all()):
        return terms, None
    names = [
        f"{n} of network {m}"
        for n, t in zip(terms._fields, terms, strict=True)
        for m in range(len(t))
    ]
    return None, f"{names[int((~finite).nonzero()[0])]} is not finite"


def gradient_fault(cohort: Cohort) -> str | None:
    """Which network's gradient is not finite, if any."""
    for m in range(len(cohort.backbones)):
        for name, part in cohort.parts(m):
            if not _finite([p.grad for p in part.parameters() if p.grad is not None]):
                return f"the gradient of network {m}'s {name} is not finite"
    if cohort.gate is not None and not _finite(
        [p.grad for p in cohort.gate.parameters() if p.grad is not None]
    ):
        return "the gradient of the gate is not finite"
    return None


def require_finite_weights(cohort: Cohort) -> None:
    """Make sure that nothing poisoned is saved or exported.

    Raises:
        NonFiniteError: a parameter or a batch-norm statistic holds NaN or Inf.
    """
    for name, tensor in (*cohort.named_parameters(), *cohort.named_buffers()):
        if not _finite([tensor.detach()]):
            raise NonFiniteError(
                f"{name} holds NaN or Inf: lower base_lr, and look at the losses in metrics.jsonl"
            )


def _finite(tensors: Sequence[Tensor]) -> bool:
    # A norm is NaN or Inf if an element is; foreach makes few kernels of many tensors.
    norms = torch._foreach_norm([t.float() for t in tensors], float("inf"))
    return bool(torch.isfinite(torch.stack(norms)).all()) if norms else True
