"""LoRA over packed weights, with peft itself and in plain PyTorch."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight  # noqa: E402
from hq_inductor.integrations.peft import HyperQuantLoraLinear, hyperquant_lora  # noqa: E402
from hq_inductor.integrations.transformers import HyperQuantConfig  # noqa: E402

TOKENS = torch.arange(3, 35).view(2, 16)


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False))


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes})


def adapted(effort=1, mma="auto", **changes):
    """A packed model with nonzero adapters."""
    model = llama()
    quantize_(model.model, hyperquant_weight(bps=4, mma=mma))
    model = peft.get_peft_model(model, hyperquant_lora(lora(**changes), effort))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def loss(model, tokens=TOKENS):
    return model(tokens, labels=tokens).loss


def test_gradients_equal_those_over_the_dequantized_weight():
    model = adapted()
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, HyperQuantLoraLinear)
    dense = copy.deepcopy(model)
    for module in list(dense.modules()):
        if isinstance(module, HyperQuantLinear):
            weight = module.weight.dequantize()
            del module.weight
            module.weight = nn.Parameter(weight, requires_grad=False)
    loss(model).backward()
    loss(dense).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    for name, p in dense.named_parameters():
        if name in trained:
            torch.testing.assert_close(trained[name], p.grad, rtol=1e-3, atol=1e-6)


def test_merge_and_unmerge():
    model = adapted()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    base, words = layer.base_layer, layer.base_layer.qdata.clone()
    wanted = base.weight.dequantize() + layer.get_delta_weight("default")
    before = model(TOKENS).logits
    model.merge_adapter()
    assert isinstance(base, HyperQuantLinear) and not torch.equal(base.qdata, words)
    assert torch.equal(base.qdata, HyperQuantTensor.from_hp(wanted, bps=4).qdata)
    after = model(TOKENS).logits
    # the new weight has quantization noise of its own
    assert 0 < (after - before).norm() / before.norm() < 0.15
    model.unmerge_adapter()
    assert torch.equal(base.qdata, words) and torch.equal(model(TOKENS).logits, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merge_keeps_the_number_format_and_takes_the_effort():
    model = adapted(effort=0, mma="int8")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.weight.dequantize() + layer.get_delta_weight("default")
    model.merge_adapter()
    assert layer.base_layer.mma == "int8"
    fast, default = (HyperQuantTensor.from_hp(wanted, bps=4, effort=effort).qdata for effort in (0, 1))
    assert torch.equal(layer.base_layer.qdata, fast) and not torch.equal(fast, default)
    with pytest.raises(ValueError, match="effort must be 0, 1 or 2, got 3"):
        hyperquant_lora(lora(), effort=3)


def test_merging_two_adapters_starts_from_the_original_words():
    model = adapted()
    model.add_adapter("second", hyperquant_lora(lora()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["second"].weight, std=0.02)
    wanted = layer.base_layer.weight.dequantize() + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert torch.equal(layer.base_layer.qdata, HyperQuantTensor.from_hp(wanted, bps=4).qdata)
    assert layer.merged_adapters == ["default", "second"]


def test_merge_and_unload_gives_a_packed_model():
    model = adapted()
    model.merge_adapter()
    merged = model(TOKENS).logits
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, HyperQuantLinear)
    assert torch.equal(plain(TOKENS).logits, merged)


def test_bad_adapters_leave_the_weight_alone():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    words = layer.base_layer.qdata.clone()
    with torch.no_grad():
        layer.lora_B["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.qdata, words) and not layer.merged


def test_refuses_what_needs_the_float_weight():
    with pytest.raises(ValueError, match="lora_bias must be False"):
        adapted(lora_bias=True)
    with pytest.raises(NotImplementedError, match="must be plain LoRA, got DoraLinearVariant"):
        adapted(use_dora=True)


def test_without_our_layer_peft_falls_back_to_its_torchao_layer(tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HyperQuantConfig(bps=4))
    model = peft.get_peft_model(model, lora()).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "TorchaoLoraLinear"
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    before = model(TOKENS).logits
    model.merge_adapter()
    assert isinstance(layer.base_layer, HyperQuantLinear) and not layer.base_layer.weight.requires_grad
    model.unmerge_adapter()
    assert (model(TOKENS).logits - before).norm() / before.norm() < 0.3


def test_adapter_round_trip(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    fresh = llama()
    quantize_(fresh.model, hyperquant_weight(bps=4))
    with warnings.catch_warnings():
        # peft's own layer warns that it could not merge: it does not know the config of a model quantized by hand
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_gradient_checkpointing():
    model = adapted().train()
    loss(model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model).backward()
    assert model.base_model.model.model.is_gradient_checkpointing
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name])


def test_training_steps_are_one_graph():
    """Forward and loss of the packed model with adapters, traced without a break, train as in eager mode."""
    model = adapted()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    losses = {}
    for name, run, owner in (("eager", model, model), ("compiled", compiled, twin)):
        optimizer = torch.optim.AdamW([p for p in owner.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(4):
            optimizer.zero_grad()
            value = loss(run)
            value.backward()
            optimizer.step()
            losses[name].append(value.item())
    assert losses["eager"][-1] < losses["eager"][0] - 0.05
    torch.testing.assert_close(torch.tensor(losses["compiled"]), torch.tensor(losses["eager"]), rtol=1e-3, atol=1e-4)


def test_training_step_through_inductor_saves_only_words():
    """The compiled backward decodes again: no dequantized weight is kept from the forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU(), nn.Linear(256, 256, bias=False))
    quantize_(model, hyperquant_weight(bps=4))
    x = torch.randn(8, 256, requires_grad=True)
    saved = []
    expected = model(x).square().mean()
    (gradient,) = torch.autograd.grad(expected, x)
    compiled = torch.compile(lambda x: model(x).square().mean(), fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = compiled(x)
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert saved and not any(t.is_floating_point() and t.numel() >= 256 * 256 for t in saved)
