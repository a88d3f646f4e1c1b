import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from hq_inductor import HyperQuantLinear, HyperQuantTensor, balance_columns, hyperquant_weight, measure_moments, quantization_report


class Block(nn.Module):
    """Two linears with one input, and one behind them; inputs are correlated."""

    def __init__(self):
        super().__init__()
        self.mix = torch.linalg.qr(torch.randn(256, 256)).Q / torch.arange(1, 257)[:, None] ** 0.5
        self.a, self.b, self.unused = (nn.Linear(256, 128, bias=False) for _ in range(3))
        self.out = nn.Linear(128, 64)

    def forward(self, x):
        x = x @ self.mix
        return self.out(self.a(x) * self.b(x).sigmoid())


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


def test_moments_are_sums_of_squares_and_shared(block):
    batches = [torch.randn(300, 256), torch.randn(2, 50, 256)]
    found = measure_moments(block, batches)
    assert set(found) == {"a", "b", "out"} and block.a.input_moments is block.b.input_moments is found["a"]
    x = torch.cat([batch.reshape(-1, 256) for batch in batches]) @ block.mix
    torch.testing.assert_close(found["a"], x.t() @ x, rtol=1e-4, atol=1e-3)
    inner = (block.a(x) * block.b(x).sigmoid()).detach()
    torch.testing.assert_close(found["out"], inner.t() @ inner, rtol=1e-4, atol=1e-3)
    assert not any("input_moments" in key for key in block.state_dict())


@pytest.mark.parametrize("balance", [False, True])
def test_output_error_falls_on_other_inputs(block, balance):
    """The rate is the same, the error of outputs on inputs that were not measured falls."""
    batches, other = [torch.randn(2000, 256)], torch.randn(500, 256)
    expected = block(other)
    errors = []
    for feedback in (False, True):
        model = copy.deepcopy(block)
        if balance:
            balance_columns(model, batches)
        if feedback:
            measure_moments(model, batches, lambda module, name: name != "unused")
        quantize_(model, hyperquant_weight(bps=3))
        assert isinstance(model.a, HyperQuantLinear) and not hasattr(model.a, "input_moments")
        errors.append((model(other) - expected).norm())
        rate = quantization_report(model).bits_per_weight
        assert rate == 3 or (balance and rate > 3)
    assert errors[1] < 0.8 * errors[0]


def test_padded_columns_and_column_scales():
    """300 columns, padded to a tile, coded divided by a scale: the error in the metric of the layer's own inputs falls."""
    torch.manual_seed(0)
    weight = torch.randn(64, 300)
    x = torch.randn(2000, 300) @ (torch.randn(300, 300) / torch.arange(1, 301)[:, None])
    scale = torch.exp2(torch.randn(300))
    costs = []
    for moments in (None, x.t() @ x):
        packed = HyperQuantTensor.from_hp(weight, bps=3, act_pre_scale=scale, moments=moments)
        costs.append((x @ (packed.dequantize() - weight).t()).square().sum())
    assert costs[1] < 0.6 * costs[0]


def test_refuses(block):
    with pytest.raises(ValueError, match="batches must hold at least one input, got none"):
        measure_moments(block, [])
    with pytest.raises(ValueError, match="none of the 1 linear layers was run"):
        measure_moments(block, [torch.randn(3, 256)], lambda module, name: name == "unused")
    weight = torch.randn(16, 128)
    with pytest.raises(ValueError, match=r"moments must have shape \(128, 128\), got \(64, 64\)"):
        HyperQuantTensor.from_hp(weight, moments=torch.eye(64))
    with pytest.raises(ValueError, match="moments must be finite and positive semidefinite"):
        HyperQuantTensor.from_hp(weight, moments=torch.full((128, 128), float("nan")))
    with pytest.raises(ValueError, match="moments must be None for a stack"):
        HyperQuantTensor.from_hp(torch.randn(2, 16, 128), moments=torch.eye(128))


def test_layers_that_share_only_sometimes_are_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.same = nn.Linear(128, 8), nn.Linear(128, 8), True

        def forward(self, x):
            y = self.a(x) + self.b(x if self.same else x + 1)
            self.same = False
            return y

    model = Sometimes()
    with pytest.raises(RuntimeError, match="b and a must read the same activation in every batch"):
        measure_moments(model, [torch.randn(3, 128), torch.randn(3, 128)])
    assert not model.a._forward_pre_hooks and not hasattr(model.a, "input_moments")
