"""Decode one vector of a tile per thread: the device form of `hq_inductor.format.rice.decode_tiles`.

Thread 4 r + j of a warp reads lane j of row r. A vector comes out as two int32 of four int8 codes, which is what the thread holds of an
`m16n8k32` int8 operand. A lane's cursor is a bit position; odd lanes, which read backwards, use its complement: word i of the plane is then
word ~i, and bits are reversed as words are read, so that all lanes run the same code.

Cost.  About 40 instructions per vector (E8, k = 2) and two dependent table look-ups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED, funnel_left, parity, reverse_bits, shift_left_wrap, shift_right, spread_sign, spread_signs
from .shared import load_shared

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def load_header(tile_ptr, RAW: tl.constexpr, END: tl.constexpr, WALL_UNIT: tl.constexpr):
    """Scale (fp32) and wall (a bit of the stream plane) of the tile at `tile_ptr`."""
    header = tl.load(tile_ptr + RAW)
    wall = (16 + (END - 16) // 2) + WALL_UNIT * ((shift_right(header, 16) & 15) - 8)
    scale = ((shift_right(header, 20) + (127 - 40) * 64) << 17).to(tl.float32, bitcast=True)
    return scale, wall


@triton.jit
def load_raw(tile_ptr, g, j, K: tl.constexpr, LATTICE: tl.constexpr):
    """Signs and low-bit planes 1 to 4 (those beyond K - 1 repeat the signs) of group `g`, lane `j`."""
    if LATTICE == "d4":
        group_ptr = tile_ptr + g * (4 * K - 1)
        s0 = tl.load(group_ptr)
        s1 = tl.load(group_ptr + K)
        s2 = tl.load(group_ptr + 2 * K)
        last = (shift_right(s0, 24)) | (shift_right(s1, 24) << 8) | (shift_right(s2, 24) << 16)
        own = tl.where(j == 0, s0, tl.where(j == 1, s1, s2)) & 0xFFFFFF
        signs = tl.where(j == 3, last, own)
        low_ptr = group_ptr + j * K - tl.where(j == 3, 1, 0)
    else:
        low_ptr = tile_ptr + g * (4 * K) + j * K
        signs = tl.load(low_ptr)
    low1 = signs
    low2 = signs
    low3 = signs
    low4 = signs
    if K >= 2:
        low1 = tl.load(low_ptr + 1)
    if K >= 3:
        low2 = tl.load(low_ptr + 2)
    if K >= 4:
        low3 = tl.load(low_ptr + 3)
    if K >= 5:
        low4 = tl.load(low_ptr + 4)
    return signs, low1, low2, low3, low4


@triton.jit
def restore_signs(signs, low1, K: tl.constexpr, LATTICE: tl.constexpr):
    """Put the implied signs of a group's four vectors in place. For K = 1 the quotients decide too: `decode_vector` does the rest."""
    if LATTICE == "e8" or LATTICE == "d4":
        odd = signs
        if K >= 2:
            odd = signs ^ low1
        odd = odd ^ shift_right(odd, 16)
        odd = odd ^ shift_right(odd, 8)
        if LATTICE == "e8":
            odd = odd ^ shift_right(odd, 1)
            signs = signs ^ ((odd & 0x55) << 25)
        else:
            signs = signs ^ ((odd & 0xFF) << 24)
    return signs


@triton.jit
def first_cursor(wall, j, END: tl.constexpr):
    """Cursor of each lane before its first code, plus 32 (the window's second word is the one that is read ahead)."""
    left = tl.where(j == 0, 16, -wall)
    right = tl.where(j == 2, wall, -END)
    return tl.where(j < 2, left, right) + 32


@triton.jit
def read_word(stream_ptr, lane_address, x, odd, STREAM_WORDS: tl.constexpr, STAGED: tl.constexpr):
    """Word `x >> 5` of a lane's stream, first bit on top. `lane_address` holds the complement of odd lanes."""
    if STAGED:
        word = load_shared(((x >> 3) & 0x7C) ^ lane_address)
    else:
        index = (x >> 5) ^ tl.where(odd, -1, 0)
        word = tl.load(stream_ptr + tl.minimum(tl.maximum(index, 0), STREAM_WORDS - 1))
    return tl.where(odd, reverse_bits(word), word)


