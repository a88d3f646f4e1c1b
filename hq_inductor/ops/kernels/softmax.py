"""Softmax over tokens that come in parts: as they run through a warp, and when the parts of a head are put together.

Definition.  A part keeps for each column m, a reference for its scores; l, the sum of `exp2(s - m + TOP)`; and the sum of the values with
             these weights. References of parts differ by what the larger of them scales the others down by.
Invariants.  m is the largest of `s + log2(scale)`, so that a weight times its value's scale is at most `2^TOP`, whatever is stored.
             What is masked has score -inf; m starts at a finite number below all scores, so that nothing is inf - inf.
Source.      Milakov and Gimelshein, arXiv 1805.02867 (online normalizer).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .warp import column_max

# log2 of the largest weight in fp16: small ones keep their bits down to 2^-28 of it
TOP = tl.constexpr(14.0)
NEVER = tl.constexpr(-1.0e30)
# scores beyond, of corrupt slots, would lose the bits that keep weights below 2^TOP
MOST = tl.constexpr(32768.0)


@triton.jit
def first_in_period(sub, HEAD_DIM: tl.constexpr, JOIN: tl.constexpr, PERIOD: tl.constexpr):
    """First coordinate of a slot's head `sub` in its period."""
    if JOIN * HEAD_DIM == PERIOD:
        return sub * HEAD_DIM
    else:
        return sub % (PERIOD // HEAD_DIM) * HEAD_DIM


@triton.jit
def weigh(scores, scale_u, scale_v, state, totals, NUM_WARPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Running softmax: weights of two tokens for two columns, `state = (m0, m1, l0, l1)` and `totals` brought to the new m."""
    m0, m1, l0, l1 = state
    s0 = tl.minimum(scores[0], MOST)
    s1 = tl.minimum(scores[1], MOST)
    s2 = tl.minimum(scores[2], MOST)
    s3 = tl.minimum(scores[3], MOST)
    log_u = tl.log2(scale_u)
    log_v = tl.log2(scale_v)
    n0 = tl.maximum(m0, column_max(tl.maximum(s0 + log_u, s2 + log_v), NUM_WARPS))
    n1 = tl.maximum(m1, column_max(tl.maximum(s1 + log_u, s3 + log_v), NUM_WARPS))
    a0 = tl.exp2(m0 - n0)
    a1 = tl.exp2(m1 - n1)
    rescaled = ()
    for b in tl.static_range(BLOCKS):
        rescaled = rescaled + (totals[4 * b] * a0, totals[4 * b + 1] * a1, totals[4 * b + 2] * a0, totals[4 * b + 3] * a1)
    e0 = tl.exp2(s0 + (TOP - n0))
    e1 = tl.exp2(s1 + (TOP - n1))
    e2 = tl.exp2(s2 + (TOP - n0))
    e3 = tl.exp2(s3 + (TOP - n1))
    weights = (e0 * scale_u, e1 * scale_u, e2 * scale_v, e3 * scale_v)
    return weights, (n0, n1, l0 * a0 + (e0 + e2), l1 * a1 + (e1 + e3)), rescaled


@triton.jit(do_not_specialize=["queries", "group", "heads", "kv_heads", "splits", "column_blocks"])
def combine_kernel(
    partial_ptr,  # [B * heads, column_blocks, splits, 8, PERIOD] fp32
    state_ptr,  # [B * heads, column_blocks, splits, 8, 2] fp32
    out_ptr,  # [B, kv_heads * group, queries, HEAD_DIM]
    queries,
    group,
    heads,
    kv_heads,
    splits,
    column_blocks,
    PERIOD: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, at least PERIOD
    HEAD_DIM: tl.constexpr,
    JOIN: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, c): column c of head i of slots, from the parts that `attention_kernel` took."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    unit = tl.program_id(0)
    column = tl.program_id(1)
    b = unit // heads
    h = unit % heads
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    norm = 0.0
    largest = NEVER
    for first in range(0, splits, STEP):
        p = first + tl.arange(0, STEP)
        row = ((unit * column_blocks + column // 8) * splits + p) * 8 + column % 8
        mask = p < splits
        m = tl.load(state_ptr + row * 2, mask=mask, other=NEVER)
        part_norm = tl.load(state_ptr + row * 2 + 1, mask=mask, other=0.0)
        # on their way before it is known which of them were written
        there = mask[:, None]
        if WIDTH > PERIOD:
            there = there & (d < PERIOD)[None, :]
        parts = tl.load(partial_ptr + row.to(tl.int64)[:, None] * PERIOD + d[None, :], mask=there, other=0.0)
        parts = tl.where((m > NEVER)[:, None], parts, 0.0)
        m_new = tl.maximum(largest, tl.max(m, 0))
        share = tl.exp2(m - m_new)
        before = tl.exp2(largest - m_new)
        norm = norm * before + tl.sum(share * part_norm, 0)
        total = total * before + tl.sum(share[:, None] * parts, 0)
        largest = m_new
    sub = column // group % JOIN
    place = d - first_in_period(sub, HEAD_DIM, JOIN, PERIOD)
    mask = (place >= 0) & (place < HEAD_DIM) & (h * JOIN + sub + d * 0 < kv_heads)
    head = (b * kv_heads + h * JOIN + sub) * group + column % group
    row = (head * queries + column // (JOIN * group)).to(tl.int64)
    value = total / tl.where(norm > 0, norm, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + place, value.to(out_ptr.dtype.element_ty), mask=mask)
