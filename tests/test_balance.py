import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from hq_inductor import HyperQuantTensor, balance_columns, hyperquant_weight, quantization_report
from hq_inductor.balance import column_scale

KINDS = {
    ("q_proj", "k_proj", "v_proj"): "input_layernorm",
    ("o_proj",): "v_proj",
    ("gate_proj", "up_proj"): "post_attention_layernorm",
    ("down_proj",): "up_proj",
    ("lm_head",): "norm",
}


def llama(size: float = 0.1) -> LlamaForCausalLM:
    """Grouped-query attention, and channels of very different size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=300,
        initializer_range=size,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data *= torch.exp(0.5 * torch.randn(parameter.shape[1]))
        elif "norm" in name:
            parameter.data = torch.exp(torch.randn_like(parameter))
    return model


def short(name: str) -> str:
    return name.rpartition(".")[2]


def column_rms(model: nn.Module, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Root mean square of every linear's input and weight, by column."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.update(
                {name: (args[0].square().mean((0, 1)).sqrt(), module.weight.square().mean(0).sqrt())}
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_folded_into_norms_and_rows():
    model, tokens = llama(), torch.randint(300, (4, 64))
    before = copy.deepcopy(model)
    report = balance_columns(model, [tokens])
    assert {tuple(map(short, g.linears)): short(g.folded_into) for g in report} == KINDS and len(report) == 9
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-3, atol=1e-3)
    for name, parameter in model.named_parameters():
        assert not parameter.equal(before.get_parameter(name)) or "embed" in name
    assert not any("balance_scale" in name for name, _ in model.named_buffers())
    assert all(g.gain > 0 for g in report)


def test_folding_reaches_the_optimum():
    """At the least error no further scale helps: activations and weights have the same profile over the columns."""
    model, tokens = llama(), torch.randint(300, (8, 64))
    balance_columns(model, [tokens])
    rms = column_rms(model, tokens)
    for name, (x, w) in rms.items():
        if short(name) in ("down_proj", "lm_head"):
            ratio = torch.log2(x / w)
            assert (ratio - ratio.median()).abs().quantile(0.95) < 0.05, name
        if short(name) == "o_proj":  # heads that share values share scales: the profile is equal on average
            x, w = (t.square().reshape(2, 2, 64).mean(1).sqrt() for t in (x, w))
            ratio = torch.log2(x / w)
            assert (ratio - ratio.median()).abs().quantile(0.95) < 0.05


class PostNorm(nn.Module):
    """The residual reads the norm's output too, so nothing can be folded into it."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(256), nn.Linear(256, 256), nn.Linear(256, 256, bias=False)
        self.norm.weight.data = torch.exp(torch.randn(256))

    def forward(self, x):
        h = self.norm(x)
        return h + self.a(h) + F.silu(self.b(h))


def test_scales_that_cannot_be_folded_are_stored_and_counted():
    torch.manual_seed(0)
    model, x = PostNorm(), torch.randn(64, 256)
    before, state = model(x), copy.deepcopy(model.state_dict())
    (group,) = balance_columns(model, [x])
    assert group.linears == ("a", "b") and group.folded_into is None
    assert model.state_dict().keys() == state.keys() and all(model.state_dict()[k].equal(v) for k, v in state.items())
    assert model(x).equal(before)
    quantize_(model, hyperquant_weight(bps=4))
    assert model.a.act_pre_scale.equal(model.b.act_pre_scale)
    assert model.a.weight.bits_per_weight == 4 + 16 / 256
    assert not hasattr(model.a, "balance_scale") and quantization_report(model).bits_per_weight == 4 + 16 / 256
    assert (model(x) - before).norm() < 0.15 * before.norm()


def test_store_scales_false_keeps_the_rate():
    model, x = PostNorm(), torch.randn(64, 256)
    assert balance_columns(model, [x], store_scales=False) == []
    quantize_(model, hyperquant_weight(bps=4))
    assert quantization_report(model).bits_per_weight == 4


def test_filter_and_modes_of_calling():
    model = PostNorm()
    x = torch.randn(16, 256)
    for batch in (x, (x,), {"x": x}):
        (group,) = balance_columns(model, [batch], lambda module, name: name == "b")
        assert group.linears == ("b",)


def test_expected_gain_is_what_quantization_shows():
    """Columns and activations of very different size: measured output error against the prediction for white noise."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512) * torch.exp2(torch.randn(512))
    x = torch.randn(4096, 512) * torch.exp2(torch.randn(512))
    model = nn.Sequential(nn.Linear(512, 256, bias=False))
    model[0].weight.data = weight
    (group,) = balance_columns(model, [x])
    errors = []
    for scale in (None, model[0].balance_scale):
        packed = HyperQuantTensor.from_hp(weight, bps=4, act_pre_scale=scale)
        errors.append((F.linear(x, packed) - x @ weight.t()).square().mean())
    measured = 10 * torch.log10(errors[0] / errors[1]).item()
    assert group.gain > 2 and abs(measured - group.gain) < 0.3


def test_dead_columns_and_outliers_stay_within_bounds():
    weight, rms_x = torch.randn(64, 256), torch.ones(256)
    weight[:, 0], weight[:, 1], rms_x[2], rms_x[3] = 0, 1e6, 0, 1e6
    scale = column_scale(weight, rms_x).float()
    assert scale.isfinite().all() and scale.min() >= 1 / 16 and scale.max() <= 16
    assert column_scale(torch.zeros(4, 256)).eq(1).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="batches must hold at least one input, got none"):
        balance_columns(PostNorm(), [])
    with pytest.raises(ValueError, match="none of the 0 linear layers was run"):
        balance_columns(PostNorm(), [torch.randn(2, 256)], lambda module, name: False)
