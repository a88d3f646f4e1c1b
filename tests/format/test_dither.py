import pytest
import torch
import torch.nn.functional as F

from hq_inductor.format.dither import dither_vectors, quantize_dithered, wide_code
from hq_inductor.format.kv import kv_layout
from hq_inductor.format.lattice import GRANULAR_ERROR, embed, nearest_point
from hq_inductor.format.layout import LATTICES
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rate_table import RATE_TABLE
from hq_inductor.format.rates import MIN_BPS
from hq_inductor.format.rice import code_lengths, lane_lengths, wall_code
from hq_inductor.format.rotation import rotation_matrix

DRAWS = 1000


def decoded(x, layout, dither, seed=3):
    """What `DRAWS` positions decode to that all store x `[tile]`, `[DRAWS, tile]`."""
    rows = x.expand(DRAWS, -1)
    start_rms = RATE_TABLE[layout.lattice][layout.code].start_rms
    if dither is None:
        codes, scale = quantize_tiles(rows, layout, start_rms)
        return embed(codes, layout.lattice) * scale[:, None]
    u = dither_vectors(dither, seed, 1, torch.arange(DRAWS), layout)[0]
    codes, scale = quantize_dithered(rows, u, layout, start_rms, dither)
    return (embed(codes, layout.lattice) - u) * scale[:, None]


ROTATION = rotation_matrix("haar", 128, seed=1)
ADVERSARIES = {
    "itself": (torch.linspace(-1, 2, 128), torch.linspace(-1, 2, 128)),
    "one large": (F.one_hot(torch.tensor(5), 128) * 9.0, F.one_hot(torch.tensor(5), 128) * 1.0),
    "one-sided": (torch.full((128,), 0.93) @ ROTATION.t(), torch.ones(128) @ ROTATION.t()),  # all coordinates the same once rotated
}


@pytest.mark.parametrize("bps", [3.0, 4.0])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_inner_products_are_unbiased_with_dither_and_not_without(bps, name):
    """Mean error of `<query, x'>` over draws of the dither, against its standard error; the measured bias without is printed."""
    x, query = (vector @ ROTATION for vector in ADVERSARIES[name])
    error = (decoded(x, kv_layout(128, bps, dither="full").tile, "full") @ query - x @ query) / (x @ query)
    standard_error = error.std() / DRAWS**0.5
    assert 1e-5 < standard_error < 1e-3
    assert abs(error.mean()) < 4 * standard_error
    plain = (decoded(x, kv_layout(128, bps).tile, None)[0] @ query - x @ query) / (x @ query)
    print(f"{name}, {bps} bits: without dither {plain:+.2%}, with {error.mean():+.3%} ± {standard_error:.3%}")
    assert abs(plain) > 8 * standard_error or name == "one-sided"


def test_low_rates_keep_a_small_bias():
    """At 2 bits some dithered codes do not fit and take a coarser scale, which depends on the dither: 0.3 % at most is left."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(2))
    error = decoded(x, kv_layout(128, 2, dither="full").tile, "full") @ x / x.square().sum() - 1
    assert abs(error.mean()) < 3e-3


@pytest.mark.parametrize("dither", ["full", "half"])
@pytest.mark.parametrize("lattice", LATTICES)
def test_errors_do_not_depend_on_the_vector(lattice, dither):
    """The error in units of the scale is uniform over the cell, whose second moment per dimension is known, for every x."""
    layout = kv_layout(128, 4, lattice, dither).tile
    rows = torch.randn(128).expand(DRAWS, -1)
    u = dither_vectors(dither, 5, 1, torch.arange(DRAWS), layout)[0]
    assert (u / (0.5 if dither == "half" else 1)).square().mean().item() == pytest.approx(GRANULAR_ERROR[lattice], rel=0.01)
    assert u.mean(0).abs().max() < 5 * u.std() / DRAWS**0.5
    # inside the cell: the nearest point is zero
    assert (nearest_point((u * 0.999).unflatten(-1, (-1, 8)), lattice) == 0).all()
    codes, scale = quantize_dithered(rows, u, layout, RATE_TABLE[lattice][layout.code].start_rms, dither)
    error = (embed(codes, lattice) - u) - rows / scale[:, None]
    if dither == "full":
        assert error.square().mean().item() == pytest.approx(GRANULAR_ERROR[lattice], rel=0.02)


@pytest.mark.parametrize("dither", ["full", "half"])
@pytest.mark.parametrize("lattice", LATTICES)
def test_codes_always_fit(lattice, dither):
    for bps in (MIN_BPS[lattice], 3, 6):
        layout = kv_layout(96, bps, lattice, dither).tile
        x = torch.cat(
            (torch.randn(20, 384), torch.zeros(1, 384), torch.eye(384)[:2] * 1e6, torch.full((1, 384), 1e-30), torch.randn(4, 384) ** 5)
        )
        u = dither_vectors(dither, 5, 1, torch.arange(len(x)), layout)[0]
        codes, scale = quantize_dithered(x, u, layout, RATE_TABLE[lattice][layout.code].start_rms, dither)
        bits, in_range = code_lengths(codes.unflatten(-1, (-1, 8)), layout)
        assert in_range.all() and wall_code(lane_lengths(bits), layout)[1].all() and scale.isfinite().all()


def test_dither_is_keyed_by_position_slot_and_seed():
    layout = kv_layout(128, 4, dither="full").tile
    u = dither_vectors("full", 1, 3, torch.arange(10), layout)
    assert torch.equal(u[:, [7, 2]], dither_vectors("full", 1, 3, torch.tensor([7, 2]), layout))
    assert torch.equal(dither_vectors("half", 1, 3, torch.arange(10), layout) * 2, u)
    assert len({tuple(row.tolist()) for row in torch.cat((u, dither_vectors("full", 2, 3, torch.arange(10), layout))).flatten(0, 1)}) == 60


def test_wide_codes_have_more_room():
    assert [wide_code("e8", code) for code in (15, 19, 23, 31, 48)] == [17, 21, 25, 32, 48]
