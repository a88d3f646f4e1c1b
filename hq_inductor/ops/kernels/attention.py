"""Attention over the KV cache for few queries: coded slots and exact tokens, straight into the tensor cores.

Definition.  `out[c] = sum_t softmax_t(scale * <query[c], K_t>) V_t` over the tokens t that column c sees: causal, from `start`, in the
             sliding window, where a mask of bools is true; a mask of numbers is added to the scores. Tokens in `[sinks, length - window)`
             are read from slots, all others from the exact buffers. PAGED: slots of a page that is not there are not seen
             (`hq_inductor.format.kv`).
             A column is one query vector; up to 8 of them share what is decoded: queries of a group, of joined heads, of a few positions.
Arithmetic.  Queries are rounded to 15 bits, `128 hi + lo`, so a score is two int8 products with the codes, exact in int32. A weight is
             `exp2(score - m) * scale_t`, scale_t of the V slot, rounded to fp16 last of all; m follows the largest of them. V's
             codes are exact in fp16; sums are fp32.
Folding.     A column has nothing to do with heads of the slot but its own. Where a long slot is cut into PERIODs, of whole heads and whole
             chunks of 32 coordinates, queries and sums are those of one period: products with chunks of another take zeros for the
             queries, and for the weights. 8 heads of 80 take 10 blocks of sums instead of 40. In a period of two heads, what a column
             sums up over the other one is left behind.
Work.        A warp takes 16 tokens at a time. Decoded as rows, K is a first operand. V must stand in columns: `transpose` turns pairs of
             its bytes, which become pairs of halves. The warps of a program merge in shared memory, programs of a head in
             `hq_inductor.ops.kernels.softmax`. Programs share a head's tokens evenly, whatever the length; as many as there are
             tokens for take part.
Shared.      Two buffers of 16 slots per warp (K, V), 16 KiB in all, then 32 KiB of tables: of one code, both directions; of two codes,
             forwards only (`slot_quads`, MIRRORED). While one buffer is decoded, the other is filled.
Cost.        Per 16 tokens and 8 columns at tile 128: 16 vectors per lane decoded, 8 int8 and 8 fp16 products, 18 transpositions, 32 byte
             permutations and as many additions of halves. In SASS (e8, k = 3, sm_90) 882 instructions, 55 per token, of which 26 on
             the integer pipe, the busiest. V as int8 with weights of two 7-bit terms would take 3 instructions less per token for the
             values, and more than that for rounding the weights to a common scale and turning sums into fp32.
Source.      Dao et al., Flash-Decoding, 2023 (split over the sequence); FlashAttention-2, arXiv 2307.08691 (running softmax).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .exact_tokens import apply_mask, exact_step, query_8
from .memory import store_global
from .shared import (
    declare_shared,
    load_shared,
    load_tables,
    scratch_address,
    store_shared,
    wait_copies,
    wait_older_copies,
)
from .slots import open_slot, page_entry, page_slots, raw_address, slot_quads, slot_raw, stage_slots, stream_address
from .softmax import NEVER, first_in_period, weigh
from .tile import decode_vector_e8, restore_signs
from .warp import (
    biased_to_half,
    column_sum,
    exchange,
    from_lane,
    mma_16bit,
    mma_s8,
    pack_bytes,
    pack_halves,
    sync_warp,
    transpose,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
# where the tables stand in shared memory, after the buffers
_BUFFERS = tl.constexpr(16384)
# 1.5 * 2^23: fp32 has no bits below the unit there
_MAGIC = tl.constexpr(12582912.0)
# far behind the last token, and still so with 8 more
_NO_TOKEN = tl.constexpr(1 << 30)


@triton.jit
def _between(x, low, count):
    """Whether `low <= x < low + count`."""
    return (x - low).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def _coded_before(part, total, active, exact_rounds, share):
    """Coded steps of the parts before `part`, when the first `exact_rounds` parts spend `share` steps on exact tokens."""
    return tl.maximum((part * total) // active - share * tl.minimum(part, tl.minimum(exact_rounds, active)), 0)


# one binary for all sizes
@triton.jit(
    do_not_specialize=[
        "scale",
        "queries",
        "group",
        "heads",
        "kv_heads",
        "max_tokens",
        "sinks",
        "window",
        "sliding_window",
        "stride_qb",
        "stride_qh",
        "stride_qs",
        "stride_mb",
        "stride_mh",
        "stride_ms",
        "num_pages",
        "max_pages",
        "page_shift",
    ]
)
def attention_kernel(
    query_ptr,  # [B, kv_heads * group, queries, HEAD_DIM], strided, last dimension contiguous
    k_ptr,  # [B, heads, max_tokens, K_WORDS] int32, or if PAGED [num_pages, heads, 16 << page_shift, K_WORDS]
    v_ptr,  # the same with V_WORDS
    table_ptr,  # [2, 4096] int32: forwards and backwards, or if TWO_CODES forwards of K and of V
    k_exact_ptr,  # [B, kv_heads, sinks + window, HEAD_DIM] fp16 or bf16
    v_exact_ptr,  # the same
    length_ptr,  # [1] int64, or [B] if OWN_LENGTHS
    start_ptr,  # [B] int64 if HAS_START
    mask_ptr,  # [B, kv_heads * group, queries, max_tokens] int8 or floating point, strided, if HAS_MASK
    out_ptr,  # [B, kv_heads * group, queries, HEAD_DIM]
    partial_ptr,  # [B * heads, column blocks, splits, 8, PERIOD] fp32 if SPLIT
    state_ptr,  # [B * heads, column blocks, splits, 8, 2] fp32 if SPLIT: m and l
    scratch_ptr,  # stands in for shared memory under the interpreter
    page_ptr,  # [B, max_pages] int32 if PAGED
    scale,  # times log2(e)
    queries,
    group,
    heads,
    kv_heads,
    max_tokens,
    sinks,
    window,
    sliding_window,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_mb,
    stride_mh,
    stride_ms,
    num_pages,
    max_pages,
    page_shift,  # log2 of the steps of 16 tokens in a page
    TILE: tl.constexpr,
    K_RICE: tl.constexpr,
    K_SHIFT: tl.constexpr,
    K_GAIN: tl.constexpr,
    K_PLACE: tl.constexpr,
    K_WORDS: tl.constexpr,
    V_RICE: tl.constexpr,
    V_SHIFT: tl.constexpr,
    V_GAIN: tl.constexpr,
    V_PLACE: tl.constexpr,
    V_WORDS: tl.constexpr,
    TWO_CODES: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    JOIN: tl.constexpr,
    PERIOD: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    OWN_LENGTHS: tl.constexpr,
    PAGED: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, p, c): head i of slots, part p of its tokens, columns 8 c on."""
    GROUPS: tl.constexpr = TILE // 128
    PERIODS: tl.constexpr = TILE // PERIOD
    CHUNKS: tl.constexpr = PERIOD // 32
    BLOCKS: tl.constexpr = 2 * CHUNKS  # of 16 coordinates by 8 columns
    K_RAW: tl.constexpr = 4 * K_RICE * GROUPS
    V_RAW: tl.constexpr = 4 * V_RICE * GROUPS
    K_END: tl.constexpr = 32 * (K_WORDS - K_RAW)
    V_END: tl.constexpr = 32 * (V_WORDS - V_RAW)

    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    unit = tl.program_id(0)
    part = tl.program_id(1)
    b = unit // heads
    h = unit % heads
    if _INTERPRETED:
        base = scratch_address(scratch_ptr, thread)
    else:
        base = declare_shared(thread)
    load_tables(table_ptr, base + _BUFFERS, thread, NUM_WARPS)
    if PDL:
        # the tables are constants; the queries and the newest tokens come from the kernels before
        gdc_wait()

    if OWN_LENGTHS:
        length = tl.load(length_ptr + b).to(tl.int32)
    else:
        length = tl.load(length_ptr).to(tl.int32)
    # column r as an operand of products, on its way together with the length
    column = tl.program_id(2) * 8 + r
    sub = column // group % JOIN
    q_row = b * stride_qb + ((h * JOIN + sub) * group + column % group) * stride_qh + column // (JOIN * group) * stride_qs
    q_mask = (column < queries * JOIN * group) & (h * JOIN + sub < kv_heads)
    q_first = first_in_period(sub, HEAD_DIM, JOIN, PERIOD)
    q_period = sub * HEAD_DIM // PERIOD
    values = ()
    for chunk in tl.static_range(CHUNKS):
        values = values + query_8(query_ptr, q_row, 32 * chunk + 8 * j, q_first, q_mask, HEAD_DIM)
    first_query = length - queries
    begin = 0
    if HAS_START:
        begin = tl.load(start_ptr + b).to(tl.int32)
    last_token = max_tokens - 1
    coded_end = tl.minimum(length - window, max_tokens)
    seen_first = tl.maximum(begin, 0)
    if sliding_window > 0:
        seen_first = tl.maximum(seen_first, first_query - sliding_window + 1)
    # no further than the last slot, where any `start` might lead
    first_step = tl.minimum(tl.maximum(sinks, seen_first), max_tokens) // 16
    steps = tl.maximum((coded_end + 15) // 16 - first_step, 0)
    # a round of exact tokens takes about as long as half a round of coded ones. The first parts have them, and fewer of these; where there
    # are programs to spare, they have none
    exact_rounds = (sinks + window + 16 * NUM_WARPS - 1) // (16 * NUM_WARPS)
    wanted = tl.maximum((steps + NUM_WARPS - 1) // NUM_WARPS + exact_rounds, 1)
    active = tl.minimum(wanted, tl.num_programs(1))
    share = tl.where(wanted <= tl.num_programs(1), NUM_WARPS, NUM_WARPS // 2)
    if part >= active:
        if SPLIT:
            # nothing seen
            row = ((unit * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(1) + part) * 16 + tl.arange(0, 16)
            tl.store(state_ptr + row, tl.where(row % 2 == 0, NEVER, 0.0))
        return
    total_steps = steps + share * tl.minimum(exact_rounds, active)
    step_begin = first_step + _coded_before(part, total_steps, active, exact_rounds, share)
    step_end = first_step + _coded_before(part + 1, total_steps, active, exact_rounds, share)
    rounds = (step_end - step_begin + NUM_WARPS - 1) // NUM_WARPS

    k_buffer = base + warp * (64 * (K_WORDS + V_WORDS))
    v_buffer = k_buffer + 64 * K_WORDS
    step = step_begin + warp
    place = step
    if PAGED:
        k_pieces = (4 * K_WORDS) << page_shift
        v_pieces = (4 * V_WORDS) << page_shift
        page = page_entry(page_ptr + b * max_pages, step, max_pages, page_shift)
        k_head = page_slots(k_ptr, page, num_pages, h, heads, k_pieces)
        v_head = page_slots(v_ptr, page, num_pages, h, heads, v_pieces)
        place = step & ((1 << page_shift) - 1)
    else:
        k_head = k_ptr + unit.to(tl.int64) * (max_tokens * K_WORDS)
        v_head = v_ptr + unit.to(tl.int64) * (max_tokens * V_WORDS)
        k_pieces = max_tokens * K_WORDS // 4
        v_pieces = max_tokens * V_WORDS // 4
    stage_slots(k_head, place, k_pieces, lane, k_buffer, K_WORDS, K_RAW)
    stage_slots(v_head, place, v_pieces, lane, v_buffer, V_WORDS, V_RAW)

    largest = tl.zeros([32 * NUM_WARPS], tl.float32)
    for i in tl.static_range(8 * CHUNKS):
        largest = tl.maximum(largest, tl.abs(values[i]))
    largest = tl.maximum(largest, exchange(largest, 1, NUM_WARPS))
    largest = tl.maximum(largest, exchange(largest, 2, NUM_WARPS))
    factor = tl.where(largest > 0, 16256.0 / largest, 0.0)
    q_high = ()
    q_low = ()
    for word in tl.static_range(2 * CHUNKS):
        above = ()
        rest = ()
        for i in tl.static_range(4):
            value = values[4 * word + i] * factor
            # an integer stands in the low bits of its sum with the magic number
            high_sum = value * 0.0078125 + _MAGIC
            above = above + (high_sum.to(tl.int32, bitcast=True),)
            rest = rest + ((value - 128.0 * (high_sum - _MAGIC) + _MAGIC).to(tl.int32, bitcast=True),)
        q_high = q_high + (pack_bytes(above[0], above[1], above[2], above[3]),)
        q_low = q_low + (pack_bytes(rest[0], rest[1], rest[2], rest[3]),)

    # columns 2 j and 2 j + 1 of sums; as an operand, column c is with threads 4 c to 4 c + 3
    q_scale = ()
    low = ()
    high = ()
    counts = ()
    mask_rows = ()
    for i in tl.static_range(2):
        own = tl.program_id(2) * 8 + 2 * j + i
        own_sub = own // group % JOIN
        position = own // (JOIN * group)
        real = (own < queries * JOIN * group) & (h * JOIN + own_sub < kv_heads)
        at = first_query + position
        column_first = tl.maximum(begin, 0) + lane * 0
        if sliding_window > 0:
            column_first = tl.maximum(column_first, at - sliding_window + 1)
        low = low + (column_first,)
        high = high + (tl.where(real, at, -1),)
        coded_last = tl.minimum(tl.minimum(at, coded_end - 1), 16 * step_end - 1)
        counts = counts + (tl.where(real, tl.maximum(coded_last - tl.maximum(column_first, sinks) + 1, 0), 0),)
        q_head = tl.minimum((h * JOIN + own_sub) * group + own % group, kv_heads * group - 1)
        mask_rows = mask_rows + (b * stride_mb + q_head * stride_mh + tl.minimum(position, queries - 1) * stride_ms,)
        q_scale = q_scale + (from_lane(largest, 8 * j + 4 * i, NUM_WARPS) * (scale / 16256.0),)
    first_0 = tl.maximum(low[0], sinks)
    first_1 = tl.maximum(low[1], sinks)

    m0 = tl.full([32 * NUM_WARPS], NEVER, tl.float32)
    zero = tl.zeros([32 * NUM_WARPS], tl.float32)
    state = (m0, m0, zero, zero)
    totals = ()
    for _ in tl.static_range(4 * BLOCKS):
        totals = totals + (zero,)

    # while the tables and the first slots are on their way
    for index in range(part, exact_rounds, active):
        state, totals = exact_step(
            (index * NUM_WARPS + warp) * 16 + r,
            k_exact_ptr,
            v_exact_ptr,
            query_ptr,
            q_row,
            q_first,
            q_period,
            q_mask,
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
            HEAD_DIM,
            JOIN,
            TILE,
            PERIOD,
            HAS_MASK,
            NUM_WARPS,
        )

    if TWO_CODES:
        k_table = base + _BUFFERS
        v_table = base + (_BUFFERS + 16384)
    else:
        k_table = base + _BUFFERS + odd * 16384
        v_table = k_table
    wait_copies(lane)
    tl.debug_barrier()

    k_raw_u = raw_address(k_buffer, r, K_WORDS, K_RAW)
    k_raw_v = raw_address(k_buffer, r + 8, K_WORDS, K_RAW)
    k_stream_u = stream_address(k_buffer, r, K_WORDS, K_RAW)
    k_stream_v = stream_address(k_buffer, r + 8, K_WORDS, K_RAW)
    v_raw_u = raw_address(v_buffer, r, V_WORDS, V_RAW)
    v_raw_v = raw_address(v_buffer, r + 8, V_WORDS, V_RAW)
    v_stream_u = stream_address(v_buffer, r, V_WORDS, V_RAW)
    v_stream_v = stream_address(v_buffer, r + 8, V_WORDS, V_RAW)

    for _ in range(rounds):
        token = step * 16 + r
        if PAGED:
            # later than all
            token = tl.where(_between(page, 0, num_pages), token, _NO_TOKEN)
        keep_u0 = _between(token, first_0, counts[0])
        keep_u1 = _between(token, first_1, counts[1])
        keep_v0 = _between(token + 8, first_0, counts[0])
        keep_v1 = _between(token + 8, first_1, counts[1])
        if HAS_MASK:
            # under way while K is decoded
            token_u = tl.minimum(token, last_token)
            token_v = tl.minimum(token + 8, last_token)
            seen_u0 = tl.load(mask_ptr + mask_rows[0] + token_u)
            seen_u1 = tl.load(mask_ptr + mask_rows[1] + token_u)
            seen_v0 = tl.load(mask_ptr + mask_rows[0] + token_v)
            seen_v1 = tl.load(mask_ptr + mask_rows[1] + token_v)
        step += NUM_WARPS
        place = step
        if PAGED:
            # needed when K is decoded
            page = page_entry(page_ptr + b * max_pages, step, max_pages, page_shift)
            place = step & ((1 << page_shift) - 1)

        wait_older_copies(lane)
        k_scale_u, y_u = open_slot(k_stream_u, j, K_END, WALL_UNIT, K_GAIN)
        k_scale_v, y_v = open_slot(k_stream_v, j, K_END, WALL_UNIT, K_GAIN)
        s0 = lane * 0
        s1 = lane * 0
        s2 = lane * 0
        s3 = lane * 0
        t0 = lane * 0
        t1 = lane * 0
        t2 = lane * 0
        t3 = lane * 0
        for g in tl.static_range(GROUPS):
            raw_u = slot_raw(k_raw_u, g, j, K_RICE, GROUPS)
            raw_v = slot_raw(k_raw_v, g, j, K_RICE, GROUPS)
            signs_u = restore_signs(raw_u, K_RICE, "e8")
            signs_v = restore_signs(raw_v, K_RICE, "e8")
            for v in tl.static_range(4):
                e0, e1, y_u = slot_quads(y_u, odd, k_table, K_PLACE, TWO_CODES)
                f0, f1, y_v = slot_quads(y_v, odd, k_table, K_PLACE, TWO_CODES)
                a0, a2 = decode_vector_e8(e0, e1, v, signs_u, raw_u, K_RICE, K_SHIFT, BIASED=False)
                a1, a3 = decode_vector_e8(f0, f1, v, signs_v, raw_v, K_RICE, K_SHIFT, BIASED=False)
                b0, b1 = q_high[2 * ((4 * g + v) % CHUNKS)], q_high[2 * ((4 * g + v) % CHUNKS) + 1]
                c0, c1 = q_low[2 * ((4 * g + v) % CHUNKS)], q_low[2 * ((4 * g + v) % CHUNKS) + 1]
                if PERIODS > 1:
                    in_head = q_period == (4 * g + v) // CHUNKS
                    b0, b1 = tl.where(in_head, b0, 0), tl.where(in_head, b1, 0)
                    c0, c1 = tl.where(in_head, c0, 0), tl.where(in_head, c1, 0)
                s0, s1, s2, s3 = mma_s8(s0, s1, s2, s3, a0, a1, a2, a3, b0, b1, NUM_WARPS)
                t0, t1, t2, t3 = mma_s8(t0, t1, t2, t3, a0, a1, a2, a3, c0, c1, NUM_WARPS)
        sync_warp(lane)
        if PAGED:
            k_head = page_slots(k_ptr, page, num_pages, h, heads, k_pieces)
        stage_slots(k_head, place, k_pieces, lane, k_buffer, K_WORDS, K_RAW)

        x0 = (s0 * 128 + t0).to(tl.float32) * (k_scale_u * q_scale[0])
        x1 = (s1 * 128 + t1).to(tl.float32) * (k_scale_u * q_scale[1])
        x2 = (s2 * 128 + t2).to(tl.float32) * (k_scale_v * q_scale[0])
        x3 = (s3 * 128 + t3).to(tl.float32) * (k_scale_v * q_scale[1])
        if HAS_MASK:
            x0, keep_u0 = apply_mask(x0, keep_u0, seen_u0)
            x1, keep_u1 = apply_mask(x1, keep_u1, seen_u1)
            x2, keep_v0 = apply_mask(x2, keep_v0, seen_v0)
            x3, keep_v1 = apply_mask(x3, keep_v1, seen_v1)
        scores = (
            tl.where(keep_u0, x0, float("-inf")),
            tl.where(keep_u1, x1, float("-inf")),
            tl.where(keep_v0, x2, float("-inf")),
            tl.where(keep_v1, x3, float("-inf")),
        )
        wait_older_copies(lane)
        v_scale_u, y_u = open_slot(v_stream_u, j, V_END, WALL_UNIT, V_GAIN)
        v_scale_v, y_v = open_slot(v_stream_v, j, V_END, WALL_UNIT, V_GAIN)
        weights, state, totals = weigh(scores, v_scale_u, v_scale_v, state, totals, NUM_WARPS, BLOCKS)
        p0 = transpose(pack_halves(weights[0], weights[1], tl.float16), NUM_WARPS)
        p1 = transpose(pack_halves(weights[2], weights[3], tl.float16), NUM_WARPS)
        w0 = p0
        w1 = p1
        for period in tl.static_range(PERIODS):
            updated = ()
            if PERIODS > 1:
                w0, w1 = tl.where(q_period == period, p0, 0), tl.where(q_period == period, p1, 0)
            # vector v of group g
            for v in tl.static_range(period * CHUNKS, (period + 1) * CHUNKS):
                if v % 4 == 0:
                    raw_u = slot_raw(v_raw_u, v // 4, j, V_RICE, GROUPS)
                    raw_v = slot_raw(v_raw_v, v // 4, j, V_RICE, GROUPS)
                    signs_u = restore_signs(raw_u, V_RICE, "e8")
                    signs_v = restore_signs(raw_v, V_RICE, "e8")
                e0, e1, y_u = slot_quads(y_u, odd, v_table, V_PLACE, TWO_CODES)
                f0, f1, y_v = slot_quads(y_v, odd, v_table, V_PLACE, TWO_CODES)
                codes_u = decode_vector_e8(e0, e1, v % 4, signs_u, raw_u, V_RICE, V_SHIFT, BIASED=True)
                codes_v = decode_vector_e8(f0, f1, v % 4, signs_v, raw_v, V_RICE, V_SHIFT, BIASED=True)
                for half in tl.static_range(2):
                    turned_u = transpose(codes_u[half], NUM_WARPS)
                    turned_v = transpose(codes_v[half], NUM_WARPS)
                    updated = updated + mma_16bit(
                        totals[8 * (v % CHUNKS) + 4 * half],
                        totals[8 * (v % CHUNKS) + 4 * half + 1],
                        totals[8 * (v % CHUNKS) + 4 * half + 2],
                        totals[8 * (v % CHUNKS) + 4 * half + 3],
                        biased_to_half(turned_u, 0),
                        biased_to_half(turned_u, 1),
                        biased_to_half(turned_v, 0),
                        biased_to_half(turned_v, 1),
                        w0,
                        w1,
                        tl.float16,
                        NUM_WARPS,
                    )
            totals = updated
        sync_warp(lane)
        if PAGED:
            v_head = page_slots(v_ptr, page, num_pages, h, heads, v_pieces)
        stage_slots(v_head, place, v_pieces, lane, v_buffer, V_WORDS, V_RAW)

    if PDL:
        gdc_launch_dependents()
    # merge the warps where their buffers and tables were
    wait_copies(lane)
    tl.debug_barrier()
    place = base + (warp * 8 + 2 * j) * (4 * PERIOD) + ((r // 2) * 8 + r % 2 * 2) * 4
    for block in tl.static_range(BLOCKS):
        for i in tl.static_range(4):
            offset = (16 * block - 12 * (block % 2) + i // 2 + PERIOD * (i % 2)) * 4
            store_shared(place + offset, totals[4 * block + i].to(tl.int32, bitcast=True))
    states = base + 32 * PERIOD * NUM_WARPS
    own = states + (warp * 8 + 2 * j) * 8
    store_shared(own, state[0].to(tl.int32, bitcast=True))
    store_shared(own + 4, column_sum(state[2], NUM_WARPS).to(tl.int32, bitcast=True))
    store_shared(own + 8, state[1].to(tl.int32, bitcast=True))
    store_shared(own + 12, column_sum(state[3], NUM_WARPS).to(tl.int32, bitcast=True))
    tl.debug_barrier()
    for turn in tl.static_range(8 // NUM_WARPS if NUM_WARPS < 8 else 1):
        # a warp takes a column
        c = turn * NUM_WARPS + warp
        largest = tl.full([32 * NUM_WARPS], NEVER, tl.float32)
        for w in tl.static_range(NUM_WARPS):
            largest = tl.maximum(largest, load_shared(states + (w * 64 + c * 8)).to(tl.float32, bitcast=True))
        shares = ()
        norm = tl.zeros([32 * NUM_WARPS], tl.float32)
        for w in tl.static_range(NUM_WARPS):
            share = tl.exp2(load_shared(states + (w * 64 + c * 8)).to(tl.float32, bitcast=True) - largest)
            norm += share * load_shared(states + (w * 64 + c * 8 + 4)).to(tl.float32, bitcast=True)
            shares = shares + (share,)
        c_all = tl.program_id(2) * 8 + c
        sub = c_all // group % JOIN
        real = (c_all < queries * JOIN * group) & (h * JOIN + sub < kv_heads)
        part_row = ((unit * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(1) + part) * 8 + c
        out_row = (((b * kv_heads + h * JOIN + sub) * group + c_all % group) * queries + c_all // (JOIN * group)).to(tl.int64)
        for i in tl.static_range(CHUNKS):
            d = i * 32 + lane
            total = tl.zeros([32 * NUM_WARPS], tl.float32)
            for w in tl.static_range(NUM_WARPS):
                total += shares[w] * load_shared(base + ((w * 8 + c) * PERIOD + d) * 4).to(tl.float32, bitcast=True)
            if SPLIT:
                store_global(partial_ptr + part_row.to(tl.int64) * PERIOD + d, total, real)
            else:
                place = d - first_in_period(sub, HEAD_DIM, JOIN, PERIOD)
                mask = real & (place >= 0) & (place < HEAD_DIM)
                value = total / tl.where(norm > 0, norm, 1.0)
                store_global(out_ptr + out_row * HEAD_DIM + place, value.to(out_ptr.dtype.element_ty), mask)
        if SPLIT:
            store_global(state_ptr + part_row * 2, largest, real & (lane == 0))
            store_global(state_ptr + part_row * 2 + 1, norm, real & (lane == 0))
