import math

import pytest
import torch

from hq_inductor.format.kv import exact_index, heads_per_slot, join_heads, kv_layout, split_heads
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import LATTICES, TileLayout
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rate_table import RATE_TABLE
from hq_inductor.format.rates import MIN_BPS


@pytest.mark.parametrize(("head_dim", "join"), [(64, 2), (80, 8), (96, 4), (128, 1), (256, 1), (112, 8), (192, 2)])
@pytest.mark.parametrize("lattice", LATTICES)
def test_rate_is_exact_or_rounded_down(head_dim, join, lattice):
    for eighths in range(int(8 * MIN_BPS[lattice]), 49):
        bps = eighths / 8
        layout = kv_layout(head_dim, bps, lattice)
        assert layout.join == join == heads_per_slot(head_dim) and layout.tile.tile == join * head_dim
        bits = layout.bits_per_value(2 * join)
        assert bps - 32 / layout.tile.tile < bits <= bps
        if bps * layout.tile.tile % 32 == 0:
            assert bits == bps


def test_padding_heads_count():
    assert kv_layout(64, 4).bits_per_value(3) == 4 * 4 / 3
    assert kv_layout(64, 4).slots(3) == 2


@pytest.mark.parametrize(("head_dim", "bps"), [(128, 2.0), (128, 3.0), (128, 4.0), (256, 3.5), (256, 5.75), (96, 3.0)])
def test_code_is_close_to_the_best(head_dim, bps):
    layout = kv_layout(head_dim, bps).tile
    x = torch.randn(400, layout.tile, generator=torch.Generator().manual_seed(0))

    def snr_db(code):
        try:
            other = TileLayout("e8", layout.tile, code, layout.words)
        except ValueError:
            return -math.inf
        codes, scale = quantize_tiles(x, other, RATE_TABLE["e8"][code].start_rms)
        return -10 * math.log10((x - embed(codes, "e8") * scale[:, None]).square().mean().item())

    assert snr_db(layout.code) >= max(snr_db(code) for code in range(layout.code - 2, min(layout.code + 3, 49))) - 0.06


@pytest.mark.parametrize("head_dim", [0, 100, True, 127, 64.0])
def test_head_dims_without_a_tile_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must have a common multiple .* got {head_dim}"):
        kv_layout(head_dim, 4)


@pytest.mark.parametrize("bps", [1.0, 6.5, 3.1])
def test_rates_out_of_range_are_refused(bps):
    with pytest.raises(ValueError, match="bps must be a multiple of 1/8"):
        kv_layout(128, bps)


@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 3), (5, 0), (0, 0)])
def test_exact_places_are_a_ring_after_the_sinks(sinks, window):
    last = [None] * (sinks + window)
    for position in range(40):
        index = exact_index(torch.tensor(position), sinks, window).item()
        if position >= sinks and window == 0:
            assert index == -1
            continue
        last[index] = position
        expected = [p for p in range(position + 1) if p < sinks or p > position - window]
        assert sorted(p for p in last if p is not None and (p < sinks or p > position - window)) == expected
    assert exact_index(torch.tensor(-1), sinks, 0).item() == -1


@pytest.mark.parametrize(("heads", "join"), [(3, 2), (4, 4), (2, 1), (5, 8)])
def test_heads_join_and_split(heads, join):
    x = torch.arange(2 * heads * 3 * 16).view(2, heads, 3, 16)
    joined = join_heads(x, join)
    assert joined.shape == (2, -(-heads // join), 3, 16 * join)
    assert torch.equal(joined[1, 0, 2, :16], x[1, 0, 2])
    assert torch.equal(split_heads(joined, join)[:, :heads], x) and (split_heads(joined, join)[:, heads:] == 0).all()
