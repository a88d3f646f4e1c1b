"""Blocks of a fused linear layer: which weight and rows a block has, how its words come in, how its sums go out.

16 rows of a weight are a strip, the strips of a block's warps a panel. Up to four weights of one format share a launch: their rows follow
each other in the output, each weight starts a panel. Where tiles of a row are split over several blocks, parts go to memory, and the warp
that finishes a strip's last one adds them up, in order: the result does not depend on who that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED, shift_right
from .memory import load_16, load_16_float, load_global, store_16, store_global
from .shared import ROW_GAP, commit_copies, copy_async, load_shared_16
from .warp import largest_of_quad, pack_halves

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
def _scale_of(code):
    return ((code + (127 - 40) * 64) << 17).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(x):
    """The least one that is no less than a positive `x`."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.constexpr_function
def exact_factors(LATTICE, LARGEST):
    """Whether -1152 times a tile's scale, divided as `row_divisors` has it, is exact in fp16: 11 bits, and in range."""
    return LATTICE != "a2" and LARGEST * 65504 >= 1152 * 448


@triton.jit
def e4m3_factors(scale, LATTICE: tl.constexpr):
    """What `codes_to_e4m3` takes: a tile's scale for even and odd places, and -1152 times as much."""
    even: tl.constexpr = 1.7320508075688772 if LATTICE == "a2" else 1.0
    return pack_halves(scale * even, scale, tl.float16), pack_halves(scale * (-1152.0 * even), scale * -1152.0, tl.float16)


@triton.jit
def row_divisors(words_ptr, strip, r, j, N, tiles, WORDS: tl.constexpr, RAW: tl.constexpr, LARGEST: tl.constexpr):
    """Of rows r and r + 8 of a strip, the power of two that brings the largest value that their tiles can hold to the range of e4m3.

    By a power of two: a scale has 7 bits then as before, which makes its products exact, and e4m3 loses nothing to half the range.

    From the headers of the tiles, of which the four threads of a row share the work. All loads of a round are under way together.
    """
    largest_u = j * 0
    largest_v = j * 0
    for first in range(0, tiles, 16):
        headers_u = ()
        headers_v = ()
        for i in tl.static_range(4):
            t = first + 4 * i + j
            headers_u = headers_u + (load_global(words_ptr + tile_offset(strip, r, t, N, tiles, WORDS) + RAW),)
            headers_v = headers_v + (load_global(words_ptr + tile_offset(strip, r + 8, t, N, tiles, WORDS) + RAW),)
        for i in tl.static_range(4):
            largest_u = tl.maximum(largest_u, shift_right(headers_u[i], 20))
            largest_v = tl.maximum(largest_v, shift_right(headers_v[i], 20))
    share: tl.constexpr = LARGEST / 448.0
    return _power_of_two(_scale_of(largest_of_quad(largest_u)) * share), _power_of_two(_scale_of(largest_of_quad(largest_v)) * share)


