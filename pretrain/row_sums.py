"""What a softmax over many candidates and its peers come to, from sums that need not hold the logits.

Dimensions: M networks, B anchors, P = M (M - 1) pairs of rows that teach each other. A row of logits is named [c, a]:
candidates of network c, anchor of network a.

With logits x = cosine / tau and the soft temperature T, the soft logits are y = x / T. One exponential of each logit is
taken, exp(x / base); exp(x) and exp(y) are powers of it. Their sums over a row give

    log sum exp(x)        KL(p || q) = log Z_q - log Z_p + sum exp(y_p) (y_p - y_q) / Z_p
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

Row = tuple[int, int]
TILE_BYTES = 2**24
# Logits up to this size need no shift: neither an exponential nor a sum of them leaves float32.
_SAFE_LOGIT = 40.0
# From this T on the moments' rounding times T squared would show in the divergences.
_LARGE_SOFT_TEMPERATURE = 4.0


class Form(NamedTuple):
    """How rows are computed.

    Attributes:
        temperature: tau.
        soft_temperature: T.
        tile_bytes: memory for tiles of logits in bytes.
        in_triton: whether the passes are Triton kernels.
    """

    temperature: float
    soft_temperature: float
    tile_bytes: int = TILE_BYTES
    in_triton: bool = False

    @property
    def base(self) -> float:
        """The divisor of x in the exponential that is taken. It loses no digits in the powers that give the others."""
        return max(self.soft_temperature, 1.0)

    @property
    def soft_power(self) -> float:
        """The power of that exponential that is exp(y). That of exp(x) is ``base``."""
        return self.base / self.soft_temperature

    @property
    def has_excess(self) -> bool:
        """Whether divergences need the sums of `RowSums.excess`."""
        return self.soft_temperature > _LARGE_SOFT_TEMPERATURE

    @property
    def is_safe(self) -> bool:
        """Whether the logits of unit vectors can do without a shift."""
        return 1 / self.temperature / min(self.soft_temperature, 1.0) <= _SAFE_LOGIT


def pairs_of_rows(networks: int) -> list[tuple[Row, Row]]:
    """The rows that teach each other: M (M - 1) / 2 pairs of distributions P, then as many of Q."""
    return [
        *(((m, m), (peer, peer)) for m, peer in itertools.combinations(range(networks), 2)),
        *(((c, a), (a, c)) for c, a in itertools.combinations(range(networks), 2)),
    ]


class RowSums(NamedTuple):
    """Sums over the candidates of every row, float64.

    Attributes:
        shift: (M, M, B), subtracted from x / base before exponentials are taken; None if nothing is.
        hard, soft: (M, M, B), sums of exp(x) and of exp(y).
        moment: (P, 2, B), for each pair of rows and for either as the teacher: the sum of the teacher's exp(y) times
            (y of the teacher - y of the student) / soft_power.
        excess: (P, 2, B), the sum of the teacher's exp(y) times e^u - 1 - u, u = y of the student - y of the teacher;
            None for small T.
    """

    shift: Tensor | None
    hard: Tensor
    soft: Tensor
    moment: Tensor
    excess: Tensor | None

    def log_hard(self, form: Form) -> Tensor:
        """log sum exp(x): (M, M, B)."""
        return self.hard.log() + (0.0 if self.shift is None else form.base * self.shift)

    def divergences(self, form: Form) -> Tensor:
        """T^2 KL(teacher || student) for each pair of rows, the first or the second as the teacher: (P, 2, B)."""
        log_soft = self.soft.log()
        if self.shift is not None:
            log_soft += form.soft_power * self.shift
        found = torch.zeros_like(self.moment)
        for number, pair in enumerate(pairs_of_rows(len(self.soft))):
            for direction, (teacher, student) in enumerate((pair, pair[::-1])):
                mean = form.soft_power * self.moment[number, direction] / self.soft[teacher]
                divergence = log_soft[student] - log_soft[teacher] + mean
                if self.excess is not None:
                    excess = self.excess[number, direction] / self.soft[teacher]
                    gain = excess - mean
                    near = excess - (gain - torch.log1p(gain))
                    divergence = torch.where(gain.abs() < 0.5, near, divergence)
                found[number, direction] = form.soft_temperature**2 * divergence
        return found


class Weights(NamedTuple):
    """The coefficients by which exponentials add up to the gradient of the logits x, float64.

    Attributes:
        hard, soft: (M, M, B), of exp(x) and of exp(y) of a row itself.
        taught: (P, 2, B), of exp(y) of the teacher, for each pair of rows and either as the teacher.
    """

    hard: Tensor
    soft: Tensor
    taught: Tensor


def weights_of_exponentials(
    of_log_hard: Tensor, of_divergences: Tensor, sums: RowSums, form: Form
) -> Weights:
    """The weights for a loss with these gradients with respect to `RowSums.log_hard` and `RowSums.divergences`."""
    learns = torch.zeros_like(sums.soft)
    taught = torch.zeros_like(sums.moment)
    for number, pair in enumerate(pairs_of_rows(len(sums.soft))):
        for direction, (teacher, student) in enumerate((pair, pair[::-1])):
            weight = form.soft_temperature * of_divergences[number, direction]
            learns[student] += weight
            taught[number, direction] = weight / sums.soft[teacher]
    return Weights(of_log_hard / sums.hard, learns / sums.soft, taught)
