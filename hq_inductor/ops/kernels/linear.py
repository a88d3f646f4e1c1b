"""Fused linear layer for small batches: words to int8 codes in registers, straight into the tensor cores.

Definition.  `out[m, n] = bias[n] + sum_t act_scale[t, m] * scale[n, t] * (sum_k codes[n, t, k] * x[m, t, k])`, inner sums exact in int32,
             outer sums in fp32 in order of t; plus `residual[m, n]` if there is one.
Storage.     Activations as `hq_inductor.ops.kernels.activations` writes them.
Work.        A warp owns 16 rows of the weight, and decodes two vectors at a time, one of row r and one of row r + 8: together the A operand
             of one `mma.m16n8k32`, which every 8 columns of the batch then use. While it decodes a tile, the stream plane of the next one
             is on its way to shared memory, and the raw words of the next group to registers.
             Tiles of a row may be split over several blocks: then parts go to memory, and the warp that finishes a row's last one adds
             them up, in order: the result does not depend on who that is.
             Up to four weights of one format share a launch: their rows follow each other in the output, each weight starts a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .memory import load_pair, load_uncached, load_where, store_where
from .shared import TABLE_BYTES, commit_copies, copy_async_4, copy_async_16, declare_shared, load_tables, wait_copies
from .tile import decode_vector, first_cursor, first_words, load_raw, next_quads, read_header, restore_signs, stream_word
from .warp import mma_s8

_INTERPRETED = tl.constexpr(INTERPRETED)


if INTERPRETED:

    @triton.jit
    def _count_in(pointer, lane, NUM_WARPS: tl.constexpr):
        before = tl.atomic_add(pointer, 1, mask=lane == 0)
        before = tl.max(tl.reshape(tl.where(lane == 0, before, 0), [NUM_WARPS, 32]), 1)
        return tl.reshape(tl.broadcast_to(before[:, None], [NUM_WARPS, 32]), [32 * NUM_WARPS])

    @triton.jit
    def _load_16(pointer):
        pointer = pointer.to(tl.pointer_type(tl.int32))
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)

else:

    @triton.jit
    def _count_in(pointer, lane, NUM_WARPS: tl.constexpr):
        """Add one to a counter, once per warp, after all the warp wrote; every thread gets the count before.

        Release only: an acquire would throw the multiprocessor's whole L1 away each time. What the count guards is read from L2.
        """
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first; .reg .b32 before;
            setp.eq.u32 first, $2, 0;
            bar.warp.sync 0xffffffff;
            @first atom.add.release.gpu.global.u32 before, [$1], 1;
            bar.warp.sync 0xffffffff;
            shfl.sync.idx.b32 $0, before, 0, 31, 0xffffffff;
            }""",
            "=r,l,r",
            [pointer.to(tl.int64), lane],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _load_16(pointer):
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def tile_offset(strip, row, t, N, tiles, WORDS: tl.constexpr):
    """Words before tile `t` of row `row` of a strip of 16, the nearest there is."""
    return (tl.minimum(strip * 16 + row, N - 1) * tiles + tl.minimum(t, tiles - 1)) * WORDS


