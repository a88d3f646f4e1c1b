"""Decode one vector of a tile per thread: the device form of `hq_inductor.format.rice.decode_tiles`.

Thread 4 r + j of a warp reads lane j of row r. A vector comes out as two int32 of four int8 codes, which is what the thread holds of an
`m16n8k32` int8 operand; the codes are `codes << GAIN`, GAIN = SHIFT - TileLayout.shift.

Even lanes read forwards, odd ones backwards, and turn their words round. A lane's window is 32 bits of the stream, in two words that it
holds; a third is there before they are used up, so that nothing waits for memory. Rotated by 14 the window's first bits come to bits 2 to
13, a byte offset into the table; rotated on by the length of the code, the next ones do. Where the stream plane has a copy in shared
memory, places are addresses, and none is checked: a lane moves less than 32 bits per vector whatever the words hold, so it stays within
`OVERRUN` bytes of the plane.

Cost.  With all that the linear kernel adds, 39 instructions per vector, 25 of them on the integer pipe, and two dependent table look-ups
       (E8, k = 3, 8 columns, sm_90, Triton 3.6, counted in the SASS of the loop over tiles).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED, and_xor, funnel_left, parity, reverse_bits, rotate_left, shift_right, spread_sign, spread_signs
from .memory import load_global
from .shared import load_shared

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def read_header(header, END: tl.constexpr, WALL_UNIT: tl.constexpr, GAIN: tl.constexpr):
    """Scale of the kernels' codes (fp32) and wall (a bit of the stream plane) from the plane's first word."""
    wall = (16 + (END - 16) // 2) + WALL_UNIT * ((shift_right(header, 16) & 15) - 8)
    scale = ((shift_right(header, 20) + (127 - 40 - GAIN) * 64) << 17).to(tl.float32, bitcast=True)
    return scale, wall


@triton.jit
def load_raw_word(tile_ptr, i, j, COUNT: tl.constexpr):
    """Raw word `i` of lane `j`; `COUNT` words per lane. Not for d4."""
    REST: tl.constexpr = COUNT % 4
    FULL: tl.constexpr = COUNT - REST
    place = tl.where(i < FULL, (i // 4) * 16 + j * 4, 4 * FULL + REST * j) + i % 4
    return load_global(tile_ptr + place)


@triton.jit
def load_raw(tile_ptr, g, j, K: tl.constexpr, LATTICE: tl.constexpr, GROUPS: tl.constexpr):
    """The K raw words of group `g`, lane `j`, word by word."""
    words = ()
    if LATTICE == "d4":
        group_ptr = tile_ptr + g * (4 * K - 1)
        s0 = load_global(group_ptr)
        s1 = load_global(group_ptr + K)
        s2 = load_global(group_ptr + 2 * K)
        last = (shift_right(s0, 24)) | (shift_right(s1, 24) << 8) | (shift_right(s2, 24) << 16)
        own = tl.where(j == 0, s0, tl.where(j == 1, s1, s2)) & 0xFFFFFF
        words = words + (tl.where(j == 3, last, own),)
        for w in tl.static_range(1, K):
            words = words + (load_global(group_ptr + j * K + w - tl.where(j == 3, 1, 0)),)
    else:
        for w in tl.static_range(K):
            words = words + (load_raw_word(tile_ptr, g * K + w, j, K * GROUPS),)
    return words


@triton.jit
def restore_signs(raw, K: tl.constexpr, LATTICE: tl.constexpr):
    """Signs with the implied ones of a group's four vectors in place. For K = 1 the quotients decide too: `decode_vector` does the rest."""
    signs = raw[0]
    if LATTICE == "e8" or LATTICE == "d4":
        odd = signs
        if K == 2:
            odd = signs ^ raw[1]
        if K >= 3:
            # the lowest bits of both words of a pair, in the order of the signs
            odd = signs ^ and_xor(raw[1], 0x55555555, (raw[2] & 0x55555555) << 1)
        odd = odd ^ shift_right(odd, 16)
        odd = odd ^ shift_right(odd, 8)
        if LATTICE == "e8":
            signs = signs ^ (((odd ^ shift_right(odd, 2)) & 0x33) << 26)
        else:
            signs = signs ^ (odd << 24)
    return signs


@triton.jit
def first_cursor(row, wall, j, END: tl.constexpr):
    """Cursor of each lane before its first code; `row` is the number of bits before the plane."""
    left = tl.where(j == 0, 16, wall - 32)
    right = tl.where(j == 2, wall, END - 32)
    return row + tl.where(j < 2, left, right)


