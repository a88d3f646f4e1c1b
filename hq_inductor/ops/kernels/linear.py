"""Fused linear layer for small batches: words to int8 codes in registers, straight into the tensor cores.

Definition.  `out[m, n] = bias[n] + sum_t act_scale[t, m] * scale[n, t] * (sum_k codes[n, t, k] * x[m, t, k])`, inner sums exact in int32,
             outer sums in fp32 in order of t.
Storage.     Activations as `hq_inductor.ops.kernels.activations` writes them.
Work.        A warp owns 16 rows of the weight, and decodes two vectors at a time, one of row r and one of row r + 8: together the A operand
             of one `mma.m16n8k32`, which every 8 columns of the batch then use. While it decodes a tile, the stream plane of the next one
             is on its way to shared memory, and the raw words of the next group to registers. Tiles of a row may be split over
             `SPLITS` blocks; the last one of a row block to finish adds up the parts, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .shared import (
    BUFFER_BYTES,
    TABLE_BYTES,
    WARP_BYTES,
    commit_copies,
    copy_async_4,
    copy_async_16,
    declare_shared,
    wait_copies,
)
from .tile import decode_vector, first_cursor, load_header, load_raw, next_quads, read_word, restore_signs

_INTERPRETED = tl.constexpr(INTERPRETED)


if INTERPRETED:

    @triton.jit
    def _byte(x, i: tl.constexpr):
        return (x << (24 - 8 * i)) >> 24

    @triton.jit
    def _mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, NUM_WARPS: tl.constexpr):
        shape: tl.constexpr = [NUM_WARPS, 8, 1, 4]
        upper = tl.zeros([NUM_WARPS, 8, 8], tl.int32)
        lower = tl.zeros([NUM_WARPS, 8, 8], tl.int32)
        for i in tl.static_range(4):
            x0 = tl.reshape(_byte(b0, i), [NUM_WARPS, 1, 8, 4])
            x1 = tl.reshape(_byte(b1, i), [NUM_WARPS, 1, 8, 4])
            upper += tl.sum(tl.reshape(_byte(a0, i), shape) * x0 + tl.reshape(_byte(a2, i), shape) * x1, 3)
            lower += tl.sum(tl.reshape(_byte(a1, i), shape) * x0 + tl.reshape(_byte(a3, i), shape) * x1, 3)
        d0, d1 = tl.split(tl.reshape(upper, [32 * NUM_WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(lower, [32 * NUM_WARPS, 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3

    @triton.jit
    def _count_in(pointer, table_address, thread):
        return thread * 0 + tl.atomic_add(pointer, 1)

    @triton.jit
    def _load_16(pointer):
        pointer = pointer.to(tl.pointer_type(tl.int32))
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)

else:

    @triton.jit
    def _mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, NUM_WARPS: tl.constexpr):
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _count_in(pointer, table_address, thread):
        """Add one to a counter, once per block; every thread gets the count before. Reuses the table's memory."""
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first; .reg .b32 before;
            setp.eq.u32 first, $3, 0;
            @first atom.add.acq_rel.gpu.global.u32 before, [$1], 1;
            @first st.shared.u32 [$2], before;
            bar.sync 0;
            ld.shared.u32 $0, [$2];
            }""",
            "=r,l,r,r",
            [(pointer + thread * 0).to(tl.int64), table_address, thread],
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
def _stage_stream(words_ptr, row0, N, tiles, t, lane, address, RAW: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Start copying the stream planes of 16 rows' tile `t` to a buffer."""
    STREAM: tl.constexpr = WORDS - RAW
    if ALIGNED:
        CHUNKS: tl.constexpr = (STREAM + 3) // 4
        for step in tl.static_range(0, (16 * CHUNKS + 31) // 32):
            index = step * 32 + lane
            row = index // CHUNKS
            chunk = index % CHUNKS
            # past the last row: the same bytes again
            row = tl.minimum(row, 15)
            source = words_ptr + (tl.minimum(row0 + row, N - 1).to(tl.int64) * tiles + t) * WORDS + RAW + 4 * chunk
            copy_async_16(address + row * 128 + ((chunk ^ (row & 7)) << 4), source)
    else:
        for row in tl.static_range(0, 16):
            source = words_ptr + (tl.minimum(row0 + row, N - 1).to(tl.int64) * tiles + t) * WORDS + RAW + tl.minimum(lane, STREAM - 1)
            copy_async_4(address + row * 128 + ((4 * tl.minimum(lane, STREAM - 1)) ^ ((row & 7) << 4)), source)
    commit_copies(lane)


@triton.jit
def _load_table(table_ptr, address, thread, NUM_WARPS: tl.constexpr):
    for step in tl.static_range(0, 4096 // (4 * 32 * NUM_WARPS)):
        index = (step * 32 * NUM_WARPS + thread) * 4
        copy_async_16(address + index * 4, table_ptr + index)


@triton.jit
def linear_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [4096] int32
    x_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N]
    partial_ptr,  # [SPLITS, M_PAD, N] fp32 if SPLITS > 1
    counter_ptr,  # [blocks] int32 zeros if SPLITS > 1
    M,
    M_PAD,
    N,
    tiles,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    RAW: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Program (i, s, b): rows 16 NUM_WARPS i on, part s of the tiles, batch columns COLUMNS b on."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    BLOCKS: tl.constexpr = COLUMNS // 8  # n-blocks of the MMA

    block = tl.program_id(0)
    part = tl.program_id(1)
    m0 = tl.program_id(2) * COLUMNS
    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    j = lane % 4
    r = lane // 4
    odd = (lane & 1) != 0
    row0 = block * (16 * NUM_WARPS) + (thread // 32) * 16
    row_u = row0 + r
    row_v = row_u + 8
    first_tile = part * tiles // SPLITS
    last_tile = (part + 1) * tiles // SPLITS

    tile_u = words_ptr + (tl.minimum(row_u, N - 1).to(tl.int64) * tiles + first_tile) * WORDS
    tile_v = words_ptr + (tl.minimum(row_v, N - 1).to(tl.int64) * tiles + first_tile) * WORDS
    x_lane = x_ptr + ((first_tile * (TILE // 64)).to(tl.int64) * M_PAD + m0 + r) * 64 + j * 16
    table_address = thread * 0
    buffers = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread, NUM_WARPS)
        _load_table(table_ptr, table_address, thread, NUM_WARPS)
        buffers = table_address + TABLE_BYTES + (thread // 32) * WARP_BYTES
        if STAGED:
            _stage_stream(words_ptr, row0, N, tiles, first_tile, lane, buffers, RAW, WORDS, ALIGNED)
        wait_copies(lane, 0)
        tl.debug_barrier()
    lane_address = (r * 128) ^ (r << 4) ^ tl.where(odd, 0x7C, 0)
    buffer = 0

    totals = ()
    for b in tl.static_range(4 * BLOCKS):
        totals = totals + (tl.zeros([32 * NUM_WARPS], tl.float32),)

    raw_u = load_raw(tile_u, 0, j, K, LATTICE)
    raw_v = load_raw(tile_v, 0, j, K, LATTICE)
    for t in range(first_tile, last_tile):
        scale_u, wall_u = load_header(tile_u, RAW, END, WALL_UNIT)
        scale_v, wall_v = load_header(tile_v, RAW, END, WALL_UNIT)
        stream_u = tile_u + RAW
        stream_v = tile_v + RAW
        address_u = lane_address
        address_v = lane_address
        if STAGED:
            wait_copies(lane, 0)
            address_u = (buffers + buffer) ^ lane_address
            address_v = (buffers + buffer + 1024) ^ lane_address
            buffer = buffer ^ BUFFER_BYTES
            # the last one is copied again: a copy too many costs less than a branch
            _stage_stream(words_ptr, row0, N, tiles, tl.minimum(t + 1, last_tile - 1), lane, buffers + buffer, RAW, WORDS, ALIGNED)
        x_u = first_cursor(wall_u, j, END)
        x_v = first_cursor(wall_v, j, END)
        first_u = read_word(stream_u, address_u, x_u - 32, odd, STREAM, STAGED)
        first_v = read_word(stream_v, address_v, x_v - 32, odd, STREAM, STAGED)
        second_u = read_word(stream_u, address_u, x_u, odd, STREAM, STAGED)
        second_v = read_word(stream_v, address_v, x_v, odd, STREAM, STAGED)
        next_u = tile_u + WORDS
        next_v = tile_v + WORDS
        if t + 1 == last_tile:
            next_u = tile_u
            next_v = tile_v

        sums = ()
        for b in tl.static_range(4 * BLOCKS):
            sums = sums + (tl.zeros([32 * NUM_WARPS], tl.int32),)
        for g in range(GROUPS):
            stored_u, low1_u, low2_u, low3_u, low4_u = raw_u
            stored_v, low1_v, low2_v, low3_v, low4_v = raw_v
            ahead_u = tl.where(g + 1 < GROUPS, tile_u + (g + 1) * (RAW // GROUPS), next_u)
            ahead_v = tl.where(g + 1 < GROUPS, tile_v + (g + 1) * (RAW // GROUPS), next_v)
            raw_u = load_raw(ahead_u, 0, j, K, LATTICE)
            raw_v = load_raw(ahead_v, 0, j, K, LATTICE)
            signs_u = restore_signs(stored_u, low1_u, K, LATTICE)
            signs_v = restore_signs(stored_v, low1_v, K, LATTICE)
            for v in tl.static_range(4):
                e0, e1, first_u, second_u, x_u = next_quads(
                    first_u, second_u, x_u, stream_u, address_u, odd, table_ptr, table_address, SHIFT, STREAM, STAGED
                )
                f0, f1, first_v, second_v, x_v = next_quads(
                    first_v, second_v, x_v, stream_v, address_v, odd, table_ptr, table_address, SHIFT, STREAM, STAGED
                )
                a0, a2 = decode_vector(e0, e1, v, stored_u, signs_u, low1_u, low2_u, low3_u, low4_u, K, SHIFT, LATTICE)
                a1, a3 = decode_vector(f0, f1, v, stored_v, signs_v, low1_v, low2_v, low3_v, low4_v, K, SHIFT, LATTICE)
                if v % 2 == 0:
                    held0 = a0
                    held1 = a1
                    held2 = a2
                    held3 = a3
                else:
                    updated = ()
                    for b in tl.static_range(BLOCKS):
                        b0, b1, b2, b3 = _load_16(x_lane + b * 512)
                        c0, c1, c2, c3 = _mma(
                            sums[4 * b], sums[4 * b + 1], sums[4 * b + 2], sums[4 * b + 3], held0, held1, held2, held3, b0, b1, NUM_WARPS
                        )
                        updated = updated + _mma(c0, c1, c2, c3, a0, a1, a2, a3, b2, b3, NUM_WARPS)
                    sums = updated
                    x_lane += M_PAD.to(tl.int64) * 64

        column_ptr = act_scale_ptr + t * M_PAD + m0 + 2 * j
        updated_totals = ()
        for b in tl.static_range(BLOCKS):
            s0 = tl.load(column_ptr + 8 * b)
            s1 = tl.load(column_ptr + 8 * b + 1)
            updated_totals = updated_totals + (
                totals[4 * b] + sums[4 * b].to(tl.float32) * (s0 * scale_u),
                totals[4 * b + 1] + sums[4 * b + 1].to(tl.float32) * (s1 * scale_u),
                totals[4 * b + 2] + sums[4 * b + 2].to(tl.float32) * (s0 * scale_v),
                totals[4 * b + 3] + sums[4 * b + 3].to(tl.float32) * (s1 * scale_v),
            )
        totals = updated_totals
        tile_u = next_u
        tile_v = next_v

    if SPLITS == 1:
        for b in tl.static_range(BLOCKS):
            for i in tl.static_range(4):
                row = row_u if i < 2 else row_v
                m = m0 + 8 * b + 2 * j + i % 2
                value = totals[4 * b + i]
                if HAS_BIAS:
                    value += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
                tl.store(out_ptr + m.to(tl.int64) * N + row, value.to(out_ptr.dtype.element_ty), mask=(row < N) & (m < M))
    else:
        for b in tl.static_range(BLOCKS):
            for i in tl.static_range(4):
                row = row_u if i < 2 else row_v
                m = m0 + 8 * b + 2 * j + i % 2
                tl.store(partial_ptr + (part * M_PAD + m).to(tl.int64) * N + row, totals[4 * b + i], mask=row < N)
        # all threads' parts are written before one thread counts the block in
        tl.debug_barrier()
        done = _count_in(counter_ptr + block * tl.num_programs(2) + tl.program_id(2), table_address, thread)
        # a mask, not a branch: a scalar would take Triton's own shared memory, which the table leaves no room for
        last = done == SPLITS - 1
        for b in tl.static_range(BLOCKS):
            for i in tl.static_range(4):
                row = row_u if i < 2 else row_v
                m = m0 + 8 * b + 2 * j + i % 2
                mask = last & (row < N) & (m < M)
                value = tl.zeros([32 * NUM_WARPS], tl.float32)
                for s in tl.static_range(SPLITS):
                    # not from L1, which may hold what was there before
                    value += tl.load(partial_ptr + (s * M_PAD + m).to(tl.int64) * N + row, mask=mask, other=0.0, cache_modifier=".cg")
                if HAS_BIAS:
                    value += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + m.to(tl.int64) * N + row, value.to(out_ptr.dtype.element_ty), mask=mask)
