"""The queue form of the mutual contrastive losses in passes over tiles of the queue: no (B, K) is held for all pairs.

Dimensions: M networks, B anchors, K queue rows, D embedding size, t queue rows of one tile. A row of logits is named
[c, a]: candidates of network c, anchor of network a.

With logits x = cosine / tau and the soft temperature T, the soft logits are y = x / T. One pass over the queue sums,
for every row, exp(x), exp(y) and, weighted by exp(y), its difference to the row that it teaches. From these follow

    -log P[1] = log sum exp(x) - x[1]        KL(p || q) = log Z_q - log Z_p + sum exp(y_p) (y_p - y_q) / Z_p

Backward makes a second pass: the gradient of a tile's logits, of the terms as they are weighted from above, times the
tile's queue rows. The few positives are computed apart, in float64.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peerlearn.compute.device import full_float32
from pretrain.finite import require_finite
from pretrain.soft_kl import exp_minus_1_minus

# Logits up to this size need no shift: neither an exponential nor a sum of them leaves float32.
_SAFE_LOGIT = 40.0
# From this T on the moments' rounding times T squared would show in the divergences.
_LARGE_SOFT_TEMPERATURE = 4.0
# What a pass works on: logits or their gradient, exponentials, products.
_BUFFERS = 3
_LARGEST_PASS_BYTES = 2**22

Row = tuple[int, int]


class Form(NamedTuple):
    """How the terms are computed.

    Attributes:
        temperature: tau.
        soft_temperature: T.
        same_sample_positive: whether the anchor's own sample is a candidate of its peers.
        tile_bytes: memory for tiles in bytes. If the exponentials of all tiles fit, they are kept for backward, unless
            the temperature is so small that they have to be shifted.
    """

    temperature: float
    soft_temperature: float
    same_sample_positive: bool
    tile_bytes: int

    @property
    def base(self) -> float:
        """The divisor of x in the exponential that is taken. It loses no digits in the powers that give the others."""
        return max(self.soft_temperature, 1.0)

    @property
    def soft_power(self) -> float:
        """The power of that exponential that is exp(y). That of exp(x) is ``base``."""
        return self.base / self.soft_temperature


def flat_queue_terms(query: Tensor, key: Tensor, rows: Tensor, form: Form) -> Tensor:
    """The four terms of each network, (4, M), in the order of `MCLTerms`. ``query`` alone gets a gradient.

    Args:
        query: (M, B, D) float32 or float64, L2-normalised.
        key: (M, B, D) alike.
        rows: (M, K, D) floating; the queue rows that exist.
        form: how.

    Raises:
        NonFiniteError: the queue rows hold NaN or Inf.
        RuntimeError: in backward: ``key`` or ``rows`` has been changed since, or a second derivative is asked for.
    """
    terms: Tensor = _FlatTerms.apply(query, key.detach(), rows.detach(), form)
    return terms


class _FlatTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor, form: Form) -> Tensor:
        sums = _Sums(query, key, rows, form)
        keeps = ctx.needs_input_grad[0] and sums.shift is None and _fits(query, rows, form)
        kept: list[Tensor] = []
        work = _Work(query, rows, form)
        for tile in work.tiles():
            logits = work.logits(tile)
            exponentials = torch.empty_like(logits) if keeps else work.buffer(1, logits)
            sums.add(logits, exponentials, work.buffer(2, logits))
            if keeps:
                kept.append(exponentials)
        ctx.save_for_backward(query, key, rows)
        ctx.sums, ctx.form, ctx.kept = sums, form, kept
        return sums.terms().to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the flat loss can be differentiated once, and create_graph asks for more: take backend='reference'"
            )
        query, key, rows = ctx.saved_tensors
        sums, form, kept = ctx.sums, ctx.form, ctx.kept
        with full_float32(query.device):
            weights = _Weights(grad, sums)
            result = weights.of_positives(query, key)
            flat = result.view(-1, result.shape[-1])
            work = _Work(query, rows, form)
            for number, tile in enumerate(work.tiles()):
                if kept:
                    exponentials = kept[number]
                    out = work.buffer(0, exponentials)
                else:
                    out = work.logits(tile)
                    exponentials = sums.exponentials(out, work.buffer(1, out))
                gradient = weights.of_logits(exponentials, out)
                for network, own in enumerate(rows[:, tile]):
                    flat.addmm_(gradient[network].flatten(0, 1), own.to(flat.dtype))
        return result.div_(form.temperature), None, None, None


def _fits(query: Tensor, rows: Tensor, form: Form) -> bool:
    networks, batch, _ = query.shape
    return networks**2 * batch * rows.shape[1] * query.element_size() <= form.tile_bytes


class _Work:
    """The tiles of the queue, and the buffers that one after another of them is worked on in."""

    def __init__(self, query: Tensor, rows: Tensor, form: Form) -> None:
        networks, batch, _ = query.shape
        self._shape = (networks, networks, batch)
        self._rows = rows
        self._query = query.flatten(0, 1) / (form.temperature * form.base)
        per_row = _BUFFERS * networks**2 * batch * query.element_size()
        self._size = max(min(form.tile_bytes, _LARGEST_PASS_BYTES) // max(per_row, 1), 1)
        self._size = min(self._size, max(rows.shape[1], 1))
        elements = networks**2 * batch * self._size
        self._buffers = [query.new_empty(elements if rows.shape[1] else 0) for _ in range(_BUFFERS)]

    def tiles(self) -> Iterator[slice]:
        total = self._rows.shape[1]
        for first in range(0, total, self._size):
            yield slice(first, min(first + self._size, total))

    def logits(self, tile: slice) -> Tensor:
        """x / base of a tile: (M, M, B, t), in the first buffer."""
        networks, _, batch = self._shape
        width = tile.stop - tile.start
        logits = self._buffers[0][: networks**2 * batch * width].view(*self._shape, width)
        for network, own in enumerate(self._rows[:, tile]):
            out = logits[network].view(networks * batch, width)
            torch.mm(self._query, own.to(self._query.dtype).T, out=out)
        return logits

    def buffer(self, number: int, like: Tensor) -> Tensor:
        return self._buffers[number][: like.numel()].view_as(like)


class _Sums:
    """Sums over the candidates of every row of logits, in float64.

    Attributes:
        shift: (M, M, B), subtracted from x / base before exponentials are taken; None if nothing is.
        hard, soft: (M, M, B), sums of exp(x) and of exp(y).
        moment: (P, 2, B), for each of the P pairs of rows that teach each other, and for either as the teacher: the sum
            of its exp(y) times (y of the teacher - y of the student) / soft_power.
        excess: (P, 2, B), the sum of its exp(y) times e^u - 1 - u, u = y of the student - y of the teacher; None for
            small T.
    """

    def __init__(self, query: Tensor, key: Tensor, rows: Tensor, form: Form) -> None:
        self.form = form
        self.networks, self.batch, _ = query.shape
        scale = 1 / (form.temperature * form.base)
        self.positive = scale * torch.einsum("abd,cbd->cab", query.double(), key.double())
        same = scale * torch.einsum("abd,cbd->cab", query.double(), query.double())
        own = torch.eye(self.networks, dtype=torch.bool, device=query.device).unsqueeze(-1)
        # Any finite logit will do where anchor and candidate are one.
        self.same = torch.where(own, self.positive, same)
        networks = range(self.networks)
        self.pairs: list[tuple[Row, Row]] = [
            *(((m, m), (peer, peer)) for m, peer in itertools.combinations(networks, 2)),
            *(((c, a), (a, c)) for c, a in itertools.combinations(networks, 2)),
        ]
        zeros = torch.zeros_like(self.positive)
        self.hard, self.soft = zeros, zeros.clone()
        self.moment = zeros.new_zeros(len(self.pairs), 2, self.batch)
        large = form.soft_temperature > _LARGE_SOFT_TEMPERATURE
        self.excess = torch.zeros_like(self.moment) if large else None
        bound = _largest_cosine(query, key, rows) / form.temperature
        is_safe = bound / min(form.soft_temperature, 1.0) <= _SAFE_LOGIT
        self.shift = None if is_safe else self.positive.to(query.dtype)
        self.add(*self._extra(self.positive))
        if form.same_sample_positive:
            self.add(*self._extra(self.same), where=self.is_cross())

    def is_cross(self) -> Tensor:
        """(M, M, 1, 1): 1 where anchor and candidates are of two networks."""
        own = torch.eye(self.networks, dtype=torch.float64, device=self.positive.device)
        return (1 - own)[:, :, None, None]

    @staticmethod
    def _extra(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = logits.unsqueeze(-1)
        return one, torch.empty_like(one), torch.empty_like(one)

    def exponentials(self, logits: Tensor, out: Tensor) -> Tensor:
        """exp(x / base - shift)."""
        if self.shift is not None:
            logits = torch.sub(logits, self.shift.unsqueeze(-1).to(logits.dtype), out=out)
        return torch.exp(logits, out=out)

    def exp_y(self, taken: Tensor) -> Tensor:
        """The exponentials of soft logits, from those that were taken."""
        return taken if self.form.soft_power == 1 else taken**self.form.soft_power

    def add(
        self, logits: Tensor, out: Tensor, products: Tensor, where: Tensor | None = None
    ) -> None:
        """Add candidates: logits (M, M, B, t), whose exponentials are left in ``out``."""
        if self.shift is not None:
            self._shift_to(torch.maximum(self.shift, logits.amax(-1).to(self.shift.dtype)))
        taken = self.exponentials(logits, out)
        if where is not None:
            taken.mul_(where)
        soft = self.exp_y(taken)
        self.soft += soft.sum(-1)
        for number, (p, q) in enumerate(self.pairs):
            difference = torch.sub(logits[p], logits[q], out=products[0, 0])
            self.moment[number, 0] += _dots(soft[p], difference)
            self.moment[number, 1] -= _dots(soft[q], difference)
            if self.excess is not None:
                difference = difference * self.form.soft_power
                self.excess[number, 0] += _dots(soft[p], exp_minus_1_minus(-difference))
                self.excess[number, 1] += _dots(soft[q], exp_minus_1_minus(difference))
        self.hard += _sum_of_powers(taken, self.form.base, products)

    def _shift_to(self, shift: Tensor) -> None:
        assert self.shift is not None
        factor = (self.shift.double() - shift.double()).exp()
        self.shift = shift
        self.hard *= factor**self.form.base
        factor = factor**self.form.soft_power
        self.soft *= factor
        teachers = [torch.stack([factor[p], factor[q]]) for p, q in self.pairs]
        for table in (self.moment, self.excess):
            if table is not None and teachers:
                table *= torch.stack(teachers)

    def terms(self) -> Tensor:
        """(4, M)."""
        form, shift = self.form, 0.0 if self.shift is None else self.shift.double()
        log_hard = self.hard.log() + form.base * shift
        log_soft = self.soft.log() + form.soft_power * shift
        own = log_hard - form.base * self.positive
        cross = own.clone()
        if form.same_sample_positive:
            cross += log_hard - form.base * self.same
        terms = torch.zeros(4, self.networks, dtype=torch.float64, device=self.hard.device)
        terms[0] = own.diagonal().mean(0)
        terms[2] = cross.mean(-1).sum(0) - cross.diagonal().mean(0)
        for number, pair in enumerate(self.pairs):
            for direction, (teacher, student) in enumerate((pair, pair[::-1])):
                mean = form.soft_power * self.moment[number, direction] / self.soft[teacher]
                divergence = log_soft[student] - log_soft[teacher] + mean
                if self.excess is not None:
                    excess = self.excess[number, direction] / self.soft[teacher]
                    gain = excess - mean
                    near = excess - (gain - torch.log1p(gain))
                    divergence = torch.where(gain.abs() < 0.5, near, divergence)
                kind = 1 if student[0] == student[1] else 3
                terms[kind, student[1]] += form.soft_temperature**2 * divergence.mean()
        return terms


class _Weights:
    """The coefficients by which exponentials add up to the gradient of the logits x, of terms weighted from above.

    Attributes:
        hard, soft: (M, M, B), of exp(x) and of exp(y) of a row itself.
        taught: (P, 2, B), of exp(y) of the teacher, for each pair of rows and either as the teacher.
    """

    def __init__(self, grad: Tensor, sums: _Sums) -> None:
        self._sums = sums
        form, networks, batch = sums.form, sums.networks, sums.batch
        scl_hard, scl_soft, icl_hard, icl_soft = grad.double() / batch
        own = torch.eye(networks, dtype=torch.bool, device=grad.device)
        positives = 2 if form.same_sample_positive else 1
        # What every positive's own log-probability weighs.
        self.positive = torch.where(own, scl_hard, icl_hard).unsqueeze(-1)
        self.hard = torch.where(own, scl_hard, positives * icl_hard).unsqueeze(-1) / sums.hard
        learns = form.soft_temperature * torch.where(own, (networks - 1) * scl_soft, icl_soft)
        self.soft = learns.unsqueeze(-1) / sums.soft
        self.taught = torch.zeros_like(sums.moment)
        for number, pair in enumerate(sums.pairs):
            for direction, (teacher, student) in enumerate((pair, pair[::-1])):
                weight = (scl_soft if student[0] == student[1] else icl_soft)[student[1]]
                self.taught[number, direction] = form.soft_temperature * weight / sums.soft[teacher]

    def of_logits(self, taken: Tensor, out: Tensor) -> Tensor:
        """The gradient of the logits of candidates whose exponentials were taken: (M, M, B, t), in ``out``."""
        form = self._sums.form
        hard, soft, taught = (
            table.unsqueeze(-1).to(taken.dtype) for table in (self.hard, self.soft, self.taught)
        )
        exp_y = self._sums.exp_y(taken)
        if form.base == 1 and form.soft_power == 1:
            torch.mul(taken, hard + soft, out=out)
        elif form.base == 3:
            torch.mul(taken, taken, out=out).mul_(hard).add_(soft).mul_(taken)
        else:
            torch.pow(taken, form.base, out=out).mul_(hard).addcmul_(exp_y, soft)
        for number, (p, q) in enumerate(self._sums.pairs):
            out[q].addcmul_(exp_y[p], taught[number, 0], value=-1)
            out[p].addcmul_(exp_y[q], taught[number, 1], value=-1)
        return out

    def of_positives(self, query: Tensor, key: Tensor) -> Tensor:
        """The gradient of tau times ``query`` from the positives alone: (M, B, D)."""
        sums = self._sums

        def gradient(logits: Tensor, where: Tensor) -> Tensor:
            one = logits.unsqueeze(-1)
            taken = sums.exponentials(one, torch.empty_like(one)) * where
            of_softmax = self.of_logits(taken, torch.empty_like(taken)).squeeze(-1)
            return of_softmax - self.positive * where.squeeze(-1)

        everywhere, cross = torch.ones_like(sums.is_cross()), sums.is_cross()
        result = torch.einsum("cab,cbd->abd", gradient(sums.positive, everywhere), key.double())
        if sums.form.same_sample_positive:
            same = gradient(sums.same, cross)
            # It pulls on both networks.
            result += torch.einsum("cab,cbd->abd", same + same.transpose(0, 1), query.double())
        return result.to(query.dtype).contiguous()


def _largest_cosine(query: Tensor, key: Tensor, rows: Tensor) -> float:
    """An upper bound of all products, 1 for unit vectors; and the look for NaN and Inf, which shows in the lengths."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=query.dtype)
    require_finite("scl_hard", "queue", lengths.unsqueeze(-1))
    if query.device.type != "cpu":
        return 1.0  # As promised. To look would wait for the device.
    own, others = query.norm(dim=-1).max(), key.norm(dim=-1).max()
    longest = torch.maximum(own, others)
    if lengths.numel():
        longest = torch.maximum(longest, lengths.max())
    return float(own * longest)


def _sum_of_powers(tensor: Tensor, exponent: float, products: Tensor) -> Tensor:
    if exponent == 1:
        return tensor.sum(-1)
    if exponent == 2:
        return _dots(tensor, tensor)
    if exponent == 3:
        return _dots(torch.mul(tensor, tensor, out=products), tensor)
    return torch.pow(tensor, exponent, out=products).sum(-1)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The inner products of the last dimension, without a product of full size."""
    flat = torch.bmm(left.reshape(-1, 1, left.shape[-1]), right.reshape(-1, right.shape[-1], 1))
    return flat.view(left.shape[:-1])
