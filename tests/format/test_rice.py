import hashlib
import zlib

import pytest
import torch

from hq_inductor.format.lattice import symbols_to_codes
from hq_inductor.format.layout import LATTICES, TileLayout, scale_from_code
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rates import start_rms, weight_layout
from hq_inductor.format.rice import code_lengths, decode_tiles, encode_tiles, lane_lengths, quads, wall_code

from .bit_reader import read_tile

RATES = (2.0, 2.75, 3.0, 4.0, 5.0, 6.0)
TILES = (128, 256, 384, 512, 1408)


def quantized_tiles(lattice: str, bps: float, tile: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor, TileLayout]:
    layout = weight_layout(tile, bps, lattice, tile).tile
    generator = torch.Generator().manual_seed(zlib.crc32(f"{lattice} {bps} {tile}".encode()))
    x = torch.randn(count, tile, generator=generator)
    return *quantize_tiles(x, layout, start_rms(bps, lattice)), layout


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0, 5.0])
def test_quads_hold_the_quotients_of_rice_on_zigzag(lattice, bps):
    layout = weight_layout(512, bps, lattice).tile
    k = layout.rice_parameter
    limit = layout.max_magnitude
    symbols = torch.randint(-limit - 1, limit + 1, (64, 8))
    index = quads(symbols, layout)
    for row, found in zip(symbols.tolist(), index.tolist(), strict=True):
        zigzag = [2 * s if s >= 0 else -2 * s - 1 for s in row]
        for half in range(2):
            assert [found[half] // layout.classes**i % layout.classes for i in range(4)] == [z >> k for z in zigzag[4 * half :][:4]]


@pytest.mark.parametrize("lattice", LATTICES)
def test_code_lengths_know_what_is_in_range(lattice):
    layout = weight_layout(512, 4.0, lattice).tile
    limit = layout.max_magnitude
    for symbol, expected in ((limit, True), (-limit - 1, True), (limit + 1, False), (-limit - 2, False)):
        codes = symbols_to_codes(torch.tensor([[symbol, 0, 0, 0, 0, 0, 0, 0]]), torch.zeros(1, dtype=torch.int64), lattice)
        assert code_lengths(codes, layout)[1].item() is expected


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", RATES)
@pytest.mark.parametrize("tile", TILES)
def test_encode_decode_is_identity(lattice, bps, tile):
    codes, scale, layout = quantized_tiles(lattice, bps, tile)
    words = encode_tiles(codes, scale, layout)
    assert words.shape == (len(codes), layout.words) and words.dtype == torch.int32
    decoded, decoded_scale = decode_tiles(words, layout)
    assert torch.equal(decoded, codes)
    assert torch.equal(decoded_scale, scale)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", RATES)
@pytest.mark.parametrize("tile", [128, 384])
def test_words_read_bit_by_bit(lattice, bps, tile):
    codes, scale, layout = quantized_tiles(lattice, bps, tile, count=3)
    for row, s, words in zip(codes.tolist(), scale.tolist(), encode_tiles(codes, scale, layout).tolist(), strict=True):
        unsigned = [word & 0xFFFFFFFF for word in words]
        code = layout.quotient_code
        found = read_tile(unsigned, lattice, tile, layout.rice_parameter, code.classes, list(code.lengths), layout.wall_unit)
        assert found == (row, s)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0])
def test_lanes_fit_their_regions_and_the_rest_is_zero(lattice, bps):
    codes, scale, layout = quantized_tiles(lattice, bps, 512)
    words = encode_tiles(codes, scale, layout)[:, layout.raw_words :]
    shift = torch.arange(31, -1, -1, dtype=torch.int32)
    bits = ((words[..., None] >> shift) & 1).flatten(1)
    lanes = lane_lengths(code_lengths(codes.unflatten(-1, (-1, 8)), layout)[0])
    wall, fits = wall_code(lanes, layout)
    assert fits.all()
    for row, lengths, code in zip(bits, lanes.tolist(), wall.tolist(), strict=True):
        middle = layout.wall_center + layout.wall_unit * (code - 8)
        ends = (layout.start + lengths[0], middle - lengths[1], middle + lengths[2], layout.end - lengths[3])
        assert ends[0] <= ends[1] and ends[2] <= ends[3]
        assert row[ends[0] : ends[1]].sum() == 0 and row[ends[2] : ends[3]].sum() == 0