@triton.jit
def _stream_word(stream_ptr, i, STREAM: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Word `i` of shared memory, or of the stream plane if it has no copy there (ROW_BYTES is 0), where it is in bounds."""
    if ROW_BYTES > 0:
        return load_shared(i << 2)
    else:
        return load_global(stream_ptr + tl.minimum(tl.maximum(i, 0), STREAM - 1))


@triton.jit
def header_word(stream_ptr, x, STREAM: tl.constexpr, ROW_BYTES: tl.constexpr):
    """First word of a stream plane that has `x` bits before it."""
    return _stream_word(stream_ptr, x >> 5, STREAM, ROW_BYTES)


@triton.jit
def first_window(stream_ptr, x, odd, STREAM: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Window of a lane from its first cursor on: two words, the one after them as it is stored, where the next one is, bits read.

    Bits count from the start of a word in reading order; `odd` is 0 or 1.
    """
    # backwards from the last bit of the window
    word = tl.where(odd != 0, x + 31, x) >> 5
    step = 1 - 2 * odd
    near = _forwards(_stream_word(stream_ptr, word, STREAM, ROW_BYTES), odd)
    far = _forwards(_stream_word(stream_ptr, word + step, STREAM, ROW_BYTES), odd)
    ahead = _stream_word(stream_ptr, word + 2 * step, STREAM, ROW_BYTES)
    place = word + 3 * step
    if ROW_BYTES > 0:
        place = place << 2
    return near, far, ahead, place, tl.where(odd != 0, -x, x)


if INTERPRETED:

    @triton.jit
    def _forwards(word, odd):
        return tl.where(odd != 0, reverse_bits(word), word)

    @triton.jit
    def _look_up(table_ptr, table_address, window):
        return tl.load(table_ptr + (shift_right(window, 2) & 0xFFF))

else:

    @triton.jit
    def _forwards(word, odd):
        """A word as a lane reads it."""
        # chosen by a mask: of a predicated brev the assembler makes three instructions
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; brev.b32 t, $1; lop3.b32 $0, $1, t, $2, 0xd8;}", "=r,r,r", [word, -odd], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def _look_up(table_ptr, table_address, window):
        """Entry of the code at bits 2 to 13 of `window`."""
        return load_shared((window & 0x3FFC) + table_address)


@triton.jit
def _advance(near, far, ahead, place, before, after, odd, stream_ptr, STREAM: tl.constexpr, ROW_BYTES: tl.constexpr):
    """The window's words after `after` bits: the next ones where that came to another word."""
    following = _forwards(ahead, odd)
    if ROW_BYTES > 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred moved; .reg .b32 t;
            xor.b32 t, $4, $5;
            and.b32 t, t, 32;
            setp.ne.u32 moved, t, 0;
            @moved mov.b32 $0, $1;
            @moved mov.b32 $1, $6;
            @moved ld.shared.b32 $2, [$3];
            @moved add.s32 $3, $3, $7;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,0,1,2,3",
            [before, after, following, 4 - 8 * odd, near, far, ahead, place],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        moved = ((before ^ after) & 32) != 0
        loaded = _stream_word(stream_ptr, place, STREAM, ROW_BYTES)
        next_place = tl.where(moved, place + (1 - 2 * odd), place)
        return tl.where(moved, far, near), tl.where(moved, following, far), tl.where(moved, loaded, ahead), next_place


