import json
import math
import sys

import perplexity
import pytest
import torch
import torch.nn.functional as F
from peers import INT4
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def evaluation(model_path):
    text = model_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 4)
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    windows, calibration, bytes_per_token = perplexity.read_windows(model_path, text, 256, sequences=6, length=32)
    assert [tuple(batch.shape) for batch in calibration] == [(2, 32), (2, 32), (1, 32)]
    assert bytes_per_token == 1 and windows.shape == (6, 33)
    assert windows[0].tolist() == list(range(33)) and (windows[:, 1:] - windows[:, :-1]).remainder(256).eq(1).all()
    return perplexity.Evaluation(model, windows, bytes_per_token, batch=4)


def test_unchanged_model_has_no_divergence(evaluation):
    result = evaluation.run(perplexity.Method("same", lambda model: 32.0))
    assert abs(result.kl) < 1e-3 and abs(result.change) < 1e-3 and result.bits_per_byte == pytest.approx(evaluation.bits_per_byte)


def test_figures_agree_with_torch(evaluation):
    """Against `F.kl_div` and `F.cross_entropy` on all tokens at once."""
    names = perplexity.linear_names(evaluation.model, head=False)
    assert len(names) == 14 and "lm_head" not in names
    result = evaluation.run(perplexity.theirs(names, INT4))
    quantized = LlamaForCausalLM(evaluation.model.config).eval()
    quantized.load_state_dict(evaluation.model.state_dict())
    for name in names:
        weight = quantized.get_submodule(name).weight
        weight.data = INT4.quantize(weight.data)
    windows = torch.cat(evaluation.batches)
    with torch.inference_mode():
        p, q = (F.log_softmax(m(windows[:, :-1]).logits, -1).flatten(0, 1) for m in (evaluation.model, quantized))
        kl = F.kl_div(q, p, log_target=True, reduction="batchmean")
        loss = F.nll_loss(q, windows[:, 1:].flatten())
    assert result.kl == pytest.approx(1000 * kl.item() / math.log(2), rel=1e-3)
    assert result.bits_per_byte == pytest.approx(loss.item() / math.log(2), rel=1e-5)
    assert result.bits_per_weight == 4.25


def test_command(model_path, evaluation, tmp_path, monkeypatch, capsys):
    arguments = ["--sequences", "4", "--length", "32", "--bps", "3", "5", "--output", str(tmp_path)]
    text = str(model_path / "text.txt")
    monkeypatch.setattr(sys, "argv", ["perplexity.py", "--model", str(model_path), "--text", text, "--no-peers", *arguments])
    perplexity.main()
    results = json.loads((tmp_path / "perplexity.json").read_text())["results"]
    for variant in perplexity.VARIANTS:
        low, high = (r for r in results if r["method"] == f"e8 {variant}")
        assert low["bits_per_weight"] <= 3 < high["bits_per_weight"] <= 5 and low["kl"] > 2 * high["kl"] > 0
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("| e8 ") == len(results)


def test_narrow_activations(evaluation):
    """int8 activations cost little, fp8 more; without narrowing, the rotated layer is the layer."""
    names = perplexity.linear_names(evaluation.model, head=False)
    kl = {}
    for arithmetic in perplexity.ARITHMETIC:
        kl[arithmetic] = evaluation.run(perplexity.ours(names, [], "plain", arithmetic, bps=6.0)).kl
    assert kl["float"] < kl["int8"] < kl["fp8"] < kl["nvfp4"] < kl["mxfp4"]

    model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    x = torch.randn(5, 256)
    perplexity.quantize_(model, perplexity.hyperquant_weight(bps=4))
    expected = model(x)
    rotated = perplexity.RotatedLinear(model[0], "float")
    torch.testing.assert_close(rotated(x), expected, rtol=1e-4, atol=1e-5)
