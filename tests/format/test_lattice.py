import itertools

import pytest
import torch

from hq_inductor.format.lattice import codes_to_symbols, embed, is_lattice_point, nearest_point, symbols_to_codes
from hq_inductor.format.layout import LATTICES


def _neighbours_e8(x):
    """Every point of 2 E8 whose coordinates are each among the two nearest of one parity: contains the nearest point."""
    points = []
    for coset in (0, 1):
        low = 2 * torch.floor((x - coset) / 2) + coset
        for step in itertools.product((0, 2), repeat=8):
            point = low + torch.tensor(step, dtype=x.dtype)
            if point.sum() % 4 == 0:
                points.append(point)
    return torch.stack(points)


def _neighbours_d4(x):
    halves = []
    for half in x.view(2, 4):
        low = torch.floor(half)
        points = torch.stack([low + torch.tensor(step, dtype=x.dtype) for step in itertools.product((0, 1), repeat=4)])
        halves.append(points[points.sum(-1) % 2 == 0])
    return torch.stack([torch.cat(pair) for pair in itertools.product(*halves)])


def _neighbours_a2(x):
    best = []
    for y, x_ in x.view(4, 2).tolist():
        pairs = [(ny, nx) for ny in range(-6, 7) for nx in range(-10, 11) if (ny - nx) % 2 == 0]
        best.append(min(pairs, key=lambda p, y=y, x_=x_: (3**0.5 * p[0] - y) ** 2 + (p[1] - x_) ** 2))
    return torch.tensor(best, dtype=x.dtype).view(1, 8)


def _neighbours_z(x):
    return torch.round(x)[None]


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("spread", [0.6, 3.0])
def test_nearest_point_is_nearest(lattice, spread):
    neighbours = {"e8": _neighbours_e8, "d4": _neighbours_d4, "a2": _neighbours_a2, "z": _neighbours_z}[lattice]
    x = torch.randn(64, 8, dtype=torch.float64) * spread
    found = nearest_point(x, lattice)
    assert is_lattice_point(found.to(torch.int64), lattice).all()
    for row, codes in zip(x, found, strict=True):
        brute = (embed(neighbours(row), lattice, torch.float64) - row).square().sum(-1).min()
        assert (embed(codes, lattice, torch.float64) - row).square().sum() <= brute + 1e-12


@pytest.mark.parametrize("lattice", LATTICES)
def test_nearest_point_on_ties_is_a_point(lattice):
    x = torch.tensor(list(itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=4)))
    x = torch.cat((x, x.flip(-1)), dim=-1)
    assert is_lattice_point(nearest_point(x, lattice).to(torch.int32), lattice).all()


def test_nearest_point_e8_minimal_vectors():
    # the 240 shortest vectors of 2 E8 have squared length 8 and are their own nearest points
    points = [p for p in itertools.product((-2, 0, 2), repeat=8) if sum(c != 0 for c in p) == 2]
    points += [p for p in itertools.product((-1, 1), repeat=8) if sum(p) % 4 == 0]
    x = torch.tensor(points, dtype=torch.float32)
    assert len(points) == 240
    assert torch.equal(nearest_point(x, "e8"), x)


@pytest.mark.parametrize("lattice", LATTICES)
def test_symbols_are_a_bijection(lattice):
    codes = nearest_point(torch.randn(4096, 8) * 5, lattice).to(torch.int32)
    symbols, coset = codes_to_symbols(codes, lattice)
    assert torch.equal(symbols_to_codes(symbols, coset, lattice), codes)
    if lattice == "e8":
        assert (symbols.sum(-1) % 2 == 0).all()


@pytest.mark.parametrize(("lattice", "gain_db"), [("e8", 0.654), ("d4", 0.366), ("a2", 0.168), ("z", 0.0)])
def test_granular_gain(lattice, gain_db):
    """Second moment per dimension at equal volume against the cubic lattice (Conway and Sloane, table 2.3)."""
    volume = {"e8": 256 ** (1 / 8), "d4": 2 ** (1 / 4), "a2": (2 * 3**0.5) ** (1 / 2), "z": 1.0}[lattice]
    x = torch.rand(200_000, 8, dtype=torch.float64) * 64
    error = (x - embed(nearest_point(x, lattice), lattice, torch.float64)).square().mean().item() / volume**2
    assert abs(10 * torch.log10(torch.tensor(1 / 12 / error)).item() - gain_db) < 0.01
