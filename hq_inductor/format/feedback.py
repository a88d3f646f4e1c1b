"""Error feedback: coefficients are rounded one vector after the other, and make up for the errors of those before.

Definition.  A row's error `e` costs `e H e^T` of squared output error, `H = E[x x^T]` the second moments of the layer's inputs in the
             rotated domain. With `H = (U + I) D (U + I)^T`, U strictly upper and D diagonal, both in blocks of 8, that is the sum over
             blocks of `r D r^T`, where `r_b = e_b + sum_{a < b} e_a U_ab`. So block b rounds `w_b - sum_{a < b} e_a U_ab`, and r is no
             more than what that rounding leaves. D is far below the diagonal of H where inputs are correlated.
             Inside a tile this happens at every scale that the search tries (`hq_inductor.format.quantizer`), so that the rate stays exact.
Robustness.  A share of the mean square is added to the diagonal of H: moments of few samples claim correlations that are not there.
Cost.        One rounding takes `tile / 8` steps of a vector each instead of one step of the tile: about 10 times the time on a CPU.
Source.      LDLQ: QuIP, arXiv 2307.13304, and for blocks of lattice vectors QuIP#, arXiv 2402.04396; the same errors as GPTQ, arXiv
             2210.17323. Differs in: entropy-coded tiles of constant rate, rounding by error and bits together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .lattice import embed
from .layout import VECTOR, TileLayout
from .rounding import cheapest_point

# share of the mean diagonal that is added to the diagonal
DAMPING = 0.1


@dataclass(frozen=True)
class Feedback:
    """What tiles need to know of their inputs and of the errors made before them.

    Attributes:
        drift: `[n, tile]` fp32, what errors of earlier tiles add to the coefficients.
        factor: `[tile, tile]` fp32, U inside the tile.
        cholesky: `[tile, tile]` fp32, upper triangular, `(I + factor) D^(1/2)`.
    """

    drift: torch.Tensor
    factor: torch.Tensor
    cholesky: torch.Tensor

    def rows(self, rows: torch.Tensor) -> Feedback:
        return Feedback(self.drift[rows], self.factor, self.cholesky)

    def round(self, target: torch.Tensor, scale: torch.Tensor, layout: TileLayout, price: torch.Tensor) -> torch.Tensor:
        """Codes `[n, tile]`, integers in the dtype of `target`.

        Args:
            target: `[n, tile]` fp32, coefficients plus `drift`.
            scale: `[n, 1]`.
            price: lambda by tile, `[n, 1]`, squared units of the scale.
        """
        rest, codes = target.clone(), torch.empty_like(target)
        coefficients = target - self.drift
        for begin in range(0, layout.tile, VECTOR):
            block = slice(begin, begin + VECTOR)
            codes[:, block] = cheapest_point(rest[:, block] / scale, layout, price)
            error = embed(codes[:, block], layout.lattice) * scale - coefficients[:, block]
            rest[:, begin + VECTOR :] -= error @ self.factor[block, begin + VECTOR :]
        return codes

    def fit(self, target: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`<target, points>` and `<points, points>` by tile, such that their ratio is the scale of least `sum(r D r^T)`."""
        diagonal = self.cholesky * (_block(self.cholesky)[:, None] == _block(self.cholesky))
        wanted = (target - self.drift) @ self.cholesky + self.drift @ diagonal
        weighted = points @ self.cholesky
        return (weighted * wanted).sum(-1), weighted.square().sum(-1)


def _block(matrix: torch.Tensor) -> torch.Tensor:
    """Number of the vector that each column belongs to."""
    return torch.arange(matrix.shape[-1], device=matrix.device) // VECTOR


def feedback_factors(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor second moments into how errors are passed on and what is left.

    Args:
        moments: `[K, K]`, symmetric, positive semidefinite; K a multiple of 8.

    Returns:
        U `[K, K]` fp32, strictly upper in blocks of 8; C `[K, K]` fp32, upper triangular, `C C^T` the damped moments.

    Raises:
        ValueError: the moments are not finite or not positive semidefinite.
    """
    moments = moments.to(torch.float64)
    damped = moments.clone()
    # all zeros (an input that never occurs) become white
    damped.diagonal().add_(DAMPING * moments.diagonal().mean().clamp(min=1e-30))
    flipped, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) or not bool(flipped.isfinite().all()):
        raise ValueError("moments must be finite and positive semidefinite, as sums of x x^T are")
    cholesky = flipped.flip(0, 1)
    size = moments.shape[0]
    columns = cholesky.unflatten(1, (-1, VECTOR)).transpose(0, 1)  # [K / 8, K, 8]
    diagonal = cholesky.unflatten(0, (-1, VECTOR)).unflatten(2, (-1, VECTOR)).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [K / 8, 8, 8]
    unit = torch.linalg.solve_triangular(diagonal, columns, upper=True, left=False).transpose(0, 1).reshape(size, size)
    block = _block(unit)
    return (unit * (block[:, None] < block)).to(torch.float32), cholesky.to(torch.float32)
