"""Quantizer: real coefficients to lattice codes whose entropy code fills a tile's fixed budget.

Definition.  For each tile the finest representable scale `a` such that the code of `x / a`, rounded to lattice points, fits the tile's
             words; then the stored scale is the representable one nearest to the least-squares factor `<x, e> / <e, e>`, e the embedded
             codes, which can only lower the squared error and costs no bits.
             Effort 0 rounds to the nearest point. Effort 1 rounds by error plus lambda times bits (`hq_inductor.format.rounding`), and
             then lowers each tile's lambda to fill its budget. Effort 2 does so from five lambdas and keeps each tile's least error.
Invariants.  What is returned always fits (`hq_inductor.format.rice`): both regions, and every quotient below `layout.classes`.
Cost.        About five roundings per tile: the code length is nearly linear in log(scale), so a Newton step lands within a few scale codes
             of the boundary. Effort 1 takes two more, effort 2 fifty.
"""

from __future__ import annotations

import torch

from .feedback import Feedback, feedback_factors
from .lattice import GRANULAR_ERROR, SQRT3, embed, nearest_point
from .layout import SCALE_CODES, VECTOR, TileLayout, scale_from_code, scale_to_code
from .on_device import on_device
from .rice import code_lengths, lane_lengths, wall_code
from .rounding import cheapest_point

_CODES_PER_OCTAVE = 64
# stream bits per symbol and octave of scale; measured on N(0, 1), all lattices, 2 to 5 bps: 0.56 to 0.98. It decides only how many steps
# are taken, like the next one
_BITS_PER_OCTAVE = 0.85
# stream bits per symbol that lambda takes when it falls by one granular error, times 2^bps; measured as above: 0.2 to 0.4
_BITS_PER_LAMBDA = 0.32
_MAX_ITERATIONS = 20
_EMPTY_STEP = 2 * _CODES_PER_OCTAVE
# squared error from clipping to the code's range that a tile may add, relative to the lattice's own error. Measured: Gaussian tiles stay
# below it, and for tiles of Laplace and Student t (4) samples it is within 0.2 dB of the best limit from 2 to 5 bps
MAX_OVERLOAD = 0.25
# lambda in granular errors. The operational curve falls by 6.02 dB per bit: 2 ln 2 D, with D somewhat above the granular error. Measured on
# N(0, 1): within 0.01 dB from 1.2 to 1.8. The first is the default's
PRICE = 1.6
_FACTORS = (PRICE, 1.1, 1.35, 2.0, 2.5)
_FILL_STEPS = 2
_THOROUGH_FILL_STEPS = 5


def check_effort(effort: int) -> None:
    """Raise `ValueError` unless `effort` is 0, 1 or 2."""
    if isinstance(effort, bool) or effort not in (0, 1, 2):
        raise ValueError(f"effort must be 0, 1 or 2, got {effort!r}")


def _limits(layout: TileLayout) -> tuple[float, ...]:
    """Largest coordinates, per position modulo the tuple's length, that quantize to symbols in range."""
    m = float(layout.max_magnitude)
    return {"e8": (2 * m,), "a2": (SQRT3 * m, 2 * m)}.get(layout.lattice, (m,))


