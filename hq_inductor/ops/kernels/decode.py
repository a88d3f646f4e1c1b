"""Decode whole weights: words to codes, to floats or to scaled fp8, row by row.

Definition.  `out[n, k] = codes[n, k]` (int8), or `codes[n, k] * scale[n, t] * sqrt(3)^[a2 and k even] / row_scale[n]` in the dtype of
             `out`.
Work.        A warp owns 16 rows, and takes tiles as `hq_inductor.ops.kernels.linear` does, from the same buffers; with tables whose
             quotients stand where codes have them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .linear import load_tables, stage_stream, tile_offset
from .shared import TABLE_BYTES, declare_shared, wait_copies
from .tile import decode_vector, first_cursor, first_words, load_raw, next_quads, read_header, restore_signs, stream_word

_INTERPRETED = tl.constexpr(INTERPRETED)


if INTERPRETED:

    @triton.jit
    def _store_8(pointer, w0, w1, mask):
        pointer = pointer.to(tl.pointer_type(tl.int32))
        tl.store(pointer, w0, mask=mask)
        tl.store(pointer + 1, w1, mask=mask)

    @triton.jit
    def _store_16(pointer, w0, w1, w2, w3, mask):
        _store_8(pointer, w0, w1, mask)
        _store_8(pointer.to(tl.pointer_type(tl.int32)) + 2, w2, w3, mask)

else:

    @triton.jit
    def _store_8(pointer, w0, w1, mask):
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, $2;}",
            "=r,l,r,r,r",
            [pointer.to(tl.int64), w0, w1, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _store_16(pointer, w0, w1, w2, w3, mask):
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, $2;}",
            "=r,l,r,r,r,r,r",
            [pointer.to(tl.int64), w0, w1, w2, w3, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _pack(codes, scale, FIRST: tl.constexpr, COUNT: tl.constexpr, LATTICE: tl.constexpr, DTYPE: tl.constexpr):
    """Values of `COUNT` of four codes as bits of one word."""
    width: tl.constexpr = 32 // COUNT
    word = codes * 0
    for i in tl.static_range(COUNT):
        value = ((codes << (24 - 8 * (FIRST + i))) >> 24).to(tl.float32) * scale
        if LATTICE == "a2" and (FIRST + i) % 2 == 0:
            value = value * 1.7320508075688772
        value = value.to(DTYPE)
        if width == 32:
            word = value.to(tl.int32, bitcast=True)
        elif width == 16:
            word = word | ((value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * i))
        else:
            word = word | ((value.to(tl.int8, bitcast=True).to(tl.int32) & 0xFF) << (8 * i))
    return word


@triton.jit
def _store_vector(out_ptr, low, high, scale, mask, LATTICE: tl.constexpr, CODES: tl.constexpr):
    """Store the eight coefficients of a vector."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if CODES:
        _store_8(out_ptr, low, high, mask)
    elif dtype.primitive_bitwidth == 8:
        _store_8(out_ptr, _pack(low, scale, 0, 4, LATTICE, dtype), _pack(high, scale, 0, 4, LATTICE, dtype), mask)
    elif dtype.primitive_bitwidth == 16:
        w0 = _pack(low, scale, 0, 2, LATTICE, dtype)
        w1 = _pack(low, scale, 2, 2, LATTICE, dtype)
        w2 = _pack(high, scale, 0, 2, LATTICE, dtype)
        w3 = _pack(high, scale, 2, 2, LATTICE, dtype)
        _store_16(out_ptr, w0, w1, w2, w3, mask)
    else:
        for half in tl.static_range(2):
            codes = low if half == 0 else high
            w0 = _pack(codes, scale, 0, 1, LATTICE, dtype)
            w1 = _pack(codes, scale, 1, 1, LATTICE, dtype)
            w2 = _pack(codes, scale, 2, 1, LATTICE, dtype)
            w3 = _pack(codes, scale, 3, 1, LATTICE, dtype)
            _store_16(out_ptr + 4 * half, w0, w1, w2, w3, mask)


