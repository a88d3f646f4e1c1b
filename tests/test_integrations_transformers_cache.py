import gc
import logging

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5")
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from hq_inductor import passes
from hq_inductor.integrations import transformers_cache
from hq_inductor.integrations.transformers_cache import HyperQuantCache, StoredStates

NEW = 8


def tiny(kv_heads=2, head_dim=64, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def prompts(batch, padded):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 64, (batch, 12), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        for row in range(1, batch):
            mask[row, : row % 7] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generate(model, inputs, cache, **options):
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **options)


def coded(model, **options):
    """A cache whose window is small beside the text, so that most of it is read from slots."""
    return HyperQuantCache(model.config, 40, **{"window": 4, "sinks": 1, "effort": 0, **options})


def compile_config(backend):
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    return config


def dense_logits(model, inputs, cache):
    """Logits of every step of a generation, and a reference: each step with full attention over what the cache holds, by hand."""
    out = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (8, True)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_generate_with_everything_exact_is_generate(batch, padded, kv_heads):
    model = tiny(kv_heads)
    inputs = prompts(batch, padded)
    expected = dense_logits(model, inputs, StaticCache(model.config, 48))
    tokens, logits = dense_logits(model, inputs, coded(model, window=48))
    assert torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_quantized_steps_are_attention_over_the_dequantized_cache(implementation):
    """The coded path of every layer against plain attention over what `dequantize` says, through the model's logits."""
    model, inputs = tiny(), prompts(3, True)
    model.set_attn_implementation(implementation)
    cache = coded(model, bps=3)
    with torch.inference_mode():
        model(**inputs, past_key_values=cache)
    seen = []

    def attention(query, key, value, attn_mask=None, scale=None, **_):
        assert isinstance(key, StoredStates) == isinstance(value, StoredStates)
        seen.append(type(key))
        groups = query.shape[1] // key.shape[1] if query.shape[2] == 1 else 1
        key, value = (x.dense() if isinstance(x, StoredStates) else x for x in (key, value))
        return F.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask, scale=scale
        )

    mask = inputs["attention_mask"]
    for step in range(6):
        mask = F.pad(mask, (0, 1), value=1)
        token = torch.full((3, 1), step + 1)
        with torch.inference_mode():
            logits = model(token, attention_mask=mask, past_key_values=cache).logits
            cache.crop(-1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transformers_cache, "_attention", attention)
                model.set_attn_implementation("sdpa")
                expected = model(token, attention_mask=mask, past_key_values=cache).logits
                model.set_attn_implementation(implementation)
        # cropping makes the token that returns to the window a decoded one: nothing else differs
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert len(seen) == 12 and all(kind is StoredStates for kind in seen)


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (8, True)])
def test_compiled_generate_is_eager_generate(batch, padded):
    model, inputs, graphs = tiny(), prompts(batch, padded), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    passes.reset_report()
    eager = generate(model, inputs, coded(model))
    compiled = generate(model, inputs, coded(model), compile_config=compile_config(backend))
    assert torch.equal(eager, compiled)
    # of two layers, traced once
    assert passes.report().made["cached_attention"] == 2 and not passes.report().left
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1
    # per layer: keys and values stored at once, one attention, and nothing decodes the cache
    assert (
        sum("kv_store_pair" in name for name in names) == sum("kv_store" in name for name in names) == 2
        and sum("kv_attention" in name for name in names) == 2
    )
    assert not any("kv_load" in name for name in names)


def test_compiled_by_inductor():
    model, inputs = tiny(), prompts(2, True)
    assert torch.equal(
        generate(model, inputs, coded(model)), generate(model, inputs, coded(model), compile_config=compile_config("inductor"))
    )


def test_quantization_shows_at_low_rates_only():
    model, inputs = tiny(), prompts(4, True)
    _, exact = dense_logits(model, inputs, StaticCache(model.config, 48))
    errors = [(dense_logits(model, inputs, coded(model, bps=bps))[1][:, 1] - exact[:, 1]).square().mean().item() for bps in (6, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2] and errors[0] < 1e-2 * exact[:, 1].var().item()


def test_generate_keeps_nothing_per_step():
    """Storage of all tensors that Python reaches, between step 5 and step 45: what `generate` knows of each token grows, nothing else."""
    model, inputs = tiny(kv_heads=1, head_dim=128), prompts(1, False)
    cache, held = HyperQuantCache(model.config, 64, window=4, sinks=1, effort=0), {}

    def record(input_ids, scores, **kwargs):
        step = input_ids.shape[1] - 12
        if step in (5, 45):
            gc.collect()
            storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu"]
            held[step] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    model.generate(**inputs, past_key_values=cache, max_new_tokens=45, do_sample=False, disable_compile=True, stopping_criteria=[record])
    assert cache.get_seq_length() == 12 + 45 - 1
    # ids, mask and, in some versions, positions; one row of hidden states kept per step would be 20 kB
    assert held[45] - held[5] <= 40 * 8 * 3


def test_beam_search():
    """Beams swap rows of the cache. With everything exact the tokens are those of transformers' own cache."""
    model, inputs = tiny(), prompts(3, True)
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    cache = coded(model, window=48)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)
    dithered = [model.generate(**inputs, past_key_values=coded(model, bps=6, dither="half"), **options) for _ in range(2)]
    assert torch.equal(*dithered)


