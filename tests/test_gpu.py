"""On a CUDA device: the same words and codes as on the CPU, bit for bit, and the same linear layer within rounding."""

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from hq_inductor import HyperQuantTensor, hyperquant_weight
from hq_inductor.format.layout import LATTICES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ops = torch.ops.hyperquant


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("columns", [384, 1024])
def test_words_and_codes_equal_the_cpu(lattice, bps, columns):
    weight = HyperQuantTensor.from_hp(torch.randn(20, columns), bps=bps, lattice=lattice)
    words = weight.qdata.clone()
    words[10:] = torch.randint(-(2**31), 2**31, words[10:].shape).to(torch.int32)
    layout = (lattice, weight.tile, weight.code)
    codes, scale = ops.rice_decode(words, *layout)
    gpu_codes, gpu_scale = ops.rice_decode(words.cuda(), *layout)
    assert torch.equal(gpu_codes.cpu(), codes) and torch.equal(gpu_scale.cpu(), scale)
    again = ops.rice_encode(gpu_codes[:10], gpu_scale[:10], *layout, words.shape[-1])
    assert torch.equal(again.cpu(), words[:10])


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5, 130])
def test_linear_equals_the_dequantized_layer(lattice, dtype, batch):
    weight = HyperQuantTensor.from_hp(torch.randn(100, 1024, device="cuda").to(dtype), lattice=lattice)
    x, bias = torch.randn(batch, 1024, device="cuda").to(dtype), torch.randn(100, device="cuda").to(dtype)
    exact = nn.functional.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    found = nn.functional.linear(x, weight, bias)
    assert found.dtype == dtype and found.is_cuda
    assert (found.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("bps", "floor_db"), [(4, 22.2), (3, 16.0), (2, 9.6)])
def test_gaussian_snr(bps, floor_db):
    hp = torch.randn(4096, 4096, device="cuda")
    weight = HyperQuantTensor.from_hp(hp, bps=bps)
    assert weight.bits_per_weight == bps
    assert -10 * torch.log10((weight.dequantize() - hp).square().mean() / hp.square().mean()).item() >= floor_db


def test_model_moves_between_devices_and_compiles():
    model, x = nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 64)), torch.randn(3, 384)
    quantize_(model, hyperquant_weight())
    expected = model(x)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.cpu()(x), expected)
