"""The kernels of `pretrain.triton_passes`. Dimensions: M networks, B anchors, K queue rows, D embedding size, P pairs.

A program takes a block of anchors, a part of the queue and one pair of rows that teach each other, p and q, and holds
both rows' logits in registers. Queues of fp16 and bf16 are widened as they are read; products add up in float32. (A
network's own row stands in M - 1 pairs, and its logits are computed for each; with two networks that is once.)
"""

import triton
import triton.language as tl

# Products of float32 on tensor cores to nearly all digits.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _anchors(query, network, block, batch, dim, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of a network's anchors, (BLOCK_B, BLOCK_D), 0 beyond its end."""
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    inside = (b[:, None] < batch) & (d[None, :] < dim)
    offsets = (network * batch + b[:, None]) * dim + d[None, :]
    return tl.load(query + offsets, mask=inside, other=0.0)


@triton.jit
def _queue_rows(
    rows,
    network,
    first,
    total,
    dim,
    stride_m,
    stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of a network's queue rows, (BLOCK_K, BLOCK_D) float32, 0 beyond their end."""
    k = first + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = (k[:, None] < total) & (d[None, :] < dim)
    offsets = network.to(tl.int64) * stride_m + k[:, None].to(tl.int64) * stride_k + d[None, :]
    return tl.load(rows + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _exp_power(taken, logits, exponent: tl.constexpr):
    """``taken``, the exponential of the logits, to a power."""
    if exponent == 1.0:
        result = taken
    elif exponent == 3.0:
        result = taken * taken * taken
    else:
        result = tl.exp(logits * exponent)
    return result


@triton.jit
def _exp_minus_1_minus(u):
    """e^u - 1 - u, by its Taylor series where the subtraction would cancel."""
    v = tl.minimum(tl.maximum(u, -0.1), 0.1)
    series = v * (1 / 362880) + 1 / 40320
    series = series * v + 1 / 5040
    series = series * v + 1 / 720
    series = series * v + 1 / 120
    series = series * v + 1 / 24
    series = series * v + 1 / 6
    series = series * v + 1 / 2
    return tl.where(tl.abs(u) < 0.1, v * v * series, tl.exp(u) - 1 - u)


@triton.jit
def sum_kernel(
    query,
    rows,
    pairs,
    parts,
    batch,
    total,
    dim,
    stride_m,
    stride_k,
    per_split,
    scale,
    BASE: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_EXCESS: tl.constexpr,
):
    """Write parts (splits, P, 6 or 8, B): hard and soft of either row, moment and excess of either as the teacher."""
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c_p, a_p = tl.load(pairs + 4 * pair), tl.load(pairs + 4 * pair + 1)
    c_q, a_q = tl.load(pairs + 4 * pair + 2), tl.load(pairs + 4 * pair + 3)
    q_p = _anchors(query, a_p, block, batch, dim, BLOCK_B, BLOCK_D)
    q_q = _anchors(query, a_q, block, batch, dim, BLOCK_B, BLOCK_D)
    hard_p = tl.zeros([BLOCK_B], tl.float32)
    hard_q = tl.zeros([BLOCK_B], tl.float32)
    soft_p = tl.zeros([BLOCK_B], tl.float32)
    soft_q = tl.zeros([BLOCK_B], tl.float32)
    moment_p = tl.zeros([BLOCK_B], tl.float32)
    moment_q = tl.zeros([BLOCK_B], tl.float32)
    excess_p = tl.zeros([BLOCK_B], tl.float32)
    excess_q = tl.zeros([BLOCK_B], tl.float32)
    begin = split * per_split
    for first in range(begin, tl.minimum(begin + per_split, total), BLOCK_K):
        exists = ((first + tl.arange(0, BLOCK_K)) < total)[None, :]
        own_p = _queue_rows(rows, c_p, first, total, dim, stride_m, stride_k, BLOCK_K, BLOCK_D)
        own_q = _queue_rows(rows, c_q, first, total, dim, stride_m, stride_k, BLOCK_K, BLOCK_D)
        x_p = tl.dot(q_p, tl.trans(own_p), input_precision=_PRECISION) * scale
        x_q = tl.dot(q_q, tl.trans(own_q), input_precision=_PRECISION) * scale
        e_p = tl.where(exists, tl.exp(x_p), 0.0)
        e_q = tl.where(exists, tl.exp(x_q), 0.0)
        hard_p += tl.sum(tl.where(exists, _exp_power(e_p, x_p, BASE), 0.0), 1)
        hard_q += tl.sum(tl.where(exists, _exp_power(e_q, x_q, BASE), 0.0), 1)
        s_p = tl.where(exists, _exp_power(e_p, x_p, POWER), 0.0)
        s_q = tl.where(exists, _exp_power(e_q, x_q, POWER), 0.0)
        soft_p += tl.sum(s_p, 1)
        soft_q += tl.sum(s_q, 1)
        difference = x_p - x_q
        moment_p += tl.sum(s_p * difference, 1)
        moment_q -= tl.sum(s_q * difference, 1)
        if HAS_EXCESS:
            u = difference * POWER
            excess_p += tl.sum(s_p * _exp_minus_1_minus(-u), 1)
            excess_q += tl.sum(s_q * _exp_minus_1_minus(u), 1)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    tables = 8 if HAS_EXCESS else 6
    own = parts + ((split * tl.num_programs(0) + pair) * tables).to(tl.int64) * batch + b
    tl.store(own, hard_p, mask=b < batch)
    tl.store(own + batch, hard_q, mask=b < batch)
    tl.store(own + 2 * batch, soft_p, mask=b < batch)
    tl.store(own + 3 * batch, soft_q, mask=b < batch)
    tl.store(own + 4 * batch, moment_p, mask=b < batch)
    tl.store(own + 5 * batch, moment_q, mask=b < batch)
    if HAS_EXCESS:
        tl.store(own + 6 * batch, excess_p, mask=b < batch)
        tl.store(own + 7 * batch, excess_q, mask=b < batch)


@triton.jit
def gradient_kernel(
    query,
    rows,
    pairs,
    parts,
    weights,
    batch,
    total,
    dim,
    stride_m,
    stride_k,
    per_split,
    scale,
    BASE: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write parts (splits, P, 2, B, D) with weights (P, 6, B): hard and soft of either row, either as the teacher."""
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c_p, a_p = tl.load(pairs + 4 * pair), tl.load(pairs + 4 * pair + 1)
    c_q, a_q = tl.load(pairs + 4 * pair + 2), tl.load(pairs + 4 * pair + 3)
    q_p = _anchors(query, a_p, block, batch, dim, BLOCK_B, BLOCK_D)
    q_q = _anchors(query, a_q, block, batch, dim, BLOCK_B, BLOCK_D)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    own = weights + pair * 6 * batch + b
    hard_p = tl.load(own, mask=b < batch, other=0.0)[:, None]
    hard_q = tl.load(own + batch, mask=b < batch, other=0.0)[:, None]
    soft_p = tl.load(own + 2 * batch, mask=b < batch, other=0.0)[:, None]
    soft_q = tl.load(own + 3 * batch, mask=b < batch, other=0.0)[:, None]
    teaches_p = tl.load(own + 4 * batch, mask=b < batch, other=0.0)[:, None]
    teaches_q = tl.load(own + 5 * batch, mask=b < batch, other=0.0)[:, None]
    of_p = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    of_q = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    begin = split * per_split
    for first in range(begin, tl.minimum(begin + per_split, total), BLOCK_K):
        # Rows beyond the end are 0, and so is what they add.
        own_p = _queue_rows(rows, c_p, first, total, dim, stride_m, stride_k, BLOCK_K, BLOCK_D)
        own_q = _queue_rows(rows, c_q, first, total, dim, stride_m, stride_k, BLOCK_K, BLOCK_D)
        x_p = tl.dot(q_p, tl.trans(own_p), input_precision=_PRECISION) * scale
        x_q = tl.dot(q_q, tl.trans(own_q), input_precision=_PRECISION) * scale
        e_p = tl.exp(x_p)
        e_q = tl.exp(x_q)
        s_p = _exp_power(e_p, x_p, POWER)
        s_q = _exp_power(e_q, x_q, POWER)
        g_p = hard_p * _exp_power(e_p, x_p, BASE) + soft_p * s_p - teaches_q * s_q
        g_q = hard_q * _exp_power(e_q, x_q, BASE) + soft_q * s_q - teaches_p * s_p
        of_p += tl.dot(g_p, own_p, input_precision=_PRECISION)
        of_q += tl.dot(g_q, own_q, input_precision=_PRECISION)
    d = tl.arange(0, BLOCK_D)
    inside = (b[:, None] < batch) & (d[None, :] < dim)
    first_row = ((split * tl.num_programs(0) + pair) * 2).to(tl.int64) * batch
    offsets = (first_row + b[:, None]) * dim + d[None, :]
    tl.store(parts + offsets, of_p, mask=inside)
    tl.store(parts + offsets + batch * dim, of_q, mask=inside)
