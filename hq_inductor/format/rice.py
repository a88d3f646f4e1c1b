"""The split-plane Rice code of a tile: symbols to bits and back.

Definition.  With sign `g = s < 0`, one's-complement magnitude `m = s ^ -g` and Rice parameter k, the quotient `q = m >> (k - 1)` goes,
             Huffman
             coded in fours (`hq_inductor.format.quotient_code`), into the stream plane, and k raw bits, g and the k - 1 low bits of m,
             into the raw plane.
             Bit-stripping: where the lattice fixes the parity of a sum of symbols, the sign of the sum's last symbol is not stored.
Storage.     `hq_inductor.format.layout`. This file is the specification, and what runs on a CPU.
Source.      Rice, 1979; HyperQuant, arXiv 2606.23406 (bit-stripping). Differs in: split planes, four lanes, constant rate, Huffman-coded
             quotients.
"""

from __future__ import annotations

import torch

from .lattice import codes_to_symbols, symbols_to_codes
from .layout import GROUP, LANES, VECTOR, TileLayout, scale_from_code, scale_to_code
from .on_device import on_device
from .quotient_code import QUAD, TABLE_BITS

_VECTORS_PER_GROUP = GROUP // (LANES * VECTOR)


def magnitudes(symbols: torch.Tensor) -> torch.Tensor:
    """One's-complement magnitudes: `s` or `-s - 1`."""
    return torch.where(symbols < 0, -symbols - 1, symbols)


