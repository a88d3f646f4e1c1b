"""Lattices: exact nearest points, their integer codes, and the symbols that are entropy coded.

Definition.  A lattice point is stored as small integers (*codes*, eight per vector) and stands for `scale * embed(codes)`:

             | lattice | codes                                            | embed              | volume per dimension |
             | z       | any integers                                     | codes              | 1                    |
             | a2      | pairs (n_y, n_x) of equal parity                 | (sqrt(3) n_y, n_x) | 2 sqrt(3) / 2 dims   |
             | d4      | 4-vectors with even sum                          | codes              | 2 / 4 dims           |
             | e8      | 2 E8: 8-vectors of one parity, sum = 0 mod 4     | codes              | 256 / 8 dims         |

             *Symbols* `s` are what the Rice coder sees. z, d4: the codes. a2: `(n_y, (n_x - (n_y & 1)) / 2)`, a bijection.
             e8: `(codes ^ -c) / 2` with the coset bit `c = codes[0] & 1` (odd vectors are complemented, which makes them even; exclusive or
             is what a decoder merges for free). Their sum is even. The even sums of e8 (per 8) and d4 (per 4) imply one bit each,
             which bit-stripping leaves out (`hq_inductor.format.rice`).
Source.      Conway and Sloane, Fast quantizing and decoding algorithms for lattice quantizers and codes, 1982 (nearest points);
             HyperQuant, arXiv 2606.23406 (bit-stripping).
"""

from __future__ import annotations

import math

import torch

from .on_device import on_device

SQRT3 = math.sqrt(3.0)
# mean squared error per dimension of a uniform source at scale 1: normalized second moment (Conway and Sloane, table 2.3) x volume^(2/n)
GRANULAR_ERROR = {"e8": 0.07168 * 4.0, "d4": 0.07660 * math.sqrt(2.0), "a2": 0.08019 * 2 * SQRT3, "z": 1 / 12}


def _round_even_sum(x: torch.Tensor, step: float) -> torch.Tensor:
    """Nearest point of `step * D_n` (integer multiples of step, even sum of the multiples) along the last dimension."""
    rounded = torch.round(x / step)
    error = x - rounded * step
    # where the sum is odd, the coordinate with the largest error moves to its second nearest multiple
    odd = rounded.sum(-1, keepdim=True).remainder(2)
    worst = error.abs().argmax(-1, keepdim=True)
    move = torch.where(error.gather(-1, worst) >= 0, odd, -odd)
    return (rounded.scatter_add(-1, worst, move)) * step


def _nearest_e8(x: torch.Tensor) -> torch.Tensor:
    even = _round_even_sum(x, 2.0)
    odd = _round_even_sum(x - 1.0, 2.0) + 1.0
    closer = (x - even).square().sum(-1, keepdim=True) <= (x - odd).square().sum(-1, keepdim=True)
    return torch.where(closer, even, odd)


def _pair(x: torch.Tensor, first: float, second: float) -> torch.Tensor:
    """`[2]` in the dtype and on the device of `x`."""
    return on_device(("pair", first, second, x.dtype), lambda: torch.tensor((first, second), dtype=x.dtype), x.device)


def _nearest_a2(x: torch.Tensor) -> torch.Tensor:
    pairs = x.unflatten(-1, (4, 2)) / _pair(x, SQRT3, 1.0)
    even = torch.round(pairs / 2) * 2
    odd = torch.round((pairs - 1) / 2) * 2 + 1
    metric = _pair(x, 3.0, 1.0)
    closer = ((pairs - even).square() * metric).sum(-1, keepdim=True) <= ((pairs - odd).square() * metric).sum(-1, keepdim=True)
    return torch.where(closer, even, odd).flatten(-2)


def nearest_point(x: torch.Tensor, lattice: str) -> torch.Tensor:
    """Codes of the lattice point nearest to each 8-vector (two 4-vectors, four pairs or eight scalars at a time for d4, a2, z).

    Args:
        x: `[..., 8]`, fp32 or fp64, in units of the scale.
        lattice: one of `"e8"`, `"d4"`, `"a2"`, `"z"`.

    Returns:
        `[..., 8]`, integers in the dtype of `x`.
    """
    if lattice == "e8":
        return _nearest_e8(x)
    if lattice == "d4":
        return _round_even_sum(x.unflatten(-1, (2, 4)), 1.0).flatten(-2)
    if lattice == "a2":
        return _nearest_a2(x)
    return torch.round(x)


def embed(codes: torch.Tensor, lattice: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Real coordinates of codes at scale 1, same shape (any number of codes that is a multiple of 8 last), given dtype."""
    x = codes.to(dtype)
    if lattice == "a2":
        return (x.unflatten(-1, (-1, 2)) * _pair(x, SQRT3, 1.0)).flatten(-2)
    return x


def codes_to_symbols(codes: torch.Tensor, lattice: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Symbols and coset bits of integer codes.

    Args:
        codes: `[..., 8]`, a signed integer dtype, points of the lattice.

    Returns:
        Symbols `[..., 8]` and, for e8, coset bits `[...]`, both in the dtype of `codes`; `None` for the other lattices.
    """
    if lattice == "e8":
        coset = codes[..., 0] & 1
        return (codes ^ -coset[..., None]) >> 1, coset
    if lattice == "a2":
        n_y, n_x = codes.unflatten(-1, (4, 2)).unbind(-1)
        return torch.stack((n_y, (n_x - (n_y & 1)) >> 1), dim=-1).flatten(-2), None
    return codes, None


def symbols_to_codes(symbols: torch.Tensor, coset: torch.Tensor | None, lattice: str) -> torch.Tensor:
    """Inverse of `codes_to_symbols`."""
    if lattice == "e8":
        return (2 * symbols) ^ -coset[..., None]
    if lattice == "a2":
        n_y, t_x = symbols.unflatten(-1, (4, 2)).unbind(-1)
        return torch.stack((n_y, 2 * t_x + (n_y & 1)), dim=-1).flatten(-2)
    return symbols


def is_lattice_point(codes: torch.Tensor, lattice: str) -> torch.Tensor:
    """Whether each 8-vector of integer codes `[..., 8]` is a point of the lattice; bool `[...]`."""
    codes = codes.to(torch.int32)
    if lattice == "e8":
        return ((codes & 1) == (codes[..., :1] & 1)).all(-1) & ((codes.sum(-1) & 3) == 0)
    if lattice == "d4":
        return ((codes.unflatten(-1, (2, 4)).sum(-1) & 1) == 0).all(-1)
    if lattice == "a2":
        pairs = codes.unflatten(-1, (4, 2)) & 1
        return (pairs[..., 0] == pairs[..., 1]).all(-1)
    return torch.ones(codes.shape[:-1], dtype=torch.bool, device=codes.device)
