import pytest
import torch

from hq_inductor.format.mma import (
    MMA,
    Fp4,
    check_mma,
    fp8_rows,
    int8_tiles,
    mxfp4_blocks,
    nvfp4_blocks,
    pack_e2m1,
    quantize_mxfp4,
    quantize_nvfp4,
    round_e2m1,
    round_operands,
)

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def snr_db(x, rounded):
    return -10 * torch.log10((rounded - x).square().mean() / x.square().mean()).item()


def test_round_e2m1_is_nearest_with_ties_to_even():
    x = torch.linspace(-7, 7, 2801, dtype=torch.float64)
    grid = torch.cat((-E2M1.flip(0), E2M1)).double()
    found = round_e2m1(x)
    assert torch.isin(found, grid).all()
    assert torch.equal((found - x).abs(), (x[:, None] - grid).abs().amin(1))
    # midpoints go to the neighbour with mantissa bit 0: 0, 1, 2, 4
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(middles).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert round_e2m1(-middles).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (lambda x: int8_tiles(x, 512), 40.0, 46.0),
        (lambda x: fp8_rows(x, 128), 31.0, 33.0),
        (nvfp4_blocks, 20.0, 21.0),
        (mxfp4_blocks, 18.3, 19.3),
    ],
)
def test_gaussian_snr_is_what_the_literature_says(function, low, high):
    """int8 41 dB per row and more per tile, e4m3 32 dB, nvfp4 20.5 dB, mxfp4 18.8 dB."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert low < snr_db(x, function(x)) < high


@pytest.mark.parametrize("function", [lambda x: int8_tiles(x, 128), lambda x: fp8_rows(x, 128), nvfp4_blocks, mxfp4_blocks])
def test_zeros_and_extremes(function):
    assert torch.equal(function(torch.zeros(2, 128)), torch.zeros(2, 128))
    for size in (1e-30, 1e30):
        x = torch.randn(2, 128) * size
        assert function(x).isfinite().all() and snr_db(x / size, function(x) / size) > 15


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_no_rows(quantize):
    assert quantize(torch.empty(0, 128)).codes.shape == (0, 64)


def test_mxfp4_scales_are_powers_of_two():
    x = torch.randn(8, 64)
    blocks = mxfp4_blocks(x).view(8, 2, 32)
    largest = x.view(8, 2, 32).abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    assert torch.isin((blocks / scale).abs(), E2M1).all()


def test_e2m1_codes_are_those_of_the_specification():
    """OCP Microscaling Formats 1.0, table 5: S E E M; the even index in the low half."""
    values = torch.cat((E2M1, -E2M1))
    assert pack_e2m1(values.view(8, 2)).flatten().tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]


def real_values(matrix: Fp4) -> torch.Tensor:
    """By a table of all codes, in fp64."""
    table = torch.cat((E2M1, -E2M1)).double()
    elements = torch.stack((table[(matrix.codes & 15).long()], table[(matrix.codes >> 4).long()]), -1).flatten(-2)
    scale = (matrix.scale.float() * matrix.factor).double() if matrix.block == 16 else torch.exp2(matrix.scale.double() - 127)
    return elements * scale.repeat_interleave(matrix.block, -1)


@pytest.mark.parametrize(("quantize", "blocks"), [(quantize_nvfp4, nvfp4_blocks), (quantize_mxfp4, mxfp4_blocks)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_bits_are_those_of_the_rounded_values(quantize, blocks, size):
    x = torch.randn(7, 256) * torch.exp(3 * torch.randn(7, 1)) * size
    x[2] = 0
    matrix = quantize(x)
    assert matrix.codes.dtype == torch.uint8 and matrix.codes.shape == (7, 128) and matrix.scale.shape == (7, 256 // matrix.block)
    assert torch.equal(real_values(matrix).float(), blocks(x))


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(wrong):
    """All of its block; of an nvfp4 matrix, whose scale is of all."""
    x = torch.randn(3, 64)
    x[1, 40] = wrong
    assert mxfp4_blocks(x).isfinite().logical_not().nonzero().tolist() == [[1, i] for i in range(32, 64)]
    assert quantize_mxfp4(x).scale[1, 1] == 255
    assert not nvfp4_blocks(x).isfinite().any()


def test_exact_formats_leave_operands_alone():
    x, weight = torch.randn(3, 512), torch.randn(5, 512)
    for mma in ("auto", "bf16"):
        assert round_operands(x, weight, mma, 512) == (x, weight)
    assert round_operands(x, weight, "int8", 512)[1] is weight


def test_check_mma():
    for mma in MMA:
        check_mma(mma)
    with pytest.raises(ValueError, match=r"mma must be one of 'auto', .*, got 'int4'"):
        check_mma("int4")
