"""Quantization-aware training with torchao's steps."""

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.qat.linear import FakeQuantizedLinear, disable_linear_fake_quant

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight
from hq_inductor.integrations.qat import HyperQuantFakeQuantizer, HyperQuantQATConfig


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 64, bias=False))


@pytest.mark.parametrize(("balance", "effort"), [(False, 1), (True, 1), (False, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_the_converted_weight(balance, effort, dtype):
    config = hyperquant_weight(bps=3, balance_columns=balance, effort=effort)
    model = mlp().to(dtype)
    quantize_(model, HyperQuantQATConfig(config))
    assert isinstance(model[0], FakeQuantizedLinear) and "FakeQuantizer(HyperQuantWeightConfig(bps=3" in repr(model[0])
    seen = [model[i].weight_fake_quantizer(model[i].weight) for i in (0, 2)]
    quantize_(model, QATConfig(config, step="convert"))
    for i, weight in zip((0, 2), seen, strict=True):
        assert isinstance(model[i], HyperQuantLinear) and weight.dtype == dtype
        assert torch.equal(model[i].weight.dequantize(), weight)
    assert model[0].bias is not None and model[2].bias is None


def test_gradient_is_straight_through():
    weight = torch.randn(16, 256, requires_grad=True)
    quantized = HyperQuantFakeQuantizer(hyperquant_weight(bps=2))(weight)
    assert 0 < (quantized - weight).norm() / weight.norm() < 0.4
    upstream = torch.randn(16, 256)
    quantized.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_switched_off():
    model, x = mlp(), torch.randn(3, 256)
    expected = model(x)
    quantize_(model, HyperQuantQATConfig(hyperquant_weight(bps=2)))
    assert not torch.allclose(model(x), expected, atol=1e-3)
    model.apply(disable_linear_fake_quant)
    assert torch.equal(model(x), expected)


def test_compiled_training_step():
    model, x = mlp(), torch.randn(3, 256)
    quantize_(model, HyperQuantQATConfig(hyperquant_weight(bps=3)))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager")(x).square().sum(), list(model.parameters()))
    for a, b in zip(expected, found, strict=True):
        # tracing may order the floating-point search for a scale differently, which moves a few tiles by one scale code
        assert (a - b).norm() / a.norm() < 0.05


def test_training_recovers_what_rounding_loses():
    """A layer that must produce given outputs: trained through the quantizer it ends nearer than rounded after training."""
    torch.manual_seed(0)
    config = hyperquant_weight(bps=2)
    x, target = torch.randn(64, 256), torch.randn(64, 128)
    exact = torch.linalg.lstsq(x, target).solution.t().contiguous()
    rounded = nn.functional.mse_loss(x @ HyperQuantTensor.from_hp(exact, bps=2).dequantize().t(), target)
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    model[0].weight = nn.Parameter(exact.clone())
    quantize_(model, HyperQuantQATConfig(config))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 60)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
    quantize_(model, QATConfig(config, step="convert"))
    assert nn.functional.mse_loss(model(x), target) < 0.65 * rounded


def test_layers_that_conversion_leaves_alone():
    model = nn.Sequential(nn.Linear(100, 8), nn.Linear(256, 8))
    config = hyperquant_weight(bps=3)
    quantize_(model, HyperQuantQATConfig(config))
    assert type(model[0]) is nn.Linear and isinstance(model[1], FakeQuantizedLinear)
    quantize_(model, QATConfig(config, step="convert"))
    assert type(model[0]) is nn.Linear and isinstance(model[1], HyperQuantLinear)


def test_refuses():
    with pytest.raises(TypeError, match="base_config must be a HyperQuantWeightConfig, got int"):
        HyperQuantQATConfig(4)
    model = mlp()
    quantize_(model, hyperquant_weight())
    with pytest.raises(TypeError, match=r"needs a torch.nn.Linear, got HyperQuantLinear"):
        quantize_(model, HyperQuantQATConfig())