@triton.jit(do_not_specialize=["N", "tiles"])
def decode_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [2, 4096] int32
    row_scale_ptr,  # [N] fp32 if ROW_SCALE
    out_ptr,  # [N, tiles * TILE]
    scale_ptr,  # [N, tiles] fp32 if CODES
    N,
    tiles,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    RAW: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Program p: rows of 16 of its warps, all tiles in turn from every part of `num_programs(1)`."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    strip = tl.program_id(0) * NUM_WARPS + warp
    first = tl.program_id(1) * tiles // tl.num_programs(1)
    end = (tl.program_id(1) + 1) * tiles // tl.num_programs(1)
    row_u = strip * 16 + r
    row_v = row_u + 8
    mask_u = row_u < N
    mask_v = row_v < N
    table_address = thread * 0
    buffers = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread)
        load_tables(table_ptr, table_address, thread, NUM_WARPS)
        buffers = table_address + TABLE_BYTES + warp * (32 * ROW_BYTES)
        if ROW_BYTES > 0:
            stage_stream(words_ptr, strip, first, N, tiles, lane, buffers, RAW, WORDS, ROW_BYTES, ALIGNED)
        wait_copies(lane)
        tl.debug_barrier()
    row_address = r * ROW_BYTES
    if ROW_BYTES > 0:
        row_address = row_address ^ (r * 16 % ROW_BYTES)
    address = buffers + row_address
    row_scale_u = tl.full([32 * NUM_WARPS], 1.0, tl.float32)
    row_scale_v = row_scale_u
    if ROW_SCALE:
        row_scale_u = tl.load(row_scale_ptr + row_u, mask=mask_u, other=1.0)
        row_scale_v = tl.load(row_scale_ptr + row_v, mask=mask_v, other=1.0)
    for t in range(first, end):
        tile_u = words_ptr + tile_offset(strip, r, t, N, tiles, WORDS)
        tile_v = words_ptr + tile_offset(strip, r + 8, t, N, tiles, WORDS)
        address_u = address
        address_v = address + 8 * ROW_BYTES
        if ROW_BYTES > 0:
            wait_copies(lane)
            address = (((address - buffers) ^ (16 * ROW_BYTES)) + buffers).to(tl.int32)
            stage_stream(
                words_ptr, strip, tl.minimum(t + 1, end - 1), N, tiles, lane, address - row_address, RAW, WORDS, ROW_BYTES, ALIGNED
            )
        zero = thread * 0
        scale_u, wall_u = read_header(stream_word(tile_u + RAW, address_u, zero, STREAM, ROW_BYTES), END, WALL_UNIT, 0)
        scale_v, wall_v = read_header(stream_word(tile_v + RAW, address_v, zero, STREAM, ROW_BYTES), END, WALL_UNIT, 0)
        if CODES:
            tl.store(scale_ptr + row_u.to(tl.int64) * tiles + t, scale_u, mask=mask_u & (j == 0))
            tl.store(scale_ptr + row_v.to(tl.int64) * tiles + t, scale_v, mask=mask_v & (j == 0))
        x_u = first_cursor(wall_u, j, END)
        x_v = first_cursor(wall_v, j, END)
        first_u, second_u = first_words(tile_u + RAW, address_u, x_u, odd, STREAM, ROW_BYTES)
        first_v, second_v = first_words(tile_v + RAW, address_v, x_v, odd, STREAM, ROW_BYTES)
        out_u = out_ptr + row_u.to(tl.int64) * (tiles * TILE) + t * TILE + 8 * j
        out_v = out_ptr + row_v.to(tl.int64) * (tiles * TILE) + t * TILE + 8 * j
        factor_u = scale_u / row_scale_u
        factor_v = scale_v / row_scale_v
        for g in range(GROUPS):
            raw_u = load_raw(tile_u, g, j, K, LATTICE, GROUPS)
            raw_v = load_raw(tile_v, g, j, K, LATTICE, GROUPS)
            signs_u = restore_signs(raw_u, K, LATTICE)
            signs_v = restore_signs(raw_v, K, LATTICE)
            for v in tl.static_range(4):
                e0, e1, first_u, second_u, x_u = next_quads(
                    first_u, second_u, x_u, odd, tile_u + RAW, address_u, table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES
                )
                f0, f1, first_v, second_v, x_v = next_quads(
                    first_v, second_v, x_v, odd, tile_v + RAW, address_v, table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES
                )
                a0, a1 = decode_vector(e0, e1, v, signs_u, raw_u, K, SHIFT, LATTICE)
                b0, b1 = decode_vector(f0, f1, v, signs_v, raw_v, K, SHIFT, LATTICE)
                _store_vector(out_u + g * 128 + v * 32, a0, a1, factor_u, mask_u, LATTICE, CODES)
                _store_vector(out_v + g * 128 + v * 32, b0, b1, factor_v, mask_v, LATTICE, CODES)
