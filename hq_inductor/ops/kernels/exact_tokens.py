"""The tokens of the KV cache that are kept exact: 16 at a time, fp16 or bf16, in the same fragments as coded ones.

Definition.  Place e of `sinks + window` holds position e if `e < sinks`, else the newest position p with
             `p = sinks + (e - sinks) mod window`. Places that nothing was written to are not read.
Arithmetic.  Queries in the tokens' dtype, sums in fp32; weights in two terms of bf16, or one of fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import weigh
from .warp import halves, mma_16bit, pack_halves, transpose
from .wide import load_8_values, load_16


@triton.jit
def query_8(query_ptr, row_offset, d, first_dim, mask, HEAD_DIM: tl.constexpr):
    """Coordinates `d` to `d + 7` of a column's query in the slot: zeros outside its own head."""
    place = d - first_dim
    return load_8_values(query_ptr + row_offset + place, mask & (place >= 0) & (place < HEAD_DIM))


@triton.jit
def _load_chunk(exact_ptr, d, base, h, kv_heads, entries, rows, inside, HEAD_DIM: tl.constexpr, JOIN: tl.constexpr):
    """Coordinates `d` to `d + 7` of the slot, of this thread's two tokens: 8 registers."""
    head = d // HEAD_DIM
    there = (head < JOIN) & (h * JOIN + head < kv_heads)
    loaded = ()
    for side in tl.static_range(2):
        offset = ((base + head).to(tl.int64) * entries + rows[side]) * HEAD_DIM + d % HEAD_DIM
        loaded = loaded + load_16(exact_ptr + offset, there & inside[side])
    return loaded


@triton.jit
def _own(a, b, own, PERIODS: tl.constexpr):
    """Weights of the columns whose period is at hand, else zeros."""
    if PERIODS > 1:
        a = tl.where(own, a, 0)
        b = tl.where(own, b, 0)
    return a, b


@triton.jit
def apply_mask(score, keep, mask):
    """Score (base 2) and whether the token is seen, by its entry of a mask: int8, nonzero where seen, or floating point and added."""
    if mask.dtype == tl.int8:
        return score, keep & (mask != 0)
    else:
        return score + mask.to(tl.float32) * 1.4426950408889634, keep


