"""Quantizer: real coefficients to lattice codes whose Rice code fills a tile's fixed budget.

Definition.  For each tile the finest representable scale `a` such that the code of `nearest_point(x / a)` fits the tile's words; then the
             stored scale is the representable one nearest to the least-squares factor `<x, e> / <e, e>`, e the embedded codes, which can
             only lower the squared error and costs no bits.
Invariants.  What is returned always fits (`hq_inductor.format.rice`): both regions, and every quotient below `layout.classes`.
Cost.        About five nearest-point searches per tile: the code length is nearly linear in log(scale), so a Newton step lands within a
             few scale codes of the boundary.
"""

from __future__ import annotations

import torch

from .lattice import GRANULAR_ERROR, SQRT3, embed, nearest_point
from .layout import SCALE_CODES, VECTOR, TileLayout, scale_from_code, scale_to_code
from .rice import code_lengths, lane_lengths, wall_code

_CODES_PER_OCTAVE = 64
# stream bits per symbol and octave of scale, about ln 2 times the mean quotient: an estimate; it decides only how many steps are taken
_BITS_PER_OCTAVE = 0.65
_MAX_ITERATIONS = 20
# squared error from clipping to the code's range that a tile may add, relative to the lattice's own error
_MAX_OVERLOAD = 0.05


def _limits(layout: TileLayout) -> tuple[float, ...]:
    """Largest coordinates, per position modulo the tuple's length, that quantize to symbols in range."""
    m = float(layout.max_magnitude)
    return {"e8": (2 * m,), "a2": (SQRT3 * m, 2 * m)}.get(layout.lattice, (m,))


def _try_scale(x: torch.Tensor, scale_code: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[n, tile]` int8 of `x` at a scale, whether they fit `[n]`, and the unused stream bits `[n]` (negative if too many)."""
    vectors = x / scale_from_code(scale_code)[:, None]
    limit = vectors.new_tensor(_limits(layout)).repeat(x.shape[1] // len(_limits(layout)))
    clipped = torch.minimum(torch.maximum(vectors, -limit), limit)
    overload = (vectors - clipped).square_().sum(-1)
    codes = nearest_point(clipped.unflatten(-1, (-1, VECTOR)), layout.lattice).to(torch.int16)
    bits, in_range = code_lengths(codes, layout)
    lane_bits = lane_lengths(bits)
    _, fits = wall_code(lane_bits, layout)
    fits &= in_range.all(-1) & (overload <= _MAX_OVERLOAD * GRANULAR_ERROR[layout.lattice] * x.shape[1])
    return codes.flatten(1).to(torch.int8), fits, layout.end - layout.start - lane_bits.sum(-1)


def quantize_tiles(x: torch.Tensor, layout: TileLayout, start_rms: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize tiles of coefficients at constant rate.

    Args:
        x: `[n, tile]` fp32, finite, after the randomized Hadamard transform.
        layout: lattice, rate and tile.
        start_rms: root mean square of `x / scale` at which the search starts (`hq_inductor.format.rates`); affects only its speed.

    Returns:
        Codes `[n, tile]` int8 and representable scales `[n]` fp32.

    Note: on CUDA no host sync; on CPU tiles that are done leave the search early.
    """
    n = x.shape[0]
    start = scale_to_code(x.square().mean(-1).sqrt() / start_rms)
    codes = torch.zeros_like(x, dtype=torch.int8)
    best = torch.full_like(start, SCALE_CODES)  # finest scale code known to fit
    failed = torch.full_like(start, -1)  # coarsest scale code known not to fit
    trial, stride = start.clone(), torch.ones_like(start)
    rows = torch.arange(n, device=x.device)
    for _ in range(_MAX_ITERATIONS):
        if not x.is_cuda:
            rows = rows[((best[rows] - failed[rows]) > 1) & (best[rows] > 0)]
            if rows.numel() == 0:
                break
        g = trial[rows]
        tried, fits, slack = _try_scale(x[rows], g, layout)
        better = fits & (g < best[rows])
        codes[rows] = torch.where(better[:, None], tried, codes[rows])
        hi = torch.where(better, g, best[rows])
        lo = torch.where(fits, failed[rows], torch.maximum(g, failed[rows]))
        # Newton on the length. Its failures stride outwards, for tiles that need more than bits (one long vector, a large code) or whose
        # length is all steps (one outlier, spread evenly by the transform)
        newton = torch.round(slack * (-_CODES_PER_OCTAVE / (_BITS_PER_OCTAVE * layout.tile))).to(g.dtype)
        newton = torch.where(fits, newton.clamp(max=-1), torch.maximum(newton, stride[rows]))
        stride[rows] = torch.where(fits, stride[rows], 2 * stride[rows])
        # where the Newton step leaves the bracket, the middle of the bracket
        guess = g + newton
        middle = torch.div(lo + hi, 2, rounding_mode="floor")
        trial[rows] = torch.where((guess > lo) & (guess < hi), guess, middle).clamp(0, SCALE_CODES - 1)
        best[rows], failed[rows] = hi, lo

    points = embed(codes, layout.lattice)
    energy = points.square().sum(-1)
    fitted = (x * points).sum(-1) / energy.clamp(min=1.0)
    scale = torch.where(energy > 0, fitted, scale_from_code(start))
    return codes, scale_from_code(scale_to_code(scale))
