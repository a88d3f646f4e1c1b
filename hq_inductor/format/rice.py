"""The split-plane Rice code of a tile: symbols to bits and back.

Definition.  With sign `g = s < 0` and one's-complement magnitude `m = s ^ -g`, Rice parameter k >= 1 writes the quotient `q = m >> (k - 1)`
             in unary (q zeros and a one) into the stream plane, and k raw bits, g and the k - 1 low bits of m, into the raw plane.
             The length,
             `q + 1 + k`, is that of Rice(k) on the zigzag value `2 m + g`. k = 0 writes the zigzag value itself in unary and no raw bits.
             Bit-stripping: where the lattice fixes the parity of a sum of symbols, one raw bit per sum is not stored (k >= 1: the bit of
             `layout.implied_plane` of the last symbol), or the last symbol is halved (k = 0): `(s - parity) / 2`.
Storage.     `hq_inductor.format.layout`. This file is the specification; the fast paths in `hq_inductor.ops` are tested
             against it bit for bit.
Source.      Rice, 1979; HyperQuant, arXiv 2606.23406 (bit-stripping). Differs in: split planes, four lanes, constant rate.
"""

from __future__ import annotations

import torch

from .lattice import codes_to_symbols, symbols_to_codes
from .layout import (
    GROUP,
    HEADER_BITS,
    LANES,
    MAX_VECTOR_BITS,
    VECTOR,
    TileLayout,
    scale_from_code,
    scale_to_code,
)

_VECTORS_PER_GROUP = GROUP // (LANES * VECTOR)


def _sum_span(lattice: str) -> int | None:
    """Number of symbols whose sum is even, if the lattice has such a rule."""
    return {"e8": 8, "d4": 4}.get(lattice)


def quotients(symbols: torch.Tensor, lattice: str, rice_parameter: int) -> torch.Tensor:
    """Unary quotients of symbols.

    Args:
        symbols: `[..., 8]`, signed integers.

    Returns:
        `[..., 8]`, same dtype, nonnegative. A code takes one bit more than its quotient.
    """
    if rice_parameter == 0:
        span = _sum_span(lattice)
        if span is not None:
            sums = symbols.unflatten(-1, (-1, span))
            parity = sums[..., :-1].sum(-1, keepdim=True, dtype=symbols.dtype) & 1
            symbols = torch.cat((sums[..., :-1], (sums[..., -1:] - parity) >> 1), dim=-1).flatten(-2)
        return torch.where(symbols < 0, -2 * symbols - 1, 2 * symbols)
    return torch.where(symbols < 0, -symbols - 1, symbols) >> (rice_parameter - 1)


def code_lengths(codes: torch.Tensor, lattice: str, rice_parameter: int) -> torch.Tensor:
    """Stream bits of each 8-vector of codes `[..., 8]` (raw bits not counted), int32 `[...]`."""
    symbols, _ = codes_to_symbols(codes.to(torch.int32), lattice)
    return quotients(symbols, lattice, rice_parameter).sum(-1, dtype=torch.int32) + VECTOR


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


def _to_interleaved(x: torch.Tensor) -> torch.Tensor:
    """Coefficient order `[n, tile]` to `[n, group, vector, lane, half, 4]`; a view."""
    return x.unflatten(-1, (-1, _VECTORS_PER_GROUP, LANES, 2, 4))


def _raw_word_index(layout: TileLayout) -> list[tuple[int, int]]:
    """(lane, plane) of each stored raw word of a group, in order."""
    every = [(lane, plane) for lane in range(LANES) for plane in range(layout.rice_parameter)]
    if layout.lattice == "d4":
        every.remove((LANES - 1, layout.implied_plane))
    return every


