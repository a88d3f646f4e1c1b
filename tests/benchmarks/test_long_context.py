import json
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("triton")

import decode_model
import long_context
from transformers import LlamaConfig

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # in bf16 two tokens may tie
    return decode_model.make_model(LlamaConfig(**decode_model.TINY, num_hidden_layers=2, tie_word_embeddings=False), "bf16", CPU).float()


@pytest.mark.parametrize("bps", [None, 4.0, 2.5])
def test_bytes_of_an_8b_model(bps):
    """Against sums by hand: 8 heads of 128 values for keys and for values, 4 first and 64 newest tokens exact."""
    config = LlamaConfig(**decode_model.LLAMA_3_8B, num_hidden_layers=1)
    per_sequence, shared = long_context.full_cache_bytes(config, bps, 8192, LIKE)
    if bps is None:
        assert per_sequence == 2**30 and shared == 32 * 8
    else:
        slots, exact, offset = 8192 * 2 * 8 * 128 * bps / 8, (4 + 64) * 2 * 8 * 128 * 2, 8 * 128 * 4
        assert per_sequence == 32 * (slots + exact + offset)
        assert shared == 32 * (2 * 128 * 128 * 2 + 8)


def test_bytes_of_weights(model):
    layer, other = (sum(p.numel() * 4 for p in part.parameters()) for part in (model.model.layers[0], model))
    other -= 2 * layer
    assert long_context.full_weight_bytes(model) == 32 * layer + other


@torch.no_grad()
def test_rows_are_attention_of_a_full_cache(model):
    """The last step, where a mask hides nothing, against transformers' own attention; compiled, since the choice of backends must trace."""
    out = {}
    torch._dynamo.reset()
    for attention, call in (("rows", torch.compile(model, fullgraph=True, backend="eager")), ("sdpa", model)):
        model.set_attn_implementation(attention)
        torch.manual_seed(1)
        state = long_context.FullDecoder(model, None, batch=3, context=40, steps=1)
        out[attention] = call(input_ids=state.tokens, past_key_values=state.cache).logits
        assert state.cache.layers[0].cumulative_length == 40
    assert out["sdpa"].std() > 0.1
    torch.testing.assert_close(out["rows"], out["sdpa"], atol=1e-4, rtol=1e-4)
    # not blind to the cache
    state = long_context.FullDecoder(model, None, batch=3, context=40, steps=1)
    assert (model(input_ids=state.tokens, past_key_values=state.cache).logits - out["sdpa"]).abs().max() > 1e-2


def test_coded_caches_are_full_of_random_states(model):
    state = long_context.FullDecoder(model, 3.0, batch=2, context=64, steps=2)
    for layer in state.cache.layers:
        assert layer.states.length == 62 and layer.states.max_tokens == 64
        for states in layer.states.dequantize():
            # finite, of size one, and no two tokens alike: 512 different slots, 64 drawn
            assert 0.8 < states.std() < 1.1 and len(states[0, 0].unique(dim=0)) > 40
    first, second = state.cache.layers
    assert not torch.equal(first.states.k_words, second.states.k_words)
    state.step()
    state.rewind()
    assert first.states.length == 62


def test_command(tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    options = "--device cpu --tiny --layers 1 --contexts 64 --memory 0.042 --cache-bps 2 --mode eager --steps 2".split()
    monkeypatch.setattr(sys, "argv", ["long_context.py", *options, "--json", str(file), "--plot", str(picture)])
    monkeypatch.setattr(long_context, "time_ms", lambda call, *_: (call(), 2.0)[1])
    long_context.main()
    results = json.loads(file.read_text())["results"]
    bf16, _, equal, largest = results
    assert [r["batch"] for r in results] == [bf16["largest_batch"]] * 3 + [largest["largest_batch"]]
    assert largest["batch"] > bf16["batch"]
    for r in results:
        used = r["weight_bytes"] + r["shared_bytes"] + r["largest_batch"] * r["sequence_bytes"]
        assert 0 <= 42e6 - used < r["sequence_bytes"]
    assert picture.stat().st_size > 1000
    output = capsys.readouterr().out
    assert "| bf16, masked |" in output and f"| {largest['batch'] / bf16['batch']:.2f}x |" in output and equal["step_ms"] == 2
    monkeypatch.setattr(sys, "argv", ["long_context.py", *options, "--memory", "0.01"])
    with pytest.raises(ValueError, match="memory must be at least"):
        long_context.main()
