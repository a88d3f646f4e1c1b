import copy
import io

import pytest
import torch
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quantize_

from hq_inductor import (
    HyperQuantLinear,
    HyperQuantTensor,
    HyperQuantWeightConfig,
    hyperquant_weight,
    quantization_report,
)
from hq_inductor.quantize import column_scale


def mlp():
    return nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 256, bias=False), nn.LayerNorm(256))


def test_quantize_model():
    model, x = mlp(), torch.randn(2, 7, 384)
    expected = model(x)
    quantize_(model, hyperquant_weight(bps=4))
    assert isinstance(model[0], HyperQuantLinear) and isinstance(model[0].weight, HyperQuantTensor)
    assert model[0].bias is not None and model[2].bias is None and isinstance(model[3], nn.LayerNorm)
    assert model[0].weight.bits_per_weight == 4
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 0.2
    dense = nn.functional.linear(x, model[0].weight.dequantize(), model[0].bias)
    torch.testing.assert_close(model[0](x), dense, rtol=1e-4, atol=1e-5)


def test_conversion_keeps_hooks_mode_and_attributes():
    linear, seen = nn.Linear(128, 8).eval(), []
    linear.register_forward_hook(lambda *args: seen.append(1))
    linear.note = "kept"
    model = nn.Sequential(linear)
    quantize_(model, hyperquant_weight())
    model(torch.randn(1, 128))
    assert model[0] is linear and seen == [1] and linear.note == "kept" and not linear.training


def test_plain_tensors_reach_the_graph():
    model = mlp()
    quantize_(model, hyperquant_weight())
    assert {name: type(p) for name, p in model.named_parameters() if name.startswith("0.")} == {
        "0.bias": nn.Parameter,
        "0.qdata": nn.Parameter,
    }
    assert not model[0].qdata.requires_grad and model[0].qdata.dtype == torch.int32


def test_parameters_of_other_modules_become_the_subclass():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Scaled(256, 16)), torch.randn(3, 256)
    expected = model(x)
    quantize_(model, hyperquant_weight(bps=6))
    assert type(model[0]) is Scaled and isinstance(model[0].weight, HyperQuantTensor)
    assert (model(x) - expected).norm() / expected.norm() < 0.05
    assert "HyperQuantTensor(shape=(16, 256)" in repr(model)


def test_fqn_to_config():
    model = mlp()
    config = FqnToConfig({"0": hyperquant_weight(bps=3), "2.weight": hyperquant_weight(bps=5, lattice="d4")})
    quantize_(model, config, filter_fn=None)
    assert (model[0].weight.bps, model[2].weight.bps, model[2].weight.lattice) == (3, 5, "d4")


def test_config_round_trips_through_json_dicts():
    config = hyperquant_weight(bps=3.5, lattice="a2", tile=256, seed=9, balance_columns=True, effort=2)
    again = config_from_dict(config_to_dict(config))
    assert isinstance(again, HyperQuantWeightConfig) and again == config


def test_layers_that_do_not_fit_are_left_alone_and_named():
    model = nn.Sequential(nn.Linear(100, 8), nn.Linear(500, 8))
    with pytest.warns(UserWarning, match=r"in_features=100.*left unquantized: 100 input features would be padded to 128 \(28% more"):
        quantize_(model, hyperquant_weight())
    assert type(model[0]) is nn.Linear and isinstance(model[1], HyperQuantLinear)
    quantize_(model[0:1], hyperquant_weight(max_padding=0.3))
    assert model[0].weight.bits_per_weight == 4 * 1.28


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bps": 7.3}, ValueError, "bps must be a multiple of 1/8 from 1.75 to 6.0 for lattice 'e8', got 7.3"),
        ({"bps": 4.1}, ValueError, "bps must be a multiple of 1/8"),
        ({"bps": "4"}, TypeError, "bps must be a number, got str"),
        ({"bps": True}, TypeError, "bps must be a number, got bool"),
        ({"lattice": "e9"}, ValueError, "lattice must be one of"),
        ({"lattice": 8}, ValueError, "lattice must be one of"),
        ({"tile": 64}, ValueError, "tile must be None or a multiple of 128"),
        ({"effort": 3}, ValueError, "effort must be 0, 1 or 2, got 3"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"balance_columns": 1}, TypeError, "balance_columns must be a bool, got int"),
        ({"max_padding": -0.1}, ValueError, "max_padding must be at least 0, got -0.1"),
        ({"bps": 3.3, "allocation": "sensitivity"}, ValueError, r"allocate_rates\(model, 3.3, batches\), filter_fn=None\)"),
        ({"allocation": "best"}, ValueError, "allocation must be \"uniform\" .* got 'best'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_is_touched(arguments, error, message):
    with pytest.raises(error, match=message):
        hyperquant_weight(**arguments)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda w: w.to(torch.int32), TypeError, "Linear.weight must be floating point, got torch.int32"),
        (lambda w: w.index_fill(0, torch.tensor([0]), float("nan")), ValueError, "weight must be finite"),
        (lambda w: w[None, None], ValueError, r"must be a matrix or a stack of them, got shape \(1, 1, 256, 512\)"),
    ],
)
def test_bad_weights_leave_their_layer_as_it_was(spoil, error, message):
    model = mlp()
    spoiled = spoil(model[2].weight.detach())
    model[2].weight = nn.Parameter(spoiled, requires_grad=False)
    with pytest.raises(error, match=message):
        quantize_(model, hyperquant_weight())
    assert type(model[2]) is nn.Linear and model[2].weight.data_ptr() == spoiled.data_ptr()


