"""Fused linear layer for batches of more than 32 on sm_90: as `hq_inductor.ops.kernels.linear`, with activations through a ring.

e4m3.        With FP8 codes become e4m3 in the registers they are decoded to, as `hq_inductor.ops.kernels.decode` makes them: one scale per
             row, from the headers of all its tiles, and one per row of activations. Sums then need no scaling from tile to tile, so they
             take one register each instead of two, and 256 columns find room. Tensor cores keep some 14 bits of such sums.
Parts.       Where the tiles of a row are dealt to several blocks, sums meet in the shared memory of a cluster
             (`hq_inductor.ops.kernels.ring_output`) or in global memory (`hq_inductor.ops.kernels.blocks`): a device has fewer places for
             clusters than for blocks.
Work.        A warp owns 16 rows of the weight, or SHARING groups of four warps share 64 rows, each with a part of their tiles and a ring of
             its own, and their sums meet in shared memory: a small weight keeps more warps at work. Activations come through shared memory
             once per ring, and four warps multiply together while they decode what comes next (`hq_inductor.ops.kernels.warpgroup`). Whole
             tiles and the scales of activations come through shared memory too where there is room: so much of it leaves the L1 none for
             loads on their way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .block_memory import BLOCK_MEMORY, open_block, whole_memory_jit
from .blocks import (
    add_tile,
    count_panels,
    e4m3_factors,
    exact_factors,
    load_chunks,
    load_staged_chunks,
    meet_in_memory,
    row_divisors,
    stage_scales,
    stage_stream,
    stage_tiles,
    store_strip,
    tile_offset,
    weight_of_panel,
    zeros_of,
)
from .memory import load_global
from .ring_output import cluster_rank, meet_and_store
from .shared import ROW_GAP, TABLE_BYTES, commit_copies, load_shared_floats, load_table, shared_base, wait_copies
from .tile import decode_vector, first_cursor, first_window, header_word, load_raw, next_quads, read_header, restore_signs
from .warp import codes_to_e4m3, own_warp
from .warpgroup import fill, next_products, open_ring, products_wait

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _multiply_group(
    sums,
    raw_u,
    raw_v,
    windows,
    place,
    source,
    odd,
    streams,
    table_ptr,
    table_address,
    factors,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    STREAM: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
    EXACT: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decode a group of both rows and add its products to `sums`, the last ones left under way.

    `place` and `source` of `next_products`; `factors` of both rows bring codes to e4m3 if FP8.
    """
    BIASED: tl.constexpr = FP8 and LATTICE == "e8"
    window_u, window_v = windows
    signs_u = restore_signs(raw_u, K, LATTICE)
    signs_v = restore_signs(raw_v, K, LATTICE)
    for v in tl.static_range(4):
        e0, e1, window_u = next_quads(window_u, odd, streams[0], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        f0, f1, window_v = next_quads(window_v, odd, streams[1], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        a0, a2 = decode_vector(e0, e1, v, signs_u, raw_u, K, SHIFT, LATTICE, BIASED)
        a1, a3 = decode_vector(f0, f1, v, signs_v, raw_v, K, SHIFT, LATTICE, BIASED)
        if FP8:
            a0 = codes_to_e4m3(a0, factors[0], factors[1], BIASED, EXACT)
            a1 = codes_to_e4m3(a1, factors[2], factors[3], BIASED, EXACT)
            a2 = codes_to_e4m3(a2, factors[0], factors[1], BIASED, EXACT)
            a3 = codes_to_e4m3(a3, factors[2], factors[3], BIASED, EXACT)
        sums, place = next_products(sums, a0, a1, a2, a3, place, source, v % STEPS, 8 * BLOCKS, STEPS, STAGES, FP8, NUM_WARPS)
    return sums, (window_u, window_v), place


@triton.jit
def _ring_block(
    thread,  # number of the thread
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [4096] int32
    x_ptr,  # [M_PAD / COLUMNS, tiles * TILE / 16, COLUMNS, 16] int8 or, if FP8, e4m3
    act_scale_ptr,  # [tiles, M_PAD] fp32; if FP8 [M]
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N + N1 + N2 + N3]
    partial_ptr,  # fp32 if SPLIT: `meet_in_memory`
    counter_ptr,  # [blocks] int32 zeros if SPLIT
    M,
    M_PAD,
    N,
    tiles,
    residual_ptr,  # [M, N + N1 + N2 + N3], rows stride_residual apart, or anything if not HAS_RESIDUAL
    stride_residual,
    words1_ptr,  # siblings, for SIBLINGS > 1, 2, 3
    words2_ptr,
    words3_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    N1,
    N2,
    N3,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    RAW: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,  # value that a code can have
    SPLIT: tl.constexpr,  # parts of the tiles of a row meet in global memory
    PARTS: tl.constexpr,  # or these many in the shared memory of a cluster's blocks
    SHARING: tl.constexpr,  # not if SPLIT, or under the interpreter
    VECTOR: tl.constexpr,  # of `meet_and_store`
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
    STEPS: tl.constexpr,  # steps of 32 coefficients per chunk
    STAGES: tl.constexpr,  # chunks in the ring
    STAGED: tl.constexpr,  # whole tiles, and the activations' scales, come through shared memory; needs CHUNKED
    SHARED: tl.constexpr,  # symbol of the block's shared memory
):
    """Cluster (i, p, c): rows 16 NUM_WARPS / SHARING i on, part p of the tiles, batch columns COLUMNS c on."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    BLOCKS: tl.constexpr = COLUMNS // 8  # n-blocks of the MMA
    # 16-byte loads of the raw words; unrolled, so short tiles only
    CHUNKED: tl.constexpr = ALIGNED and LATTICE != "d4" and GROUPS <= 4 and K * GROUPS % 4 == 0
    FIRST: tl.constexpr = (K - 1) // 4 + 1  # 16-byte loads that the first group needs
    STRIPS: tl.constexpr = NUM_WARPS // SHARING

    pointers = (words_ptr, words1_ptr, words2_ptr, words3_ptr, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
    rows = (N, N1, N2, N3)
    total = count_panels(rows, SIBLINGS, 16 * STRIPS)[1]
    words_ptr, bias_ptr, N, panel, column = weight_of_panel(tl.program_id(0), pointers, rows, SIBLINGS, 16 * STRIPS)
    m0 = tl.program_id(2) * COLUMNS
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    if PARTS > 1:
        part = cluster_rank(N)
        parts = PARTS
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    strip = panel * STRIPS + warp % STRIPS
    share = 0
    if SHARING > 1:
        # a scalar that is not the same in all warps, nor is what follows from it
        share = own_warp(N, thread) // STRIPS
    first_tile = (part * SHARING + share) * tiles // (parts * SHARING)
    last_tile = (part * SHARING + share + 1) * tiles // (parts * SHARING)
    member = thread % (32 * STRIPS)

    # offsets of 32 bits from here on, where registers are dear: a weight has less than 2^31 words
    # of a warp: two buffers, used in turns
    STRIDE: tl.constexpr = 4 * WORDS + 16 if STAGED else ROW_BYTES + ROW_GAP
    BUFFER: tl.constexpr = 16 * STRIDE
    CHUNK: tl.constexpr = 32 * STEPS * COLUMNS
    SCALES: tl.constexpr = 0 if FP8 else 8 * COLUMNS
    table_address = thread * 0
    buffers = thread * 0
    scales = thread * 0
    slots = 0
    barriers = 0
    if not _INTERPRETED:
        table_address = shared_base(thread, SHARED)
        load_table(table_ptr, table_address, thread, NUM_WARPS)
        buffers = table_address + TABLE_BYTES + warp * (2 * BUFFER)
        after: tl.constexpr = TABLE_BYTES + NUM_WARPS * 2 * (BUFFER if ROW_BYTES > 0 else 0)
        scales = table_address + after + warp * SCALES
        slots = shared_base(M, SHARED) + (after + (NUM_WARPS * SCALES if STAGED else 0))
        barriers = slots + SHARING * STAGES * CHUNK + share * (16 * STAGES)
        slots += share * (STAGES * CHUNK)
        open_ring(barriers, member, STAGES, STRIPS)
        if STAGED:
            stage_tiles(words_ptr, strip, first_tile, N, tiles, lane, buffers, WORDS, STRIDE)
        elif ROW_BYTES > 0:
            stage_stream(words_ptr, strip, first_tile, N, tiles, lane, buffers, RAW, WORDS, ROW_BYTES, ALIGNED)
    tile_u = tile_offset(strip, r, first_tile, N, tiles, WORDS)
    tile_v = tile_offset(strip, r + 8, first_tile, N, tiles, WORDS)
    if CHUNKED and not STAGED:
        ahead_u = load_chunks((), words_ptr + tile_u, j, 0, FIRST)
        ahead_v = load_chunks((), words_ptr + tile_v, j, 0, FIRST)
    elif not STAGED:
        ahead_u = load_raw(words_ptr + tile_u, 0, j, K, LATTICE, GROUPS)
        ahead_v = load_raw(words_ptr + tile_v, 0, j, K, LATTICE, GROUPS)
    if FP8:
        divisor_u, divisor_v = row_divisors(words_ptr, strip, r, j, N, tiles, WORDS, RAW, LARGEST)
    if not _INTERPRETED:
        commit_copies(lane)
        wait_copies(lane)
        tl.debug_barrier()
    if PDL:
        # all above reads only constants, and may run while the kernel before, which writes the activations, still does
        gdc_wait()
    x_ptr += (tl.program_id(2) * tiles + first_tile).to(tl.int64) * (TILE * COLUMNS)
    chunks = (last_tile - first_tile) * (TILE // (32 * STEPS))
    place = (0, 0, 0, 0, 0, 0, 0)  # as `next_products` has it
    source = (x_ptr, slots, barriers, chunks, member, lane)
    if STAGED and not FP8:
        stage_scales(act_scale_ptr + first_tile * M_PAD + m0, lane, scales, COLUMNS)
        commit_copies(lane)
    for stage in tl.static_range(STAGES):
        fill(member + tl.where(stage < chunks, 0, 256), barriers + 8 * stage, slots + CHUNK * stage, x_ptr + CHUNK * stage, CHUNK)
    # bits before the rows' stream planes: in shared memory, or of a plane by itself
    bits_u = thread * 0
    bits_v = bits_u

    EXACT: tl.constexpr = exact_factors(LATTICE, LARGEST)
    # sums of all tiles
    totals = zeros_of(thread, 4 * BLOCKS)
    factors = (thread * 0, thread * 0, thread * 0, thread * 0)
    for t in range(first_tile, last_tile):
        # not read where the planes have copies
        streams = (words_ptr + tile_u + RAW, words_ptr + tile_v + RAW)
        if ROW_BYTES > 0:
            wait_copies(lane)
            turn = (t - first_tile) & 1
            tile_address = buffers + (turn * BUFFER + r * STRIDE)
            bits_u = (tile_address + (4 * RAW if STAGED else 0)) * 8
            bits_v = bits_u + 8 * 8 * STRIDE
            other = buffers + (BUFFER - turn * BUFFER)
            if STAGED:
                stage_tiles(words_ptr, strip, t + 1, N, tiles, lane, other, WORDS, STRIDE)
                if not FP8:
                    next_ptr = act_scale_ptr + tl.minimum(t + 1, tiles - 1) * M_PAD + m0
                    stage_scales(next_ptr, lane, scales + (4 * COLUMNS - turn * (4 * COLUMNS)), COLUMNS)
                commit_copies(lane)
            else:
                stage_stream(words_ptr, strip, t + 1, N, tiles, lane, other, RAW, WORDS, ROW_BYTES, ALIGNED)
        scale_u, wall_u = read_header(header_word(streams[0], bits_u, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        scale_v, wall_v = read_header(header_word(streams[1], bits_v, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        x_u = first_cursor(bits_u, wall_u, j, END)
        x_v = first_cursor(bits_v, wall_v, j, END)
        window_u = first_window(streams[0], x_u, odd, STREAM, ROW_BYTES)
        window_v = first_window(streams[1], x_v, odd, STREAM, ROW_BYTES)
        windows = (window_u, window_v)
        if FP8:
            sums = totals
            factors = e4m3_factors(scale_u / divisor_u, LATTICE) + e4m3_factors(scale_v / divisor_v, LATTICE)
        else:
            sums = ()
            for _ in tl.static_range(4 * BLOCKS):
                sums = sums + (thread * 0,)
        if CHUNKED:
            if STAGED:
                words_u = load_staged_chunks((), tile_address, j, 0, FIRST)
                words_v = load_staged_chunks((), tile_address + 8 * STRIDE, j, 0, FIRST)
            else:
                words_u = ahead_u
                words_v = ahead_v
            for g in tl.static_range(GROUPS):
                # what the next group needs is under way while this one is decoded
                if STAGED and g + 1 < GROUPS:
                    words_u = load_staged_chunks(words_u, tile_address, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                    words_v = load_staged_chunks(
                        words_v, tile_address + 8 * STRIDE, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1
                    )
                elif STAGED:
                    next_u = tile_u
                    next_v = tile_v
                elif g + 1 < GROUPS:
                    words_u = load_chunks(words_u, words_ptr + tile_u, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                    words_v = load_chunks(words_v, words_ptr + tile_v, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                else:
                    next_u = tile_offset(strip, r, t + 1, N, tiles, WORDS)
                    next_v = tile_offset(strip, r + 8, t + 1, N, tiles, WORDS)
                    ahead_u = load_chunks((), words_ptr + next_u, j, 0, FIRST)
                    ahead_v = load_chunks((), words_ptr + next_v, j, 0, FIRST)
                raw_u = ()
                raw_v = ()
                for w in tl.static_range(K):
                    raw_u = raw_u + (words_u[K * g + w],)
                    raw_v = raw_v + (words_v[K * g + w],)
                sums, windows, place = _multiply_group(
                    sums,
                    raw_u,
                    raw_v,
                    windows,
                    place,
                    source,
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    factors,
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    BLOCKS,
                    FP8,
                    EXACT,
                    NUM_WARPS,
                    STEPS,
                    STAGES,
                )
        else:
            next_u = tile_offset(strip, r, t + 1, N, tiles, WORDS)
            next_v = tile_offset(strip, r + 8, t + 1, N, tiles, WORDS)
            for g in range(GROUPS):
                raw_u = ahead_u
                raw_v = ahead_v
                g_next = (g + 1) % GROUPS
                ahead_u = load_raw(words_ptr + tl.where(g + 1 < GROUPS, tile_u, next_u), g_next, j, K, LATTICE, GROUPS)
                ahead_v = load_raw(words_ptr + tl.where(g + 1 < GROUPS, tile_v, next_v), g_next, j, K, LATTICE, GROUPS)
                sums, windows, place = _multiply_group(
                    sums,
                    raw_u,
                    raw_v,
                    windows,
                    place,
                    source,
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    factors,
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    BLOCKS,
                    FP8,
                    EXACT,
                    NUM_WARPS,
                    STEPS,
                    STAGES,
                )

        sums = products_wait(sums, COLUMNS, FP8)
        if FP8:
            totals = sums
        else:
            column_ptr = act_scale_ptr + t * M_PAD + m0 + 2 * j
            column_scales = ()
            for b in tl.static_range(BLOCKS):
                if STAGED:
                    column_scales = column_scales + load_shared_floats(scales + (turn * (4 * COLUMNS) + 32 * b + 8 * j))
                else:
                    column_scales = column_scales + (load_global(column_ptr + 8 * b), load_global(column_ptr + 8 * b + 1))
            totals = add_tile(totals, sums, scale_u, scale_v, column_scales, BLOCKS)
        tile_u = next_u
        tile_v = next_v

    if PDL:
        # not before: what starts early takes its place among the blocks of this kernel that still wait for theirs
        gdc_launch_dependents()
    if FP8:
        scaled = ()
        for b in tl.static_range(BLOCKS):
            # past the last column: its scale again
            m = m0 + 8 * b + 2 * j
            s0 = load_global(act_scale_ptr + tl.minimum(m, M - 1))
            s1 = load_global(act_scale_ptr + tl.minimum(m + 1, M - 1))
            scaled = scaled + (
                totals[4 * b] * (s0 * divisor_u),
                totals[4 * b + 1] * (s1 * divisor_u),
                totals[4 * b + 2] * (s0 * divisor_v),
                totals[4 * b + 3] * (s1 * divisor_v),
            )
        totals = scaled
    if SPLIT or _INTERPRETED:
        mine = strip * 16 + lane * 0 < N
        if SPLIT:
            # panels of all blocks of columns
            among = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
            apart = tl.num_programs(0) * tl.num_programs(2)
            totals, last = meet_in_memory(
                totals,
                lane,
                warp,
                partial_ptr,
                counter_ptr,
                part * apart + among,
                among,
                parts,
                among * NUM_WARPS + warp,
                apart,
                BLOCKS,
                NUM_WARPS,
            )
            mine = mine & last
        store_strip(
            totals,
            strip,
            mine,
            column,
            m0,
            M,
            N,
            total,
            lane,
            bias_ptr,
            residual_ptr,
            stride_residual,
            out_ptr,
            BLOCKS,
            HAS_BIAS,
            HAS_RESIDUAL,
        )
    else:
        # of the last tile's copies, which come again; then all warps are done with what is in shared memory
        wait_copies(lane)
        tl.debug_barrier()
        meet_and_store(
            totals,
            thread,
            share,
            part,
            table_address + TABLE_BYTES,
            panel * (16 * STRIPS),
            column,
            m0,
            M,
            N,
            total,
            bias_ptr,
            residual_ptr,
            stride_residual,
            out_ptr,
            BLOCKS,
            16 * STRIPS,
            PARTS,
            SHARING,
            HAS_BIAS,
            HAS_RESIDUAL,
            VECTOR,
        )


@whole_memory_jit(do_not_specialize=["M", "M_PAD", "N", "N1", "N2", "N3", "tiles"])
def ring_linear_kernel(
    words_ptr,
    table_ptr,
    x_ptr,
    act_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    M_PAD,
    N,
    tiles,
    residual_ptr,
    stride_residual,
    words1_ptr,
    words2_ptr,
    words3_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    N1,
    N2,
    N3,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    RAW: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,  # value that a code can have
    SPLIT: tl.constexpr,  # parts of the tiles of a row meet in global memory
    PARTS: tl.constexpr,  # or these many in the shared memory of a cluster's blocks
    SHARING: tl.constexpr,  # groups of four warps that share rows
    VECTOR: tl.constexpr,  # of `meet_and_store`
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    STAGED: tl.constexpr,
    SHARED_KB: tl.constexpr,
):
    """Of `_ring_block`. One binary for all sizes."""
    thread = open_block(NUM_WARPS, PARTS, SHARED_KB)
    _ring_block(
        thread,
        words_ptr,
        table_ptr,
        x_ptr,
        act_scale_ptr,
        bias_ptr,
        out_ptr,
        partial_ptr,
        counter_ptr,
        M,
        M_PAD,
        N,
        tiles,
        residual_ptr,
        stride_residual,
        words1_ptr,
        words2_ptr,
        words3_ptr,
        bias1_ptr,
        bias2_ptr,
        bias3_ptr,
        N1,
        N2,
        N3,
        LATTICE,
        K,
        SHIFT,
        GAIN,
        LENGTH_PLACE,
        TILE,
        WORDS,
        RAW,
        WALL_UNIT,
        ALIGNED,
        ROW_BYTES,
        COLUMNS,
        FP8,
        LARGEST,
        SPLIT,
        PARTS,
        SHARING,
        VECTOR,
        HAS_BIAS,
        HAS_RESIDUAL,
        SIBLINGS,
        NUM_WARPS,
        PDL,
        STEPS,
        STAGES,
        STAGED,
        BLOCK_MEMORY,
    )
