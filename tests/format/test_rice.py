import hashlib
import zlib

import pytest
import torch

from hq_inductor.format.lattice import codes_to_symbols, nearest_point
from hq_inductor.format.layout import LATTICES, MAX_VECTOR_BITS, TileLayout, scale_from_code
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rates import start_rms, weight_layout
from hq_inductor.format.rice import code_lengths, decode_tiles, encode_tiles, lane_lengths, quotients, wall_code

from .bit_reader import read_tile, rice_code

RATES = (2.0, 2.75, 3.0, 4.0, 5.0, 6.0)
TILES = (128, 256, 384, 512, 1408)


def quantized_tiles(lattice: str, bps: float, tile: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor, TileLayout]:
    layout = weight_layout(tile, bps, lattice, tile).tile
    generator = torch.Generator().manual_seed(zlib.crc32(f"{lattice} {bps} {tile}".encode()))
    x = torch.randn(count, tile, generator=generator)
    return *quantize_tiles(x, layout, start_rms(bps, lattice)), layout


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("k", range(5))
def test_quotients_are_those_of_rice_on_zigzag(lattice, k):
    codes = nearest_point(torch.randn(256, 8) * 2 ** (k + 1), lattice).to(torch.int32)
    symbols, _ = codes_to_symbols(codes, lattice)
    q = quotients(symbols, lattice, k)
    span = {"e8": 8, "d4": 4}.get(lattice)
    for row, lengths in zip(symbols.tolist(), q.tolist(), strict=True):
        for index, (symbol, length) in enumerate(zip(row, lengths, strict=True)):
            if k == 0 and span and index % span == span - 1:
                parity = sum(row[index - span + 1 : index]) % 2
                symbol = (symbol - parity) // 2
            assert length == rice_code(symbol, k)[0]


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
        assert read_tile(unsigned, lattice, tile, layout.rice_parameter, layout.wall_unit) == (row, s)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0])
def test_stream_holds_one_bit_per_symbol_and_every_quotient(lattice, bps):
    """Set bits are terminators (and header and coset bits), and the span of each lane is its code length."""
    codes, scale, layout = quantized_tiles(lattice, bps, 512)
    words = encode_tiles(codes, scale, layout)[:, layout.raw_words :]
    shift = torch.arange(31, -1, -1, dtype=torch.int32)
    bits = ((words[..., None] >> shift) & 1).flatten(1)
    assert (bits[:, layout.start :].sum(-1) == layout.tile).all()
    lanes = lane_lengths(code_lengths(codes.unflatten(-1, (-1, 8)), lattice, layout.rice_parameter))
    wall, fits = wall_code(lanes, layout)
    assert fits.all()
    for row, lengths, code in zip(bits, lanes.tolist(), wall.tolist(), strict=True):
        middle = layout.wall_center + layout.wall_unit * (code - 8)
        ends = (layout.start + lengths[0] - 1, middle - lengths[1], middle + lengths[2] - 1, layout.end - lengths[3])
        assert all(row[end] == 1 for end in ends)
        assert row[ends[0] + 1 : ends[1]].sum() == 0 and row[ends[2] + 1 : ends[3]].sum() == 0


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
def test_longest_vector_is_readable(lattice, bps):
    """A vector of exactly 32 stream bits, the most an encoder may write, in every lane."""
    layout = weight_layout(512, bps, lattice, 512).tile
    codes = torch.zeros(1, 64, 8, dtype=torch.int32)
    unit = 1 << max(layout.rice_parameter - 1, 0)
    for vector in range(4):
        for size in range(1, 60):
            trial = codes[0, vector].clone()
            step = 2 * unit if lattice == "e8" else unit
            trial[0], trial[1] = size * step, size * step
            if code_lengths(trial, lattice, layout.rice_parameter) > MAX_VECTOR_BITS:
                break
            codes[0, vector] = trial
    scale = scale_from_code(torch.tensor([2000], dtype=torch.int32))
    words = encode_tiles(codes.flatten(1).to(torch.int8), scale, layout)
    assert torch.equal(decode_tiles(words, layout)[0], codes.flatten(1).to(torch.int8))


def test_format_is_frozen():
    """A change of these hashes is a change of the format: raise FORMAT_VERSION."""
    found = {}
    for lattice in LATTICES:
        digest = hashlib.sha256()
        for bps in (2.0, 3.0, 4.0):
            layout = weight_layout(256, bps, lattice, 256).tile
            # integers only: the same on every machine
            x = (torch.arange(4 * 32 * 8).view(4, 32, 8) * 7919 % 31 - 15).to(torch.float64) * 2.0 ** (layout.rice_parameter - 5) * 1.3
            codes = nearest_point(x, lattice).to(torch.int8).flatten(1)
            scale = scale_from_code(torch.arange(2000, 2004, dtype=torch.int32))
            digest.update(encode_tiles(codes, scale, layout).numpy().tobytes())
        found[lattice] = digest.hexdigest()[:16]
    assert found == FROZEN


FROZEN = {"e8": "cc7caa970d3e5026", "d4": "465504d1d2975d3b", "a2": "1edb5d04aacf23e8", "z": "92121c80ac2dcae6"}
