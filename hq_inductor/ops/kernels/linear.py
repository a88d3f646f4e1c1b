"""Fused linear layer for small batches: words to int8 codes in registers, straight into the tensor cores.

Definition.  `out[m, n] = bias[n] + sum_t act_scale[t, m] * scale[n, t] * (sum_k codes[n, t, k] * x[m, t, k])`, inner sums exact in int32,
             outer sums in fp32; plus `residual[m, n]` if there is one.
Storage.     Activations as `hq_inductor.ops.kernels.activations` writes them.
Work.        A strip is 16 rows of the weight. SHARING warps share its tiles, warp i of them takes tiles i, i + SHARING, ..., and their sums
             meet in shared memory: no sum leaves a multiprocessor unfinished, and a small weight keeps all of them at work. A block's
             warps have a panel of NUM_WARPS / SHARING strips; as many blocks as live at once take panels in turns.
             Of a weight with many panels none is shared: there the tiles of all panels are dealt to the blocks in equal RUNS, and the
             few panels that two blocks have tiles of meet in memory.
             A warp decodes two vectors at a time, one of row r and one of row r + 8: together the A operand of one `mma.m16n8k32`, which
             every 8 columns of the batch then use. While it decodes a tile, the stream plane of the next one is on its way to shared
             memory, and the raw words of the next group to registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .blocks import (
    block_of_unit,
    count_panels,
    first_unit,
    load_chunks,
    meet_in_memory,
    stage_stream,
    store_strip,
    tile_offset,
    weight_of_panel,
    zeros_of,
)
from .memory import load_16, load_global, store_global
from .shared import ROW_GAP, TABLE_BYTES, declare_shared, load_shared_float, load_table, store_shared_16, wait_copies
from .tile import decode_vector, first_cursor, first_window, header_word, load_raw, next_quads, read_header, restore_signs
from .warp import mma_s8

_INTERPRETED = tl.constexpr(INTERPRETED)


def sums_bytes(columns: int, num_warps: int) -> int:
    """Shared memory in which the sums of a block's warps meet, 8 columns at a time, in turns."""
    return 512 * num_warps * min(columns // 8, 2)


if INTERPRETED:

    @triton.jit
    def _meet(totals, thread, SHARING: tl.constexpr, NUM_WARPS: tl.constexpr):
        """Sums of the warps that share a strip, in all of them."""
        sums = ()
        for i in tl.static_range(len(totals)):
            apart = tl.reshape(totals[i], [NUM_WARPS // SHARING, SHARING, 32])
            together = tl.broadcast_to(tl.sum(apart, 1)[:, None, :], [NUM_WARPS // SHARING, SHARING, 32])
            sums = sums + (tl.reshape(together, [32 * NUM_WARPS]),)
        return sums


@triton.jit
def _meet_and_store(
    totals,
    strips,
    column,
    m0,
    M,
    N,
    total,
    thread,
    sums_address,
    bias_ptr,
    residual_ptr,
    stride_residual,
    out_ptr,
    BLOCKS: tl.constexpr,
    SHARING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sums of a block's strips, `strips` and on, to the output: each warp's `totals`, as MMAs leave them, meet at `sums_address`."""
    OUTPUTS: tl.constexpr = 128 * NUM_WARPS // SHARING  # of a block of 8 columns
    for b in tl.static_range(BLOCKS):
        # two buffers in turns: one barrier is enough
        buffer = sums_address + (b % 2) * (512 * NUM_WARPS)
        store_shared_16(buffer + 16 * thread, totals[4 * b], totals[4 * b + 1], totals[4 * b + 2], totals[4 * b + 3])
        tl.debug_barrier()
        for first in tl.static_range(0, OUTPUTS, 32 * NUM_WARPS):
            output = first + thread
            # neighbours have neighbouring rows, which lie side by side in the output
            row = output % 16
            m = output // 16 % 8
            strip = output // 128
            place = buffer + strip * (512 * SHARING) + (64 * (row % 8) + 16 * (m // 2) + 8 * (row // 8) + 4 * (m % 2))
            value = load_shared_float(place)
            for s in tl.static_range(1, SHARING):
                value += load_shared_float(place + 512 * s)
            n = (strips + strip) * 16 + row
            m = m0 + 8 * b + m
            mask = (output < OUTPUTS) & (n < N) & (m < M)
            if HAS_BIAS:
                value += load_global(bias_ptr + n, mask).to(tl.float32)
            if HAS_RESIDUAL:
                value += load_global(residual_ptr + m.to(tl.int64) * stride_residual + (column + n), mask).to(tl.float32)
            store_global(out_ptr + m.to(tl.int64) * total + (column + n), value.to(out_ptr.dtype.element_ty), mask)
    if BLOCKS % 2 == 1:
        # the next panel begins with the same buffer
        tl.debug_barrier()


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
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    STREAM: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Decode a group of both rows and add its products to `sums`.

    `source` is the activations' pointer and the distance of two MMAs, `place` the offset of the next ones.
    """
    AHEAD: tl.constexpr = BLOCKS if BLOCKS <= 2 else 1
    window_u, window_v = windows
    signs_u = restore_signs(raw_u, K, LATTICE)
    signs_v = restore_signs(raw_v, K, LATTICE)
    for v in tl.static_range(4):
        if v % 2 == 0:
            # long before they are multiplied, as far as registers go
            x_ptr = source[0] + place
            columns = ()
            for b in tl.static_range(AHEAD):
                columns = columns + load_16(x_ptr + b * 512)
        e0, e1, window_u = next_quads(window_u, odd, streams[0], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        f0, f1, window_v = next_quads(window_v, odd, streams[1], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        a0, a2 = decode_vector(e0, e1, v, signs_u, raw_u, K, SHIFT, LATTICE)
        a1, a3 = decode_vector(f0, f1, v, signs_v, raw_v, K, SHIFT, LATTICE)
        if v % 2 == 0:
            held0 = a0
            held1 = a1
            held2 = a2
            held3 = a3
        else:
            updated = ()
            for b in tl.static_range(BLOCKS):
                if b < AHEAD:
                    b0, b1, b2, b3 = columns[4 * b], columns[4 * b + 1], columns[4 * b + 2], columns[4 * b + 3]
                else:
                    b0, b1, b2, b3 = load_16(x_ptr + b * 512)
                s0, s1, s2, s3 = sums[4 * b], sums[4 * b + 1], sums[4 * b + 2], sums[4 * b + 3]
                s0, s1, s2, s3 = mma_s8(s0, s1, s2, s3, held0, held1, held2, held3, b0, b1, NUM_WARPS)
                updated = updated + mma_s8(s0, s1, s2, s3, a0, a1, a2, a3, b2, b3, NUM_WARPS)
            sums = updated
            place += source[1]
    return sums, (window_u, window_v), place


# one binary for all sizes
@triton.jit(do_not_specialize=["M", "M_PAD", "N", "N1", "N2", "N3", "tiles"])
def linear_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [4096] int32
    x_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N + N1 + N2 + N3]
    partial_ptr,  # with RUNS fp32 of `meet_in_memory`: of each program a place for a panel that begins in its run, one for one before
    counter_ptr,  # with RUNS [blocks of columns, panels, warps] int32 zeros
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
    SHARING: tl.constexpr,
    RUNS: tl.constexpr,  # then SHARING is 1
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, c): every `num_programs(0)`-th panel from the i-th on, or the i-th run; batch columns COLUMNS c on."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    BLOCKS: tl.constexpr = COLUMNS // 8  # n-blocks of the MMA
    STRIPS: tl.constexpr = NUM_WARPS // SHARING  # of a panel
    # 16-byte loads of the raw words; unrolled, so short tiles only
    CHUNKED: tl.constexpr = ALIGNED and LATTICE != "d4" and GROUPS <= 4 and K * GROUPS % 4 == 0
    FIRST: tl.constexpr = (K - 1) // 4 + 1  # 16-byte loads that the first group needs

    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    share = warp % SHARING
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    pointers = (words_ptr, words1_ptr, words2_ptr, words3_ptr, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
    rows = (N, N1, N2, N3)
    panels, total = count_panels(rows, SIBLINGS, 16 * STRIPS)
    turns = (tiles + SHARING - 1) // SHARING  # of a panel
    each = panels * tiles // tl.num_programs(0)
    rest = panels * tiles % tl.num_programs(0)
    if RUNS:
        begin = first_unit(tl.program_id(0), each, rest)
        rounds = first_unit(tl.program_id(0) + 1, each, rest) - begin
        panel = begin // tiles
        turn = begin % tiles
    else:
        panel = tl.program_id(0)
        turn = 0
        rounds = turns * ((panels - panel + tl.num_programs(0) - 1) // tl.num_programs(0))
    words_ptr, bias_ptr, N, weight_panel, column = weight_of_panel(panel, pointers, rows, SIBLINGS, 16 * STRIPS)
    m0 = tl.program_id(1) * COLUMNS
    strip = weight_panel * STRIPS + warp // SHARING
    t = share + SHARING * turn
    begins = turn == 0

    # offsets of 32 bits from here on, where registers are dear: a weight has less than 2^31 words
    x_step = M_PAD * 64
    x_row = (m0 + r) * 64 + j * 16
    # of a warp: two buffers, used in turns
    BUFFER: tl.constexpr = 16 * (ROW_BYTES + ROW_GAP)
    # measured: with 16 columns the larger ones are 5 % slower, else 2 to 8 % faster
    PIECE: tl.constexpr = 8 if COLUMNS == 16 else 16
    table_address = thread * 0
    buffers = thread * 0
    sums_address = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread)
        load_table(table_ptr, table_address, thread, NUM_WARPS)
        staged: tl.constexpr = 2 * BUFFER if ROW_BYTES > 0 else 0
        buffers = table_address + TABLE_BYTES + warp * staged
        sums_address = table_address + (TABLE_BYTES + NUM_WARPS * staged)
        if ROW_BYTES > 0:
            stage_stream(words_ptr, strip, t, N, tiles, lane, buffers, RAW, WORDS, ROW_BYTES, ALIGNED, PIECE)
    tile_u = tile_offset(strip, r, t, N, tiles, WORDS)
    tile_v = tile_offset(strip, r + 8, t, N, tiles, WORDS)
    if CHUNKED:
        ahead_u = load_chunks((), words_ptr + tile_u, j, 0, FIRST)
        ahead_v = load_chunks((), words_ptr + tile_v, j, 0, FIRST)
    else:
        ahead_u = load_raw(words_ptr + tile_u, 0, j, K, LATTICE, GROUPS)
        ahead_v = load_raw(words_ptr + tile_v, 0, j, K, LATTICE, GROUPS)
    if not _INTERPRETED:
        wait_copies(lane)
        tl.debug_barrier()
    if PDL:
        # all above reads only constants, and may run while the kernel before, which writes the activations, still does
        gdc_wait()
    # bits before the rows' stream planes: in shared memory, or of a plane by itself
    bits_u = thread * 0
    bits_v = bits_u

    totals = zeros_of(thread, 4 * BLOCKS)
    buffer = 0
    for i in range(rounds):
        # what comes next: the same again after the last one
        wraps = turn + 1 == turns
        last = i + 1 == rounds
        next_panel = tl.where(wraps & (i + 1 < rounds), panel + (1 if RUNS else tl.num_programs(0)), panel)
        next_turn = tl.where(wraps, 0, turn + 1)
        next_t = share + SHARING * next_turn
        next_words_ptr, next_bias_ptr, next_N, next_weight_panel, next_column = weight_of_panel(
            next_panel, pointers, rows, SIBLINGS, 16 * STRIPS
        )
        next_strip = next_weight_panel * STRIPS + warp // SHARING
        # not read where the planes have copies
        streams = (words_ptr + tile_u + RAW, words_ptr + tile_v + RAW)
        if ROW_BYTES > 0:
            wait_copies(lane)
            bits_u = (buffers + (buffer * BUFFER + r * (ROW_BYTES + ROW_GAP))) * 8
            bits_v = bits_u + 8 * 8 * (ROW_BYTES + ROW_GAP)
            buffer = 1 - buffer
            stage_stream(
                next_words_ptr, next_strip, next_t, next_N, tiles, lane, buffers + buffer * BUFFER, RAW, WORDS, ROW_BYTES, ALIGNED, PIECE
            )
        inside = tl.minimum(t, tiles - 1)
        column_ptr = act_scale_ptr + inside * M_PAD + m0 + 2 * j
        column_scales = ()
        if BLOCKS <= 2:
            # under way long before the end of the tile, as far as registers go
            for b in tl.static_range(BLOCKS):
                column_scales = column_scales + (load_global(column_ptr + 8 * b), load_global(column_ptr + 8 * b + 1))
        scale_u, wall_u = read_header(header_word(streams[0], bits_u, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        scale_v, wall_v = read_header(header_word(streams[1], bits_v, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        # warps beyond the last tile decode it again for nothing
        scale_u = tl.where(t < tiles, scale_u, 0.0)
        scale_v = tl.where(t < tiles, scale_v, 0.0)
        x_u = first_cursor(bits_u, wall_u, j, END)
        x_v = first_cursor(bits_v, wall_v, j, END)
        window_u = first_window(streams[0], x_u, odd, STREAM, ROW_BYTES)
        window_v = first_window(streams[1], x_v, odd, STREAM, ROW_BYTES)
        windows = (window_u, window_v)
        place = x_row + (inside * (TILE // 64)) * x_step

        sums = ()
        for _ in tl.static_range(4 * BLOCKS):
            sums = sums + (thread * 0,)
        next_u = tile_offset(next_strip, r, next_t, next_N, tiles, WORDS)
        next_v = tile_offset(next_strip, r + 8, next_t, next_N, tiles, WORDS)
        if CHUNKED:
            words_u = ahead_u
            words_v = ahead_v
            for g in tl.static_range(GROUPS):
                # what the next group needs is under way while this one is decoded
                if g + 1 < GROUPS:
                    words_u = load_chunks(words_u, words_ptr + tile_u, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                    words_v = load_chunks(words_v, words_ptr + tile_v, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                else:
                    ahead_u = load_chunks((), next_words_ptr + next_u, j, 0, FIRST)
                    ahead_v = load_chunks((), next_words_ptr + next_v, j, 0, FIRST)
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
                    (x_ptr, x_step),
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    BLOCKS,
                    NUM_WARPS,
                )
        else:
            for g in range(GROUPS):
                raw_u = ahead_u
                raw_v = ahead_v
                more = g + 1 < GROUPS
                ahead_ptr = tl.where(more, words_ptr.to(tl.int64), next_words_ptr.to(tl.int64)).to(words_ptr.dtype)
                ahead_u = load_raw(ahead_ptr + tl.where(more, tile_u, next_u), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
                ahead_v = load_raw(ahead_ptr + tl.where(more, tile_v, next_v), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
                sums, windows, place = _multiply_group(
                    sums,
                    raw_u,
                    raw_v,
                    windows,
                    place,
                    (x_ptr, x_step),
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    BLOCKS,
                    NUM_WARPS,
                )

        if BLOCKS > 2:
            for b in tl.static_range(BLOCKS):
                column_scales = column_scales + (load_global(column_ptr + 8 * b), load_global(column_ptr + 8 * b + 1))
        updated = ()
        for b in tl.static_range(BLOCKS):
            s0 = column_scales[2 * b]
            s1 = column_scales[2 * b + 1]
            updated = updated + (
                totals[4 * b] + sums[4 * b].to(tl.float32) * (s0 * scale_u),
                totals[4 * b + 1] + sums[4 * b + 1].to(tl.float32) * (s1 * scale_u),
                totals[4 * b + 2] + sums[4 * b + 2].to(tl.float32) * (s0 * scale_v),
                totals[4 * b + 3] + sums[4 * b + 3].to(tl.float32) * (s1 * scale_v),
            )
        totals = updated
        if wraps | last:
            if PDL:
                # not before: what starts early takes its place among the blocks of this kernel that still wait for theirs
                gdc_launch_dependents()
            if SHARING > 1 and not _INTERPRETED:
                _meet_and_store(
                    totals,
                    weight_panel * STRIPS,
                    column,
                    m0,
                    M,
                    N,
                    total,
                    thread,
                    sums_address,
                    bias_ptr,
                    residual_ptr,
                    stride_residual,
                    out_ptr,
                    BLOCKS,
                    SHARING,
                    HAS_BIAS,
                    HAS_RESIDUAL,
                    NUM_WARPS,
                )
            else:
                mine = (strip * 16 + lane * 0 < N) & (warp % SHARING == 0)
                if SHARING > 1:
                    totals = _meet(totals, thread, SHARING, NUM_WARPS)
                if RUNS:
                    first_block = block_of_unit(panel * tiles, each, rest)
                    parts = block_of_unit(panel * tiles + (tiles - 1), each, rest) - first_block + 1
                    if parts > 1:
                        programs = tl.program_id(1) * tl.num_programs(0)
                        totals, finished = meet_in_memory(
                            totals,
                            lane,
                            warp,
                            partial_ptr,
                            counter_ptr,
                            2 * (programs + tl.program_id(0)) + tl.where(begins, 0, 1),
                            2 * (programs + first_block),
                            2 * (programs + first_block) + 1,
                            parts,
                            (tl.program_id(1) * panels + panel) * NUM_WARPS + warp,
                            2,
                            BLOCKS,
                            NUM_WARPS,
                        )
                        mine = mine & finished
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
            totals = zeros_of(thread, 4 * BLOCKS)
        begins = begins | wraps
        turn = next_turn
        t = next_t
        tile_u = next_u
        tile_v = next_v
        panel = next_panel
        words_ptr = next_words_ptr
        bias_ptr = next_bias_ptr
        N = next_N
        weight_panel = next_weight_panel
        column = next_column
        strip = next_strip