def test_wall_code_is_minimal_and_sufficient():
    layout = weight_layout(512, 4.0, "e8", 512).tile
    half = (layout.end - layout.start) // 2
    for left in range(half - 60, half + 60):
        lanes = torch.tensor([[left // 2, left - left // 2, 10, 10]], dtype=torch.int32)
        code, fits = wall_code(lanes, layout)
        room = layout.wall_center + layout.wall_unit * (code.item() - 8) - layout.start
        assert fits.item() == (left <= layout.wall_center + 7 * layout.wall_unit - layout.start)
        if fits:
            assert room >= left and (code.item() == 0 or room - layout.wall_unit < left)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "flipped"])
def test_corrupt_words_decode_to_something_finite(lattice, bps, kind):
    codes, scale, layout = quantized_tiles(lattice, bps, 256)
    words = encode_tiles(codes, scale, layout)
    if kind == "random":
        words = torch.randint(-(2**31), 2**31, words.shape, dtype=torch.int64).to(torch.int32)
    elif kind == "flipped":
        words = words ^ (torch.rand(words.shape) < 0.1).to(torch.int32)
    else:
        words.fill_(0 if kind == "zeros" else -1)
    decoded, decoded_scale = decode_tiles(words, layout)
    assert decoded.shape == codes.shape and decoded_scale.isfinite().all()


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0])
def test_longest_codes_are_readable(lattice, bps):
    """Vectors of the longest codes and the largest magnitudes, in every lane."""
    layout = weight_layout(512, bps, lattice, 512).tile
    symbols = torch.zeros(1, 64, 8, dtype=torch.int32)
    top = layout.max_magnitude
    symbols[0, :4] = torch.tensor([top, -top - 1, top, -top - 1, -top - 1, top, -top - 1, top])
    symbols[0, :4, 7] ^= symbols[0, :4].sum(-1, dtype=torch.int32) & 1
    symbols[0, :4, 3] ^= symbols[0, :4, :4].sum(-1, dtype=torch.int32) & 1
    symbols[0, :4, 7] ^= symbols[0, :4].sum(-1, dtype=torch.int32) & 1
    codes = symbols_to_codes(symbols, torch.tensor([[0, 1, 0, 1] * 16], dtype=torch.int32), lattice).flatten(1).to(torch.int8)
    scale = scale_from_code(torch.tensor([2000], dtype=torch.int32))
    assert code_lengths(codes.unflatten(-1, (-1, 8)), layout)[1].all()
    assert torch.equal(decode_tiles(encode_tiles(codes, scale, layout), layout)[0], codes)


def test_format_is_frozen():
    """A change of these hashes is a change of the format: raise FORMAT_VERSION."""
    found = {}
    for lattice in LATTICES:
        digest = hashlib.sha256()
        for bps in (2.0, 3.0, 4.0):
            layout = weight_layout(256, bps, lattice, 256).tile
            # integers only: the same on every machine
            symbols = (torch.arange(4 * 32 * 8).view(4, 32, 8) * 7919 % 31 - 15) >> 1 << (layout.rice_parameter - 1) >> 1
            symbols = symbols - (symbols.unflatten(-1, (2, 4)).sum(-1, keepdim=True) & 1).expand(-1, -1, -1, 4).flatten(2) * (
                torch.arange(8) % 4 == 3
            )
            coset = (torch.arange(128) % 3 == 0).view(4, 32).to(torch.int64)
            codes = symbols_to_codes(symbols.clamp(-layout.max_magnitude - 1), coset, lattice).to(torch.int8).flatten(1)
            scale = scale_from_code(torch.arange(2000, 2004, dtype=torch.int32))
            digest.update(encode_tiles(codes, scale, layout).numpy().tobytes())
        found[lattice] = digest.hexdigest()[:16]
    assert found == FROZEN


FROZEN = {"e8": "555682ef321c34d4", "d4": "4efd191fd13dc090", "a2": "6589a41950d5affa", "z": "e7b75b3263eec259"}
