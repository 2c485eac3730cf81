"""The two passes of `pretrain.tile_passes` in Triton kernels, for CUDA devices.

Dimensions: M networks, B anchors, K queue rows, D embedding size, P pairs of rows.

The programs of a grid write sums of their own, which are added up afterwards in a fixed order: no atomic operation, and
so the same bits again.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from pretrain.row_sums import Form, Row, RowSums, Weights, pairs_of_rows
from pretrain.triton_kernels import gradient_kernel, sum_kernel

_BLOCK_ANCHORS, _BLOCK_ROWS = 32, 32
# Of shared memory, for each column of a padded embedding: what the compiler asks for at most with these blocks.
SHARED_BYTES_PER_COLUMN = 640
# As many programs as keep the largest devices busy.
_PROGRAMS = 512


def sum_rows(query: Tensor, rows: Tensor, sums: RowSums, form: Form) -> RowSums:
    """Add the queue rows (M, K, D) to the sums of the rows of anchors (M, B, D), which are not shifted."""
    launch = _Launch(query, rows, form)
    tables = 8 if sums.excess is not None else 6
    parts = query.new_empty(launch.splits, len(launch.pairs), tables, query.shape[1])
    launch(sum_kernel, parts, HAS_EXCESS=sums.excess is not None)
    total = parts.double().sum(0)
    seen: set[Row] = set()
    for number, pair in enumerate(launch.pairs):
        for side, row in enumerate(pair):
            if row not in seen:
                sums.hard[row] += total[number, side]
                sums.soft[row] += total[number, 2 + side]
            seen.add(row)
    if len(query) > 1:
        sums.moment.add_(total[:, 4:6])
        if sums.excess is not None:
            sums.excess.add_(total[:, 6:8])
    return sums


def add_gradient(
    query: Tensor, rows: Tensor, weights: Weights, form: Form, of_query: Tensor
) -> None:
    """Add the gradient of tau times the anchors, (M, B, D)."""
    launch = _Launch(query, rows, form)
    own = query.new_zeros(len(launch.pairs), 6, query.shape[1])
    seen: set[Row] = set()
    for number, pair in enumerate(launch.pairs):
        for side, row in enumerate(pair):
            if row not in seen:
                own[number, side] = weights.hard[row]
                own[number, 2 + side] = weights.soft[row]
            seen.add(row)
    if len(query) > 1:
        own[:, 4:] = weights.taught
    parts = query.new_empty(launch.splits, len(launch.pairs), 2, *query.shape[1:])
    launch(gradient_kernel, parts, own)
    total = parts.sum(0)
    for number, pair in enumerate(launch.pairs):
        for side, (_, anchor) in enumerate(pair):
            of_query[anchor] += total[number, side]


def padded_size(dim: int) -> int:
    """The width of the blocks that hold embeddings of this size."""
    return max(int(triton.next_power_of_2(dim)), 16)


class _Launch:
    """The grid and the arguments that both kernels share."""

    def __init__(self, query: Tensor, rows: Tensor, form: Form) -> None:
        networks, self._batch, self._dim = query.shape
        self._query, self._rows = query.contiguous(), rows if rows.stride(2) == 1 else rows.clone()
        self._form, self._total = form, rows.shape[1]
        # A network alone is a pair with itself, of which the second half is not used.
        self.pairs = pairs_of_rows(networks) or [((0, 0), (0, 0))]
        self._blocks = triton.cdiv(self._batch, _BLOCK_ANCHORS)
        most = triton.cdiv(self._total, _BLOCK_ROWS)
        self.splits = max(min(most, _PROGRAMS // (len(self.pairs) * self._blocks)), 1)

    def __call__(self, kernel: Any, parts: Tensor, *tables: Tensor, **flags: Any) -> None:
        names = torch.tensor(self.pairs, dtype=torch.int32).to(parts.device, non_blocking=True)
        per_split = triton.cdiv(triton.cdiv(self._total, self.splits), _BLOCK_ROWS) * _BLOCK_ROWS
        kernel[(len(self.pairs), self._blocks, self.splits)](
            self._query,
            self._rows,
            names,
            parts,
            *tables,
            self._batch,
            self._total,
            self._dim,
            self._rows.stride(0),
            self._rows.stride(1),
            per_split,
            1 / (self._form.temperature * self._form.base),
            BASE=self._form.base,
            POWER=self._form.soft_power,
            BLOCK_B=_BLOCK_ANCHORS,
            BLOCK_K=_BLOCK_ROWS,
            BLOCK_D=padded_size(self._dim),
            num_stages=1,
            **flags,
        )