@triton.jit
def stage_stream(
    words_ptr, strip, t, N, tiles, lane, address, RAW: tl.constexpr, WORDS: tl.constexpr, ROW_BYTES: tl.constexpr, ALIGNED: tl.constexpr
):
    """Start copying the stream planes of 16 rows' tile `t` to a buffer."""
    STREAM: tl.constexpr = WORDS - RAW
    if ALIGNED:
        CHUNKS: tl.constexpr = STREAM // 4
        for step in tl.static_range(0, (16 * CHUNKS + 31) // 32):
            index = step * 32 + lane
            # past the last row: the same bytes again
            row = tl.minimum(index // CHUNKS, 15)
            offset = 16 * (index % CHUNKS)
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + offset // 4)
            copy_async_16(address + row * ROW_BYTES + (offset ^ (row * 16 % ROW_BYTES % 128)), source)
    else:
        word = tl.minimum(lane, STREAM - 1)
        for row in tl.static_range(0, 16):
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + word)
            copy_async_4(address + row * ROW_BYTES + ((4 * word) ^ (row * 16 % ROW_BYTES % 128)), source)
    commit_copies(lane)


@triton.jit
def load_chunks(words, tile_ptr, j, FIRST: tl.constexpr, LAST: tl.constexpr):
    """`words` and the raw words 4 FIRST to 4 LAST of lane `j`."""
    for c in tl.static_range(FIRST, LAST):
        words = words + _load_16(tile_ptr + 16 * c + 4 * j)
    return words


@triton.jit
def _multiply_group(
    sums,
    raw_u,
    raw_v,
    cursors,
    odd,
    streams,
    addresses,
    table_ptr,
    table_address,
    x_ptr,
    x_lane,
    x_step,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    STREAM: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Decode a group of both rows and add its products to `sums`."""
    AHEAD: tl.constexpr = BLOCKS if BLOCKS <= 2 else 1
    first_u, second_u, x_u, first_v, second_v, x_v = cursors
    signs_u = restore_signs(raw_u, K, LATTICE)
    signs_v = restore_signs(raw_v, K, LATTICE)
    for v in tl.static_range(4):
        if v % 2 == 0:
            # long before they are multiplied, as far as registers go
            columns = ()
            for b in tl.static_range(AHEAD):
                columns = columns + _load_16(x_ptr + x_lane + b * 512)
        e0, e1, first_u, second_u, x_u = next_quads(
            first_u, second_u, x_u, odd, streams[0], addresses[0], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES
        )
        f0, f1, first_v, second_v, x_v = next_quads(
            first_v, second_v, x_v, odd, streams[1], addresses[1], table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES
        )
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
                    b0, b1, b2, b3 = _load_16(x_ptr + x_lane + b * 512)
                s0, s1, s2, s3 = sums[4 * b], sums[4 * b + 1], sums[4 * b + 2], sums[4 * b + 3]
                s0, s1, s2, s3 = mma_s8(s0, s1, s2, s3, held0, held1, held2, held3, b0, b1, NUM_WARPS)
                updated = updated + mma_s8(s0, s1, s2, s3, a0, a1, a2, a3, b2, b3, NUM_WARPS)
            sums = updated
            x_lane += x_step
    return sums, (first_u, second_u, x_u, first_v, second_v, x_v), x_lane


@triton.jit
def _select(condition, a, b):
    """Scalar choice of two pointers of one type."""
    return tl.where(condition, a.to(tl.int64), b.to(tl.int64)).to(a.dtype)


# one binary for all sizes
@triton.jit(do_not_specialize=["M", "M_PAD", "N", "N1", "N2", "N3", "tiles"])
def linear_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [2, 4096] int32
    x_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N + N1 + N2 + N3]
    partial_ptr,  # [parts, M_PAD, N + N1 + N2 + N3] fp32 if SPLIT
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
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, p, c): rows 16 NUM_WARPS i on, part p of the tiles, batch columns COLUMNS c on."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    BLOCKS: tl.constexpr = COLUMNS // 8  # n-blocks of the MMA
    # 16-byte loads of the raw words; unrolled, so short tiles only
    CHUNKED: tl.constexpr = ALIGNED and LATTICE != "d4" and GROUPS <= 4 and K * GROUPS % 4 == 0
    FIRST: tl.constexpr = (K - 1) // 4 + 1  # 16-byte loads that the first group needs

    # the weight of this block, its first block, and the output column of its first row
    block = tl.program_id(0)
    total = N
    column = 0
    if SIBLINGS > 1:
        rows = N
        total = N + N1
        blocks = (N + 16 * NUM_WARPS - 1) // (16 * NUM_WARPS)
        other = block >= blocks
        block = tl.where(other, block - blocks, block)
        column = tl.where(other, rows, column)
        words_ptr = _select(other, words1_ptr, words_ptr)
        bias_ptr = _select(other, bias1_ptr, bias_ptr)
        N = tl.where(other, N1, N)
        if SIBLINGS > 2:
            total += N2
            blocks = (N1 + 16 * NUM_WARPS - 1) // (16 * NUM_WARPS)
            other = other & (block >= blocks)
            block = tl.where(other, block - blocks, block)
            column = tl.where(other, column + N1, column)
            words_ptr = _select(other, words2_ptr, words_ptr)
            bias_ptr = _select(other, bias2_ptr, bias_ptr)
            N = tl.where(other, N2, N)
        if SIBLINGS > 3:
            total += N3
            blocks = (N2 + 16 * NUM_WARPS - 1) // (16 * NUM_WARPS)
            other = other & (block >= blocks)
            block = tl.where(other, block - blocks, block)
            column = tl.where(other, column + N2, column)
            words_ptr = _select(other, words3_ptr, words_ptr)
            bias_ptr = _select(other, bias3_ptr, bias_ptr)
            N = tl.where(other, N3, N)
    part = tl.program_id(1)
    m0 = tl.program_id(2) * COLUMNS
    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    strip = block * NUM_WARPS + warp
    splits = tl.num_programs(1)
    first_tile = part * tiles // splits
    last_tile = (part + 1) * tiles // splits

    # offsets of 32 bits from here on, where registers are dear: a weight has less than 2^31 words
    x_step = M_PAD * 64
    x_row = (m0 + r) * 64 + j * 16
    table_address = thread * 0
    buffers = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread)
        load_tables(table_ptr, table_address, thread, NUM_WARPS)
        buffers = table_address + TABLE_BYTES + warp * (32 * ROW_BYTES)
        if ROW_BYTES > 0:
            stage_stream(words_ptr, strip, first_tile, N, tiles, lane, buffers, RAW, WORDS, ROW_BYTES, ALIGNED)
    tile_u = tile_offset(strip, r, first_tile, N, tiles, WORDS)
    tile_v = tile_offset(strip, r + 8, first_tile, N, tiles, WORDS)
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
    row_address = r * ROW_BYTES
    if ROW_BYTES > 0:
        row_address = row_address ^ (r * 16 % ROW_BYTES)
    # in turns of two buffers
    address = buffers + row_address

    totals = ()
    for _ in tl.static_range(4 * BLOCKS):
        totals = totals + (tl.zeros([32 * NUM_WARPS], tl.float32),)
    for t in range(first_tile, last_tile):
        streams = (words_ptr + tile_u + RAW, words_ptr + tile_v + RAW)
        addresses = (address, address + 8 * ROW_BYTES)
        if ROW_BYTES > 0:
            wait_copies(lane)
            address = (((address - buffers) ^ (16 * ROW_BYTES)) + buffers).to(tl.int32)
            stage_stream(words_ptr, strip, t + 1, N, tiles, lane, address - row_address, RAW, WORDS, ROW_BYTES, ALIGNED)
        column_ptr = act_scale_ptr + t * M_PAD + m0 + 2 * j
        column_scales = ()
        if BLOCKS <= 2:
            # under way long before the end of the tile, as far as registers go
            for b in tl.static_range(BLOCKS):
                column_scales = column_scales + load_pair(column_ptr + 8 * b)
        scale_u, wall_u = read_header(stream_word(streams[0], addresses[0], thread * 0, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        scale_v, wall_v = read_header(stream_word(streams[1], addresses[1], thread * 0, STREAM, ROW_BYTES), END, WALL_UNIT, GAIN)
        x_u = first_cursor(wall_u, j, END)
        x_v = first_cursor(wall_v, j, END)
        first_u, second_u = first_words(streams[0], addresses[0], x_u, odd, STREAM, ROW_BYTES)
        first_v, second_v = first_words(streams[1], addresses[1], x_v, odd, STREAM, ROW_BYTES)
        cursors = (first_u, second_u, x_u, first_v, second_v, x_v)
        x_lane = x_row + (t * (TILE // 64)) * x_step

        sums = ()
        for _ in tl.static_range(4 * BLOCKS):
            sums = sums + (tl.zeros([32 * NUM_WARPS], tl.int32),)
        if CHUNKED:
            words_u = ahead_u
            words_v = ahead_v
            for g in tl.static_range(GROUPS):
                # what the next group needs is under way while this one is decoded
                if g + 1 < GROUPS:
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
                sums, cursors, x_lane = _multiply_group(
                    sums,
                    raw_u,
                    raw_v,
                    cursors,
                    odd,
                    streams,
                    addresses,
                    table_ptr,
                    table_address,
                    x_ptr,
                    x_lane,
                    x_step,
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
            next_u = tile_offset(strip, r, t + 1, N, tiles, WORDS)
            next_v = tile_offset(strip, r + 8, t + 1, N, tiles, WORDS)
            for g in range(GROUPS):
                raw_u = ahead_u
                raw_v = ahead_v
                g_next = (g + 1) % GROUPS
                ahead_u = load_raw(words_ptr + tl.where(g + 1 < GROUPS, tile_u, next_u), g_next, j, K, LATTICE, GROUPS)
                ahead_v = load_raw(words_ptr + tl.where(g + 1 < GROUPS, tile_v, next_v), g_next, j, K, LATTICE, GROUPS)
                sums, cursors, x_lane = _multiply_group(
                    sums,
                    raw_u,
                    raw_v,
                    cursors,
                    odd,
                    streams,
                    addresses,
                    table_ptr,
                    table_address,
                    x_ptr,
                    x_lane,
                    x_step,
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
                column_scales = column_scales + load_pair(column_ptr + 8 * b)
        updated_totals = ()
        for b in tl.static_range(BLOCKS):
            s0 = column_scales[2 * b]
            s1 = column_scales[2 * b + 1]
            updated_totals = updated_totals + (
                totals[4 * b] + sums[4 * b].to(tl.float32) * (s0 * scale_u),
                totals[4 * b + 1] + sums[4 * b + 1].to(tl.float32) * (s1 * scale_u),
                totals[4 * b + 2] + sums[4 * b + 2].to(tl.float32) * (s0 * scale_v),
                totals[4 * b + 3] + sums[4 * b + 3].to(tl.float32) * (s1 * scale_v),
            )
        totals = updated_totals
        tile_u = next_u
        tile_v = next_v

    if PDL:
        # not before: what starts early takes its place among the blocks of this kernel that still wait for theirs
        gdc_launch_dependents()
    row_u = strip * 16 + r
    row_v = row_u + 8
    mine = row_u - r < N
    if SPLIT:
        for b in tl.static_range(BLOCKS):
            for i in tl.static_range(4):
                row = row_u if i < 2 else row_v
                m = m0 + 8 * b + 2 * j + i % 2
                store_where(partial_ptr + (part * M_PAD + m).to(tl.int64) * total + (column + row), totals[4 * b + i], row < N)
        # strips beyond the last row count too, in counters of their own
        counter = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * NUM_WARPS + warp
        mine = mine & (_count_in(counter_ptr + counter, lane, NUM_WARPS) == splits - 1)
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(4):
            row = row_u if i < 2 else row_v
            m = m0 + 8 * b + 2 * j + i % 2
            mask = mine & (row < N) & (m < M)
            value = totals[4 * b + i]
            if SPLIT:
                value = tl.zeros([32 * NUM_WARPS], tl.float32)
                for s in range(splits):
                    value += load_uncached(partial_ptr + (s * M_PAD + m).to(tl.int64) * total + (column + row), mask)
            if HAS_BIAS:
                value += load_where(bias_ptr + row, mask).to(tl.float32)
            if HAS_RESIDUAL:
                value += load_where(residual_ptr + m.to(tl.int64) * stride_residual + (column + row), mask).to(tl.float32)
            store_where(out_ptr + m.to(tl.int64) * total + (column + row), value.to(out_ptr.dtype.element_ty), mask)
