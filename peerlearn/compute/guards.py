"""Keeping NaN and Inf out of the networks and out of saves.

A step whose losses or gradients hold NaN or Inf is skipped, on all ranks alike: weights, optimiser, queue and
batch-norm statistics stay as they were before it. Too many in a row mean that training has diverged.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A tensor holds NaN or Inf. The message names it."""


class DivergedError(Exception):
    """Too many steps in a row were skipped.

    Attributes:
        first_step: number of the first skipped step, from 0.
    """

    def __init__(self, message: str, first_step: int) -> None:
        super().__init__(message)
        self.first_step = first_step


class StepGuard:
    """Keeps a copy of the buffers from before a step, and counts the skipped steps.

    Attributes:
        skipped: number of steps skipped since the start of the run.
        in_a_row: number of steps skipped since the last good one.
    """

    def __init__(self, modules: Sequence[nn.Module], *, max_skipped_in_a_row: int) -> None:
        self._buffers = [b for module in modules for b in module.buffers() if not b.is_meta]
        self._remembered = [torch.empty_like(buffer) for buffer in self._buffers]
        self._max_in_a_row = max_skipped_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the batch-norm statistics before the step."""
        _copy_each(self._remembered, self._buffers)

    @torch.no_grad()
    def skip(self, step: int, reason: str) -> None:
        """Restore the buffers from before this step, and count the step as skipped.

        Raises:
            DivergedError: the allowed number of steps in a row has been skipped.
        """
        _copy_each(self._buffers, self._remembered)
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self._max_in_a_row:
            raise DivergedError(
                f"{self.in_a_row} steps in a row gave NaN or Inf, the last at step {step}: {reason}",
                first_step=step + 1 - self.in_a_row,
            )

    def passed(self) -> None:
        """Note that the step was good."""
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def _copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    # Networks without batch norm may have no buffers, and torch takes no empty list.
    if targets:
        torch._foreach_copy_(targets, sources)


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients of all parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no element of any tensor is NaN or Inf: a bool () on their device, so that nobody waits for it."""
    if not tensors:
        return torch.ones((), dtype=torch.bool)
    # A norm is NaN or Inf if an element is. foreach needs few kernels for many tensors.
    norms = torch._foreach_norm([t.detach().float() for t in tensors], float("inf"))
    return torch.isfinite(torch.stack(norms)).all()


def require_finite_weights(module: nn.Module) -> None:
    """Make sure that only finite weights are saved or exported. Those on the device "meta" lie in another process.

    Raises:
        NonFiniteError: a parameter or a batch-norm statistic holds NaN or Inf.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not (tensor.is_meta or all_finite([tensor])):
            raise NonFiniteError(
                f"{name} holds NaN or Inf: lower base_lr, and look at the losses in metrics.jsonl"
            )
