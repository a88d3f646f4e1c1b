import copy
import json
import sys

import kv_quality
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hq_inductor.integrations.transformers_cache import HyperQuantCache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("bps", [2.0, 4.0])
def test_one_pass_is_decoding_with_the_cache_token_by_token(model, bps):
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    one_pass = copy.deepcopy(model)
    quantize, bits = kv_quality.hyperquant(bps, 64, effort=0, prompt=16)
    assert kv_quality.cached("ours", bits, quantize, window=5, sinks=2, prompt=16).apply(one_pass) == bps
    cache = HyperQuantCache(model.config, 32, bps=bps, window=5, sinks=2, effort=0)
    with torch.inference_mode():
        model(tokens[:, :16], past_key_values=cache)
        expected = torch.cat([model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(16, 30)], 1)
        exact = model(tokens).logits[:, 16:]
        found = one_pass(tokens).logits[:, 16:]
    assert torch.allclose(found, expected, atol=2e-3)
    # of what quantization changes this is little
    assert (found - expected).square().mean() < 1e-4 * (exact - expected).square().mean()


def test_methods_have_true_rates_and_errors_in_order(model):
    x = torch.randn(1, 2, 64, 128)
    error = {}
    for name, (quantize, bits) in {
        "ours 2": kv_quality.hyperquant(2, 128),
        "ours 3": kv_quality.hyperquant(3, 128),
        "lloyd 4": kv_quality.lloyd_max(4, 128),
        "int2": kv_quality.integers(2, 32),
        "kivi": kv_quality.kivi(2),
    }.items():
        assert bits == {"ours 2": 2, "ours 3": 3, "lloyd 4": 2.125, "int2": 3, "kivi": 3}[name]
        error[name] = (quantize(x, 0, "k") - x).square().mean().item()
    # Gaussian vectors: 2 bits of ours beat 2.125 of Lloyd and Max (9.3 dB); 3 beat integers of 3
    assert error["ours 2"] < error["lloyd 4"] < 0.125 and error["ours 3"] < 0.25 * error["int2"] and error["ours 3"] < 0.25 * error["kivi"]


def test_exact_layers_and_windows_are_exact(model):
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))

    def broken(x, layer, role):
        return x * 0

    for arguments in ((20, 0), (1, 20), (0, 0, (0, -1))):
        other = copy.deepcopy(model)
        kv_quality.cached("broken", 0, broken, *arguments).apply(other)
        with torch.inference_mode():
            assert torch.allclose(other(tokens).logits, model(tokens).logits, atol=2e-3)


def test_command(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)))
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--text",
        str(text),
        "--sequences",
        "2",
        "--length",
        "24",
        "--bps",
        "2",
        "--window",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["kv_quality.py", *arguments, "--output", str(tmp_path)])
    kv_quality.main()
    results = json.loads((tmp_path / "kv_quality.json").read_text())["results"]
    printed = capsys.readouterr().out
    assert len(results) == 22 and all(f"| {r['method']} |" in printed and r["kl"] > -1e-3 for r in results)
