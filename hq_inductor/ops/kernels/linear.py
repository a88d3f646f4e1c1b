"""Fused linear layer for small batches: words to int8 codes in registers, straight into the tensor cores.

Definition.  `out[m, n] = bias[n] + sum_t act_scale[t, m] * scale[n, t] * (sum_k codes[n, t, k] * x[m, t, k])`, inner sums exact in int32,
             outer sums in fp32; plus `residual[m, n]` if there is one.
Storage.     Activations as `hq_inductor.ops.kernels.activations` writes them.
Work.        A strip is 16 rows of the weight. A block has up to NUM_WARPS strips in a row, as many as any other or one more, and its warps
             take equal runs of their tiles: no multiprocessor has much more to decode than another, and none leaves a sum unfinished. A
             run has tiles of one strip or of two. Sums meet in shared memory, once, in the order of the warps: the result does not depend
             on timing.
             A warp decodes two vectors at a time, one of row r and one of row r + 8: together the A operand of one `mma.m16n8k32`, which
             every 8 columns of the batch then use. While it decodes a tile, the stream plane of the next one is on its way to shared
             memory, and the raw words of the next group to registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .blocks import add_tile, first_unit, load_chunks, stage_stream, store_strip, tile_offset, weight_of_block, zeros_of
from .memory import load_16, load_global, store_global
from .shared import (
    ROW_GAP,
    SHARED_BYTES,
    TABLE_BYTES,
    buffer_bytes,
    declare_shared,
    load_shared_float,
    load_table,
    store_shared_16,
    wait_copies,
)
from .tile import decode_vector, first_cursor, first_window, header_word, load_raw, next_quads, read_header, restore_signs
from .warp import mma_s8, own_warp, rounds_of

_INTERPRETED = tl.constexpr(INTERPRETED)


def most_strips(columns: int, num_warps: int, row_bytes: int) -> int:
    """Strips that a block can have: a run that goes on to another strip leaves its sums of the first in shared memory."""
    sums = 512 * (columns // 8)
    # of its last strip every warp leaves them where its stream planes were
    fixed = TABLE_BYTES.value + num_warps * (buffer_bytes(row_bytes) or sums)
    return min(num_warps, 1 + (SHARED_BYTES.value - fixed) // sums)


if INTERPRETED:

    @triton.jit
    def _sum_of_strip(totals, mine, NUM_WARPS: tl.constexpr):
        """Sums over the warps whose totals are `mine`, in all of them."""
        sums = ()
        for i in tl.static_range(len(totals)):
            apart = tl.reshape(tl.where(mine, totals[i], 0.0), [NUM_WARPS, 32])
            sums = sums + (tl.reshape(tl.broadcast_to(tl.sum(apart, 0)[None, :], [NUM_WARPS, 32]), [32 * NUM_WARPS]),)
        return sums


@triton.jit
def _share(warp, units, NUM_WARPS: tl.constexpr):
    """First unit of a warp's run: `warp * units // NUM_WARPS`."""
    PLACES: tl.constexpr = (NUM_WARPS > 1) + (NUM_WARPS > 2) + (NUM_WARPS > 4)
    return (warp * units) >> PLACES


@triton.jit
def _leave_sums(totals, address, lane, BLOCKS: tl.constexpr):
    """A warp's sums to shared memory, as MMAs leave them."""
    for b in tl.static_range(BLOCKS):
        store_shared_16(address + 512 * b + 16 * lane, totals[4 * b], totals[4 * b + 1], totals[4 * b + 2], totals[4 * b + 3])


