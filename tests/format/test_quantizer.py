import math

import pytest
import torch

from hq_inductor.format.lattice import embed, is_lattice_point
from hq_inductor.format.layout import LATTICES, scale_to_code
from hq_inductor.format.quantizer import _try_scale, quantize_tiles
from hq_inductor.format.rates import MIN_BPS, start_rms, weight_layout
from hq_inductor.format.rice import code_lengths, lane_lengths, wall_code


def quantize(x, lattice, bps, effort=1):
    layout = weight_layout(x.shape[1], bps, lattice, x.shape[1]).tile
    codes, scale = quantize_tiles(x, layout, start_rms(bps, lattice), effort)
    return codes, scale, layout


def snr_db(x, codes, scale, lattice):
    error = x - embed(codes, lattice) * scale[:, None]
    return -10 * math.log10((error.square().sum() / x.square().sum()).item())


def assert_fits(codes, layout):
    vectors = codes.unflatten(-1, (-1, 8))
    assert is_lattice_point(vectors, layout.lattice).all()
    bits, in_range = code_lengths(vectors, layout)
    assert in_range.all()
    assert wall_code(lane_lengths(bits), layout)[1].all()


@pytest.mark.parametrize(("bps", "floors_db"), [(4.0, (22.2, 22.4, 22.45)), (3.0, (16.1, 16.5, 16.53)), (2.0, (9.9, 10.4, 10.43))])
def test_gaussian_snr_all_in(bps, floors_db):
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    snrs = []
    for effort, floor_db in enumerate(floors_db):
        codes, scale, layout = quantize(x, "e8", bps, effort)
        assert layout.bits_per_weight == bps
        assert_fits(codes, layout)
        snrs.append(snr_db(x, codes, scale, "e8"))
        assert snrs[-1] >= floor_db
    assert snrs == sorted(snrs)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.25, 4.0])
def test_more_effort_never_costs_quality_on_tiles_with_heavy_tails(lattice, bps):
    x = torch.distributions.StudentT(4.0).sample((256, 512))
    snrs = []
    for effort in (0, 1, 2):
        codes, scale, layout = quantize(x, lattice, bps, effort)
        assert_fits(codes, layout)
        snrs.append(snr_db(x, codes, scale, lattice))
    assert snrs[1] > snrs[0] - 0.05 and snrs[2] > snrs[1]


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("effort", [0, 1, 2])
def test_no_host_sync(lattice, effort):
    """Traced on the meta device, where reading a value or a data-dependent shape raises: what runs on CUDA."""
    layout = weight_layout(256, 3.0, lattice, 256).tile
    codes, scale = quantize_tiles(torch.empty(10, 256, device="meta"), layout, start_rms(3.0, lattice), effort)
    assert (codes.shape, codes.dtype) == ((10, 256), torch.int8) and (scale.shape, scale.dtype) == ((10,), torch.float32)


def test_effort_is_checked():
    for effort in (-1, 3, True):
        with pytest.raises(ValueError, match=f"effort must be 0, 1 or 2, got {effort}"):
            quantize(torch.randn(1, 128), "e8", 4.0, effort)


@pytest.mark.parametrize("lattice", LATTICES)
def test_snr_rises_with_rate_and_stays_below_shannon(lattice):
    x = torch.randn(64, 512)
    last = 0.0
    for eighths in range(int(8 * MIN_BPS[lattice]), 49):
        codes, scale, layout = quantize(x, lattice, eighths / 8)
        assert_fits(codes, layout)
        snr = snr_db(x, codes, scale, lattice)
        assert last < snr < 6.0206 * eighths / 8
        last = snr


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.125, 4.0, 6.0])
def test_finest_scale_that_fits(lattice, bps):
    """The next finer representable scales do not fit, so no budget is left unused for want of search."""
    x = torch.randn(64, 512)
    layout = weight_layout(512, bps, lattice, 512).tile
    codes, _ = quantize_tiles(x, layout, start_rms(bps, lattice), effort=0)
    grid = torch.arange(scale_to_code(torch.tensor(1e-4)).item(), scale_to_code(torch.tensor(8.0)).item(), dtype=torch.int32)
    for tile, found in zip(x[:6], codes, strict=False):
        tried, fits, _ = _try_scale(tile.expand(len(grid), -1), grid, layout)
        finest = int(fits.nonzero()[0])
        same = [(tried[index] == found).all().item() for index in range(finest, finest + 4)]
        assert any(same)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_search_does_not_depend_on_its_start(lattice, bps, start):
    x = torch.randn(32, 256)
    layout = weight_layout(256, bps, lattice, 256).tile
    good = snr_db(x, *quantize_tiles(x, layout, start_rms(bps, lattice)), lattice)
    assert snr_db(x, *quantize_tiles(x, layout, start_rms(bps, lattice) * start), lattice) > good - 0.5


EXTREMES = {
    "zeros": torch.zeros(1, 256),
    "one value": torch.full((1, 256), 0.3),
    "one spike": torch.nn.functional.one_hot(torch.tensor([7]), 256).to(torch.float32),
    "huge spike": torch.nn.functional.one_hot(torch.tensor([255]), 256) * 1e6 + torch.linspace(-1, 1, 256),
    "denormal": torch.linspace(-1, 1, 256)[None] * 1e-40,
    "tiny": torch.linspace(-1, 1, 256)[None] * 1e-9,
    "large": torch.linspace(-1, 1, 256)[None] * 1e7,
}


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_tiles(lattice, bps, name):
    x = EXTREMES[name].to(torch.float32)
    codes, scale, layout = quantize(x, lattice, bps)
    assert_fits(codes, layout)
    values = embed(codes, lattice) * scale[:, None]
    assert values.isfinite().all()
    if name == "zeros":
        assert (codes == 0).all()
    error = (x - values).square().sum()
    assert error <= x.square().sum()
    # denormals lie far below the smallest scale and become zeros; up to 3 bps a tile of one repeated value may (probability zero after a
    # rotation), since every symbol's code takes more than its share of the budget
    if name not in ("zeros", "denormal") and (bps > 3 or name != "one value"):
        assert error < x.square().sum() * 0.3


def test_scales_are_least_squares():
    x = torch.randn(64, 512)
    codes, scale, _ = quantize(x, "e8", 2.0)
    points = codes.to(torch.float32)
    error = (x - points * scale[:, None]).square().sum(-1)
    for step in (-1, 1):
        other = scale * (1 + step / 50)  # more than one code away
        assert (error <= (x - points * other[:, None]).square().sum(-1)).all()


@pytest.mark.parametrize("effort", [0, 1])
def test_values_that_are_no_numbers_are_zeros(effort):
    x = torch.randn(4, 256)
    x[0] = float("nan")
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    layout = weight_layout(256, 4.0, "e8", 256).tile
    codes, scale = quantize_tiles(x, layout, start_rms(4.0, "e8"), effort)
    expected, expected_scale = quantize_tiles(x.nan_to_num(0, 0, 0), layout, start_rms(4.0, "e8"), effort)
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)
    assert (codes[0] == 0).all() and scale.isfinite().all()