def _pack_raw(symbols: torch.Tensor, coset: torch.Tensor | None, layout: TileLayout) -> torch.Tensor:
    """Raw plane, int32 `[n, raw_words]`, of int32 symbols `[n, tile / 8, 8]`."""
    n, k = symbols.shape[0], layout.rice_parameter
    if k == 0:
        return symbols.new_zeros(n, 0)
    negative = symbols < 0
    magnitude = torch.where(negative, -symbols - 1, symbols)
    words = symbols.new_zeros(n, layout.groups, LANES, k)
    for plane in range(k):
        bits = (negative if plane == 0 else (magnitude >> (plane - 1)) & 1).to(torch.uint8)
        if plane == layout.implied_plane:
            if layout.lattice == "e8":
                bits[..., 7] = coset
            elif layout.lattice == "d4":
                bits[..., 3::4] = 0
        # four neighbouring coefficients are four bytes of a word
        quads = _to_interleaved(bits.reshape(n, layout.tile)).contiguous().view(torch.int32).squeeze(-1)
        for vector in range(_VECTORS_PER_GROUP):
            for half in range(2):
                words[..., plane] |= quads[:, :, vector, :, half] << (2 * vector + half)
    if layout.lattice == "d4":
        spare = words[:, :, LANES - 1, layout.implied_plane]
        for lane in range(LANES - 1):
            words[:, :, lane, layout.implied_plane] |= (spare << (24 - 8 * lane)) & -(1 << 24)
    return torch.stack([words[:, :, lane, plane] for lane, plane in _raw_word_index(layout)], dim=-1).flatten(1)


