"""Rate-distortion optimised rounding: lattice points by squared error plus lambda times bits.

Definition.  `cheapest_point(x)` minimises `|x - embed(p)|^2 + lambda * bits(p)` over the lattice points p whose symbols are in range and
             whose every coordinate is one of the two neighbours of x's in p's coset. `bits(p)` is a sum over coordinates of `-log2` of the
             class probabilities that the quotient code is made from; the Huffman code of quads follows that sum but for rounding.
             A sum keeps the search as cheap as for the nearest point: in each coset every coordinate takes the better neighbour, and where
             the lattice's parity is violated, the coordinate that loses least takes the other one.
             `lambda = 0` gives the nearest point within the range.
Invariants.  Every symbol is in range.
Source.      Sullivan and Wiegand, Rate-distortion optimization for video compression, 1998 (lambda is the slope of the operational
             curve); Conway and Sloane, 1982 (parity by the second best coordinate).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .lattice import SQRT3
from .layout import VECTOR, TileLayout
from .on_device import on_device
from .rate_table import RATE_TABLE


@dataclass(frozen=True)
class _Axis:
    """One kind of coordinate of one coset: the values `offset + step * t` and the bits of each t.

    Attributes:
        columns: which of the eight coordinates.
        unit: length of a step of 1 in the code, in units of the scale.
        low, high: range of t.
        bits: by `t - low`.
    """

    columns: slice
    offset: int
    step: int
    unit: float
    low: int
    high: int
    bits: tuple[float, ...]


def class_bits(layout: TileLayout) -> tuple[float, ...]:
    """Ideal bits of each quotient class: `-log2` of its weight, mean of even and odd positions."""
    rate = RATE_TABLE[layout.lattice][layout.code]
    weights = [a + b for a, b in zip(rate.even, rate.odd, strict=True)]
    return tuple(-math.log2(w / sum(weights)) for w in weights)


def _axis(layout: TileLayout, columns: slice, offset: int, step: int, unit: float, symbol) -> _Axis:
    """The axis of a symbol `symbol(t)`, an increasing function."""
    bits_of, top = class_bits(layout), layout.max_magnitude
    allowed = [t for t in range(-top - 2, top + 2) if -top - 1 <= symbol(t) <= top]
    bits = tuple(bits_of[max(s, -s - 1) >> (layout.rice_parameter - 1)] for s in map(symbol, allowed))
    return _Axis(columns, offset, step, unit, allowed[0], allowed[-1], bits)


@functools.lru_cache(maxsize=1024)
def _cosets(layout: TileLayout) -> tuple[tuple[_Axis, ...], ...]:
    every = slice(None)
    if layout.lattice == "e8":
        return tuple((_axis(layout, every, c, 2, 1.0, lambda t: t),) for c in (0, 1))
    if layout.lattice == "a2":
        return tuple(
            (
                _axis(layout, slice(0, None, 2), c, 2, SQRT3, lambda t, c=c: c + 2 * t),
                _axis(layout, slice(1, None, 2), c, 2, 1.0, lambda t: t),
            )
            for c in (0, 1)
        )
    return ((_axis(layout, every, 0, 1, 1.0, lambda t: t),),)


# for `benchmarks/make_rate_table.py`, which changes the rate table under way
forget_tables = _cosets.cache_clear


def _choose(x: torch.Tensor, axis: _Axis, price: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Better neighbour t of each coordinate, its cost, and the other neighbour's cost less that of the one below (negative: t is above)."""
    bits = on_device(("class bits", axis.bits), lambda: torch.tensor(axis.bits), x.device)
    unit, square = axis.step * axis.unit, float(axis.step * axis.unit) ** 2
    t = (x - axis.offset * axis.unit).mul_(1 / unit)
    below = torch.floor(t).clamp_(axis.low, axis.high - 1)
    index = (below - axis.low).to(torch.int32).flatten()
    price_below = bits.index_select(0, index).view_as(t).mul_(price)
    price_above = bits.index_select(0, index.add_(1)).view_as(t).mul_(price)
    rest = t.sub_(below)
    # |rest - 1|^2 - |rest|^2 = 1 - 2 rest
    difference = price_above.sub_(price_below).add_(square).sub_(rest, alpha=2 * square)
    cost = rest.square_().mul_(square).add_(price_below).add_(difference.clamp(max=0))
    return below.add_(difference < 0), cost, difference


def _even_sums(t: torch.Tensor, difference: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the sums of `span` neighbouring t even at the least loss; t and the loss per span, `[..., 8 / span]`."""
    t, difference = t.unflatten(-1, (-1, span)), difference.unflatten(-1, (-1, span))
    odd = t.sum(-1, keepdim=True).remainder_(2)
    loss, cheapest = difference.abs().min(-1, keepdim=True)
    move = torch.where(difference.gather(-1, cheapest) < 0, -odd, odd)
    return t.scatter_add(-1, cheapest, move).flatten(-2), (loss * odd).squeeze(-1)


def cheapest_point(x: torch.Tensor, layout: TileLayout, price: torch.Tensor) -> torch.Tensor:
    """Codes of the lattice points of least `|x - point|^2 + price * bits` whose symbols are in range.

    Args:
        x: `[..., 8]` fp32, in units of the scale.
        layout: lattice, range and class probabilities.
        price: lambda, squared units of the scale per bit, fp32, broadcast against `[..., 8]` with 1 last.

    Returns:
        `[..., 8]`, integers in the dtype of `x`.
    """
    cosets = _cosets(layout)
    if layout.lattice == "e8":
        chosen, costs = [], []
        for (axis,) in cosets:
            t, cost, difference = _choose(x, axis, price)
            t, loss = _even_sums(t, difference, VECTOR)
            chosen.append(t.mul_(2).add_(axis.offset))
            costs.append(cost.sum(-1, keepdim=True).add_(loss))
        return torch.where(costs[0] <= costs[1], *chosen)
    if layout.lattice == "a2":
        chosen, costs = [], []
        for axes in cosets:
            (y, cost_y, _), (z, cost_z, _) = (_choose(x[..., axis.columns], axis, price) for axis in axes)
            chosen.append(torch.stack((y, z), dim=-1).mul_(2).add_(axes[0].offset))
            costs.append(cost_y.add_(cost_z)[..., None])
        return torch.where(costs[0] <= costs[1], *chosen).flatten(-2)
    t, _, difference = _choose(x, cosets[0][0], price)
    return _even_sums(t, difference, 4)[0] if layout.lattice == "d4" else t