@triton.jit
def next_quads(
    lane_window,
    odd,
    stream_ptr,
    table_ptr,
    table_address,
    LENGTH_PLACE: tl.constexpr,
    STREAM: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Table entries of the lane's next vector, and its window after it."""
    near, far, ahead, place, x = lane_window
    window = rotate_left(funnel_left(near, far, x), odd * 0 + 14)
    entry0 = _look_up(table_ptr, table_address, window)
    length0 = shift_right(entry0, LENGTH_PLACE)
    entry1 = _look_up(table_ptr, table_address, rotate_left(window, length0))
    after = x + ((length0 + shift_right(entry1, LENGTH_PLACE)) & 31)
    near, far, ahead, place = _advance(near, far, ahead, place, x, after, odd, stream_ptr, STREAM, ROW_BYTES)
    return entry0, entry1, (near, far, ahead, place, after)


@triton.jit
def _field(x, place: tl.constexpr, target: tl.constexpr):
    """Move bits from `place` to `target`."""
    if place >= target:
        return shift_right(x, place - target)
    else:
        return x << (target - place)


@triton.jit
def _merge(codes, entry, v: tl.constexpr, h: tl.constexpr, raw, K: tl.constexpr, SHIFT: tl.constexpr):
    """Low bits and quotients into four codes that hold their signs."""
    UNIT: tl.constexpr = SHIFT - K + 1  # place of the lowest magnitude bit
    PAIR: tl.constexpr = 4 * (v % 2) + 2 * h
    SINGLE: tl.constexpr = PAIR + v // 2
    if K == 2:
        codes = and_xor(_field(raw[1], SINGLE, UNIT), 0x01010101 << UNIT, codes)
    if K >= 3:
        codes = and_xor(_field(raw[1 + v // 2], PAIR, UNIT), 0x03030303 << UNIT, codes)
    if K == 4:
        codes = and_xor(_field(raw[3], SINGLE, UNIT + 2), 0x01010101 << (UNIT + 2), codes)
    if K == 5:
        codes = and_xor(_field(raw[3 + v // 2], PAIR, UNIT + 2), 0x03030303 << (UNIT + 2), codes)
    # three bits of quotient, or two right below the sign
    return and_xor(entry, 0x07070707 << SHIFT if SHIFT < 5 else 0x60606060, codes)


@triton.jit
def _half(entry, v: tl.constexpr, h: tl.constexpr, signs, raw, K: tl.constexpr, SHIFT: tl.constexpr, LATTICE: tl.constexpr):
    """Four codes of a lattice other than e8."""
    UNIT: tl.constexpr = SHIFT - K + 1
    sign = spread_signs(signs << (7 - (4 * (v % 2) + 2 * h + v // 2)))
    if UNIT > 0:
        sign = sign & ((((0xFF << UNIT) & 0xFF) * 0x01010101) - (1 << 32))
    codes = _merge(sign, entry, v, h, raw, K, SHIFT)
    if LATTICE == "a2":
        codes = (codes & 0x00FF00FF) | ((codes << 1) & -0x01FF0200) | ((codes & 0x00010001) << 8)
    return codes


@triton.jit
def decode_vector(
    entry0, entry1, v: tl.constexpr, signs, raw, K: tl.constexpr, SHIFT: tl.constexpr, LATTICE: tl.constexpr, BIASED: tl.constexpr = False
):
    """Codes of vector `v` (0 to 3) of a group: symbols 0 to 3 and 4 to 7, four int8 each. `signs` from `restore_signs`.

    BIASED: four uint8, 128 more; of e8 only.
    """
    if LATTICE == "e8":
        return decode_vector_e8(entry0, entry1, v, signs, raw, K, SHIFT, BIASED)
    else:
        if K == 1 and LATTICE == "d4":
            signs = signs ^ (parity(entry0 & (0x01010101 << SHIFT)) << (24 + 4 * (v % 2) + v // 2))
            signs = signs ^ (parity(entry1 & (0x01010101 << SHIFT)) << (26 + 4 * (v % 2) + v // 2))
        return _half(entry0, v, 0, signs, raw, K, SHIFT, LATTICE), _half(entry1, v, 1, signs, raw, K, SHIFT, LATTICE)


@triton.jit
def _half_e8(
    entry, v: tl.constexpr, h: tl.constexpr, signs, raw, coset, addend, K: tl.constexpr, SHIFT: tl.constexpr, BIASED: tl.constexpr
):
    """Four codes; `coset` is all ones for odd vectors, `addend` what of a code does not depend on its symbol."""
    UNIT: tl.constexpr = SHIFT - K + 1
    SINGLE: tl.constexpr = 4 * (v % 2) + 2 * h + v // 2
    # the sign's place less what can be multiplied up to the unit
    BASE: tl.constexpr = SINGLE // 4 * 4 if UNIT >= 3 else SINGLE // 2 * 2
    PLACE: tl.constexpr = SINGLE - BASE
    sign = (shift_right(signs, BASE) ^ coset) & (0x01010101 << PLACE)
    # all bits of a byte from the unit on; of biased ones the highest is inverted
    FACTOR: tl.constexpr = -((1 << UNIT) >> PLACE) if BIASED else ((0xFF << UNIT) & 0xFF) >> PLACE
    return _merge(sign * FACTOR + addend, entry, v, h, raw, K, SHIFT)


@triton.jit
def decode_vector_e8(entry0, entry1, v: tl.constexpr, signs, raw, K: tl.constexpr, SHIFT: tl.constexpr, BIASED: tl.constexpr):
    """`decode_vector` for e8, signs spread by products: these are not on the integer pipe. BIASED: four uint8, 128 more."""
    COSET_UNIT: tl.constexpr = 0x01010101 << (SHIFT - K)
    # the coset bit: byte 3, half 1
    coset = spread_sign(raw[0] << (5 - 4 * (v % 2) - v // 2))
    addend = and_xor(coset, COSET_UNIT, coset * 0 - 0x7F7F7F80) if BIASED else coset & COSET_UNIT
    if K == 1:
        signs = signs ^ (parity((entry0 ^ entry1) & (0x01010101 << SHIFT)) << (26 + 4 * (v % 2) + v // 2))
    low = _half_e8(entry0, v, 0, signs, raw, coset, addend, K, SHIFT, BIASED)
    high = _half_e8(entry1, v, 1, signs, raw, coset, addend, K, SHIFT, BIASED)
    return low, high
