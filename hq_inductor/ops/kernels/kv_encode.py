"""Encode new tokens into slots of the KV cache: scale, lattice points and bits of one slot per program, keys and values side by side.

Definition.  As `hq_inductor.format.quantizer`: the finest scale at which the code fits, points by error plus lambda times bits (effort 0:
             lambda 0, the nearest ones), then the least lambda that fits at that scale, and the least-squares scale. Slots decode with
             `hq_inductor.format.rice`; they need not equal the CPU's bit by bit, because the search differs.
Search.      A window of candidates at a time: neighbouring scales around the root mean square; for effort 1 then as many lambdas at the
             finest one that fits. If no scale fits, or the very finest does, the window moves by its width. Of each round the first
             candidate that fits leaves its codes, so what is written is what was measured. Nothing fitting leaves zeros, which do.
Work.        A thread takes one vector for one candidate, all 8 coordinates in registers; candidates are rows, vectors columns.
             Positions of codes are prefix sums of their lengths; words are sums over all vectors of the bits each has there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activations import round_to_even
from .bits import reverse_bits, shift_right
from .memory import load_global

_SCALE_CODES = tl.constexpr(4096)


@triton.jit
def _scale_of(code):
    """`hq_inductor.format.layout.scale_from_code`."""
    return ((code + (127 - 40) * 64) << 17).to(tl.float32, bitcast=True)


@triton.jit
def _code_of(scale):
    """`hq_inductor.format.layout.scale_to_code` of positive scales in its range."""
    bits = scale.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(((bits + (1 << 16)) >> 17) - (127 - 40) * 64, 0), _SCALE_CODES - 1)


@triton.jit
def _round_coset(y, coset: tl.constexpr, price, bits_ptr, LIMIT: tl.constexpr, EFFORT: tl.constexpr):
    """Cheapest t of each coordinate `2 t + coset` of vectors of 8 tensors; where their sum is odd, which one moves; and the cost with that.

    A move is `2 i` for one up of coordinate i, `2 i + 1` for one down, -1 for none.
    """
    parity = (y[0] * 0).to(tl.int32)
    cost = y[0] * 0
    least = y[0] * 0 + 1.0e30
    move = parity
    chosen = ()
    for i in tl.static_range(8):
        t = y[i] * 0.5 - 0.5 * coset
        # floor, or one less for integers; in the range of symbols with the one above
        below = tl.minimum(tl.maximum(round_to_even(t - 0.5), -1.0 * LIMIT), LIMIT - 2.0)
        rest = t - below
        # |rest - 1|^2 - |rest|^2 = 1 - 2 rest, for steps of 2
        difference = 4.0 - 8.0 * rest
        own = 4.0 * rest * rest
        symbol = below.to(tl.int32)
        if EFFORT > 0:
            bits_below = load_global(bits_ptr + (symbol + LIMIT)) * price
            difference += load_global(bits_ptr + (symbol + (LIMIT + 1))) * price - bits_below
            own += bits_below
        above = difference < 0
        symbol = tl.where(above, symbol + 1, symbol)
        cost += own + tl.minimum(difference, 0.0)
        parity = parity ^ symbol
        loss = tl.abs(difference)
        better = loss < least
        least = tl.where(better, loss, least)
        move = tl.where(better, tl.where(above, 2 * i + 1, 2 * i), move)
        chosen = chosen + (symbol,)
    odd = (parity & 1) != 0
    return chosen, tl.where(odd, move, -1), tl.where(odd, cost + least, cost)


@triton.jit
def _magnitude(symbol):
    return symbol ^ (symbol >> 31)


@triton.jit
def _quad(a, b, c, d, K: tl.constexpr, CLASSES: tl.constexpr):
    """Index of a quad of quotients."""
    index = _magnitude(d) >> (K - 1)
    index = index * CLASSES + (_magnitude(c) >> (K - 1))
    index = index * CLASSES + (_magnitude(b) >> (K - 1))
    return index * CLASSES + (_magnitude(a) >> (K - 1))


@triton.jit
def _wall(left, END: tl.constexpr, WALL_UNIT: tl.constexpr):
    """Code and bit of the wall for `left` bits of lanes 0 and 1; codes beyond 15 do not exist."""
    CENTER: tl.constexpr = 16 + (END - 16) // 2
    # the sum is not negative: shifts round down
    code = tl.maximum((left + (16 - CENTER + 9 * WALL_UNIT - 1)) // WALL_UNIT, 0)
    code = tl.where(left + (16 - CENTER + 9 * WALL_UNIT - 1) < 0, 0, code)
    return code, CENTER + WALL_UNIT * (code - 8)


@triton.jit
def _pack_4(a, b, c, d):
    return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)


@triton.jit
def _symbol(packed, i: tl.constexpr):
    """Symbol i of eight in two registers."""
    return (packed[i // 4] << (24 - 8 * (i % 4))) >> 24


@triton.jit
def _raw_word(symbols, cosets, v, w: tl.constexpr, K: tl.constexpr):
    """What vectors of number `v` in their lane and group have in raw word `w`."""
    # word 0 holds signs; pairs of low bits take two words, a last single one takes one
    SINGLE: tl.constexpr = w == 0 or (K % 2 == 0 and w == K - 1)
    FIRST: tl.constexpr = (w - 1) // 2 * 2
    word = v * 0
    for i in tl.static_range(8):
        if w == 0 and i == 7:
            bit = cosets
        elif w == 0:
            bit = shift_right(symbols[i], 31)
        elif SINGLE:
            bit = (_magnitude(symbols[i]) >> (K - 2)) & 1
        else:
            bit = tl.where(v // 2 == (w - 1) % 2, (_magnitude(symbols[i]) >> FIRST) & 3, 0)
        place = 4 * (v % 2) + (2 * (i // 4) + 8 * (i % 4))
        if SINGLE:
            place += v // 2
        word = word | (bit << place)
    return word


@triton.jit
def _slot_in_page(position, b, h, heads, max_tokens, page_ptr, num_pages, max_pages, page_size):
    """Number of the slot of a position in the pool, and whether it has one."""
    inside = (position >= 0) & (position < max_tokens)
    place = tl.where(inside, position, 0).to(tl.int32)
    page = tl.load(page_ptr + b * max_pages + place // page_size)
    return (page.to(tl.int64) * heads + h) * page_size + place % page_size, inside & (page >= 0) & (page < num_pages)


@triton.jit(
    do_not_specialize=[
        "heads",
        "all_heads",
        "max_tokens",
        "stride_xb",
        "stride_xh",
        "stride_xs",
        "stride_x2b",
        "stride_x2h",
        "stride_x2s",
        "stride_pb",
        "num_pages",
        "max_pages",
        "page_size",
    ]
)
def encode_kernel(
    x_ptr,  # [B, all_heads, S, HEAD_DIM], strided, last dimension contiguous
    position_ptr,  # [S] int64, or [B, S] of row stride `stride_pb`
    words_ptr,  # [B, heads, max_tokens, WORDS] int32, or if PAGED [num_pages, heads, page_size, WORDS]
    x2_ptr,  # if PAIR another x of the same shape and dtype, strides of its own
    words2_ptr,  # and its words
    lengths_ptr,  # [CLASSES^4] int32
    codewords_ptr,  # [CLASSES^4] int32
    bits_ptr,  # [2 LIMIT] fp32, of symbols -LIMIT to LIMIT - 1
    page_ptr,  # [B, max_pages] int32 if PAGED
    heads,
    all_heads,
    max_tokens,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_x2b,
    stride_x2h,
    stride_x2s,
    stride_pb,
    num_pages,
    max_pages,
    page_size,
    price,  # lambda, squared units of the scale per bit
    start_rms,
    overload,  # squared error from clipping that a slot may have, in units of the scale
    K: tl.constexpr,
    CLASSES: tl.constexpr,
    LIMIT: tl.constexpr,  # symbols are from -LIMIT to LIMIT - 1
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    WALL_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    JOIN: tl.constexpr,
    VECTORS: tl.constexpr,  # power of two, at least TILE / 8
    STREAM_PAD: tl.constexpr,  # power of two, at least the words of the stream plane
    EFFORT: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FINER: tl.constexpr,  # candidates that are finer than the scale at which Gaussians come to rest on the average (`start_rms`)
    PAIR: tl.constexpr,
    PAGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, s, r): token s of head i of slots, of x for r = 0 and of the other one for r = 1."""
    GROUPS: tl.constexpr = TILE // 128
    RAW: tl.constexpr = 4 * K * GROUPS
    STREAM: tl.constexpr = WORDS - RAW
    END: tl.constexpr = 32 * STREAM
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # windows that cover all scales
    MAX_ROUNDS: tl.constexpr = 4096 // CANDIDATES + 4
    unit = tl.program_id(0)
    s = tl.program_id(1)
    b = unit // heads
    h = unit % heads
    if PAIR:
        if tl.program_id(2) == 1:
            x_ptr, words_ptr = x2_ptr, words2_ptr
            stride_xb, stride_xh, stride_xs = stride_x2b, stride_x2h, stride_x2s
    position = tl.load(position_ptr + b * stride_pb + s)
    if PAGED:
        slot, exists = _slot_in_page(position, b, h, heads, max_tokens, page_ptr, num_pages, max_pages, page_size)
    else:
        slot = unit.to(tl.int64) * max_tokens + position
        exists = (position >= 0) & (position < max_tokens)

    vector = tl.arange(0, VECTORS)
    head = h * JOIN + vector * 8 // HEAD_DIM
    inside = (vector * 8 < TILE) & (vector * 8 < JOIN * HEAD_DIM) & (head < all_heads)
    offset = b.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh + s.to(tl.int64) * stride_xs + vector * 8 % HEAD_DIM
    x = ()
    energy = tl.zeros([VECTORS], tl.float32)
    largest = tl.zeros([VECTORS], tl.float32)
    for i in tl.static_range(8):
        value = tl.load(x_ptr + offset + i, mask=inside, other=0.0).to(tl.float32)
        # NaN and infinities count as zeros
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
        energy += value * value
        largest = tl.maximum(largest, tl.abs(value))
        x = x + (value,)
    start = _code_of(tl.sqrt(tl.sum(energy, 0) / TILE) / start_rms)
    # finer ones clip too much of the largest coordinate
    start = tl.maximum(start, _code_of(tl.max(largest, 0) / (2.0 * LIMIT - 2.0 + tl.sqrt(overload))))

    number = tl.arange(0, CANDIDATES)
    left_lanes = (vector % 4 < 2)[None, :]
    base = start - FINER
    code = start
    low = vector * 0
    high = vector * 0
    cosets = vector * 0
    stage = 0  # 0: scales, 1: lambdas, 2: done
    moved = 0  # coarser, or finer if negative
    rounds = 0
    while stage < 2:
        codes = tl.minimum(tl.maximum(tl.where(stage == 0, base + number, code), 0), _SCALE_CODES - 1)
        factor = (1.0 / _scale_of(codes))[:, None]
        row_price = (price * tl.where(stage == 0, 1.0, number.to(tl.float32) / CANDIDATES))[:, None]
        y = ()
        clipped = tl.zeros([CANDIDATES, VECTORS], tl.float32)
        for i in tl.static_range(8):
            # the end of the range of integers in fp32 is far beyond that of codes
            scaled = tl.minimum(tl.maximum(x[i][None, :] * factor, -1048576.0), 1048576.0)
            excess = tl.maximum(tl.abs(scaled) - (2.0 * LIMIT - 2.0), 0.0)
            clipped += excess * excess
            y = y + (scaled,)
        even, even_move, even_cost = _round_coset(y, 0, row_price, bits_ptr, LIMIT, EFFORT)
        odd, odd_move, odd_cost = _round_coset(y, 1, row_price, bits_ptr, LIMIT, EFFORT)
        is_even = even_cost <= odd_cost
        move = tl.where(is_even, even_move, odd_move)
        moved_place = move >> 1
        step = 1 - 2 * (move & 1)
        t = ()
        for i in tl.static_range(8):
            unmoved = tl.where(is_even, even[i], odd[i])
            t = t + (tl.where(moved_place == i, unmoved + step, unmoved),)
        # symbols are the t of both cosets: odd codes are complemented, 2 t + 1 = (2 t') ^ -1 with t' = -t - 1, and so are t
        length = load_global(lengths_ptr + _quad(t[0], t[1], t[2], t[3], K, CLASSES))
        length += load_global(lengths_ptr + _quad(t[4], t[5], t[6], t[7], K, CLASSES))
        length = tl.where(vector[None, :] * 8 < TILE, length, 0)
        both = tl.sum(tl.where(left_lanes, length, length << 16), 1)
        wall_code, wall = _wall(both & 0xFFFF, END, WALL_UNIT)
        fits = (wall_code <= 15) & ((both >> 16) <= END - wall) & (tl.sum(clipped, 1) <= overload)
        first = tl.min(tl.where(fits, number, CANDIDATES), 0)
        found = first < CANDIDATES
        mine = (number == first)[:, None]
        new_low = tl.sum(tl.where(mine, _pack_4(t[0], t[1], t[2], t[3]), 0), 0)
        new_high = tl.sum(tl.where(mine, _pack_4(t[4], t[5], t[6], t[7]), 0), 0)
        new_cosets = tl.sum(tl.where(mine & (is_even == 0), 1, 0), 0)
        # a window further down whose first candidates fail keeps what was found
        low = tl.where(found, new_low, low)
        high = tl.where(found, new_high, high)
        cosets = tl.where(found, new_cosets, cosets)
        rounds += 1
        if stage == 0:
            code = tl.where(found, tl.minimum(tl.maximum(base + first, 0), _SCALE_CODES - 1), code)
            up = (found == 0) & (moved >= 0) & (base < _SCALE_CODES) & (rounds < MAX_ROUNDS)
            down = (first == 0) & (moved <= 0) & (base > 0) & (rounds < MAX_ROUNDS)
            if up:
                moved = 1
                base += CANDIDATES
            elif down:
                moved = -1
                base -= CANDIDATES
            else:
                stage = 1 if EFFORT > 0 else 2
        else:
            stage = 2

    symbols = ()
    correlation = tl.zeros([VECTORS], tl.float32)
    norm = tl.zeros([VECTORS], tl.float32)
    for i in tl.static_range(8):
        t = _symbol((low, high), i)
        point = (2 * t + cosets).to(tl.float32)
        correlation += point * x[i]
        norm += point * point
        # of odd vectors the complement: 2 t + 1 = (2 s) ^ -1 for s = -t - 1
        symbols = symbols + (t ^ -cosets,)
    total = tl.sum(norm, 0)
    fitted = tl.where(total > 0, tl.sum(correlation, 0) / tl.maximum(total, 1.0), _scale_of(start))
    scale_code = _code_of(tl.maximum(fitted, 9.094947017729282e-13))

    slot_ptr = words_ptr + slot * WORDS
    # lanes of a slot that does not exist write none
    real = tl.where(exists, 1, 0)

    # raw plane
    v = vector // 4 % 4
    lane = vector % 4
    group = vector // 16
    REST: tl.constexpr = K * GROUPS % 4
    FULL: tl.constexpr = K * GROUPS - REST
    raw_mask = (vector * 8 < TILE) & (v == 0) & (vector * 0 < real)
    for w in tl.static_range(K):
        word = _raw_word(symbols, cosets, v, w, K)
        # the four vectors of a lane's group have bits apart
        merged = tl.sum(tl.reshape(word, [VECTORS // 16, 4, 4]), 1)
        merged = tl.reshape(tl.broadcast_to(merged[:, None, :], [VECTORS // 16, 4, 4]), [VECTORS])
        index = group * K + w
        place = tl.where(index < FULL, index // 4 * 16 + lane * 4, 4 * FULL + REST * lane) + index % 4
        tl.store(slot_ptr + place, merged, mask=raw_mask)

    # stream plane
    first_quad = _quad(symbols[0], symbols[1], symbols[2], symbols[3], K, CLASSES)
    second_quad = _quad(symbols[4], symbols[5], symbols[6], symbols[7], K, CLASSES)
    second_length = load_global(lengths_ptr + second_quad)
    length = load_global(lengths_ptr + first_quad) + second_length
    value = (load_global(codewords_ptr + first_quad) << second_length) | load_global(codewords_ptr + second_quad)
    length = tl.where(vector * 8 < TILE, length, 0)
    value = tl.where(vector * 8 < TILE, value, 0)
    value = tl.where(lane % 2 == 1, shift_right(reverse_bits(value), 32 - tl.maximum(length, 1)), value)
    done = tl.reshape(tl.cumsum(tl.reshape(length, [VECTORS // 4, 4]), 0), [VECTORS])
    wall_code, wall = _wall(tl.sum(tl.where(lane < 2, length, 0), 0), END, WALL_UNIT)
    before = done - length
    forward = tl.where(lane == 0, 16, wall) + before
    backward = tl.where(lane == 1, wall, END) - done
    begin = tl.where(lane % 2 == 0, forward, backward)
    word_number = tl.arange(0, STREAM_PAD)
    shift = (word_number * 32 + 32)[None, :] - (begin + length)[:, None]
    bits = value[:, None]
    upper = tl.where(shift < 32, bits << (shift & 31), 0)
    lower = tl.where(shift > -32, shift_right(bits, (-shift) & 31), 0)
    stream = tl.sum(tl.where(shift >= 0, upper, lower), 0)
    header = (scale_code << 20) | (wall_code << 16)
    stream = tl.where(word_number == 0, stream | header, stream)
    tl.store(slot_ptr + RAW + word_number, stream, mask=(word_number < STREAM) & (word_number * 0 < real))
