"""The mutual contrastive losses in passes over tiles of logits: no (B, N) is held for all pairs of networks.

Dimensions: M networks, B anchors, N candidates, D embedding size, E extra candidates of each anchor, P = M (M - 1)
pairs of rows that teach each other. A row of logits is named [c, a]: candidates of network c, anchor of network a.

Forward makes one pass that sums every row (`pretrain.row_sums`), backward a second one: the gradient of a tile's
logits, of the terms as they are weighted from above, times the tile's candidates. Positives need no pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlearn.compute.device import full_float32
from pretrain.finite import require_finite
from pretrain.row_sums import Form, RowSums, pairs_of_rows, weights_of_exponentials
from pretrain.tile_passes import (
    Exclude,
    Tiles,
    add_candidates,
    add_gradient,
    exponentials,
    gradient_of_logits,
    sum_rows,
)

# Stands for "not a candidate". Finite, so that differences of two such logits are 0 and not NaN.
EXCLUDED = -1e9


def flat_queue_terms(
    query: Tensor, key: Tensor, rows: Tensor, form: Form, *, same_sample_positive: bool
) -> Tensor:
    """The four terms of each network by `queue_terms`, (4, M) in the order of `MCLTerms`.

    Args:
        query: (M, B, D) float32 or float64, L2-normalised.
        key: (M, B, D) alike.
        rows: (M, K, D) floating; the queue rows that exist.
        form: how.
        same_sample_positive: whether the anchor's own sample is a candidate of its peers.

    Raises:
        NonFiniteError: the queue rows hold NaN or Inf.
        RuntimeError: in backward: ``key`` or ``rows`` has been changed since, or a second derivative is asked for.
    """
    lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=query.dtype)
    # NaN and Inf show in the lengths.
    require_finite("scl_hard", "queue", lengths.unsqueeze(-1))
    own = torch.eye(len(query), dtype=torch.bool, device=query.device).unsqueeze(-1)
    positive = _products(query, key) / form.temperature
    extra = [positive]
    if same_sample_positive:
        extra.append((_products(query, query) / form.temperature).masked_fill(own, EXCLUDED))
    log_sums, divergences = _Rows.apply(query, rows, torch.stack(extra, -1), form, None)
    hard = torch.stack([log_sums - each for each in extra]).sum(0)
    cross = hard.masked_fill(own, 0.0).mean(-1).sum(0)
    return _stacked((log_sums - positive).diagonal().mean(0), cross, divergences).to(query.dtype)


def flat_batch_terms(
    embedding: Tensor, labels: Tensor, form: Form, *, same_sample_positive: bool
) -> Tensor:
    """The four terms of each network by `batch_terms`, (4, M), all other samples being candidates.

    Args:
        embedding: (M, B, D) float32 or float64, L2-normalised.
        labels: (B,) integer classes.
        form: how.
        same_sample_positive: whether the anchor's own sample is a candidate of its peers.
    """
    networks = len(embedding)

    def exclude(logits: Tensor, anchors: slice, candidates: slice) -> None:
        first, last = max(anchors.start, candidates.start), min(anchors.stop, candidates.stop)
        if first >= last:
            return
        block = logits[
            ..., first - anchors.start : last - anchors.start, first - candidates.start :
        ]
        themselves = block.diagonal(dim1=2, dim2=3)
        if not same_sample_positive:
            themselves.fill_(EXCLUDED)
        for network in range(networks):
            themselves[network, network].fill_(EXCLUDED)

    none = embedding.new_empty(networks, networks, embedding.shape[1], 0, dtype=torch.float64)
    log_sums, divergences = _Rows.apply(embedding, embedding, none, form, exclude)
    group = _groups(labels)
    others = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))[group] - 1
    class_sums = torch.zeros_like(embedding).index_add(1, group, embedding)
    mates = (class_sums[:, group] - embedding) / others.clamp(min=1).unsqueeze(-1)
    hard = (log_sums - _products(embedding, mates) / form.temperature) * (others > 0)
    hard = hard.sum(-1) / (others > 0).sum().clamp(min=1)
    cross = hard
    if same_sample_positive:
        same = _products(embedding, embedding) / form.temperature
        cross = hard + (log_sums - same).mean(-1)
    cross = cross.sum(0) - cross.diagonal()
    return _stacked(hard.diagonal(), cross, divergences).to(embedding.dtype)


class _Rows(torch.autograd.Function):
    """log sum exp(x) of every row, (M, M, B), and T^2 KL(teacher || student) of every pair, (P, 2, B), in float64.

    The candidates are ``rows`` (M, N, D) and, of logits ``extra`` (M, M, B, E), others of each anchor alone. Gradients
    reach the anchors ``query`` (M, B, D), the students' logits in ``extra`` and, where they need it, the candidates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        rows: Tensor,
        extra: Tensor,
        form: Form,
        exclude: Exclude | None,
    ) -> tuple[Tensor, Tensor]:
        sums = _no_sums(query, form)
        if extra.shape[-1]:
            logits = extra / form.base
            sums = add_candidates(
                sums, form, logits, torch.empty_like(logits), torch.empty_like(logits)
            )
        kept: list[Tensor] = []
        if form.in_triton:
            from pretrain import triton_passes

            sums = triton_passes.sum_rows(query, rows, sums, form)
        else:
            tiles = Tiles(query, rows, form, exclude)
            keep = ctx.needs_input_grad[0] and sums.shift is None and tiles.can_keep
            sums, kept = sum_rows(tiles, sums, keep=keep)
        ctx.save_for_backward(query, rows, extra)
        ctx.sums, ctx.form, ctx.exclude, ctx.kept = sums, form, exclude, kept
        return sums.log_hard(form), sums.divergences(form)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_log_sums: Tensor, of_divergences: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the flat loss can be differentiated once, and create_graph asks for more: "
                "take backend='reference', or a smaller batch"
            )
        query, rows, extra = ctx.saved_tensors
        sums, form = ctx.sums, ctx.form
        weights = weights_of_exponentials(of_log_sums, of_divergences, sums, form)
        of_query = torch.zeros_like(query)
        of_rows = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        with full_float32(query.device):
            if form.in_triton:
                from pretrain import triton_passes

                triton_passes.add_gradient(query, rows, weights, form, of_query)
            else:
                tiles = Tiles(query, rows, form, ctx.exclude)
                add_gradient(tiles, sums, weights, ctx.kept, of_query, of_rows)
            taken = exponentials(sums.shift, extra / form.base, torch.empty_like(extra))
            of_extra = gradient_of_logits(weights, form, taken, torch.empty_like(taken))
        of_query.div_(form.temperature)
        if of_rows is not None:
            of_rows.div_(form.temperature)
        return of_query, of_rows, of_extra, None, None


