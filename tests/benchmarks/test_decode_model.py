import copy
import json
import sys
from collections import Counter

import decode_model
import pytest
import torch
from transformers import LlamaConfig

from hq_inductor import HyperQuantLinear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**decode_model.TINY, num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def quantized(config):
    torch.manual_seed(0)
    return decode_model.make_model(config, "4", CPU)


def test_quantized_layers_have_memory_and_words_of_their_own(quantized):
    linears = decode_model.decoder_linears(quantized)
    assert len(linears) == 14 and all(type(linear) is HyperQuantLinear for linear in linears.values())
    first, second = (quantized.model.layers[i].mlp.up_proj for i in range(2))
    assert first.qdata.data_ptr() != second.qdata.data_ptr() and not torch.equal(first.qdata, second.qdata)
    # a roll: the same rows in another order
    torch.testing.assert_close(first.weight.dequantize().norm(dim=1).sort().values, second.weight.dequantize().norm(dim=1).sort().values)
    weights = sum(linear.in_features * linear.out_features for linear in linears.values())
    norms = sum(p.numel() for name, p in quantized.model.layers.named_parameters() if "norm" in name)
    assert decode_model.stored_bytes(quantized.model.layers.parameters()) == weights // 2 + 2 * norms
    # as the subclass shows it, and as the words are
    assert decode_model.stored_bytes([first.weight]) == decode_model.stored_bytes([first.qdata]) == first.qdata.numel() * 4


@torch.no_grad()
def test_compiled_steps_decode_the_tokens_of_plain_ones(quantized):
    """Greedy tokens from the graph, one by one, against whole forward passes over a cache filled alike."""
    torch._dynamo.reset()
    # in bf16 two tokens may tie
    model = copy.deepcopy(quantized).float()
    state = decode_model.Decoder(model, batch=3, context=5, steps=4)
    step = torch.compile(state.step, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens = [state.tokens.clone()]
    for _ in range(4):
        step()
        tokens.append(state.tokens.clone())
    tokens = torch.cat(tokens, 1)
    plain = decode_model.Decoder(model, batch=3, context=5, steps=4)
    logits = model(input_ids=tokens[:, :-1], past_key_values=plain.cache).logits
    assert torch.equal(logits.argmax(-1), tokens[:, 1:])
    assert len(tokens.unique()) > 3
    assert state.cache.layers[0].cumulative_length == 9
    state.rewind()
    assert all(layer.cumulative_length == 5 for layer in state.cache.layers)


def test_launches():
    names = Counter({"linear": 7 * 8, "rotate": 5 * 8, "norm": 2 * 8 + 1, "attention": 8, "head": 1, "argmax": 2, "first_norm": 1})
    assert decode_model.launches(names, layers=8) == (7 + 5 + 2 + 1, 7 * 8 + 5 * 8 + 17 + 8 + 4)


def test_scaling_to_a_whole_model():
    """Of 9 ms for 8 layers 1 ms is the head's, so 32 layers take 33 ms."""
    bf16 = decode_model.Result("bf16", 8, 8, 9.0, 1.0, 800, 100, 10, 90, 1.0)
    ours = decode_model.Result("4", 8, 8, 5.0, 1.0, 200, 100, None, None, 2.0)
    whole = decode_model.Result("4", 8, 32, 17.0, 1.0, 800, 100, 15, 490, 2.0)
    assert bf16.full_step_ms == 33 and bf16.tokens_per_s == pytest.approx(8000 / 33) and bf16.full_bytes == 3300
    assert ours.full_step_ms == whole.full_step_ms == whole.step_ms and ours.full_bytes == whole.full_bytes == 900
    header, _, first, second = decode_model.table([bf16, ours]).splitlines()
    assert header.count("(scaled to 32 layers)") == 3 and "scaled" not in decode_model.table([whole])
    assert "| 1.00x |" in first and "| 1.94x |" in second and "| ours 4 bps | 8 |" in second


def test_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    arguments = "--device cpu --tiny --layers 1 --weights bf16 3 --batches 1 2 --steps 2 --context 8 --mode eager --json".split()
    monkeypatch.setattr(sys, "argv", ["decode_model.py", *arguments, str(file)])
    decode_model.main()
    results = json.loads(file.read_text())["results"]
    assert [(r["weights"], r["batch"]) for r in results] == [("bf16", 1), ("bf16", 2), ("3", 1), ("3", 2)]
    assert all(r["step_ms"] > 0 and r["head_ms"] > 0 for r in results)
    assert results[2]["decoder_bytes"] < 0.2 * results[0]["decoder_bytes"]
    assert capsys.readouterr().out.count("| ours 3 bps |") == 2
    monkeypatch.setattr(sys, "argv", ["decode_model.py", "--device", "cpu", "--weights", "int4wo"])
    with pytest.raises(SystemExit, match="int4wo packs its weights for CUDA"):
        decode_model.main()