@triton.jit
def look_up(table_ptr, table_address, index):
    if _INTERPRETED:
        return tl.load(table_ptr + index)
    else:
        return load_shared(table_address + index * 4)


@triton.jit
def next_quads(
    first,
    second,
    x,
    stream_ptr,
    lane_address,
    odd,
    table_ptr,
    table_address,
    SHIFT: tl.constexpr,
    STREAM_WORDS: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Table entries of the lane's next vector; returns them and the window's words and cursor after it."""
    window = funnel_left(first, second, x)
    entry0 = look_up(table_ptr, table_address, shift_right(window, 20))
    length0 = shift_right(entry0, SHIFT + 3)
    window = shift_left_wrap(window, length0)
    entry1 = look_up(table_ptr, table_address, shift_right(window, 20))
    after = x + (length0 & 15) + (shift_right(entry1, SHIFT + 3) & 15)
    word = read_word(stream_ptr, lane_address, after, odd, STREAM_WORDS, STAGED)
    # at most 24 bits are used up, so the window moves on by at most one word
    first = tl.where(((after ^ x) & 32) != 0, second, first)
    return entry0, entry1, first, word, after


@triton.jit
def _half(entry, bit: tl.constexpr, signs, low1, low2, low3, low4, complement, K: tl.constexpr, SHIFT: tl.constexpr, LATTICE: tl.constexpr):
    """Four codes from their quotients' entry and bit `bit` of every byte of the raw words; `complement` is all ones for odd e8 vectors."""
    unit: tl.constexpr = SHIFT - K + 1  # place of the lowest magnitude bit in a code: 1 for e8, else 0
    sign = spread_signs(signs << (7 - bit))
    if unit == 1:
        sign = (sign & -0x01010102) ^ complement
    # quotients have three bits, or two where a code's byte has no room for more
    mask: tl.constexpr = 0x07070707 << SHIFT if SHIFT < 5 else 0x03030303 << SHIFT
    codes = (entry & mask) ^ sign
    if K >= 2:
        codes = codes ^ (_align(low1, bit, unit) & (0x01010101 << unit))
    if K >= 3:
        codes = codes ^ (_align(low2, bit, unit + 1) & (0x01010101 << (unit + 1)))
    if K >= 4:
        codes = codes ^ (_align(low3, bit, unit + 2) & (0x01010101 << (unit + 2)))
    if K >= 5:
        codes = codes ^ (_align(low4, bit, unit + 3) & (0x01010101 << (unit + 3)))
    if LATTICE == "a2":
        codes = (codes & 0x00FF00FF) | ((codes << 1) & -0x01FF0200) | ((codes & 0x00010001) << 8)
    return codes


@triton.jit
def _align(x, bit: tl.constexpr, place: tl.constexpr):
    """Move bit `bit` of every byte to `place`."""
    if bit >= place:
        return shift_right(x, bit - place)
    else:
        return x << (place - bit)


@triton.jit
def decode_vector(
    entry0, entry1, v: tl.constexpr, stored, signs, low1, low2, low3, low4, K: tl.constexpr, SHIFT: tl.constexpr, LATTICE: tl.constexpr
):
    """Codes of vector `v` (0 to 3) of a group: symbols 0 to 3 and 4 to 7, four int8 each.

    `stored` are the signs as stored, `signs` after `restore_signs`.
    """
    complement = stored
    if LATTICE == "e8":
        complement = spread_sign(stored << (6 - 2 * v))
    if K == 1:
        if LATTICE == "e8":
            odd = parity((entry0 ^ entry1) & (0x01010101 << SHIFT))
            signs = signs ^ (odd << (25 + 2 * v))
        elif LATTICE == "d4":
            signs = signs ^ (parity(entry0 & (0x01010101 << SHIFT)) << (24 + 2 * v))
            signs = signs ^ (parity(entry1 & (0x01010101 << SHIFT)) << (25 + 2 * v))
    low = _half(entry0, 2 * v, signs, low1, low2, low3, low4, complement, K, SHIFT, LATTICE)
    high = _half(entry1, 2 * v + 1, signs, low1, low2, low3, low4, complement, K, SHIFT, LATTICE)
    return low, high