@triton.jit
def _add_and_store(
    first_strip,
    count,
    tiles,
    column,
    m0,
    M,
    N,
    total,
    thread,
    ends_address,
    crossings_address,
    bias_ptr,
    residual_ptr,
    stride_residual,
    out_ptr,
    END_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sums of a block's strips to the output: those of warp w's last strip are at `ends_address + END_BYTES w`, those of the i-th strip
    which a warp left for the next one at `crossings_address + 512 BLOCKS i`."""
    units = count * tiles
    for first in range(0, 128 * count, 32 * NUM_WARPS):
        output = first + thread
        # neighbours have neighbouring rows, which lie side by side in the output
        row = output & 15
        column_of = (output >> 4) & 7
        i = output >> 7
        n = (first_strip + i) * 16 + row
        m = m0 + column_of
        place = ((row & 7) << 6) + ((column_of >> 1) << 4) + ((row >> 3) << 3) + ((column_of & 1) << 2)
        inside = (i < count) & (n < N)
        values = ()
        for b in tl.static_range(BLOCKS):
            value = (thread * 0).to(tl.float32)
            if HAS_BIAS:
                value += load_global(bias_ptr + n, inside).to(tl.float32)
            if HAS_RESIDUAL:
                residual_row = residual_ptr + (m + 8 * b).to(tl.int64) * stride_residual
                value += load_global(residual_row + (column + n), inside & (m + 8 * b < M)).to(tl.float32)
            values = values + (value,)
        for w in tl.static_range(NUM_WARPS):
            begin = _share(w, units, NUM_WARPS)
            end = _share(w + 1, units, NUM_WARPS)
            part = inside & (begin < (i + 1) * tiles) & (end > i * tiles)
            goes_on = end > (i + 1) * tiles
            there = place + tl.where(goes_on, crossings_address + (512 * BLOCKS) * i, ends_address + END_BYTES * w)
            added = ()
            for b in tl.static_range(BLOCKS):
                added = added + (values[b] + load_shared_float(there + 512 * b, part),)
            values = added
        for b in tl.static_range(BLOCKS):
            out_row = out_ptr + (m + 8 * b).to(tl.int64) * total
            store_global(out_row + (column + n), values[b].to(out_ptr.dtype.element_ty), inside & (m + 8 * b < M))


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
@triton.jit(do_not_specialize=["M", "M_PAD", "N", "N1", "N2", "N3", "tiles", "dealt", "dealt1", "dealt2", "dealt3"])
def linear_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [4096] int32
    x_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N + N1 + N2 + N3]
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
    dealt,  # of each weight: 16 times its blocks, which together are all programs (i, .), and the fewest strips that one of them has
    dealt1,
    dealt2,
    dealt3,
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, c): the i-th block of the weights' strips, `most_strips` of them at the most; batch columns COLUMNS c on."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    BLOCKS: tl.constexpr = COLUMNS // 8  # n-blocks of the MMA
    # 16-byte loads of the raw words; unrolled, so short tiles only
    CHUNKED: tl.constexpr = ALIGNED and LATTICE != "d4" and GROUPS <= 4 and K * GROUPS % 4 == 0
    FIRST: tl.constexpr = (K - 1) // 4 + 1  # 16-byte loads that the first group needs

    thread = tl.arange(0, 32 * NUM_WARPS)
    table_address = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread)
        load_table(table_ptr, table_address, thread, NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    pointers = (words_ptr, words1_ptr, words2_ptr, words3_ptr, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
    words_ptr, bias_ptr, index, dealt, column, N, total = weight_of_block(
        tl.program_id(0), pointers, (N, N1, N2, N3), (dealt, dealt1, dealt2, dealt3), SIBLINGS
    )
    # divisions take long, and nothing can be loaded before
    fewest = dealt & 15
    longer = ((N + 15) >> 4) - fewest * (dealt >> 4)
    first_strip = first_unit(index, fewest, longer)
    count = first_unit(index + 1, fewest, longer) - first_strip
    # a warp's run of the block's tiles
    own = own_warp(N, thread)
    begin = _share(own, count * tiles, NUM_WARPS)
    mine = _share(own + 1, count * tiles, NUM_WARPS) - begin
    m0 = tl.program_id(1) * COLUMNS
    before = own * 0
    for i in tl.static_range(1, NUM_WARPS):
        before += tl.where(begin >= i * tiles, 1, 0)
    strip = first_strip + before
    t = begin - before * tiles

    # offsets of 32 bits from here on, where registers are dear: a weight has less than 2^31 words
    x_step = M_PAD * 64
    x_row = (m0 + r) * 64 + j * 16
    # of a warp: two buffers, used in turns
    BUFFER: tl.constexpr = 16 * (ROW_BYTES + ROW_GAP)
    # measured: with 16 columns the larger ones are 5 % slower, else 2 to 8 % faster
    PIECE: tl.constexpr = 8 if COLUMNS == 16 else 16
    # that, or a warp's sums, where there is nothing else
    END_BYTES: tl.constexpr = 2 * BUFFER if ROW_BYTES > 0 else 512 * BLOCKS
    buffers = thread * 0
    crossings_address = thread * 0
    if not _INTERPRETED:
        buffers = table_address + TABLE_BYTES + warp * END_BYTES
        crossings_address = table_address + (TABLE_BYTES + NUM_WARPS * END_BYTES)
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
    left = totals  # under the interpreter: sums of a strip that the warp left, and its number
    left_strip = strip * 0 - 1
    buffer = 0
    for i in range(rounds_of(mine)):
        # what comes next: the same again after the last one
        wraps = (t + 1 == tiles) & (i + 1 < mine)
        next_strip = tl.where(wraps, strip + 1, strip)
        next_t = tl.where(i + 1 < mine, tl.where(wraps, 0, t + 1), t)
        # not read where the planes have copies
        streams = (words_ptr + tile_u + RAW, words_ptr + tile_v + RAW)
        if ROW_BYTES > 0:
            wait_copies(lane)
            bits_u = (buffers + (buffer * BUFFER + r * (ROW_BYTES + ROW_GAP))) * 8
            bits_v = bits_u + 8 * 8 * (ROW_BYTES + ROW_GAP)
            buffer = 1 - buffer
            stage_stream(words_ptr, next_strip, next_t, N, tiles, lane, buffers + buffer * BUFFER, RAW, WORDS, ROW_BYTES, ALIGNED, PIECE)
        column_ptr = act_scale_ptr + t * M_PAD + m0 + 2 * j
        column_scales = ()
        if BLOCKS <= 2:
            # under way long before the end of the tile, as far as registers go
            for b in tl.static_range(BLOCKS):
                column_scales = column_scales + (load_global(column_ptr + 8 * b), load_global(column_ptr + 8 * b + 1))
        scale_u, wall_u = read_header(header_word(streams[0], bits_u, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        scale_v, wall_v = read_header(header_word(streams[1], bits_v, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        if _INTERPRETED:
            # warps that are done decode the last tile again for nothing
            scale_u = tl.where(i < mine, scale_u, 0.0)
            scale_v = tl.where(i < mine, scale_v, 0.0)
        x_u = first_cursor(bits_u, wall_u, j, END)
        x_v = first_cursor(bits_v, wall_v, j, END)
        window_u = first_window(streams[0], x_u, odd, STREAM, ROW_BYTES)
        window_v = first_window(streams[1], x_v, odd, STREAM, ROW_BYTES)
        windows = (window_u, window_v)
        place = x_row + (t * (TILE // 64)) * x_step

        sums = ()
        for _ in tl.static_range(4 * BLOCKS):
            sums = sums + (thread * 0,)
        next_u = tile_offset(next_strip, r, next_t, N, tiles, WORDS)
        next_v = tile_offset(next_strip, r + 8, next_t, N, tiles, WORDS)
        if CHUNKED:
            words_u = ahead_u
            words_v = ahead_v
            for g in tl.static_range(GROUPS):
                # what the next group needs is under way while this one is decoded
                if g + 1 < GROUPS:
                    words_u = load_chunks(words_u, words_ptr + tile_u, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                    words_v = load_chunks(words_v, words_ptr + tile_v, j, (K * g + K - 1) // 4 + 1, (K * g + 2 * K - 1) // 4 + 1)
                else:
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
                ahead_u = load_raw(words_ptr + tl.where(more, tile_u, next_u), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
                ahead_v = load_raw(words_ptr + tl.where(more, tile_v, next_v), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
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
        totals = add_tile(totals, sums, scale_u, scale_v, column_scales, BLOCKS)
        if _INTERPRETED:
            kept = ()
            began = ()
            for k in tl.static_range(4 * BLOCKS):
                kept = kept + (tl.where(wraps, totals[k], left[k]),)
                began = began + (tl.where(wraps, 0.0, totals[k]),)
            left = kept
            left_strip = tl.where(wraps, strip, left_strip)
            totals = began
        elif wraps:
            _leave_sums(totals, crossings_address + (512 * BLOCKS) * (strip - first_strip), lane, BLOCKS)
            totals = zeros_of(thread, 4 * BLOCKS)
        t = next_t
        tile_u = next_u
        tile_v = next_v
        strip = next_strip

    if PDL:
        # not before: what starts early takes its place among the blocks of this kernel that still wait for theirs
        gdc_launch_dependents()
    if _INTERPRETED:
        for i in range(count):
            met = ()
            ends = _sum_of_strip(totals, strip == first_strip + i, NUM_WARPS)
            crossings = _sum_of_strip(left, left_strip == first_strip + i, NUM_WARPS)
            for k in tl.static_range(4 * BLOCKS):
                met = met + (ends[k] + crossings[k],)
            store_strip(
                met,
                first_strip + i,
                warp == 0,
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
        # of the last tile's copies, which came again
        wait_copies(lane)
        _leave_sums(totals, buffers, lane, BLOCKS)
        tl.debug_barrier()
        _add_and_store(
            first_strip,
            count,
            tiles,
            column,
            m0,
            M,
            N,
            total,
            thread,
            table_address + TABLE_BYTES,
            crossings_address,
            bias_ptr,
            residual_ptr,
            stride_residual,
            out_ptr,
            END_BYTES,
            BLOCKS,
            HAS_BIAS,
            HAS_RESIDUAL,
            NUM_WARPS,
        )