def test_quantizing_twice_is_refused():
    model = mlp()
    quantize_(model, hyperquant_weight())
    with pytest.raises(ValueError, match="already a HyperQuantTensor"):
        quantize_(model, hyperquant_weight())


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(balance, assign):
    model, x = mlp(), torch.randn(3, 384)
    blank = copy.deepcopy(model)
    quantize_(model, hyperquant_weight(bps=3.5, balance_columns=balance))
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.bias", "2.weight", "3.weight", "3.bias"}
    assert isinstance(state["0.weight"], HyperQuantTensor)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    if not assign:  # a float model takes packed weights only by assignment, like every torchao tensor
        quantize_(blank, hyperquant_weight(bps=3.5, balance_columns=balance))
    assert str(blank.load_state_dict(loaded, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(blank(x), model(x))


def test_load_state_dict_reports_what_does_not_agree():
    a, b = mlp(), mlp()
    quantize_(a, hyperquant_weight(bps=4))
    quantize_(b, hyperquant_weight(bps=3))
    before = b[0].qdata.clone()
    with pytest.raises(RuntimeError, match=r"0.weight: bps must be 3.0, got 4.0"):
        b.load_state_dict(a.state_dict())
    assert torch.equal(b[0].qdata, before)
    with pytest.raises(RuntimeError, match=r"0.weight: expected a HyperQuantTensor, got Tensor"):
        b.load_state_dict(mlp().state_dict())
    state = a.state_dict()
    del state["0.weight"]
    assert a.load_state_dict(state, strict=False).missing_keys == ["0.weight"]
    b.load_state_dict(a.state_dict(), assign=True)
    assert b[0].weight.bps == 4 and torch.equal(b[0].qdata, a[0].qdata)


def test_module_conversions():
    model = mlp()
    quantize_(model, hyperquant_weight())
    words = model[0].qdata.clone()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16 and half[0].bias.dtype == torch.bfloat16
    assert torch.equal(half[0].qdata, words)
    assert half(torch.randn(2, 384, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.to("meta")[0].weight.device.type == "meta"


def test_weight_assignment():
    linear = nn.Sequential(nn.Linear(256, 16))
    quantize_(linear, hyperquant_weight())
    other = HyperQuantTensor.from_hp(torch.randn(16, 256), bps=2)
    linear[0].weight = other
    assert linear[0].weight.bps == 2 and torch.equal(linear[0].qdata, other.qdata)
    with pytest.raises(TypeError, match="must be a HyperQuantTensor, got Parameter"):
        linear[0].weight = nn.Parameter(torch.randn(16, 256))
    with pytest.raises(ValueError, match=r"shape \(16, 256\), got \(8, 256\)"):
        linear[0].weight = HyperQuantTensor.from_hp(torch.randn(8, 256))


def test_gradients_flow_to_activations_and_bias():
    model, x = mlp(), torch.randn(3, 384, requires_grad=True)
    quantize_(model, hyperquant_weight())
    model(x).square().sum().backward()
    dense = mlp()
    for name in ("0", "2"):
        dense.get_submodule(name).weight = nn.Parameter(model.get_submodule(name).weight.dequantize())
    dense[0].bias, dense[3] = nn.Parameter(model[0].bias.detach().clone()), model[3]
    y = x.detach().clone().requires_grad_()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model[0].bias.grad, dense[0].bias.grad, rtol=1e-3, atol=1e-4)
    assert model[0].qdata.grad is None


def test_attention_modules():
    attention = nn.MultiheadAttention(256, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 256)
    expected, _ = attention(x, x, x)
    # torchao's default filter leaves this subclass of Linear out
    quantize_(attention, hyperquant_weight(bps=6), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert isinstance(attention.out_proj.weight, HyperQuantTensor)
    found, _ = attention(x, x, x)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_column_scale():
    weight = torch.randn(64, 512) * torch.logspace(-2, 2, 512)
    weight[:, 3] = 0
    scale = column_scale(weight).float()
    assert scale.isfinite().all() and scale.min() >= 1 / 16 and scale.max() <= 16
    inner = slice(100, 400)
    ratio = scale[inner] / weight[:, inner].square().mean(0).pow(0.25)
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones_like(ratio), rtol=0.01, atol=0)


def test_balanced_columns_lower_the_output_error():
    """Columns of very different size under white activations: what the scales are derived for."""
    torch.manual_seed(0)
    weight, x = torch.randn(128, 512) * torch.logspace(-1, 1, 512)[torch.randperm(512)], torch.randn(64, 512)
    errors = []
    for scale in (None, column_scale(weight)):
        packed = HyperQuantTensor.from_hp(weight, bps=3, act_pre_scale=scale)
        errors.append((nn.functional.linear(x, packed) - x @ weight.t()).square().mean().item())
    rms = weight.square().mean(0).sqrt()
    # error ~ sum(w^2 d^2) * sum(1 / d^2): d = 1 against d = w^(-1/2)
    predicted = (rms.sum() ** 2 / (rms.square().sum() * 512)).item()
    assert abs(errors[1] / errors[0] - predicted) < 0.15 * predicted + 0.02


def test_report():
    model = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="left unquantized"):
        quantize_(model, hyperquant_weight(bps=3))
    report = quantization_report(model)
    assert report.bits_per_weight == 3 and report.size_bytes == 512 * 64 * 3 // 8
    assert [w.quantized for w in report.weights] == [True, False]
    assert "1 of 2 quantized, 12,288 bytes, 3.0000 bits/weight" in str(report)
    assert "e8 at 3 bps, tile 512" in str(report)