@triton.jit
def exact_step(
    e,
    k_exact_ptr,
    v_exact_ptr,
    query_ptr,
    query_row,
    query_first,
    query_period,
    query_mask,
    scale,
    low,
    high,
    mask_rows,
    mask_ptr,
    last_token,
    length,
    sinks,
    window,
    b,
    h,
    kv_heads,
    j,
    state,
    totals,
    HEAD_DIM: tl.constexpr,
    JOIN: tl.constexpr,
    TILE: tl.constexpr,
    PERIOD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """16 tokens of the exact buffers, of which this thread holds number `e` and `e + 8`."""
    dtype: tl.constexpr = k_exact_ptr.dtype.element_ty
    PERIODS: tl.constexpr = TILE // PERIOD
    CHUNKS: tl.constexpr = PERIOD // 32
    # registers hold all that is read, or long slots chunk by chunk
    AT_ONCE: tl.constexpr = TILE <= 256
    entries = sinks + window
    period = tl.maximum(window, 1)
    rows = ()
    tokens = ()
    inside = ()
    for side in tl.static_range(2):
        place = e + 8 * side
        # the newest position that this place of the ring can hold
        since = (length - 1 - place) % period
        token = tl.where(place < sinks, place, length - 1 - tl.where(since < 0, since + period, since))
        real = (place < entries) & (token < length) & ((place < sinks) | (token >= sinks))
        rows = rows + (tl.minimum(place, entries - 1),)
        tokens = tokens + (tl.where(real, token, 0),)
        inside = inside + (real,)

    base = b * kv_heads + h * JOIN
    k_all = ()
    v_all = ()
    if AT_ONCE:
        # all on their way before any is needed
        for chunk in tl.static_range(PERIODS * CHUNKS):
            k_all = k_all + _load_chunk(k_exact_ptr, 32 * chunk + 8 * j, base, h, kv_heads, entries, rows, inside, HEAD_DIM, JOIN)
            v_all = v_all + _load_chunk(v_exact_ptr, 32 * chunk + 8 * j, base, h, kv_heads, entries, rows, inside, HEAD_DIM, JOIN)

    s0 = tl.zeros([32 * NUM_WARPS], tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    for chunk in tl.static_range(PERIODS * CHUNKS):
        k_regs = ()
        if AT_ONCE:
            for i in tl.static_range(8):
                k_regs = k_regs + (k_all[8 * chunk + i],)
        else:
            k_regs = _load_chunk(k_exact_ptr, 32 * chunk + 8 * j, base, h, kv_heads, entries, rows, inside, HEAD_DIM, JOIN)
        q_mask = query_mask
        if PERIODS > 1:
            q_mask = query_mask & (query_period == chunk // CHUNKS)
        q = query_8(query_ptr, query_row, 32 * (chunk % CHUNKS) + 8 * j, query_first, q_mask, HEAD_DIM)
        q_regs = ()
        for i in tl.static_range(4):
            q_regs = q_regs + (pack_halves(q[2 * i], q[2 * i + 1], dtype),)
        for i in tl.static_range(2):
            s0, s1, s2, s3 = mma_16bit(
                s0,
                s1,
                s2,
                s3,
                k_regs[2 * i],
                k_regs[4 + 2 * i],
                k_regs[2 * i + 1],
                k_regs[5 + 2 * i],
                q_regs[2 * i],
                q_regs[2 * i + 1],
                dtype,
                NUM_WARPS,
            )
    products = (s0, s1, s2, s3)
    scores = ()
    for i in tl.static_range(4):
        token = tokens[i // 2]
        score = products[i] * scale
        seen = inside[i // 2] & (token >= low[i % 2]) & (token <= high[i % 2])
        if HAS_MASK:
            score, seen = apply_mask(score, seen, tl.load(mask_ptr + mask_rows[i % 2] + tl.minimum(token, last_token)))
        scores = scores + (tl.where(seen, score, float("-inf")),)
    one = tl.full([32 * NUM_WARPS], 1.0, tl.float32)
    weights, state, totals = weigh(scores, one, one, state, totals, NUM_WARPS, 2 * CHUNKS)
    w0, w1, w2, w3 = weights
    # two terms, so that weights keep more bits than bf16 has
    p0 = pack_halves(w0, w1, dtype)
    p1 = pack_halves(w2, w3, dtype)
    if dtype == tl.bfloat16:
        r0 = pack_halves(w0 - (p0 << 16).to(tl.float32, bitcast=True), w1 - (p0 & -65536).to(tl.float32, bitcast=True), dtype)
        r1 = pack_halves(w2 - (p1 << 16).to(tl.float32, bitcast=True), w3 - (p1 & -65536).to(tl.float32, bitcast=True), dtype)
        r0 = transpose(r0, NUM_WARPS)
        r1 = transpose(r1, NUM_WARPS)
    p0 = transpose(p0, NUM_WARPS)
    p1 = transpose(p1, NUM_WARPS)
    for period in tl.static_range(PERIODS):
        updated = ()
        own = query_period == period
        for chunk in tl.static_range(period * CHUNKS, (period + 1) * CHUNKS):
            v_regs = ()
            if AT_ONCE:
                for i in tl.static_range(8):
                    v_regs = v_regs + (v_all[8 * chunk + i],)
            else:
                v_regs = _load_chunk(v_exact_ptr, 32 * chunk + 8 * j, base, h, kv_heads, entries, rows, inside, HEAD_DIM, JOIN)
            for half in tl.static_range(2):
                a0 = transpose(halves(v_regs[2 * half], v_regs[2 * half + 1], 0), NUM_WARPS)
                a1 = transpose(halves(v_regs[2 * half], v_regs[2 * half + 1], 1), NUM_WARPS)
                a2 = transpose(halves(v_regs[4 + 2 * half], v_regs[5 + 2 * half], 0), NUM_WARPS)
                a3 = transpose(halves(v_regs[4 + 2 * half], v_regs[5 + 2 * half], 1), NUM_WARPS)
                t0 = totals[8 * (chunk % CHUNKS) + 4 * half]
                t1 = totals[8 * (chunk % CHUNKS) + 4 * half + 1]
                t2 = totals[8 * (chunk % CHUNKS) + 4 * half + 2]
                t3 = totals[8 * (chunk % CHUNKS) + 4 * half + 3]
                b0, b1 = _own(p0, p1, own, PERIODS)
                t0, t1, t2, t3 = mma_16bit(t0, t1, t2, t3, a0, a1, a2, a3, b0, b1, dtype, NUM_WARPS)
                if dtype == tl.bfloat16:
                    b0, b1 = _own(r0, r1, own, PERIODS)
                    t0, t1, t2, t3 = mma_16bit(t0, t1, t2, t3, a0, a1, a2, a3, b0, b1, dtype, NUM_WARPS)
                updated = updated + (t0, t1, t2, t3)
        totals = updated
    return state, totals
