import pytest
import torch

from hq_inductor.format.layout import MAX_SCALE, MIN_SCALE, SCALE_CODES, TileLayout, scale_from_code, scale_to_code
from hq_inductor.format.rates import choose_tile, weight_layout


def test_scale_codes_every_code():
    codes = torch.arange(SCALE_CODES, dtype=torch.int32)
    scales = scale_from_code(codes)
    expected = torch.tensor([2.0 ** ((c >> 6) - 40) * (1 + (c & 63) / 64) for c in range(SCALE_CODES)])
    assert torch.equal(scales, expected)
    assert torch.equal(scale_to_code(scales), codes)
    assert scales[0] == MIN_SCALE and scales[-1] == MAX_SCALE


def test_scale_codes_round_to_nearest():
    x = torch.exp(torch.empty(4000, dtype=torch.float64).uniform_(-20, 10)).to(torch.float32)
    grid = scale_from_code(torch.arange(SCALE_CODES, dtype=torch.int32)).double()
    nearest = (x[:, None].double() - grid).abs().amin(1)
    assert torch.equal((scale_from_code(scale_to_code(x)).double() - x).abs(), nearest)


def test_scale_codes_out_of_range():
    x = torch.tensor([0.0, 1e-30, 1e-45, 1e30, float("inf")])
    assert scale_to_code(x).tolist() == [0, 0, 0, SCALE_CODES - 1, SCALE_CODES - 1]


@pytest.mark.parametrize("lattice", ["e8", "d4", "a2", "z"])
@pytest.mark.parametrize("eighths", range(16, 49))
def test_weight_layout_exact_rate(lattice, eighths):
    layout = weight_layout(4096, eighths / 8, lattice)
    assert layout.tile.tile == 512
    assert layout.padding == 0
    assert layout.bits_per_weight == eighths / 8


@pytest.mark.parametrize(
    ("in_features", "bps", "tile"),
    [(4096, 4, 512), (384, 4, 384), (1408, 4, 1408), (768, 4, 768), (11008, 4, 256), (14336, 3.125, 512), (8960, 4, 640), (128, 4, 128)],
)
def test_choose_tile(in_features, bps, tile):
    assert choose_tile(in_features, bps) == tile


@pytest.mark.parametrize("in_features", [1, 100, 128, 384, 500, 1000, 1408, 11008])
@pytest.mark.parametrize("bps", [1.75, 2, 3.125, 4.125, 6])
def test_weight_layout_never_exceeds_rate_of_stored_columns(in_features, bps):
    layout = weight_layout(in_features, bps)
    assert layout.padded_features >= in_features
    assert layout.tile.bits_per_weight <= bps
    assert layout.tile.bits_per_weight > bps - 32 / layout.tile.tile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e9", 512, 32, 64), "lattice must be one of"),
        (("e8", 100, 32, 64), "tile must be a multiple of 128"),
        (("e8", 2048, 32, 64), "tile must be a multiple of 128"),
        (("e8", 512, 7, 64), "code must be from 14 to 48"),
        (("z", 512, 15, 64), "code must be from 16 to 48"),
        (("e8", 512, 40, 64), "words=64 is too few"),
    ],
)
def test_tile_layout_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TileLayout(*arguments)
