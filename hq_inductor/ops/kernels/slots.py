"""Slots of the KV cache in shared memory: 16 tokens at a time come in whole, and each lane reads its part of the stream from there.

Definition.  A slot is one tile of `hq_inductor.format.layout`, e8, G groups of 128 coefficients; consecutive tokens of a head are
             consecutive in memory. `hq_inductor.ops.kernels.tile` decodes the vectors; here the bits are found.
Storage.     A buffer takes 16 slots, `64 WORDS` bytes. Where a slot is a whole number of 16-byte pieces the raw planes of all 16 come
             first, then the stream planes: rows that are 4 (2 i + 1) words apart lie in different banks. Else slots lie as in memory.
Invariants.  Nothing masks addresses, because nothing needs to: a lane reads at most 4 G - 1 vectors of 24 bits and a window on from a wall
             every code of which lies in the plane, so no bits lead further than 3 G + 1 words out of a stream plane. Before the first
             plane there is a raw plane, of at least 4 G words; what follows the last one must be shared memory of the kernel too.
Why.         A lane's share of such a short stream is about 28 bits at 4 bps: fetching the window anew for each vector takes fewer
             instructions than keeping one up to date as longer tiles do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED, funnel_left, reverse_bits, rotate_left, shift_right
from .memory import load_global
from .shared import commit_copies, copy_async, load_shared
from .tile import read_header


def buffer_bytes(words: int) -> int:
    """Bytes of 16 slots."""
    return 64 * words


@triton.jit
def stage_slots(head_ptr, step, pieces, lane, address, WORDS: tl.constexpr, RAW: tl.constexpr):
    """Start to copy the slots of tokens `16 step` to `16 step + 15`, or the last there are; `pieces`: of 16 bytes, in all of the head."""
    PIECES: tl.constexpr = 4 * WORDS
    for i in tl.static_range(0, (PIECES + 31) // 32):
        piece = i * 32 + lane
        if 32 * i + 32 > PIECES:
            # the same bytes again
            piece = tl.minimum(piece, PIECES - 1)
        if WORDS % 4 == 0:
            row = piece // (WORDS // 4)
            column = piece % (WORDS // 4)
            raw_place = row * (4 * RAW) + column * 16
            stream_place = 64 * RAW + row * (4 * (WORDS - RAW)) + (column * 16 - 4 * RAW)
            place = tl.where(column * 4 < RAW, raw_place, stream_place)
        else:
            place = piece * 16
        copy_async(address + place, head_ptr + 4 * tl.minimum(step * PIECES + piece, pieces - 1), 16)
    commit_copies(lane)


@triton.jit
def page_entry(row_ptr, step, max_pages, page_shift):
    """Entry of a row of the page table for tokens `16 step` to `16 step + 15`, the last one's beyond the end."""
    return load_global(row_ptr + tl.minimum(step >> page_shift, max_pages - 1))


@triton.jit
def page_slots(pool_ptr, page, num_pages, h, heads, pieces):
    """Where the slots of head `h` begin in a page, `pieces` of 16 bytes; of the page next to it where there is no such page."""
    return pool_ptr + (tl.minimum(tl.maximum(page, 0), num_pages - 1) * heads + h).to(tl.int64) * (4 * pieces)


@triton.jit
def raw_address(buffer, row, WORDS: tl.constexpr, RAW: tl.constexpr):
    """Address of a row's raw plane."""
    return buffer + row * (4 * RAW if WORDS % 4 == 0 else 4 * WORDS)


@triton.jit
def stream_address(buffer, row, WORDS: tl.constexpr, RAW: tl.constexpr):
    """Address of a row's stream plane."""
    if WORDS % 4 == 0:
        return buffer + (64 * RAW + row * (4 * (WORDS - RAW)))
    else:
        return buffer + (4 * RAW + row * (4 * WORDS))


@triton.jit
def slot_raw(address, g: tl.constexpr, j, K: tl.constexpr, GROUPS: tl.constexpr):
    """The K raw words of group `g`, lane `j`, word by word."""
    COUNT: tl.constexpr = K * GROUPS
    REST: tl.constexpr = COUNT % 4
    FULL: tl.constexpr = COUNT - REST
    words = ()
    for w in tl.static_range(K):
        if g * K + w < FULL:
            words = words + (load_shared(address + j * 16 + ((g * K + w) // 4 * 64 + (g * K + w) % 4 * 4)),)
        else:
            words = words + (load_shared(address + j * (4 * REST) + (16 * FULL + (g * K + w) % 4 * 4)),)
    return words


@triton.jit
def open_slot(address, j, END: tl.constexpr, WALL_UNIT: tl.constexpr, GAIN: tl.constexpr):
    """Scale of the kernels' codes of a slot (fp32), and the lane's cursor: the first bit of its window, counted from address 0."""
    scale, wall = read_header(load_shared(address), END, WALL_UNIT, GAIN)
    edge = tl.where(j == 0, 16, END - 32)
    middle = wall - tl.where(j == 1, 32, 0)
    return scale, address * 8 + tl.where((j == 0) | (j == 3), edge, middle)


if INTERPRETED:

    @triton.jit
    def word_number(y):
        return y >> 5

else:

    @triton.jit
    def word_number(y):
        """Number of the word that bit `y` lies in, by an instruction that the compiler leaves alone."""
        return tl.inline_asm_elementwise("shr.u32 $0, $1, 5;", "=r,r", [y], tl.int32, is_pure=True, pack=1)


@triton.jit
def slot_quads(y, odd, table, LENGTH_PLACE: tl.constexpr, MIRRORED: tl.constexpr):
    """Table entries of the lane's next vector and the cursor after it; `table`: address of the lane's table.

    MIRRORED: odd lanes turn their window round and share the table of the even ones, which leaves room for that of another code.
    """
    # not (y >> 3) & -4: the product is not on the integer pipe, which is the busiest
    address = word_number(y) * 4
    window = funnel_left(load_shared(address), load_shared(address + 4), y)
    if MIRRORED:
        window = rotate_left(tl.where(odd != 0, reverse_bits(window), window), y * 0 + 14)
    else:
        window = rotate_left(window, 14 - 12 * odd)
    entry0 = load_shared((window & 0x3FFC) + table)
    length0 = shift_right(entry0, LENGTH_PLACE)
    entry1 = load_shared((rotate_left(window, length0) & 0x3FFC) + table)
    length = (length0 + shift_right(entry1, LENGTH_PLACE)) & 31
    if MIRRORED:
        return entry0, entry1, y + tl.where(odd != 0, -length, length)
    else:
        # backwards lengths are 32 less; the sum is less than 32 either way
        return entry0, entry1, y + length - 32 * odd
