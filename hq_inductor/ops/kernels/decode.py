"""Decode whole weights: words to codes, to floats or to scaled fp8, row by row.

Definition.  `out[n, k] = codes[n, k]` (int8), or `codes[n, k] * scale[n, t] * sqrt(3)^[a2 and k even] / row_scale[n]` in the dtype of
             `out`. `row_scale` brings the largest value that the row's tiles can hold to the largest that e4m3 can.
Work.        A warp takes tiles of 16 rows as `hq_inductor.ops.kernels.linear` does, from the same buffers; with tables whose quotients
             stand where codes have them. Tiles of strips of 16 rows are dealt to the warps of all blocks in runs that go over the ends of
             rows: equal ones, of few strips, whose headers each warp reads for their scales.
             Codes become floats as the low bits of a float that is large enough to have no fraction, which is then subtracted: the
             converting instructions are a quarter as fast.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .blocks import e4m3_factors, exact_factors, first_unit, load_chunks, row_divisors, stage_stream, tile_offset
from .memory import store_global
from .shared import ROW_GAP, TABLE_BYTES, declare_shared, load_table, wait_copies
from .tile import decode_vector, first_cursor, first_window, header_word, load_raw, next_quads, read_header, restore_signs
from .warp import codes_to_e4m3, own_warp, rounds_of

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


if INTERPRETED:

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
    def _four_values(codes, even, odd, LATTICE: tl.constexpr, DTYPE: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr):
        words = ()
        COUNT: tl.constexpr = 32 // DTYPE.primitive_bitwidth
        for first in tl.static_range(0, 4, COUNT):
            words = words + (_pack(codes, odd, first, COUNT, LATTICE, DTYPE),)
        return words

else:

    @triton.jit
    def _four_floats(codes, even, odd):
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 biased, large;
            mov.b32 large, 0x4B000000;
            xor.b32 biased, $4, 0x80808080;
            prmt.b32 $0, biased, large, 0x7440;
            prmt.b32 $1, biased, large, 0x7441;
            prmt.b32 $2, biased, large, 0x7442;
            prmt.b32 $3, biased, large, 0x7443;
            sub.rn.f32 $0, $0, 0f4B000080;
            sub.rn.f32 $1, $1, 0f4B000080;
            sub.rn.f32 $2, $2, 0f4B000080;
            sub.rn.f32 $3, $3, 0f4B000080;
            mul.rn.f32 $0, $0, $5;
            mul.rn.f32 $1, $1, $6;
            mul.rn.f32 $2, $2, $5;
            mul.rn.f32 $3, $3, $6;
            }""",
            "=&f,=&f,=&f,=&f,r,f,f",
            [codes, even, odd],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _four_values(codes, even, odd, LATTICE: tl.constexpr, DTYPE: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr):
        """Values of four codes as bits of the words they take; `even` and `odd` are the scales of even and odd places.

        BIASED, EXACT: of `codes_to_e4m3`.
        """
        if DTYPE.primitive_bitwidth == 8:
            factors = e4m3_factors(odd, LATTICE)
            return (codes_to_e4m3(codes, factors[0], factors[1], BIASED, EXACT),)
        else:
            f0, f1, f2, f3 = _four_floats(codes, even, odd)
            if DTYPE == tl.float32:
                return (
                    f0.to(tl.int32, bitcast=True),
                    f1.to(tl.int32, bitcast=True),
                    f2.to(tl.int32, bitcast=True),
                    f3.to(tl.int32, bitcast=True),
                )
            else:
                convert: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
                return (
                    tl.inline_asm_elementwise(convert, "=r,f,f", [f0, f1], tl.int32, is_pure=True, pack=1),
                    tl.inline_asm_elementwise(convert, "=r,f,f", [f2, f3], tl.int32, is_pure=True, pack=1),
                )


