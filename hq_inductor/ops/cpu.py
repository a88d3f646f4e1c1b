"""Rice decode on the CPU, vectorized over whole planes with numpy.

The unary plane of a well-formed tile holds exactly `tile` ones, in the order lane 0, lane 1 backwards, lane 2, lane 3 backwards. So the
quotients are differences of the positions of set bits, found for all tiles at once, and raw bits are handled four coefficients at a time as
the bytes of a 32-bit word. Tiles that are not well formed go through the specification, so the result is the same for any input bits.

Cost.  Measured in `benchmarks/codec.py`: see benchmarks/README.md.
"""

from __future__ import annotations

import numpy as np
import torch

from ..format.layout import GROUP, HEADER_BITS, LANES, MAX_VECTOR_BITS, VECTOR, TileLayout
from ..format.rice import decode_tiles, read_header

_ONES = 0x01010101
# tiles are decoded in blocks of about this many weights, which bounds the working set
_BLOCK_WEIGHTS = 1 << 17


def _stream_quotients(stream: np.ndarray, wall: np.ndarray, layout: TileLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quotients `[n, tile]` uint8 in coefficient order, coset bits `[n, start - 16]`, and which tiles are well formed `[n]`."""
    n, tile = stream.shape[0], layout.tile
    bits = np.unpackbits(stream.astype(">i4").view(np.uint8).reshape(n, -1), axis=1)
    coset = bits[:, HEADER_BITS : layout.start].copy()
    bits[:, : layout.start] = 0
    flat = np.flatnonzero(bits.view(np.bool_))
    first = np.arange(n, dtype=np.int64)[:, None] * layout.end
    good = np.ones(n, dtype=np.bool_)
    if flat.size == n * tile:
        position = flat.reshape(n, tile) - first
        good = (position[:, 0] >= 0) & (position[:, -1] < layout.end)
    if flat.size != n * tile or not good.all():
        good = bits.sum(axis=1, dtype=np.int64) == tile
        position = np.zeros((n, tile), dtype=np.int64)
        position[good] = np.flatnonzero(bits[good].view(np.bool_)).reshape(-1, tile) - first[: good.sum()]
    position = position.astype(np.int32)
    quarter = tile // LANES
    good &= (position[:, 2 * quarter - 1] < wall) & (position[:, 2 * quarter] >= wall)
    lanes = position.reshape(n, LANES, quarter)
    steps = np.empty((n, LANES, quarter), dtype=np.int32)
    np.subtract(lanes[:, ::2, 1:], lanes[:, ::2, :-1], out=steps[:, ::2, 1:])
    steps[:, 0, 0] = lanes[:, 0, 0] - (layout.start - 1)
    steps[:, 2, 0] = lanes[:, 2, 0] - (wall - 1)
    backwards = lanes[:, 1::2, ::-1]
    np.subtract(backwards[:, :, :-1], backwards[:, :, 1:], out=steps[:, 1::2, 1:])
    steps[:, 1, 0] = wall - backwards[:, 0, 0]
    steps[:, 3, 0] = layout.end - backwards[:, 1, 0]
    good &= (steps.reshape(n, -1, VECTOR).sum(axis=2, dtype=np.int32) <= MAX_VECTOR_BITS).all(axis=1)
    quotient = np.empty((n, quarter // VECTOR, LANES, VECTOR), dtype=np.uint8)
    quotient[...] = (steps - 1).astype(np.uint8).reshape(n, LANES, quarter // VECTOR, VECTOR).swapaxes(1, 2)
    return quotient.reshape(n, tile), coset, good


def _fold_bytes(x: np.ndarray) -> np.ndarray:
    """Exclusive or of the four bytes of each word, in the low byte (the other bytes hold leftovers)."""
    x = x ^ (x >> 16)
    return x ^ (x >> 8)


def _raw_words(raw: np.ndarray, layout: TileLayout) -> np.ndarray:
    """Raw plane `[n, raw_words]` to `[n, group, lane, k]` uint32, D4's scattered bytes put back."""
    n, k = raw.shape[0], layout.rice_parameter
    if layout.lattice != "d4":
        return raw.reshape(n, layout.groups, LANES, k)
    implied, missing = layout.implied_plane, (LANES - 1) * k + layout.implied_plane
    stored = raw.reshape(n, layout.groups, -1)
    words = np.insert(stored, missing, 0, axis=2).reshape(n, layout.groups, LANES, k)
    for lane in range(LANES - 1):
        words[:, :, LANES - 1, implied] |= (words[:, :, lane, implied] >> 24) << (8 * lane)
        words[:, :, lane, implied] &= 0xFFFFFF
    return words


def _restore_implied(words: np.ndarray, quads: np.ndarray, layout: TileLayout) -> np.ndarray | None:
    """Put the implied bits into `words` in place; returns the raw words that hold the coset bits (e8), before that."""
    if layout.lattice not in ("e8", "d4"):
        return None
    k, implied = layout.rice_parameter, words[..., layout.implied_plane]
    coset = implied.copy()
    parity = _fold_bytes(words[..., 0] if k == 1 else words[..., 0] ^ words[..., 1]) & 0xFF  # bit 2 v + h
    if k == 1:  # the lowest magnitude bit is the quotient's; quads [n, group, vector, lane, half]
        lowest = _fold_bytes(quads) & 1
        for vector in range(4):
            for half in range(2):
                parity ^= lowest[:, :, vector, :, half] << (2 * vector + half)
    if layout.lattice == "e8":
        parity = (parity ^ (parity >> 1)) & 0x55
        implied ^= parity << 25
        return coset
    implied |= parity << 24
    return None


def _decode_block(words: np.ndarray, wall: np.ndarray, layout: TileLayout) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[n, tile]` int8 of uint32 words `[n, words]`, and which tiles were well formed."""
    n, k, lattice = words.shape[0], layout.rice_parameter, layout.lattice
    quotient, coset, good = _stream_quotients(words[:, layout.raw_words :], wall, layout)
    if k == 0:
        symbols = (quotient >> 1) ^ (0 - (quotient & 1))
        span = {"e8": 8, "d4": 4}.get(lattice)
        if span is not None:
            sums = symbols.reshape(n, -1, span)
            parity = np.bitwise_xor.reduce(sums[..., :-1], axis=2) & 1
            sums[..., -1] = (sums[..., -1] << 1) | parity
        if lattice == "e8":
            symbols = (symbols << 1).reshape(n, -1, VECTOR) | coset[..., None]
    else:
        quads = quotient.view(np.uint32).reshape(n, layout.groups, GROUP // 32, LANES, 2)
        raw = _raw_words(words[:, : layout.raw_words].copy(), layout)
        coset_words = _restore_implied(raw, quads, layout)
        out = np.empty_like(quads)
        keep = (0xFF >> (k - 1)) * _ONES
        for vector in range(4):
            for half in range(2):
                place = 2 * vector + half
                s = (quads[:, :, vector, :, half] & keep) << (k - 1)
                for plane in range(1, k):
                    s |= ((raw[..., plane] >> place) & _ONES) << (plane - 1)
                s ^= ((raw[..., 0] >> place) & _ONES) * 255
                if coset_words is not None:
                    s = ((s & (0x7F * _ONES)) << 1) | (((coset_words >> (25 + 2 * vector)) & 1) * _ONES)
                out[:, :, vector, :, half] = s
        symbols = out.view(np.uint8)
    codes = symbols.reshape(n, layout.tile).view(np.int8)
    if lattice == "a2":
        pairs = codes.reshape(n, -1, 2)
        pairs[..., 1] = (pairs[..., 1] << 1) | (pairs[..., 0] & 1)
    return codes, good


def decode_codes(words: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[n, tile]` int8 and scales `[n]` fp32 of CPU tiles `[n, words]` int32; equals `decode_tiles` for any bits."""
    words = words.contiguous()
    scale, wall = read_header(words, layout)
    walls, source = wall.to(torch.int32).numpy(), words.numpy().view(np.uint32)
    codes = np.empty((words.shape[0], layout.tile), dtype=np.int8)
    good = np.empty(words.shape[0], dtype=np.bool_)
    step = max(1, _BLOCK_WEIGHTS // layout.tile)
    for begin in range(0, words.shape[0], step):
        rows = slice(begin, begin + step)
        codes[rows], good[rows] = _decode_block(source[rows], walls[rows], layout)
    out = torch.from_numpy(codes)
    if not good.all():
        bad = torch.from_numpy(np.flatnonzero(~good))
        out[bad] = decode_tiles(words[bad], layout)[0]
    return out, scale
