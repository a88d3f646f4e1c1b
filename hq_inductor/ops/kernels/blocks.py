"""Blocks of a fused linear layer: which tiles a block has, how their words come in, how its sums go out.

Unit.     One tile of all rows of a panel, which is a strip of 16 rows for each warp. Units are counted panel by panel, and dealt out to the
          blocks of the grid in runs as equal as can be: so all multiprocessors have work to the end, whatever the sizes.
Parts.    A panel whose units are in several runs has its sums in parts. They go to memory, and the warp that finishes a strip's last one
          adds them up, in order: the result does not depend on who that is.
Siblings. Up to four weights of one format share a launch: their rows follow each other in the output, each weight starts a panel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .memory import load_16, load_16_float, load_global, store_16, store_global
from .shared import commit_copies, copy_async, load_shared_16

if INTERPRETED:

    @triton.jit
    def count_in(pointer, lane, NUM_WARPS: tl.constexpr):
        before = tl.atomic_add(pointer, 1, mask=lane == 0)
        before = tl.max(tl.reshape(tl.where(lane == 0, before, 0), [NUM_WARPS, 32]), 1)
        return tl.reshape(tl.broadcast_to(before[:, None], [NUM_WARPS, 32]), [32 * NUM_WARPS])

else:

    @triton.jit
    def count_in(pointer, lane, NUM_WARPS: tl.constexpr):
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
        CHUNKS: tl.constexpr = STREAM // 2
        for step in tl.static_range(0, (16 * CHUNKS + 31) // 32):
            index = step * 32 + lane
            # past the last row: the same bytes again
            row = tl.minimum(index // CHUNKS, 15)
            offset = 8 * (index % CHUNKS)
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + offset // 4)
            copy_async(address + row * (ROW_BYTES + 8) + offset, source, 8)
    else:
        word = tl.minimum(lane, STREAM - 1)
        for row in tl.static_range(0, 16):
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + word)
            copy_async(address + row * (ROW_BYTES + 8) + 4 * word, source, 4)
    commit_copies(lane)


@triton.jit
def stage_tiles(words_ptr, strip, t, N, tiles, lane, address, WORDS: tl.constexpr, STRIDE: tl.constexpr):
    """Start copying tile `t` of 16 rows to a buffer, rows STRIDE bytes apart; WORDS is a multiple of 4."""
    CHUNKS: tl.constexpr = WORDS // 4
    for step in tl.static_range(0, (16 * CHUNKS + 31) // 32):
        index = step * 32 + lane
        # past the last row: the same bytes again
        row = tl.minimum(index // CHUNKS, 15)
        chunk = index % CHUNKS
        copy_async(address + row * STRIDE + 16 * chunk, words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + 4 * chunk, 16)


@triton.jit
def stage_scales(column_ptr, lane, address, COLUMNS: tl.constexpr):
    """Start copying COLUMNS scales to a buffer."""
    for step in tl.static_range(0, (COLUMNS + 127) // 128):
        # past the last column: the last ones again
        place = tl.minimum(4 * (step * 32 + lane), COLUMNS - 4)
        copy_async(address + 4 * place, column_ptr + place, 16)


@triton.jit
def load_staged_chunks(words, address, j, FIRST: tl.constexpr, LAST: tl.constexpr):
    """As `load_chunks`, from a tile in shared memory."""
    for c in tl.static_range(FIRST, LAST):
        words = words + load_shared_16(address + (64 * c + 16 * j))
    return words


@triton.jit
def load_chunks(words, tile_ptr, j, FIRST: tl.constexpr, LAST: tl.constexpr):
    """`words` and the raw words 4 FIRST to 4 LAST of lane `j`."""
    for c in tl.static_range(FIRST, LAST):
        words = words + load_16(tile_ptr + 16 * c + 4 * j)
    return words


@triton.jit
def select_pointer(condition, a, b):
    """Scalar choice of two pointers of one type."""
    return tl.where(condition, a.to(tl.int64), b.to(tl.int64)).to(a.dtype)


@triton.jit
def count_panels(N, N1, N2, N3, SIBLINGS: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Panels of all weights."""
    ROWS: tl.constexpr = 16 * NUM_WARPS
    panels = (N + ROWS - 1) // ROWS
    if SIBLINGS > 1:
        panels += (N1 + ROWS - 1) // ROWS
    if SIBLINGS > 2:
        panels += (N2 + ROWS - 1) // ROWS
    if SIBLINGS > 3:
        panels += (N3 + ROWS - 1) // ROWS
    return panels


@triton.jit
def first_unit(block, each, rest):
    """Of the run of a block; the first `rest` blocks have one unit more than `each`."""
    return block * each + tl.minimum(block, rest)