def _no_sums(query: Tensor, form: Form) -> RowSums:
    networks, batch, _ = query.shape
    row = query.new_zeros(networks, networks, batch, dtype=torch.float64)
    pair = row.new_zeros(networks * (networks - 1), 2, batch)
    return RowSums(
        shift=None if form.is_safe else row + EXCLUDED,
        hard=row.clone(),
        soft=row.clone(),
        moment=pair.clone(),
        excess=pair.clone() if form.has_excess else None,
    )


def _groups(labels: Tensor) -> Tensor:
    """Numbers below B for the classes of (B,) labels: `torch.unique` would wait for the device."""
    order = labels.argsort(stable=True)
    in_order = labels[order]
    begins = F.pad(in_order[1:] != in_order[:-1], (1, 0))
    return torch.empty_like(order).scatter(0, order, begins.cumsum(0))


def _products(anchors: Tensor, candidates: Tensor) -> Tensor:
    """The inner product of each network's i-th anchor and each network's i-th candidate: (M, M, B) float64."""
    # A product that autograd keeps its factors of: a change of them before backward is seen.
    return (anchors * candidates.unsqueeze(1)).sum(-1).double()


def _stacked(scl_hard: Tensor, icl_hard: Tensor, divergences: Tensor) -> Tensor:
    """(4, M) from (M,), (M,) and the divergences (P, 2, B) of pairs of rows."""
    networks = len(scl_hard)
    students = [
        (student[0] != student[1]) * networks + student[1]
        for pair in pairs_of_rows(networks)
        for student in pair[::-1]
    ]
    share = F.one_hot(torch.tensor(students, dtype=torch.long), 2 * networks).double()
    share = share.to(scl_hard.device, non_blocking=True)
    scl_soft, icl_soft = (divergences.mean(-1).flatten() @ share).view(2, networks)
    return torch.stack([scl_hard, scl_soft, icl_hard, icl_soft])