def _unpack_raw(raw: torch.Tensor, layout: TileLayout) -> list[torch.Tensor]:
    """Raw bits, one int32 `[n, tile / 8, 8]` of zeros and ones per plane; implied bits not yet restored."""
    n, k = raw.shape[0], layout.rice_parameter
    words = raw.new_zeros(n, layout.groups, LANES, k)
    for index, (lane, plane) in enumerate(_raw_word_index(layout)):
        words[:, :, lane, plane] = raw.unflatten(-1, (layout.groups, -1))[..., index]
    if layout.lattice == "d4":
        implied = words[..., layout.implied_plane]
        for lane in range(LANES - 1):
            implied[..., LANES - 1] |= ((implied[..., lane] >> 24) & 0xFF) << (8 * lane)
    planes = []
    for plane in range(k):
        bits = raw.new_zeros(n, layout.groups, _VECTORS_PER_GROUP, LANES, 2, 4)
        for vector in range(_VECTORS_PER_GROUP):
            for half in range(2):
                for byte in range(4):
                    bits[:, :, vector, :, half, byte] = (words[..., plane] >> (8 * byte + 2 * vector + half)) & 1
        planes.append(bits.reshape(n, layout.tile // VECTOR, VECTOR))
    return planes


def _lane_order(x: torch.Tensor) -> torch.Tensor:
    """Coefficient order `[n, tile]` to lane order `[n, 4, tile / 4]`."""
    return x.unflatten(-1, (-1, LANES, VECTOR)).transpose(1, 2).flatten(2)


def _set_bits(words: torch.Tensor, position: torch.Tensor) -> None:
    """Set distinct bits of int32 `words` `[n, w]`; positions `[n, m]` int64 count from the most significant bit of word 0."""
    words.scatter_add_(1, position >> 5, (1 << (31 - (position & 31))).to(torch.int32))


def encode_tiles(codes: torch.Tensor, scale: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Write tiles of codes into words. Vectorized, no data-dependent shapes, no host sync.

    Args:
        codes: `[n, tile]` int8 lattice points that fit (`lane_lengths`, `wall_code`); bits that do not fit are lost.
        scale: `[n]` fp32, rounded to the nearest representable scale.
        layout: where the bits go.

    Returns:
        `[n, words]` int32.
    """
    n = codes.shape[0]
    symbols, coset = codes_to_symbols(codes.to(torch.int32).unflatten(-1, (-1, VECTOR)), layout.lattice)
    length = quotients(symbols, layout.lattice, layout.rice_parameter) + 1
    lane_length = _lane_order(length.flatten(1))
    wall, _ = wall_code(lane_length.sum(-1, dtype=torch.int32), layout)

    stream = symbols.new_zeros(n, layout.stream_words)
    header = (scale_to_code(scale) << 20) | (wall << 16)
    last = lane_length.cumsum(-1, dtype=torch.int64) - 1
    wall_bit = (layout.wall_center + layout.wall_unit * (wall.to(torch.int64) - 8))[:, None]
    position = torch.stack(
        (layout.start + last[:, 0], wall_bit - 1 - last[:, 1], wall_bit + last[:, 2], layout.end - 1 - last[:, 3]), dim=1
    )
    _set_bits(stream, position.flatten(1).clamp_(layout.start, layout.end - 1))
    if layout.has_coset_bits:
        place = torch.arange(HEADER_BITS, layout.start, device=codes.device)
        stream.scatter_add_(1, (place >> 5).expand(n, -1), (coset << (31 - (place & 31))).to(torch.int32))
    stream[:, 0] |= header
    return torch.cat((_pack_raw(symbols, coset, layout), stream), dim=1)


def read_header(words: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale `[n]` fp32 and wall, as a bit of the stream plane, `[n]` int64, of tiles `[n, words]`."""
    header = words[:, layout.raw_words]
    wall = layout.wall_center + layout.wall_unit * (((header >> 16) & 15) - 8)
    return scale_from_code((header >> 20) & 0xFFF), wall.to(torch.int64)


def _read_stream(stream: torch.Tensor, wall: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Quotients, int32 `[n, tile / 8, 8]`, from the stream plane `[n, stream_words]`.

    A vector is read from a window of 32 bits; codes missing from it read as its end, bits outside the plane as zeros.
    """
    n, device = stream.shape[0], stream.device
    shift = torch.arange(31, -1, -1, device=device, dtype=torch.int32)
    bits = ((stream[:, :, None] >> shift) & 1).to(torch.uint8).flatten(1)
    cursor = torch.stack((torch.full_like(wall, layout.start), wall - 1, wall, torch.full_like(wall, layout.end - 1)), dim=1)  # [n, 4]
    direction = torch.tensor((1, -1, 1, -1), device=device)
    offset = torch.arange(MAX_VECTOR_BITS, device=device)
    count = torch.arange(VECTOR, device=device, dtype=torch.uint8)
    out = []
    for _ in range(layout.tile // (LANES * VECTOR)):
        place = cursor[..., None] + direction[:, None] * offset
        inside = (place >= 0) & (place < layout.end)
        window = bits.gather(1, place.clamp(0, layout.end - 1).flatten(1)).view(n, LANES, -1) * inside
        ones = window.cumsum(-1, dtype=torch.uint8)
        end = (ones[..., None] <= count).sum(-2, dtype=torch.int32)  # position of the code's final one, [n, 4, 8]
        out.append(torch.diff(end, dim=-1, prepend=end.new_full((n, LANES, 1), -1)).sub_(1).clamp_(min=0))
        cursor = cursor + direction * (end[..., -1] + 1).clamp(max=MAX_VECTOR_BITS)
    return torch.stack(out, dim=1).flatten(1, 2)


def decode_tiles(words: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Read tiles of codes from words. Any bits are read without error; corrupt ones give wrong codes.

    Args:
        words: `[n, words]` int32.
        layout: where the bits lie.

    Returns:
        Codes `[n, tile]` int8 and scales `[n]` fp32.
    """
    k, lattice = layout.rice_parameter, layout.lattice
    scale, wall = read_header(words, layout)
    stream = words[:, layout.raw_words :]
    q = _read_stream(stream, wall, layout)
    span = _sum_span(lattice)
    coset = None
    if k == 0:
        symbols = (q >> 1) ^ -(q & 1)
        if span is not None:
            sums = symbols.unflatten(-1, (-1, span))
            parity = sums[..., :-1].sum(-1, keepdim=True, dtype=torch.int32) & 1
            symbols = torch.cat((sums[..., :-1], 2 * sums[..., -1:] + parity), dim=-1).flatten(-2)
        if layout.has_coset_bits:
            place = torch.arange(HEADER_BITS, layout.start, device=words.device)
            coset = (stream[:, place >> 5] >> (31 - (place & 31)).to(torch.int32)) & 1
    else:
        planes = _unpack_raw(words[:, : layout.raw_words], layout)
        implied = planes[layout.implied_plane]
        if lattice == "e8":
            coset = implied[..., 7].clone()
        if span is not None:
            # the lowest bit of a symbol is (magnitude & 1) ^ sign, and an even number of them are set
            implied.unflatten(-1, (-1, span))[..., -1] = 0
            lowest = planes[0] ^ (planes[1] if k >= 2 else q & 1)
            parity = lowest.unflatten(-1, (-1, span)).sum(-1, dtype=torch.int32) & 1
            implied.unflatten(-1, (-1, span))[..., -1] = parity
        magnitude = q << (k - 1)
        for plane in range(1, k):
            magnitude = magnitude | (planes[plane] << (plane - 1))
        symbols = magnitude ^ -planes[0]
    return symbols_to_codes(symbols, coset, lattice).flatten(1).to(torch.int8), scale
