import itertools
import math

import pytest
import torch

from hq_inductor.format.lattice import GRANULAR_ERROR, codes_to_symbols, embed, is_lattice_point, nearest_point
from hq_inductor.format.layout import LATTICES, TileLayout
from hq_inductor.format.rate_table import RATE_TABLE
from hq_inductor.format.rates import weight_layout
from hq_inductor.format.rice import magnitudes
from hq_inductor.format.rounding import cheapest_point

# (values of a coset per coordinate, as offset and step) by lattice
COSETS = {"e8": ((0, 2), (1, 2)), "a2": ((0, 2), (1, 2)), "d4": ((0, 1),), "z": ((0, 1),)}
# coordinates that can be searched apart from the rest of the vector
SPAN = {"e8": 8, "d4": 4, "a2": 2, "z": 1}


def cost(x: torch.Tensor, codes: torch.Tensor, layout: TileLayout, price: float) -> torch.Tensor:
    """Squared error and price of 8-vectors; infinite out of range. Straight from the definition."""
    rate = RATE_TABLE[layout.lattice][layout.code]
    total = sum(rate.even) + sum(rate.odd)
    class_bits = torch.tensor([-math.log2((a + b) / total) for a, b in zip(rate.even, rate.odd, strict=True)])
    symbols, _ = codes_to_symbols(codes.to(torch.int32), layout.lattice)
    quotient = magnitudes(symbols) >> (rate.rice_parameter - 1)
    bits = class_bits[quotient.clamp(max=len(class_bits) - 1)].sum(-1)
    error = (x - embed(codes, layout.lattice)).square().sum(-1)
    return torch.where((quotient < len(class_bits)).all(-1), error + price * bits, torch.inf)


def neighbours(x: torch.Tensor, lattice: str) -> torch.Tensor:
    """Lattice points whose coordinates in the first span are neighbours of those of x `[8]` in one coset; zero elsewhere."""
    unit = embed(torch.ones(8), lattice)
    points = []
    for offset, step in COSETS[lattice]:
        below = offset + step * torch.floor((x / unit - offset) / step)
        ranges = [(b, b + step) for b in below[: SPAN[lattice]].tolist()]
        points += [[*point, *[0.0] * (8 - SPAN[lattice])] for point in itertools.product(*ranges)]
    points = torch.tensor(points)
    return points[is_lattice_point(points, lattice)]


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.125, 4.0])
@pytest.mark.parametrize("factor", [0.5, 1.6])
def test_cheapest_of_all_neighbours(lattice, bps, factor):
    """No neighbouring lattice point costs less, by enumeration."""
    layout = weight_layout(512, bps, lattice).tile
    price = factor * GRANULAR_ERROR[lattice]
    x = torch.randn(60, 8) * RATE_TABLE[lattice][layout.code].start_rms
    # points with parts of the vector out of the search count those as zeros
    x[:, SPAN[lattice] :] = 0
    # clear of the range's end, where neighbours may be out of it
    x = x.clamp(-0.8 * layout.max_magnitude, 0.8 * layout.max_magnitude)
    found = cheapest_point(x, layout, torch.full((60, 1), price))
    assert is_lattice_point(found, lattice).all()
    found_cost = cost(x, found, layout, price)
    changed = 0
    for vector, own in zip(x, found_cost, strict=True):
        least = cost(vector, neighbours(vector, lattice), layout, price).min()
        assert own <= least + 1e-4
        changed += 1
    assert changed == 60


@pytest.mark.parametrize("lattice", LATTICES)
def test_no_price_means_nearest_point(lattice):
    layout = weight_layout(512, 4.0, lattice).tile
    x = torch.randn(2000, 8) * 0.2 * layout.max_magnitude
    found = cheapest_point(x, layout, torch.zeros(1, 1))
    nearest = nearest_point(x, lattice)
    error, least = ((x - embed(codes, lattice)).square().sum(-1) for codes in (found, nearest))
    torch.testing.assert_close(error, least)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 2.5, 4.0, 6.0])
def test_always_in_range_and_on_the_lattice(lattice, bps):
    layout = weight_layout(512, bps, lattice).tile
    x = torch.randn(4000, 8) * torch.logspace(-3, 6, 4000)[:, None]
    found = cheapest_point(x, layout, torch.full((4000, 1), 2.5 * GRANULAR_ERROR[lattice]))
    symbols, _ = codes_to_symbols(found.to(torch.int32), lattice)
    assert is_lattice_point(found, lattice).all() and magnitudes(symbols).max() <= layout.max_magnitude
    # the far ones go to the ends
    assert magnitudes(symbols)[-1].max() == layout.max_magnitude


def test_price_trades_error_for_bits():
    layout = weight_layout(512, 3.0).tile
    x = torch.randn(4000, 8) * RATE_TABLE["e8"][24].start_rms
    errors, bits = [], []
    for factor in (0.0, 0.5, 1.0, 2.0, 4.0):
        price = factor * GRANULAR_ERROR["e8"]
        codes = cheapest_point(x, layout, torch.full((4000, 1), price))
        errors.append(cost(x, codes, layout, 0.0).sum().item())
        bits.append(cost(x, codes, layout, 1.0).sum().item() - errors[-1])
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)