@triton.jit
def _block_of(unit, each, rest):
    """Which block's run a unit is in."""
    longer = rest * (each + 1)
    return tl.where(unit < longer, unit // (each + 1), rest + (unit - longer) // tl.maximum(each, 1))


@triton.jit
def weight_of_panel(
    panel,
    words_ptr,
    words1_ptr,
    words2_ptr,
    words3_ptr,
    bias_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    N,
    N1,
    N2,
    N3,
    SIBLINGS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Words, bias and rows of a panel's weight, its number among the weight's panels, the output column of the weight's first row."""
    ROWS: tl.constexpr = 16 * NUM_WARPS
    column = 0
    if SIBLINGS > 1:
        rows = N
        panels = (N + ROWS - 1) // ROWS
        other = panel >= panels
        panel = tl.where(other, panel - panels, panel)
        column = tl.where(other, rows, column)
        words_ptr = select_pointer(other, words1_ptr, words_ptr)
        bias_ptr = select_pointer(other, bias1_ptr, bias_ptr)
        N = tl.where(other, N1, N)
        if SIBLINGS > 2:
            panels = (N1 + ROWS - 1) // ROWS
            other = other & (panel >= panels)
            panel = tl.where(other, panel - panels, panel)
            column = tl.where(other, column + N1, column)
            words_ptr = select_pointer(other, words2_ptr, words_ptr)
            bias_ptr = select_pointer(other, bias2_ptr, bias_ptr)
            N = tl.where(other, N2, N)
        if SIBLINGS > 3:
            panels = (N2 + ROWS - 1) // ROWS
            other = other & (panel >= panels)
            panel = tl.where(other, panel - panels, panel)
            column = tl.where(other, column + N2, column)
            words_ptr = select_pointer(other, words3_ptr, words_ptr)
            bias_ptr = select_pointer(other, bias3_ptr, bias_ptr)
            N = tl.where(other, N3, N)
    return words_ptr, bias_ptr, N, panel, column


@triton.jit
def finish(
    totals,
    strip,
    column,
    m0,
    M,
    N,
    total,
    lane,
    warp,
    bias_ptr,
    residual_ptr,
    stride_residual,
    out_ptr,
    partial_ptr,
    counter_ptr,
    panel,
    panels,
    tiles,
    each,
    rest,
    starts,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sums of a warp's 16 rows and `8 BLOCKS` batch columns from m0 on, four per thread and block, to the output.

    `panel` is one of `panels`, `strip` the warp's among those of its weight, `starts` says whether the sums begin with the first tile.
    Parts lie in `partial_ptr` as threads hold them, fp32 `[blocks, 2, warps, BLOCKS, 32, 4]`: of each block a part that begins within a
    panel, and one that begins with it.
    """
    j = lane % 4
    r = lane // 4
    row_u = strip * 16 + r
    row_v = row_u + 8
    mine = row_u - r < N
    if SPLIT:
        first_block = _block_of(panel * tiles, each, rest)
        parts = _block_of(panel * tiles + (tiles - 1), each, rest) - first_block + 1
        if parts > 1:
            column_block = tl.program_id(1) * tl.num_programs(0)
            place = (2 * (column_block + tl.program_id(0)) + tl.where(starts, 1, 0)) * NUM_WARPS + warp
            for b in tl.static_range(BLOCKS):
                part_ptr = partial_ptr + place.to(tl.int64) * (128 * BLOCKS) + (128 * b + 4 * lane)
                store_16(part_ptr, totals[4 * b], totals[4 * b + 1], totals[4 * b + 2], totals[4 * b + 3])
            # strips beyond the last row count too
            counter = (tl.program_id(1) * panels + panel) * NUM_WARPS + warp
            mine = mine & (count_in(counter_ptr + counter, lane, NUM_WARPS) == parts - 1)
            # all loads of a round are under way together, as far as registers go
            ROUND: tl.constexpr = 8 // BLOCKS if BLOCKS <= 4 else 16 // BLOCKS if BLOCKS <= 16 else 1
            place = (2 * (column_block + first_block)) * NUM_WARPS + warp
            summed = ()
            for _ in tl.static_range(4 * BLOCKS):
                summed = summed + ((lane * 0).to(tl.float32),)
            for first in range(0, parts, ROUND):
                loaded = ()
                for s in tl.static_range(ROUND):
                    # only the first one begins with the panel
                    begins = tl.where(first + s == 0, NUM_WARPS, 0)
                    for b in tl.static_range(BLOCKS):
                        part = place + (2 * NUM_WARPS * (first + s) + begins)
                        part_ptr = partial_ptr + part.to(tl.int64) * (128 * BLOCKS) + (128 * b + 4 * lane)
                        loaded = loaded + load_16_float(part_ptr, mine & (first + s < parts))
                for s in tl.static_range(ROUND):
                    updated = ()
                    for i in tl.static_range(4 * BLOCKS):
                        updated = updated + (summed[i] + loaded[4 * BLOCKS * s + i],)
                    summed = updated
            totals = summed
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(4):
            row = row_u if i < 2 else row_v
            m = m0 + 8 * b + 2 * j + i % 2
            mask = mine & (row < N) & (m < M)
            value = totals[4 * b + i]
            if HAS_BIAS:
                value += load_global(bias_ptr + row, mask).to(tl.float32)
            if HAS_RESIDUAL:
                value += load_global(residual_ptr + m.to(tl.int64) * stride_residual + (column + row), mask).to(tl.float32)
            store_global(out_ptr + m.to(tl.int64) * total + (column + row), value.to(out_ptr.dtype.element_ty), mask)
