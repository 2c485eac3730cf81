"""Passes over tiles of the logits: the sums of every row, and the gradient of them, in torch operations.

Dimensions: M networks, B anchors, N candidates, D embedding size. A tile is of b anchors and t candidates of every
network; its logits are (M, M, b, t), [c, a] as in `pretrain.row_sums`.

Every operation runs through memory that a CPU's cache holds and that the next tile takes over.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pretrain.row_sums import Form, RowSums, Weights, pairs_of_rows
from pretrain.soft_kl import exp_minus_1_minus

# What is worked on: logits or their gradient, exponentials, products.
_BUFFERS = 3
_LARGEST_TILE_BYTES = 2**23
# Matrix products are fastest at this width, and a sixth slower at one that no 64 divides. Tiles of few anchors are made
# wider, to this many logits, for operations are called once per tile.
_WIDTH, _WIDTH_STEP, _FEW_LOGITS = 320, 64, 2**18

# Sets the logits of what is no candidate, in a tile of these anchors and candidates, to a large negative number.
Exclude = Callable[[Tensor, slice, slice], None]


class Tiles:
    """The logits of M x B anchors and M x N candidates, tile by tile, and the memory they are worked on in.

    Args:
        query: (M, B, D) anchors, float32 or float64.
        rows: (M, N, D) candidates, floating.
        exclude: marks what is no candidate; None excludes nothing.

    Attributes:
        can_keep: whether the exponentials of all logits fit in ``form.tile_bytes``.
    """

    def __init__(
        self, query: Tensor, rows: Tensor, form: Form, exclude: Exclude | None = None
    ) -> None:
        networks, batch, _ = query.shape
        total = rows.shape[1]
        self.query, self.rows, self.form = query, rows, form
        self._exclude = exclude
        per_logit = networks**2 * query.element_size()
        self.can_keep = per_logit * batch * total <= form.tile_bytes
        logits = min(form.tile_bytes, _LARGEST_TILE_BYTES) // (_BUFFERS * per_logit)
        self._height = max(min(batch, logits // _WIDTH), 1)
        width = min(
            logits // self._height, max(_WIDTH, _FEW_LOGITS // (networks**2 * self._height))
        )
        width -= width % _WIDTH_STEP if width > _WIDTH_STEP else 0
        self._width = max(min(width, total), 1)
        elements = networks**2 * self._height * self._width
        self._buffers = [query.new_empty(elements) for _ in range(_BUFFERS)]

    def anchors(self) -> Iterator[slice]:
        return _slices(self.query.shape[1], self._height)

    def candidates(self) -> Iterator[slice]:
        return _slices(self.rows.shape[1], self._width)

    def scaled(self, anchors: slice) -> Tensor:
        """(M * b, D): the factor of `logits` that is one for all candidates."""
        scale = 1 / (self.form.temperature * self.form.base)
        return (self.query[:, anchors] * scale).flatten(0, 1)

    def logits(self, scaled: Tensor, anchors: slice, candidates: slice) -> Tensor:
        """x / base of a tile, in the first buffer."""
        networks = len(self.rows)
        width = candidates.stop - candidates.start
        flat = self._buffers[0][: networks * len(scaled) * width]
        logits = flat.view(networks, networks, -1, width)
        for network, own in enumerate(self.rows[:, candidates]):
            torch.mm(scaled, own.to(scaled.dtype).T, out=logits[network].view(-1, width))
        if self._exclude is not None:
            self._exclude(logits, anchors, candidates)
        return logits

    def buffer(self, number: int, like: Tensor) -> Tensor:
        return self._buffers[number][: like.numel()].view_as(like)


def sum_rows(tiles: Tiles, sums: RowSums, *, keep: bool) -> tuple[RowSums, list[Tensor]]:
    """Add all candidates to the sums.

    Returns:
        The sums, and the exponentials of each tile if they are to be kept.
    """
    kept: list[Tensor] = []
    blocks: list[RowSums] = []
    for anchors in tiles.anchors():
        block = RowSums(*(None if each is None else each[..., anchors] for each in sums))  # type: ignore[arg-type]
        scaled = tiles.scaled(anchors)
        for candidates in tiles.candidates():
            logits = tiles.logits(scaled, anchors, candidates)
            taken = torch.empty_like(logits) if keep else tiles.buffer(1, logits)
            block = add_candidates(block, tiles.form, logits, taken, tiles.buffer(2, logits))
            if keep:
                kept.append(taken)
        blocks.append(block)
    fields = zip(*blocks, strict=True)
    return RowSums(*(None if each[0] is None else torch.cat(each, -1) for each in fields)), kept  # type: ignore[arg-type]


def add_candidates(
    sums: RowSums, form: Form, logits: Tensor, taken: Tensor, products: Tensor
) -> RowSums:
    """Add candidates with the logits x / base; ``taken`` is filled with their exponentials."""
    if sums.shift is not None:
        sums = _shifted(sums, form, torch.maximum(sums.shift, logits.amax(-1).double()))
    exponentials(sums.shift, logits, taken)
    soft = _power(taken, form.soft_power)
    sums.soft.add_(soft.sum(-1))
    space = products.flatten(0, 1)
    number = 0
    for (p, q), (soft_p, soft_q) in zip(_paired(logits), _paired(soft), strict=True):
        numbers = slice(number, number + len(q))
        number += len(q)
        difference, product = space[: len(q)], space[-len(q) :]
        torch.sub(p, q, out=difference)
        sums.moment[numbers, 0] += torch.mul(soft_p, difference, out=product).sum(-1)
        sums.moment[numbers, 1] -= torch.mul(soft_q, difference, out=product).sum(-1)
        if sums.excess is not None:
            difference.mul_(form.soft_power)
            sums.excess[numbers, 0] += (soft_p * exp_minus_1_minus(-difference)).sum(-1)
            sums.excess[numbers, 1] += (soft_q * exp_minus_1_minus(difference)).sum(-1)
    sums.hard.add_(_power(taken, form.base, out=products).sum(-1))
    return sums


def exponentials(shift: Tensor | None, logits: Tensor, out: Tensor) -> Tensor:
    """exp(x / base - shift)."""
    if shift is not None:
        logits = torch.sub(logits, shift.unsqueeze(-1).to(logits.dtype), out=out)
    return torch.exp(logits, out=out)


def add_gradient(
    tiles: Tiles,
    sums: RowSums,
    weights: Weights,
    kept: list[Tensor],
    of_query: Tensor,
    of_rows: Tensor | None,
) -> None:
    """Add the gradients of tau times the anchors (M, B, D) and, if wanted, of tau times the candidates (M, N, D)."""
    stored = iter(kept)
    for anchors in tiles.anchors():
        own_weights = Weights(*(each[..., anchors] for each in weights))
        shift = None if sums.shift is None else sums.shift[..., anchors]
        scaled, query = tiles.scaled(anchors), tiles.query[:, anchors].flatten(0, 1)
        block = torch.zeros_like(scaled)
        for candidates in tiles.candidates():
            if kept:
                taken = next(stored)
                out = tiles.buffer(0, taken)
            else:
                out = tiles.logits(scaled, anchors, candidates)
                taken = exponentials(shift, out, tiles.buffer(1, out))
            gradient_of_logits(own_weights, tiles.form, taken, out)
            for network, own in enumerate(tiles.rows[:, candidates]):
                gradient = out[network].view(len(block), -1)
                block.addmm_(gradient, own.to(gradient.dtype))
                if of_rows is not None:
                    of_rows[network, candidates].addmm_(gradient.T, query)
        of_query[:, anchors] += block.view(len(of_query), -1, block.shape[-1])


def gradient_of_logits(weights: Weights, form: Form, taken: Tensor, out: Tensor) -> Tensor:
    """The gradient of the logits x of candidates whose exponentials were taken, in ``out``."""
    hard, soft, taught = (table.unsqueeze(-1).to(taken.dtype) for table in weights)
    soft_taken = _power(taken, form.soft_power)
    if form.base == 1 and form.soft_power == 1:
        torch.mul(taken, hard + soft, out=out)
    elif form.base == 3:
        torch.mul(taken, taken, out=out).mul_(hard).add_(soft).mul_(taken)
    else:
        torch.pow(taken, form.base, out=out).mul_(hard).addcmul_(soft_taken, soft)
    number = 0
    for (p, q), (soft_p, soft_q) in zip(_paired(out), _paired(soft_taken), strict=True):
        numbers = slice(number, number + len(q))
        number += len(q)
        q.addcmul_(soft_p, taught[numbers, 0], value=-1)
        if len(p) == len(q):
            p.addcmul_(soft_q, taught[numbers, 1], value=-1)
            continue
        for teacher, weight in zip(soft_q, taught[numbers, 1], strict=True):
            p[0].addcmul_(teacher, weight, value=-1)
    return out


def _shifted(sums: RowSums, form: Form, shift: Tensor) -> RowSums:
    """The same sums relative to another shift."""
    assert sums.shift is not None
    factor = (sums.shift - shift).exp()
    soft = factor**form.soft_power
    pairs = pairs_of_rows(len(shift))
    teachers = torch.stack([torch.stack([soft[p], soft[q]]) for p, q in pairs]) if pairs else 1.0
    return RowSums(
        shift,
        sums.hard * factor**form.base,
        sums.soft * soft,
        sums.moment * teachers,
        None if sums.excess is None else sums.excess * teachers,
    )


def _paired(table: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows of `pairs_of_rows` in a table (M, M, ...), in that order, as views.

    Pairs of one first network are taken together: one row or n rows, and the n rows that they teach.
    """
    networks = range(len(table) - 1)
    own = table.flatten(0, 1)[:: len(table) + 1]
    return [
        *((own[m : m + 1], own[m + 1 :]) for m in networks),
        *((table[m, m + 1 :], table[m + 1 :, m]) for m in networks),
    ]


def _power(tensor: Tensor, exponent: float, out: Tensor | None = None) -> Tensor:
    """``tensor`` itself for 1."""
    if exponent == 1:
        return tensor
    if exponent == 3:
        return torch.mul(tensor, tensor, out=out).mul_(tensor)
    return torch.pow(tensor, exponent, out=out)


def _slices(total: int, length: int) -> Iterator[slice]:
    for first in range(0, total, length):
        yield slice(first, min(first + length, total))