def _try_scale(
    x: torch.Tensor, scale_code: torch.Tensor, layout: TileLayout, price: torch.Tensor | None = None, feedback: Feedback | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round tiles at a scale.

    Args:
        x: `[n, tile]` fp32.
        scale_code: `[n]`.
        price: lambda by tile, `[n]` fp32; None rounds to the nearest point.
        feedback: None rounds all vectors at once. Otherwise `x` has its drift already.

    Returns:
        Codes `[n, tile]` int8, whether they fit `[n]`, and the unused stream bits `[n]` (negative if too many).
    """
    scale = scale_from_code(scale_code)[:, None]
    vectors = x / scale
    limits = _limits(layout)
    limit = on_device(("limits", limits), lambda: torch.tensor(limits), x.device).repeat(x.shape[1] // len(limits))
    clipped = torch.minimum(torch.maximum(vectors, -limit), limit)
    overload = (vectors - clipped).square_().sum(-1)
    if feedback is not None:
        price = torch.zeros_like(scale) if price is None else price[:, None]
        codes = feedback.round(x, scale, layout, price).unflatten(-1, (-1, VECTOR))
    elif price is None:
        codes = nearest_point(clipped.unflatten(-1, (-1, VECTOR)), layout.lattice)
    else:
        codes = cheapest_point(vectors.unflatten(-1, (-1, VECTOR)), layout, price[:, None, None])
    codes = codes.to(torch.int16)
    bits, in_range = code_lengths(codes, layout)
    lane_bits = lane_lengths(bits)
    _, fits = wall_code(lane_bits, layout)
    fits &= in_range.all(-1) & (overload <= MAX_OVERLOAD * GRANULAR_ERROR[layout.lattice] * x.shape[1])
    return codes.flatten(1).to(torch.int8), fits, layout.end - layout.start - lane_bits.sum(-1)


def _finest_scale(
    x: torch.Tensor, layout: TileLayout, start: torch.Tensor, price: torch.Tensor | None, feedback: Feedback | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[n, tile]` at the finest scale found to fit, that scale's code `[n]` (`SCALE_CODES` if none), and the unused bits there."""
    codes = torch.zeros_like(x, dtype=torch.int8)
    best = torch.full_like(start, SCALE_CODES)  # finest scale code known to fit
    failed = torch.full_like(start, -1)  # coarsest scale code known not to fit
    trial, stride, unused = start.clone(), torch.ones_like(start), torch.zeros_like(start, dtype=torch.int64)
    rows = torch.arange(x.shape[0], device=x.device)
    empty = layout.end - layout.start - layout.zeros_bits
    for _ in range(_MAX_ITERATIONS):
        if x.device.type == "cpu":
            rows = rows[((best[rows] - failed[rows]) > 1) & (best[rows] > 0)]
            if rows.numel() == 0:
                break
        g = trial[rows]
        prices, errors = None if price is None else price[rows], None if feedback is None else feedback.rows(rows)
        tried, fits, slack = _try_scale(x[rows], g, layout, prices, errors)
        better = fits & (g < best[rows])
        codes[rows] = torch.where(better[:, None], tried, codes[rows])
        unused[rows] = torch.where(better, slack, unused[rows])
        hi = torch.where(better, g, best[rows])
        lo = torch.where(fits, failed[rows], torch.maximum(g, failed[rows]))
        # Newton on the length. Its failures stride outwards, for tiles that need more than bits (one long vector, a large code) or whose
        # length is all steps (one outlier, spread evenly by the transform)
        newton = torch.round(slack * (-_CODES_PER_OCTAVE / (_BITS_PER_OCTAVE * layout.tile))).to(g.dtype)
        # a tile of zeros says nothing about the length at finer scales
        newton = torch.where(slack >= empty, -_EMPTY_STEP, newton)
        newton = torch.where(fits, newton.clamp(max=-1), torch.maximum(newton, stride[rows]))
        stride[rows] = torch.where(fits, stride[rows], 2 * stride[rows])
        # where the Newton step leaves the bracket, the middle of the bracket
        guess = g + newton
        middle = torch.div(lo + hi, 2, rounding_mode="floor")
        trial[rows] = torch.where((guess > lo) & (guess < hi), guess, middle).clamp(0, SCALE_CODES - 1)
        best[rows], failed[rows] = hi, lo
    return codes, best, unused


def _fill_budget(
    x: torch.Tensor,
    layout: TileLayout,
    scale_code: torch.Tensor,
    price: torch.Tensor,
    codes: torch.Tensor,
    unused: torch.Tensor,
    steps: int,
    feedback: Feedback | None = None,
) -> torch.Tensor:
    """Spend the unused bits on a lower lambda at the same scale; tiles that do not fit then keep their codes.

    Each step aims at half of them: both regions must hold their share, and a step that fails costs a rounding.
    """
    unit = GRANULAR_ERROR[layout.lattice] * 2**layout.bits_per_weight / (_BITS_PER_LAMBDA * layout.tile)
    low = torch.zeros_like(price)
    for _ in range(steps):
        lower = torch.maximum(price - unused * (unit / 2), (price + low) / 2)
        tried, fits, slack = _try_scale(x, scale_code, layout, lower, feedback)
        codes = torch.where(fits[:, None], tried, codes)
        unused = torch.where(fits, slack, unused)
        price, low = torch.where(fits, lower, price), torch.where(fits, low, lower)
    return codes


def _fit(x: torch.Tensor, codes: torch.Tensor, layout: TileLayout, feedback: Feedback | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`<x, e>` and `<e, e>` of each tile, e the embedded codes."""
    points = embed(codes, layout.lattice)
    if feedback is not None:
        return feedback.fit(x, points)
    return (x * points).sum(-1), points.square().sum(-1)


def _squared_error(x: torch.Tensor, codes: torch.Tensor, layout: TileLayout, feedback: Feedback | None) -> torch.Tensor:
    """Of each tile at its least-squares scale, relative to what is the same for all codes: `-<x, e>^2 / <e, e>`."""
    product, energy = _fit(x, codes, layout, feedback)
    return torch.where(energy > 0, -product.square() / energy, 0.0)


def _optimised_codes(
    x: torch.Tensor, layout: TileLayout, start: torch.Tensor, factor: float, steps: int, feedback: Feedback | None
) -> torch.Tensor:
    """Codes at the finest scale for a lambda of `factor` granular errors, budget filled in `steps`."""
    price = torch.full_like(x[:, 0], factor * GRANULAR_ERROR[layout.lattice])
    codes, best, unused = _finest_scale(x, layout, start, price)
    if feedback is not None:
        # the search without is fast and ends near
        codes, best, unused = _finest_scale(x, layout, best.clamp(max=SCALE_CODES - 1), price, feedback)
    return _fill_budget(x, layout, best.clamp(max=SCALE_CODES - 1), price, codes, unused, steps, feedback)


def quantize_tiles(
    x: torch.Tensor, layout: TileLayout, start_rms: float, effort: int = 1, feedback: Feedback | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize tiles of coefficients at constant rate.

    Args:
        x: `[n, tile]` fp32 after the randomized Hadamard transform; NaN and infinities count as zeros.
        layout: lattice, rate and tile.
        start_rms: root mean square of `x / scale` at which the search starts (`hq_inductor.format.rates`); affects only its speed.
        effort: 0, 1 or 2, see above.
        feedback: rounds vector by vector, each making up for the errors of those before.

    Returns:
        Codes `[n, tile]` int8 and representable scales `[n]` fp32.

    Note: on CUDA no host sync; on CPU tiles that are done leave the search early.
    """
    check_effort(effort)
    # NaN would become an index; callers who want such weights refused do so before (`HyperQuantTensor.from_hp`)
    x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if feedback is not None:
        x = x + feedback.drift
    start = scale_to_code(x.square().mean(-1).sqrt() / start_rms)
    if effort == 0:
        codes, _, _ = _finest_scale(x, layout, start, None, feedback)
    else:
        factors, steps = (_FACTORS[:1], _FILL_STEPS) if effort == 1 else (_FACTORS, _THOROUGH_FILL_STEPS)
        codes = _optimised_codes(x, layout, start, factors[0], steps, feedback)
        for factor in factors[1:]:
            other = _optimised_codes(x, layout, start, factor, steps, feedback)
            better = _squared_error(x, other, layout, feedback) < _squared_error(x, codes, layout, feedback)
            codes = torch.where(better[:, None], other, codes)
    return codes, _fitted_scale(x, codes, layout, start, feedback)


def _fitted_scale(
    x: torch.Tensor, codes: torch.Tensor, layout: TileLayout, start: torch.Tensor, feedback: Feedback | None = None
) -> torch.Tensor:
    """The representable scale nearest to the least-squares one; that of `start` for codes that are all zero."""
    product, energy = _fit(x, codes, layout, feedback)
    fitted = torch.where(energy > 0, product / energy, scale_from_code(start))
    return scale_from_code(scale_to_code(fitted))


def quantize_with_feedback(
    x: torch.Tensor, moments: torch.Tensor, layout: TileLayout, start_rms: float, effort: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of coefficients tile by tile, each making up for the errors of those before (`hq_inductor.format.feedback`).

    Args:
        x: `[N, K]` fp32 after the randomized Hadamard transform, finite; K a multiple of the tile.
        moments: `[K, K]`, second moments of the inputs after the transform.
        layout, start_rms, effort: as in `quantize_tiles`.

    Returns:
        Codes `[N, K]` int8 and representable scales `[N, K / tile]` fp32.

    Raises:
        ValueError: the moments are not finite or not positive semidefinite.
    """
    factor, cholesky = feedback_factors(moments)
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty((x.shape[0], x.shape[1] // layout.tile))
    errors = torch.empty_like(x)
    for index, begin in enumerate(range(0, x.shape[1], layout.tile)):
        tile = slice(begin, begin + layout.tile)
        drift = -(errors[:, :begin] @ factor[:begin, tile])
        feedback = Feedback(drift, factor[tile, tile], cholesky[tile, tile])
        codes[:, tile], scales[:, index] = quantize_tiles(x[:, tile], layout, start_rms, effort, feedback)
        errors[:, tile] = embed(codes[:, tile], layout.lattice) * scales[:, index, None] - x[:, tile]
    return codes, scales
