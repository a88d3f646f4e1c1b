"""Error feedback against its algebra, and against rounding without it on inputs that are correlated."""

import pytest
import torch

from hq_inductor.format.feedback import DAMPING, Feedback, feedback_factors
from hq_inductor.format.lattice import embed
from hq_inductor.format.quantizer import quantize_tiles, quantize_with_feedback
from hq_inductor.format.rates import start_rms, weight_layout
from hq_inductor.format.rounding import cheapest_point

from .test_quantizer import assert_fits


def correlated_moments(size: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Of inputs whose spectrum falls off as 1 / index, in a basis that is the same for all seeds."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(7))).Q
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator) / torch.arange(1, size + 1) @ basis
    return x.t() @ x


def test_factors():
    moments = correlated_moments(64, 200)
    factor, cholesky = feedback_factors(moments)
    damped = moments.double() + DAMPING * moments.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close((cholesky @ cholesky.t()).double(), damped, rtol=1e-4, atol=1e-4 * damped.max().item())
    # (I + U) D (I + U)^T with D in blocks of 8
    block = torch.arange(64) // 8
    assert (factor[block[:, None] >= block] == 0).all() and factor.abs().max() > 0
    unit = torch.linalg.inv((torch.eye(64) + factor).double())
    middle = unit @ damped @ unit.t()
    outside = middle[block[:, None] != block]
    assert outside.abs().max() < 1e-5 * damped.max()


def test_uncorrelated_inputs_need_no_feedback():
    factor, cholesky = feedback_factors(torch.eye(32) * 3)
    assert (factor == 0).all()
    torch.testing.assert_close(cholesky, torch.eye(32) * (3 * (1 + DAMPING)) ** 0.5)
    assert (feedback_factors(torch.zeros(16, 16))[0] == 0).all()


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -1e6])
def test_bad_moments_are_refused(spoil):
    moments = torch.eye(16)
    moments[3, 3] = spoil
    with pytest.raises(ValueError, match="moments must be finite and positive semidefinite"):
        feedback_factors(moments)


@pytest.mark.parametrize("lattice", ["e8", "d4", "a2", "z"])
def test_rounding_leaves_only_what_the_last_step_left(lattice):
    """`r = e (I + U)` of a tile is block by block the error of rounding a target, here made anew from the definition."""
    layout = weight_layout(128, 4.0, lattice, 128).tile
    factor, cholesky = feedback_factors(correlated_moments(128, 400))
    x = torch.randn(5, 128)
    scale = torch.full((5, 1), 0.3)
    feedback = Feedback(torch.zeros_like(x), factor, cholesky)
    codes = feedback.round(x, scale, layout, torch.zeros(5, 1))
    error = embed(codes, lattice) * scale - x
    for begin in range(0, 128, 8):
        block = slice(begin, begin + 8)
        target = x[:, block] - error[:, :begin] @ factor[:begin, block]
        expected = cheapest_point(target / scale, layout, torch.zeros(5, 1))
        # another order of additions moves a target that lies between two points
        assert (codes[:, block] == expected).all(1).float().mean() >= 0.8
    residual = error @ (torch.eye(128) + factor)
    plain = embed(cheapest_point(x.unflatten(1, (-1, 8)) / scale[..., None], layout, torch.zeros(5, 1, 1)).flatten(1), lattice) * scale - x
    assert residual.square().mean() < 1.1 * plain.square().mean() < error.square().mean() * 1.1


@pytest.mark.parametrize("lattice", ["e8", "z"])
@pytest.mark.parametrize("effort", [0, 1])
def test_output_error_falls_and_codes_fit(lattice, effort):
    """Two tiles per row, moments from other samples of the same source than those it is judged by."""
    layout = weight_layout(512, 3.0, lattice, 256).tile
    x = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
    moments, judge = (correlated_moments(512, 4000, seed) for seed in (0, 1))
    codes, scales = quantize_with_feedback(x, moments, layout, start_rms(3.0, lattice), effort)
    assert codes.dtype == torch.int8 and scales.shape == (48, 2)
    assert_fits(codes.view(-1, 256), layout)
    plain, plain_scales = quantize_tiles(x.view(-1, 256), layout, start_rms(3.0, lattice), effort)

    def output_error(codes, scales):
        error = embed(codes.view(48, 2, 256), lattice) * scales.view(48, 2, 1) - x.view(48, 2, 256)
        error = error.flatten(1)
        return ((error @ judge) * error).sum()

    assert output_error(codes, scales) < 0.5 * output_error(plain, plain_scales)


def test_scale_is_that_of_least_output_error():
    """With errors of an earlier tile: what is left of all errors, over a fine grid of scales."""
    moments = correlated_moments(64, 400)
    factor, cholesky = feedback_factors(moments)
    damped = (cholesky @ cholesky.t()).double()
    x, points = torch.randn(1, 32), torch.randint(-3, 4, (1, 32)).float()
    earlier = 0.3 * torch.randn(1, 32)
    tile = slice(32, 64)
    feedback = Feedback(-(earlier @ factor[:32, tile]), factor[tile, tile], cholesky[tile, tile])
    product, energy = feedback.fit(x + feedback.drift, points)
    grid = (product / energy) * torch.linspace(0.5, 1.5, 101)
    errors = torch.cat((earlier.expand(101, -1), grid[:, None] * points - x), dim=1).double()
    cost = ((errors @ damped) * errors).sum(1)
    assert cost.argmin() == 50


def test_white_inputs_cost_next_to_nothing():
    layout = weight_layout(256, 3.0, "e8", 256).tile
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize_with_feedback(x, torch.eye(256), layout, start_rms(3.0, "e8"))
    plain, plain_scales = quantize_tiles(x, layout, start_rms(3.0, "e8"))
    errors = [(embed(c, "e8") * s.view(-1, 1) - x).square().mean() for c, s in ((codes, scales), (plain, plain_scales))]
    assert errors[0] < 1.03 * errors[1]