def test_second_turn_and_crop():
    """A second prompt goes on after the first; `crop` takes it back."""
    model, inputs = tiny(), prompts(2, False)
    cache = coded(model, window=48)
    with torch.inference_mode():
        model(inputs["input_ids"], past_key_values=cache)
        more = torch.tensor([[5, 6, 7], [8, 9, 10]])
        expected = model(torch.cat((inputs["input_ids"], more), 1)).logits[:, -3:]
        for _ in range(2):
            assert torch.allclose(model(more, past_key_values=cache).logits, expected, atol=1e-3)
            assert int(cache.get_seq_length()) == 15
            cache.crop(-3)
    assert int(cache.get_seq_length()) == 12
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(generate(model, inputs, cache), generate(model, inputs, coded(model, window=48)))


def test_sliding_window_layers():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(**sizes, num_key_value_heads=1, sliding_window=7, initializer_range=0.2, eos_token_id=None, pad_token_id=0)
    model = MistralForCausalLM(config).eval()
    inputs = prompts(2, True)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(model, inputs, coded(model, window=48)), expected)


def test_exact_layers_and_rates():
    model, inputs = tiny(), prompts(2, True)
    cache = coded(model, exact_layers=[0, -1])
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(model, inputs, cache), expected)
    assert cache.size_bytes == 2 * 2 * 2 * 2 * 48 * 64 * 4
    mixed = coded(model, k_bps=4, v_bps=2, exact_layers=[1])
    generate(model, inputs, mixed)
    states = mixed.layers[0].states
    assert (states.k_words.shape[-1], states.v_words.shape[-1]) == (16, 8)
    with pytest.raises(ValueError, match=r"exact_layers must be indices of 2 layers, got \[2\]"):
        coded(model, exact_layers=[2])


def test_other_uses_decode_and_say_so(caplog):
    model, inputs = tiny(), prompts(2, False)
    cache = coded(model)
    with torch.inference_mode():
        model(inputs["input_ids"], past_key_values=cache)
    k = torch.randn(2, 2, 1, 64)
    keys, values = cache.update(k, k, 0)
    dense_keys, dense_values = cache.layers[0].states.dequantize()
    assert keys.shape == dense_keys.shape == (2, 2, 48, 64) and keys.dtype == torch.float32
    transformers_cache._logged.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(keys + 1, dense_keys + 1)
        assert torch.equal(torch.cat((keys, values)), torch.cat((dense_keys, dense_values)))
        query, mask = torch.randn(2, 4, 1, 64), (torch.arange(48) < 13)[None, None, None]
        expected = F.scaled_dot_product_attention(query, dense_keys, dense_values, mask, enable_gqa=True)
        swapped = F.scaled_dot_product_attention(query, values, keys, mask, enable_gqa=True)
        assert torch.allclose(swapped, F.scaled_dot_product_attention(query, dense_values, dense_keys, mask, enable_gqa=True))
    messages = [record.message for record in caplog.records]
    assert any("__add__" in m or "add reads keys or values" in m for m in messages)
    assert any("not of one layer" in m for m in messages)
    # and what is recognised decodes nothing
    caplog.clear()
    transformers_cache._logged.clear()
    assert torch.allclose(F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True), expected, atol=1e-5)
    repeated = [x[:, :, None, :, :].expand(2, 2, 2, 48, 64).reshape(2, 4, 48, 64) for x in (keys, values)]
    assert torch.allclose(F.scaled_dot_product_attention(query, *repeated, attn_mask=mask), expected, atol=1e-5)
    assert torch.equal(repeated[0].dense(), dense_keys.repeat_interleave(2, 1))
    packed = query.reshape(2, 2, 2, 64)
    assert torch.allclose(F.scaled_dot_product_attention(packed, keys, values, mask).reshape(2, 4, 1, 64), expected, atol=1e-5)
    assert not caplog.records


def test_graphs_that_decode_say_so_in_the_report():
    model, inputs = tiny(), prompts(2, False)
    cache = coded(model)
    with torch.inference_mode():
        model(inputs["input_ids"], past_key_values=cache)
    k, query = torch.randn(2, 2, 1, 64), torch.randn(2, 4, 1, 64)

    def attend(query, k):
        keys, values = cache.layers[0].update(k, k)
        return F.scaled_dot_product_attention(query, values, keys, enable_gqa=True) + F.scaled_dot_product_attention(
            query, keys, values, dropout_p=0.5, enable_gqa=True
        )

    passes.reset_report()
    with torch.no_grad():
        torch.compile(attend, backend="eager")(query, k)
    assert passes.report().left == {
        ("cached_attention", "keys and values are not of one layer"): 1,
        ("cached_attention", "dropout_p=0.5 and is_causal=False"): 1,
    }
    assert not passes.report().made


def test_errors():
    model = tiny()
    cache = coded(model)
    k = torch.randn(1, 2, 3, 64)
    cache.update(k, k, 0)
    with pytest.raises(ValueError, match="the cache is full: max_tokens must be at least 49, got 48"):
        cache.update(torch.randn(1, 2, 46, 64), torch.randn(1, 2, 46, 64), 0)
    with pytest.raises(ValueError, match=r"k must have shape \[1, 2, S, 64\]"):
        cache.update(torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64), 0)
    assert cache.layers[0].get_seq_length() == 3
    with pytest.raises(ValueError, match="keys and values must have one head_dim, got 64 and 128"):
        cache.update(k, torch.randn(1, 2, 3, 128), 1)
    with pytest.raises(ValueError, match="tokens_to_remove must be at most 0, got 2"):
        cache.crop(2)
    with pytest.raises(ValueError, match="max_cache_len must be an integer of at least 1, got 0"):
        HyperQuantCache(model.config, 0)
    with pytest.raises(ValueError, match="bps must be a multiple of 1/8"):
        HyperQuantCache(model.config, 8, bps=1)
    with pytest.raises(NotImplementedError, match="does not offload"):
        cache.layers[0].offload()
