"""The divergence by which networks learn from each other's distributions, exact where they nearly agree."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_kl(teacher: Tensor, student: Tensor, soft_temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` per row, with gradient to the student only.

    Args:
        teacher, student: (..., N) logits. soft_temperature: T.

    Returns:
        (...) divergences, never negative, exact to a few units in the last place even where T squared
        multiplies a tiny divergence (large T, or peers that nearly agree).
    """
    value: Tensor = _SoftKL.apply(teacher, student, soft_temperature)
    return value


class _SoftKL(torch.autograd.Function):
    """The textbook sum p (log p - log q) loses all digits once p and q are close. With u = log(q / p),
    sum_k p (e^u - 1 - u) is the same sum without a term that cancels."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, soft_temperature: float) -> Tensor:
        log_p = F.log_softmax(teacher / soft_temperature, -1)
        p = log_p.exp()
        difference = (student - teacher) / soft_temperature
        u = difference - torch.logsumexp(log_p + difference, -1, keepdim=True)
        # Beyond e^30 the student's probability is computed directly: expm1 would overflow.
        bounded = u.clamp(max=30.0)
        near = u < 30.0
        q = F.softmax(student / soft_temperature, -1)
        value = torch.where(near, p * exp_minus_1_minus(bounded), q - p - p * u)
        gap = torch.where(near, p * torch.expm1(bounded), q - p)
        # q - p sums to 0. What is left is the rounding of the logsumexp, common to all candidates.
        gap = gap - p * gap.sum(-1, keepdim=True)
        ctx.save_for_backward(gap * soft_temperature)
        return value.sum(-1) * soft_temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (student_gradient,) = ctx.saved_tensors
        return None, grad.unsqueeze(-1) * student_gradient, None


def exp_minus_1_minus(u: Tensor) -> Tensor:
    """e^u - 1 - u, by its Taylor series where the subtraction would cancel."""
    v = u.clamp(-0.1, 0.1)
    series = torch.full_like(v, 1 / 362880)
    for factorial in (40320, 5040, 720, 120, 24, 6, 2):
        series = series * v + 1 / factorial
    return torch.where(u.abs() < 0.1, v * v * series, torch.expm1(u) - u)