def quads(symbols: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Indices of the quads of quotients, int32 `[..., n / 4]`, of symbols `[..., n]`; quotients out of range are clamped."""
    a = layout.classes
    q = (magnitudes(symbols).to(torch.int32) >> (layout.rice_parameter - 1)).clamp(max=a - 1).unflatten(-1, (-1, QUAD))
    return ((q[..., 3] * a + q[..., 2]) * a + q[..., 1]) * a + q[..., 0]


def code_lengths(codes: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Stream bits of each 8-vector (raw bits not counted) and whether all its quotients are in range.

    Args:
        codes: `[..., 8]`, a signed integer dtype.

    Returns:
        int32 `[...]` and bool `[...]`.
    """
    symbols, _ = codes_to_symbols(codes, layout.lattice)
    bits = layout.lengths(codes.device)[quads(symbols, layout)].sum(-1, dtype=torch.int32)
    return bits, magnitudes(symbols).amax(-1) <= layout.max_magnitude


def lane_lengths(vector_bits: torch.Tensor) -> torch.Tensor:
    """Stream bits of each lane, `[..., 4]`, from those of the tile's vectors in order, `[..., tile / 8]`."""
    return vector_bits.unflatten(-1, (-1, LANES)).sum(-2, dtype=torch.int32)


def wall_code(lane_bits: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Place the wall.

    Args:
        lane_bits: `[..., 4]` int32, stream bits per lane.

    Returns:
        The smallest wall code (0 to 15) whose left region holds lanes 0 and 1, int32 `[...]`, and whether both regions fit, bool `[...]`.
    """
    left = lane_bits[..., 0] + lane_bits[..., 1]
    right = lane_bits[..., 2] + lane_bits[..., 3]
    steps = left + layout.start - layout.wall_center
    code = (torch.div(steps + layout.wall_unit - 1, layout.wall_unit, rounding_mode="floor") + 8).clamp(min=0)
    wall = layout.wall_center + layout.wall_unit * (code - 8)
    fits = (code <= 15) & (right <= layout.end - wall)
    return code.clamp(max=15), fits


def _fields(layout: TileLayout) -> list[tuple[int, int, int, int, int, int]]:
    """(word, place, vector, half, first magnitude bit or -1 for the sign, bits) of every field of a lane's group, in the order of the
    layout."""
    out = []
    for vector in range(_VECTORS_PER_GROUP):
        for half in range(2):
            pair = 4 * (vector % 2) + 2 * half
            out.append((0, pair + vector // 2, vector, half, -1, 1))
            for word, bits in layout.low_bits:
                if bits == 2:
                    out.append((word + vector // 2, pair, vector, half, word - 1, 2))
                else:
                    out.append((word, pair + vector // 2, vector, half, word - 1, 1))
    return out


def _stored(layout: TileLayout, device: torch.device) -> torch.Tensor:
    """Group, lane, word and index in the raw plane, `[4, raw_words]` int64, of the stored raw words."""

    def make() -> torch.Tensor:
        words = [(g, j, w) for g in range(layout.groups) for j in range(LANES) for w in range(layout.rice_parameter)]
        if layout.lattice == "d4":
            words = [(g, j, w) for g, j, w in words if (j, w) != (LANES - 1, 0)]
        return torch.tensor([(g, j, w, layout.raw_place(g, j, w)) for g, j, w in words]).t().contiguous()

    return on_device(("raw words", layout), make, device)


def _to_interleaved(x: torch.Tensor) -> torch.Tensor:
    """Coefficient order `[n, tile]` to `[n, group, vector, lane, half, 4]`; a view."""
    return x.unflatten(-1, (-1, _VECTORS_PER_GROUP, LANES, 2, 4))


def _pack_raw(symbols: torch.Tensor, coset: torch.Tensor | None, layout: TileLayout) -> torch.Tensor:
    """Raw plane, int32 `[n, raw_words]`, of int32 symbols `[n, tile / 8, 8]`."""
    n, k = symbols.shape[0], layout.rice_parameter
    signs = (symbols < 0).to(torch.uint8)
    if layout.lattice == "e8":
        signs[..., 7] = coset
    elif layout.lattice == "d4":
        signs[..., 3::4] = 0
    # four neighbouring coefficients are four bytes of a word: [n, group, vector, lane, half]
    sign_bytes, magnitude_bytes = (
        _to_interleaved(x.to(torch.uint8).reshape(n, layout.tile)).contiguous().view(torch.int32).squeeze(-1)
        for x in (signs, magnitudes(symbols))
    )
    words = symbols.new_zeros(k, n, layout.groups, LANES)
    for word, place, vector, half, first, bits in _fields(layout):
        source = sign_bytes if first < 0 else (magnitude_bytes >> first) & (0x01010101 * ((1 << bits) - 1))
        words[word] |= source[:, :, vector, :, half] << place
    if layout.lattice == "d4":
        spare = words[0, :, :, LANES - 1]
        for lane in range(LANES - 1):
            words[0, :, :, lane] |= (spare << (24 - 8 * lane)) & -(1 << 24)
    out = symbols.new_empty(n, layout.raw_words)
    groups, lanes, index, place = _stored(layout, symbols.device)
    out[:, place] = words[index, :, groups, lanes].t()
    return out


def _raw_by_lane(raw: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Raw words `[n, raw_words]` as int32 `[k, n, group, lane]`, D4's scattered bytes put back."""
    words = raw.new_zeros(layout.rice_parameter, raw.shape[0], layout.groups, LANES)
    groups, lanes, index, place = _stored(layout, raw.device)
    words[index, :, groups, lanes] = raw[:, place].t()
    if layout.lattice == "d4":
        signs = words[0]
        for lane in range(LANES - 1):
            signs[..., LANES - 1] |= ((signs[..., lane] >> 24) & 0xFF) << (8 * lane)
            signs[..., lane] &= 0xFFFFFF
    return words


def _fold_bytes(x: torch.Tensor) -> torch.Tensor:
    """Exclusive or of the four bytes of each word, in its low byte."""
    x = x ^ (x >> 16)
    return (x ^ (x >> 8)) & 0xFF


def _lane_order(x: torch.Tensor, per_vector: int) -> torch.Tensor:
    """Coefficient order `[n, tile / 8 * per_vector]` to lane order `[n, 4, tile / 32 * per_vector]`."""
    return x.unflatten(-1, (-1, LANES, per_vector)).transpose(1, 2).flatten(2)


def _add_bits(words: torch.Tensor, position: torch.Tensor, value: torch.Tensor, length: torch.Tensor) -> None:
    """Add disjoint codes to int32 `words` `[n, w]`: `value` `[n, m]`, right-aligned, `length` <= 12 bits from bit `position` on (int64)."""
    for word, shift in ((position >> 5, 32 - (position & 31) - length), ((position >> 5) + 1, 64 - (position & 31) - length)):
        part = torch.where(shift >= 0, value << shift.clamp(min=0), value >> (-shift).clamp(min=0)) & 0xFFFFFFFF
        part = torch.where((shift < 32) & (word < words.shape[1]), part, 0)
        # int64 to int32 keeps the low 32 bits
        words.scatter_add_(1, word.clamp(0, words.shape[1] - 1), part.to(torch.int32))


def _reversed_bits(value: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The low `length` <= 12 bits in reverse order."""
    out = torch.zeros_like(value)
    for bit in range(TABLE_BITS):
        out = (out << 1) | ((value >> bit) & 1)
    return out >> (TABLE_BITS - length)


def encode_tiles(codes: torch.Tensor, scale: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Write tiles of codes into words. Vectorized, no data-dependent shapes, no host sync.

    Args:
        codes: `[n, tile]` int8 lattice points that fit (`code_lengths`, `wall_code`); bits that do not fit are lost.
        scale: `[n]` fp32, rounded to the nearest representable scale.
        layout: where the bits go.

    Returns:
        `[n, words]` int32.
    """
    n, device = codes.shape[0], codes.device
    symbols, coset = codes_to_symbols(codes.to(torch.int32).unflatten(-1, (-1, VECTOR)), layout.lattice)
    index = _lane_order(quads(symbols, layout).flatten(1), VECTOR // QUAD)
    length = layout.lengths(device)[index].to(torch.int64)
    value = layout.codewords(device)[index].to(torch.int64)
    value[:, 1::2] = _reversed_bits(value[:, 1::2], length[:, 1::2])
    wall, _ = wall_code(length.sum(-1).to(torch.int32), layout)

    stream = symbols.new_zeros(n, layout.stream_words)
    done = length.cumsum(-1)
    wall_bit = (layout.wall_center + layout.wall_unit * (wall.to(torch.int64) - 8))[:, None]
    before = done - length
    position = torch.stack((layout.start + before[:, 0], wall_bit - done[:, 1], wall_bit + before[:, 2], layout.end - done[:, 3]), dim=1)
    _add_bits(stream, position.flatten(1).clamp_(layout.start, layout.end - 1), value.flatten(1), length.flatten(1))
    stream[:, 0] |= (scale_to_code(scale) << 20) | (wall << 16)
    return torch.cat((_pack_raw(symbols, coset, layout), stream), dim=1)


def read_header(words: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale `[n]` fp32 and wall, as a bit of the stream plane, `[n]` int64, of tiles `[n, words]`."""
    header = words[:, layout.raw_words]
    wall = layout.wall_center + layout.wall_unit * (((header >> 16) & 15) - 8)
    return scale_from_code((header >> 20) & 0xFFF), wall.to(torch.int64)


def _reversed_bytes() -> torch.Tensor:
    return torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=torch.uint8)


def _read_stream(stream: torch.Tensor, wall: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Table entries of all quads, int32 `[n, group, vector, lane, half]`, from the stream plane `[n, stream_words]`.

    Every lane reads forwards, the odd ones from a copy of the plane in reverse. Bits after the plane read as zeros.
    """
    n, words = stream.shape
    table = layout.table(stream.device)
    backwards = on_device(("reversed bytes",), _reversed_bytes, stream.device)[stream.contiguous().view(torch.uint8).to(torch.int32)]
    backwards = backwards.flip(1).view(torch.int32)
    blank = stream.new_zeros(n, 2)
    both = torch.stack((torch.cat((stream, blank), 1), torch.cat((backwards, blank), 1)), 1).to(torch.int64) & 0xFFFFFFFF
    pairs = ((both[..., :-1] << 32) | both[..., 1:]).flatten(1)  # bit p of a plane starts the top of pair p / 32, shifted by p % 32
    cursor = torch.stack((torch.full_like(wall, layout.start), layout.end - wall, wall, torch.zeros_like(wall)), dim=1)  # [n, 4]
    plane = (torch.arange(LANES, device=stream.device) & 1) * (words + 1)
    out = stream.new_empty((layout.tile // (LANES * VECTOR), n, LANES, VECTOR // QUAD))
    for vector in out:
        window = pairs.gather(1, plane + (cursor >> 5).clamp_(0, words)) << (cursor & 31)
        for half in range(VECTOR // QUAD):
            # arithmetic shift; the mask drops the copies of the sign
            entry = table[(window >> (64 - TABLE_BITS)) & ((1 << TABLE_BITS) - 1)]
            vector[..., half] = entry
            length = (entry >> (layout.shift + 3)) & 15
            window = window << length
            cursor = cursor + length
    return out.transpose(0, 1).unflatten(1, (layout.groups, -1))


def decode_tiles(words: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Read tiles of codes from words. Any bits are read without error; corrupt ones give wrong codes.

    Args:
        words: `[n, words]` int32.
        layout: where the bits lie.

    Returns:
        Codes `[n, tile]` int8 and scales `[n]` fp32.
    """
    n, k, lattice = words.shape[0], layout.rice_parameter, layout.lattice
    scale, wall = read_header(words, layout)
    entries = _read_stream(words[:, layout.raw_words :], wall, layout)
    raw = _raw_by_lane(words[:, : layout.raw_words], layout)
    signs = raw[0]
    # coset bits, meaningful for e8: symbol 7 is byte 3, half 1
    cosets = torch.stack([signs >> (24 + place) & 1 for _, place, _, half, first, _ in _fields(layout) if half and first < 0], dim=2)
    # quotients, a byte each; the mask drops the length bits
    quotients = (entries >> layout.shift) & 0x07070707
    if lattice in ("e8", "d4"):
        # the lowest bit of a symbol is (magnitude & 1) ^ sign, and an even number of them are set
        lowest = torch.zeros_like(signs)
        for word, place, vector, half, first, _ in _fields(layout):
            if first == 0:
                lowest = lowest | (((raw[word] >> place) & 0x01010101) << (4 * (vector % 2) + 2 * half + vector // 2))
            elif k == 1:
                lowest = lowest | ((quotients[:, :, vector, :, half] & 0x01010101) << place)
        parity = _fold_bytes(signs ^ lowest)
        signs = signs ^ (((parity ^ (parity >> 2)) & 0x33) << 26) if lattice == "e8" else signs ^ (parity << 24)
    symbols = quotients << (k - 1)
    for word, place, vector, half, first, bits in _fields(layout):
        if first >= 0:
            symbols[:, :, vector, :, half] |= ((raw[word] >> place) & (0x01010101 * ((1 << bits) - 1))) << first
    for _, place, vector, half, first, _ in _fields(layout):
        if first < 0:
            symbols[:, :, vector, :, half] ^= ((signs >> place) & 0x01010101) * 255
    symbols = symbols.view(torch.int8).reshape(n, layout.tile // VECTOR, VECTOR)
    return symbols_to_codes(symbols, cosets.reshape(n, -1).to(torch.int8), lattice).flatten(1), scale