@triton.jit
def _store_vector(
    out_ptr,
    low,
    high,
    even,
    odd,
    mask,
    LATTICE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCKED: tl.constexpr,
    BIASED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Store the eight coefficients of a vector."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if BLOCKED:
        # each in a block of 16 coefficients, of which rows of a warp are neighbours
        word_ptr = out_ptr.to(tl.pointer_type(tl.int32))
        store_global(word_ptr, low, mask)
        store_global(word_ptr + 256, high, mask)
    elif CODES:
        _store_8(out_ptr, low, high, mask)
    else:
        first = _four_values(low, even, odd, LATTICE, dtype, BIASED, EXACT)
        second = _four_values(high, even, odd, LATTICE, dtype, BIASED, EXACT)
        if dtype.primitive_bitwidth == 8:
            _store_8(out_ptr, first[0], second[0], mask)
        elif dtype.primitive_bitwidth == 16:
            _store_16(out_ptr, first[0], first[1], second[0], second[1], mask)
        else:
            _store_16(out_ptr, first[0], first[1], first[2], first[3], mask)
            _store_16(out_ptr + 4, second[0], second[1], second[2], second[3], mask)


@triton.jit
def _decode_group(
    raw_u,
    raw_v,
    windows,
    odd,
    streams,
    table_ptr,
    table_address,
    outs,
    place,
    LATTICE: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH_PLACE: tl.constexpr,
    STREAM: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    BLOCKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Decode a group of both rows and store it."""
    BIASED: tl.constexpr = LATTICE == "e8" and outs[0].dtype.element_ty == tl.float8e4nv and not _INTERPRETED
    STEP: tl.constexpr = 2048 if BLOCKED else 32
    window_u, window_v = windows
    stream_u, stream_v = streams
    out_u, out_v, even_u, odd_u, even_v, odd_v, mask_u, mask_v = outs
    signs_u = restore_signs(raw_u, K, LATTICE)
    signs_v = restore_signs(raw_v, K, LATTICE)
    for v in tl.static_range(4):
        e0, e1, window_u = next_quads(window_u, odd, stream_u, table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        f0, f1, window_v = next_quads(window_v, odd, stream_v, table_ptr, table_address, LENGTH_PLACE, STREAM, ROW_BYTES)
        a0, a1 = decode_vector(e0, e1, v, signs_u, raw_u, K, SHIFT, LATTICE, BIASED)
        b0, b1 = decode_vector(f0, f1, v, signs_v, raw_v, K, SHIFT, LATTICE, BIASED)
        _store_vector(out_u + place + v * STEP, a0, a1, even_u, odd_u, mask_u, LATTICE, CODES, BLOCKED, BIASED, EXACT)
        _store_vector(out_v + place + v * STEP, b0, b1, even_v, odd_v, mask_v, LATTICE, CODES, BLOCKED, BIASED, EXACT)
    return window_u, window_v


@triton.jit(do_not_specialize=["N", "tiles", "scale_rows"])
def decode_kernel(
    words_ptr,  # [N, tiles, WORDS] int32
    table_ptr,  # [4096] int32
    row_scale_ptr,  # [N] fp32, written if ROW_SCALE
    out_ptr,  # [N, tiles * TILE], or if BLOCKED [N / 64, tiles * TILE / 16, 64, 16] in the fused kernel's order of coefficients
    scale_ptr,  # if CODES [N, tiles] fp32, or if BLOCKED [tiles, scale_rows]
    N,
    tiles,
    scale_rows,
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
    BLOCKED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p, warp w: run p NUM_WARPS + w. PDL: the kernel before is one that lets this one start when all before it is done."""
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    GROUPS: tl.constexpr = TILE // 128
    CHUNKED: tl.constexpr = ALIGNED and LATTICE != "d4" and GROUPS <= 4 and K * GROUPS % 4 == 0
    CHUNKS: tl.constexpr = K * GROUPS // 4
    # of a warp: two buffers, used in turns
    BUFFER: tl.constexpr = 16 * (ROW_BYTES + ROW_GAP)
    thread = tl.arange(0, 32 * NUM_WARPS)
    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    r = lane // 4
    odd = lane % 2
    units = (N + 15) // 16 * tiles
    runs = tl.num_programs(0) * NUM_WARPS
    own = tl.program_id(0) * NUM_WARPS + own_warp(N, thread)
    begin = first_unit(own, units // runs, units % runs)
    mine = first_unit(own + 1, units // runs, units % runs) - begin
    strip = begin // tiles
    t = begin - strip * tiles
    table_address = thread * 0
    buffers = thread * 0
    if not _INTERPRETED:
        table_address = declare_shared(thread)
        load_table(table_ptr, table_address, thread, NUM_WARPS)
        buffers = table_address + TABLE_BYTES + warp * (2 * BUFFER)
        if ROW_BYTES > 0:
            stage_stream(words_ptr, strip, t, N, tiles, lane, buffers, RAW, WORDS, ROW_BYTES, ALIGNED)
    next_u = words_ptr + tile_offset(strip, r, t, N, tiles, WORDS)
    next_v = words_ptr + tile_offset(strip, r + 8, t, N, tiles, WORDS)
    if CHUNKED:
        ahead_u = load_chunks((), next_u, j, 0, CHUNKS)
        ahead_v = load_chunks((), next_v, j, 0, CHUNKS)
    else:
        ahead_u = load_raw(next_u, 0, j, K, LATTICE, GROUPS)
        ahead_v = load_raw(next_v, 0, j, K, LATTICE, GROUPS)
    if not _INTERPRETED:
        wait_copies(lane)
        tl.debug_barrier()
    EXACT: tl.constexpr = exact_factors(LATTICE, LARGEST) and ROW_SCALE
    bits_u = thread * 0
    bits_v = bits_u
    divisor_u = tl.full([32 * NUM_WARPS], 1.0, tl.float32)
    divisor_v = divisor_u
    for i in range(rounds_of(mine)):
        row_u = strip * 16 + r
        row_v = row_u + 8
        mask_u = row_u < N
        mask_v = row_v < N
        # under the interpreter warps are at different tiles at a time
        if ROW_SCALE and _INTERPRETED:
            divisor_u, divisor_v = row_divisors(words_ptr, strip, r, j, N, tiles, WORDS, RAW, LARGEST)
        elif ROW_SCALE:
            if (i == 0) | (t == 0):
                divisor_u, divisor_v = row_divisors(words_ptr, strip, r, j, N, tiles, WORDS, RAW, LARGEST)
        if ROW_SCALE:
            # all warps that have tiles of a row write the same
            tl.store(row_scale_ptr + row_u, divisor_u, mask=mask_u & (j == 0))
            tl.store(row_scale_ptr + row_v, divisor_v, mask=mask_v & (j == 0))
        # what comes next: the same again after the last one
        wraps = (t + 1 == tiles) & (i + 1 < mine)
        next_t = tl.where(i + 1 < mine, tl.where(wraps, 0, t + 1), t)
        next_strip = tl.where(wraps, strip + 1, strip)
        tile_u = next_u
        tile_v = next_v
        next_u = words_ptr + tile_offset(next_strip, r, next_t, N, tiles, WORDS)
        next_v = words_ptr + tile_offset(next_strip, r + 8, next_t, N, tiles, WORDS)
        if ROW_BYTES > 0:
            wait_copies(lane)
            turn = i & 1
            bits_u = (buffers + (turn * BUFFER + r * (ROW_BYTES + ROW_GAP))) * 8
            bits_v = bits_u + 8 * 8 * (ROW_BYTES + ROW_GAP)
            ahead = buffers + (BUFFER - turn * BUFFER)
            stage_stream(words_ptr, next_strip, next_t, N, tiles, lane, ahead, RAW, WORDS, ROW_BYTES, ALIGNED)
        scale_u, wall_u = read_header(header_word(tile_u + RAW, bits_u, STREAM, ROW_BYTES), END, WALL_UNIT, 0)
        scale_v, wall_v = read_header(header_word(tile_v + RAW, bits_v, STREAM, ROW_BYTES), END, WALL_UNIT, 0)
        if BLOCKED:
            tl.store(scale_ptr + t.to(tl.int64) * scale_rows + row_u, scale_u, mask=mask_u & (j == 0))
            tl.store(scale_ptr + t.to(tl.int64) * scale_rows + row_v, scale_v, mask=mask_v & (j == 0))
        elif CODES:
            tl.store(scale_ptr + row_u.to(tl.int64) * tiles + t, scale_u, mask=mask_u & (j == 0))
            tl.store(scale_ptr + row_v.to(tl.int64) * tiles + t, scale_v, mask=mask_v & (j == 0))
        x_u = first_cursor(bits_u, wall_u, j, END)
        x_v = first_cursor(bits_v, wall_v, j, END)
        window_u = first_window(tile_u + RAW, x_u, odd, STREAM, ROW_BYTES)
        window_v = first_window(tile_v + RAW, x_v, odd, STREAM, ROW_BYTES)
        windows = (window_u, window_v)
        out_u = out_ptr + row_u.to(tl.int64) * (tiles * TILE) + t * TILE + 8 * j
        out_v = out_ptr + row_v.to(tl.int64) * (tiles * TILE) + t * TILE + 8 * j
        if BLOCKED:
            out_u = out_ptr + (row_u // 64).to(tl.int64) * (64 * tiles * TILE) + t * (64 * TILE) + row_u % 64 * 16 + 4 * j
            out_v = out_u + 8 * 16
        odd_u = scale_u / divisor_u
        odd_v = scale_v / divisor_v
        even_u = odd_u
        even_v = odd_v
        if LATTICE == "a2":
            even_u = odd_u * 1.7320508075688772
            even_v = odd_v * 1.7320508075688772
        outs = (out_u, out_v, even_u, odd_u, even_v, odd_v, mask_u, mask_v)
        streams = (tile_u + RAW, tile_v + RAW)
        if CHUNKED:
            # a tile's time ahead: memory that is written to as well answers late
            words_u = ahead_u
            words_v = ahead_v
            ahead_u = load_chunks((), next_u, j, 0, CHUNKS)
            ahead_v = load_chunks((), next_v, j, 0, CHUNKS)
            for g in tl.static_range(GROUPS):
                raw_u = ()
                raw_v = ()
                for w in tl.static_range(K):
                    raw_u = raw_u + (words_u[K * g + w],)
                    raw_v = raw_v + (words_v[K * g + w],)
                windows = _decode_group(
                    raw_u,
                    raw_v,
                    windows,
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    outs,
                    g * (8192 if BLOCKED else 128),
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    CODES,
                    BLOCKED,
                    EXACT,
                )
        else:
            for g in range(GROUPS):
                raw_u = ahead_u
                raw_v = ahead_v
                last = g + 1 == GROUPS
                ahead_u = load_raw(tl.where(last, next_u, tile_u), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
                ahead_v = load_raw(tl.where(last, next_v, tile_v), (g + 1) % GROUPS, j, K, LATTICE, GROUPS)
                windows = _decode_group(
                    raw_u,
                    raw_v,
                    windows,
                    odd,
                    streams,
                    table_ptr,
                    table_address,
                    outs,
                    g * (8192 if BLOCKED else 128),
                    LATTICE,
                    K,
                    SHIFT,
                    LENGTH_PLACE,
                    STREAM,
                    ROW_BYTES,
                    CODES,
                    BLOCKED,
                    EXACT,
                )
        t = next_t
        strip = next_strip
    if PDL:
        gdc_launch_dependents()
        # who waits for this kernel takes the one before for done, too
        gdc_wait()