@triton.jit
def stage_stream(
    words_ptr,
    strip,
    t,
    N,
    tiles,
    lane,
    address,
    RAW: tl.constexpr,
    WORDS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr = 16,
):
    """Start copying the stream planes of 16 rows' tile `t` to a buffer, if ALIGNED in pieces of so many bytes."""
    STREAM: tl.constexpr = WORDS - RAW
    if ALIGNED:
        CHUNKS: tl.constexpr = 4 * STREAM // PIECE
        for step in tl.static_range(0, (16 * CHUNKS + 31) // 32):
            index = step * 32 + lane
            # past the last row: the same bytes again
            row = tl.minimum(index // CHUNKS, 15)
            offset = PIECE * (index % CHUNKS)
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + offset // 4)
            copy_async(address + row * (ROW_BYTES + ROW_GAP) + offset, source, PIECE)
    else:
        word = tl.minimum(lane, STREAM - 1)
        for row in tl.static_range(0, 16):
            source = words_ptr + tile_offset(strip, row, t, N, tiles, WORDS) + (RAW + word)
            copy_async(address + row * (ROW_BYTES + ROW_GAP) + 4 * word, source, 4)
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
def _select(condition, a, b):
    """Scalar choice of two pointers of one type."""
    return tl.where(condition, a.to(tl.int64), b.to(tl.int64)).to(a.dtype)


@triton.jit
def count_panels(rows, SIBLINGS: tl.constexpr, ROWS: tl.constexpr):
    """Panels of ROWS rows, and rows, of all weights."""
    panels = 0
    total = 0
    for i in tl.static_range(SIBLINGS):
        panels += (rows[i] + ROWS - 1) // ROWS
        total += rows[i]
    return panels, total


@triton.jit
def weight_of_panel(panel, pointers, rows, SIBLINGS: tl.constexpr, ROWS: tl.constexpr):
    """Words, bias and rows of a panel's weight, its number among the weight's panels, the output column of the weight's first row.

    `pointers`: words of four weights, then their biases; `rows` of each.
    """
    words_ptr = pointers[0]
    bias_ptr = pointers[4]
    count = rows[0]
    column = 0
    past = panel >= 0
    for i in tl.static_range(1, SIBLINGS):
        panels = (count + ROWS - 1) // ROWS
        past = past & (panel >= panels)
        panel = tl.where(past, panel - panels, panel)
        column = tl.where(past, column + count, column)
        words_ptr = _select(past, pointers[i], words_ptr)
        bias_ptr = _select(past, pointers[4 + i], bias_ptr)
        count = tl.where(past, rows[i], count)
    return words_ptr, bias_ptr, count, panel, column


@triton.jit
def weight_of_block(block, pointers, rows, dealt, SIBLINGS: tl.constexpr):
    """As `weight_of_panel`, for weights with `dealt // 16` blocks each.

    Words, bias, the block's number among the weight's, what the weight has of `dealt`, the output column of its first row, its rows, and
    the rows of all weights.
    """
    words_ptr = pointers[0]
    bias_ptr = pointers[4]
    count = rows[0]
    own = dealt[0]
    column = 0
    total = rows[0]
    past = block >= 0
    for i in tl.static_range(1, SIBLINGS):
        past = past & (block >= own >> 4)
        block = tl.where(past, block - (own >> 4), block)
        column = tl.where(past, column + count, column)
        words_ptr = _select(past, pointers[i], words_ptr)
        bias_ptr = _select(past, pointers[4 + i], bias_ptr)
        count = tl.where(past, rows[i], count)
        own = tl.where(past, dealt[i], own)
        total += rows[i]
    return words_ptr, bias_ptr, block, own, column, count, total


@triton.jit
def first_unit(block, each, rest):
    """Of a block's run, where units are dealt out in runs as equal as can be: the first `rest` blocks have one more than `each`."""
    return block * each + tl.minimum(block, rest)


@triton.jit
def _sum_parts(
    lane,
    warp,
    partial_ptr,
    mask,
    first_part,
    parts,
    stride,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sums of blocks BEGIN to END of all parts, of `meet_in_memory`."""
    COUNT: tl.constexpr = 4 * (END - BEGIN)
    # all loads of a round are under way together, as many as there are registers for
    ROUND: tl.constexpr = 32 // COUNT if COUNT <= 16 else 2
    totals = zeros_of(lane, COUNT)
    for first in range(0, parts, ROUND):
        loaded = ()
        for s in tl.static_range(ROUND):
            i = first + s
            place_of = first_part + stride * i
            for b in tl.static_range(BEGIN, END):
                place = (place_of * NUM_WARPS + warp).to(tl.int64) * (128 * BLOCKS) + (128 * b + 4 * lane)
                loaded = loaded + load_16_float(partial_ptr + place, mask & (i < parts))
        for s in tl.static_range(ROUND):
            summed = ()
            for k in tl.static_range(COUNT):
                summed = summed + (totals[k] + loaded[COUNT * s + k],)
            totals = summed
    return totals


@triton.jit
def meet_in_memory(
    totals,
    lane,
    warp,
    partial_ptr,
    counter_ptr,
    part,
    first_part,
    parts,
    counter,
    stride,
    BLOCKS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sums of all parts of a strip, and whether this warp has them, which is the last one that gets here.

    Parts lie in `partial_ptr` as threads hold them, fp32 `[places, warps, BLOCKS, 32, 4]`: this one at place `part`, the i-th at
    `first_part + i * stride`. `counter` is the strip's.
    """
    for b in tl.static_range(BLOCKS):
        place = (part * NUM_WARPS + warp).to(tl.int64) * (128 * BLOCKS) + (128 * b + 4 * lane)
        store_16(partial_ptr + place, totals[4 * b], totals[4 * b + 1], totals[4 * b + 2], totals[4 * b + 3])
    last = count_in(counter_ptr + counter, lane, NUM_WARPS) == parts - 1
    met = ()
    for begin in tl.static_range(0, BLOCKS, 8):
        met = met + _sum_parts(
            lane,
            warp,
            partial_ptr,
            last,
            first_part,
            parts,
            stride,
            begin,
            BLOCKS if begin + 8 > BLOCKS else begin + 8,
            BLOCKS,
            NUM_WARPS,
        )
    return met, last


@triton.jit
def add_tile(totals, sums, scale_u, scale_v, column_scales, BLOCKS: tl.constexpr):
    """`totals` and a tile's int32 sums, scaled: both as MMAs leave them, scales of rows r and r + 8, two of each block of columns."""
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
    return updated


@triton.jit
def zeros_of(thread, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + ((thread * 0).to(tl.float32),)
    return zeros


@triton.jit
def store_strip(
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
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Sums of a strip and `8 BLOCKS` batch columns from m0 on, as MMAs leave them, to the output, where `mine`."""
    j = lane % 4
    row_u = strip * 16 + lane // 4
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(4):
            row = row_u if i < 2 else row_u + 8
            m = m0 + 8 * b + 2 * j + i % 2
            mask = mine & (row < N) & (m < M)
            value = totals[4 * b + i]
            if HAS_BIAS:
                value += load_global(bias_ptr + row, mask).to(tl.float32)
            if HAS_RESIDUAL:
                value += load_global(residual_ptr + m.to(tl.int64) * stride_residual + (column + row), mask).to(tl.float32)
            store_global(out_ptr + m.to(tl.int64) * total + (column + row), value.to(out_ptr.dtype.element_ty), mask)
