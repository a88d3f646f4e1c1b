import gc

import pytest
import torch
import torch.nn.functional as F

from hq_inductor.cache import KVConfig, QuantizedKV, kv_attention, kv_encode, kv_encode_pair
from hq_inductor.format.kv import kv_layout
from hq_inductor.format.rotation import ROTATIONS, rotation_matrix


def make(batch=2, kv_heads=2, head_dim=128, max_tokens=48, **options):
    arguments = {name: options.pop(name) for name in ("layer", "sliding_window", "dtype", "device") if name in options}
    return QuantizedKV(
        KVConfig(**{"window": 6, "sinks": 2, **options}), batch, kv_heads, head_dim, max_tokens, **{"dtype": torch.float32, **arguments}
    )


def states(tokens, batch=2, kv_heads=2, head_dim=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, kv_heads, tokens, head_dim, generator=generator) for _ in range(2))


def snr_db(x, y):
    return 10 * torch.log10(x.square().sum() / (x - y).square().sum()).item()


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(128, 2), (80, 3), (96, 2), (64, 1)])
def test_states_come_back(rotation, head_dim, kv_heads):
    cache = make(kv_heads=kv_heads, head_dim=head_dim, rotation=rotation, layer=3)
    k, v = states(20, kv_heads=kv_heads, head_dim=head_dim)
    cache.store(k[:, :, :17], v[:, :, :17])
    for token in range(17, 20):
        cache.store(k[:, :, token : token + 1], v[:, :, token : token + 1])
    assert cache.length.tolist() == [20]
    for x, y in zip((k, v), cache.dequantize(), strict=True):
        y = y[:, :, :20]
        exact = [0, 1, *range(14, 20)]
        assert torch.allclose(x[:, :, exact], y[:, :, exact], atol=1e-5)
        coded = slice(2, 14)
        # heads of zeros leave more bits to the others
        assert 20.5 < snr_db(x[:, :, coded], y[:, :, coded]) < (26.5 if kv_heads % cache.k_layout.join else 24)


@pytest.mark.parametrize("bps", [2.0, 4.0])
def test_bytes_are_exact(bps):
    cache = make(k_bps=bps, v_bps=bps, max_tokens=64, dtype=torch.bfloat16, window=0, sinks=0)
    bf16, offset = 2 * 2 * 2 * 64 * 128 * 2, 2 * 2 * 128 * 4
    assert cache.slot_bits_per_value == bps and cache.size_bytes == bf16 * bps / 16 + offset
    with_window = make(k_bps=bps, v_bps=bps, max_tokens=64, dtype=torch.bfloat16)
    assert with_window.size_bytes - cache.size_bytes == 2 * 2 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(("bps", "shrinks"), [(2.0, 0.09), (3.0, 0.02), (4.0, 0.005)])
def test_coded_keys_are_as_long_as_the_keys(bps, shrinks):
    """`<k, k'>` is `|k|^2` in the mean of many keys, and less by the relative error without the gain."""
    k, v = states(48)
    ratio = {}
    for unbias in (False, True):
        cache = make(k_bps=bps, unbias=unbias, window=0, sinks=0)
        cache.store(k, v)
        ratio[unbias] = (((cache.keys() * k).sum() / k.square().sum()) - 1).item()
    assert ratio[False] < -shrinks and abs(ratio[True]) < 0.15 * shrinks + 1e-3


def test_centering_changes_nothing_but_the_error():
    """Keys with a common part: attention of exact tokens stays the same, that of coded ones comes closer."""
    k, v = states(40)
    k = k + 6 * torch.randn(2, 2, 1, 128, generator=torch.Generator().manual_seed(7))
    query = torch.randn(2, 2, 1, 128, generator=torch.Generator().manual_seed(8)) / 4
    expected = F.scaled_dot_product_attention(query, k, v)
    error = {}
    for window in (6, 48):
        for center in (False, True):
            cache = make(center=center, window=window, v_bps=6)
            cache.store(k[:, :, :39], v[:, :, :39])
            cache.store(k[:, :, 39:], v[:, :, 39:])
            assert (cache.k_offset != 0).any() == center
            error[window, center] = (cache.attend(query) - expected).abs().max().item()
            # the common part is 37 times the rest: 15 dB
            assert snr_db(k, cache.dequantize()[0][:, :, :40]) > (33 if center else 20)
    assert max(error[48, False], error[48, True]) < 1e-4
    assert error[6, True] < 0.5 * error[6, False]
    few = make()
    few.store(k[:, :, :15], v[:, :, :15])
    few.store(k[:, :, 15:], v[:, :, 15:])
    assert (few.k_offset == 0).all()


@pytest.mark.parametrize(("tokens", "steps"), [(1, 12), (3, 5), (11, 2)])
def test_attention_is_that_of_what_is_stored(tokens, steps):
    """Against attention over `dequantize`, in chunks of any size: rotations cancel."""
    cache = make(layer=1)
    for step in range(steps):
        k, v = states(tokens, seed=step)
        cache.store(k, v)
        query = torch.randn(2, 6, tokens, 128)
        length = (step + 1) * tokens
        keys, values = (x[:, :, :length] for x in cache.dequantize())
        mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        assert torch.allclose(cache.attend(query), expected, atol=1e-4)


def test_chunks_do_not_matter():
    k, v = states(30)
    caches = [make(center=False) for _ in range(3)]
    for cache, chunks in zip(caches, ([30], [1] * 30, [7, 2, 20, 1]), strict=True):
        for k_part, v_part in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
            cache.store(k_part, v_part)
    for name, tensor in caches[0].tensors().items():
        for other in caches[1:]:
            assert torch.allclose(tensor.float(), other.tensors()[name].float(), atol=1e-6), name


@pytest.mark.parametrize("dither", [None, "full"])
@pytest.mark.parametrize("removed", [1, 4, 15, 28])
def test_crop(removed, dither):
    """As if the tokens had never been there, but that those back in the window are decoded ones."""
    k, v = states(30)
    cropped, short = (make(dither=dither, center=False) for _ in range(2))
    cropped.store(k, v)
    cropped.crop(removed)
    left = 30 - removed
    short.store(k[:, :, :left], v[:, :, :left])
    assert cropped.length.tolist() == [left]
    # the window's newest tokens that were already outside of it: decoded; sinks stay exact
    back = [p for p in range(max(2, left - 6), left) if p < 24]
    kept = [p for p in range(left) if p not in back]
    for x, a, b in zip((k, v), cropped.dequantize(), short.dequantize(), strict=True):
        assert torch.allclose(a[:, :, kept], b[:, :, kept], atol=1e-5)
        assert torch.allclose(b[:, :, back], x[:, :, back], atol=1e-5)
        if back:
            assert snr_db(x[:, :, back], a[:, :, back]) > 15
    for step in range(3):
        for cache in (cropped, short):
            cache.store(*states(1, seed=100 + step))
    tail = slice(left, left + 3)
    for a, b in zip(cropped.dequantize(), short.dequantize(), strict=True):
        assert torch.allclose(a[:, :, tail], b[:, :, tail], atol=1e-5)
    assert torch.equal(cropped.k_words[:, :, : left + 3], short.k_words[:, :, : left + 3])


@pytest.mark.parametrize("dither", [None, "half", "full"])
def test_reorder_is_reordering_the_tokens(dither):
    index = torch.tensor([1, 1, 0])
    k, v = states(20, batch=3)
    cache, other = make(batch=3, dither=dither), make(batch=3, dither=dither)
    pointers = {name: tensor.data_ptr() for name, tensor in cache.tensors().items()}
    cache.store(k, v)
    cache.start = torch.tensor([0, 1, 2])
    cache.reorder(index)
    other.store(k[index], v[index])
    for name, tensor in other.tensors().items():
        assert torch.equal(cache.tensors()[name], tensor), name
    assert pointers == {name: tensor.data_ptr() for name, tensor in cache.tensors().items()}
    assert cache.start.tolist() == [1, 1, 0]
    cache.select_batch(torch.tensor([2]))
    assert cache.k_words.shape[0] == 1 and torch.equal(cache.k_exact[0], other.k_exact[2])


def test_reset_and_start():
    cache = make()
    cache.store(*states(20, seed=1))
    cache.start = torch.tensor([3, 0])
    cache.reset()
    k, v = states(4)
    cache.store(k, v)
    fresh = make()
    fresh.store(k, v)
    query = torch.randn(2, 2, 1, 128)
    assert torch.allclose(cache.attend(query), fresh.attend(query), atol=1e-6)
    fresh.start = torch.tensor([2, 0])
    expected = F.scaled_dot_product_attention(query[:1], k[:1, :, 2:], v[:1, :, 2:])
    assert torch.allclose(fresh.attend(query)[:1], expected, atol=1e-5)


def test_sliding_window():
    cache = make(sliding_window=5)
    k, v = states(20)
    cache.store(k, v)
    query = torch.randn(2, 2, 1, 128)
    expected = F.scaled_dot_product_attention(query, k[:, :, 15:], v[:, :, 15:])
    assert torch.allclose(cache.attend(query), expected, atol=1e-5)


def snapshot(cache):
    return {name: tensor.clone() for name, tensor in cache.tensors().items()}


REFUSED = {
    "the cache is full: max_tokens must be at least 50, got 48": lambda: states(40),
    r"k must have shape \[2, 2, S, 128\], .* got \(2, 2, 3, 64\)": lambda: states(3, head_dim=64),
    r"k must have shape .* got \(1, 2, 3, 128\)": lambda: states(3, batch=1),
    r"k must have shape .* got \(2, 3, 3, 128\)": lambda: states(3, kv_heads=3),
    "k must be on cpu, where the cache is, got meta": lambda: (x.to("meta") for x in states(3)),
    "v must be floating point, got torch.int64": lambda: (next(states(3)), torch.zeros(2, 2, 3, 128, dtype=torch.int64)),
    r"v must have shape .* got \(2, 2, 4, 128\)": lambda: (next(states(3)), next(states(4))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(message):
    cache = make()
    cache.store(*states(10))
    before = snapshot(cache)
    with pytest.raises((ValueError, TypeError), match=message):
        cache.store(*REFUSED[message]())
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_mixed_rates_are_refused():
    cache, other = make(), make(k_bps=3, v_bps=3)
    k, _ = states(1)
    layouts = cache.k_layout, other.v_layout
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"words must have 16 words per slot \(4 bits per value\), got 12"):
        kv_encode(other.k_words, other.k_exact, k, torch.arange(1), cache.k_layout, sinks=2, window=6)
    with pytest.raises(ValueError, match=r"v_words must have 12 words per slot \(3 bits per value\), got 16"):
        kv_attention(k, cache.k_words, cache.v_words, cache.k_exact, cache.v_exact, cache.length, *layouts, sinks=2, window=6)
    with pytest.raises(ValueError, match="x must have head_dim=128, got 64"):
        kv_encode(cache.k_words, cache.k_exact, k[..., :64], torch.arange(1), cache.k_layout, sinks=2, window=6)
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "change",
    [
        {"k_bps": 1.5},
        {"v_bps": 3.3},
        {"lattice": "e7"},
        {"rotation": "qjl"},
        {"window": -1},
        {"sinks": 1.5},
        {"effort": 3},
        {"dither": "no"},
    ],
)
def test_config_is_checked(change):
    with pytest.raises((ValueError, TypeError), match="must be"):
        KVConfig(**change)


def test_crop_is_checked():
    cache = make()
    cache.store(*states(3))
    for tokens in (-1, 4):
        with pytest.raises(ValueError, match=f"tokens must be from 0 to the 3 stored, got {tokens}"):
            cache.crop(tokens)
    assert cache.length.tolist() == [3]


def test_functions_alone():
    """The style of code that owns its tensors: positions come from outside."""
    layout = kv_layout(64, 3)
    words = [torch.zeros(1, 1, 16, layout.tile.words, dtype=torch.int32) for _ in range(2)]
    exact = [torch.zeros(1, 2, 5, 64) for _ in range(2)]
    rotation = rotation_matrix("haar", 64)
    k, v = states(9, batch=1, head_dim=64)
    for position in (torch.arange(6), torch.arange(6, 9)):
        for x, w, e in zip((k, v), words, exact, strict=True):
            kv_encode(w, e, x[:, :, position], position, layout, rotation, sinks=1, window=4)
    query = torch.randn(1, 4, 1, 64)
    out = kv_attention(query, *words, *exact, torch.tensor([9]), layout, layout, rotation, rotation, sinks=1, window=4)
    expected = F.scaled_dot_product_attention(query, k, v, enable_gqa=True)
    assert 9 < snr_db(expected, out) < 40
    near = kv_attention(query, *words, *exact, torch.tensor([9]), layout, layout, rotation, rotation, sinks=1, window=4, sliding_window=4)
    assert torch.allclose(near, F.scaled_dot_product_attention(query, k[:, :, 5:], v[:, :, 5:], enable_gqa=True), atol=1e-5)


@pytest.mark.parametrize("v_bps", [3, 2])
def test_a_pair_is_keys_and_values_encoded(v_bps):
    layouts = kv_layout(64, 3), kv_layout(64, v_bps)
    k, v = states(9, batch=1, head_dim=64)
    rotations = [rotation_matrix("haar", 64, role=role) for role in "kv"]
    offset, position = torch.randn(1, 2, 1, 64), torch.arange(9)

    def empty():
        words = [torch.zeros(1, 1, 16, layout.tile.words, dtype=torch.int32) for layout in layouts]
        return *words, *(torch.zeros(1, 2, 5, 64) for _ in range(2))

    pair, alone = empty(), empty()
    kv_encode_pair(*pair, k, v, position, *layouts, *rotations, sinks=1, window=4, k_offset=offset, k_gain=1.25)
    kv_encode(*alone[::2], k, position, layouts[0], rotations[0], sinks=1, window=4, offset=offset, gain=1.25)
    kv_encode(*alone[1::2], v, position, layouts[1], rotations[1], sinks=1, window=4)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(pair, alone, strict=True))
    with pytest.raises(ValueError, match="v must have head_dim=64, got 32"):
        kv_encode_pair(*pair, k, v[..., :32], position, *layouts, sinks=1, window=4)


def test_compiled_step_is_one_graph_and_agrees():
    eager, compiled = make(), make()

    def step(cache, query, k, v):
        cache.store(k, v)
        return cache.attend(query)

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    frames = torch._dynamo.utils.counters["frames"]
    for index in range(12):
        k, v = states(1, seed=index)
        query = torch.randn(2, 4, 1, 128)
        assert torch.allclose(run(compiled, query, k, v), step(eager, query, k, v), atol=1e-5)
        if index == 1:
            started = frames["total"]
    assert frames["total"] == started, "recompiled while the cache grows"
    for name, tensor in eager.tensors().items():
        assert torch.allclose(compiled.tensors()[name].float(), tensor.float(), atol=1e-6), name


def test_compiled_steps_beyond_the_end_write_nothing():
    cache = make(max_tokens=16)
    cache.store(*states(16))
    torch.compile(lambda k, v: cache.store(k, v), fullgraph=True, backend="aot_eager")(*states(1, seed=9))
    other = make(max_tokens=16)
    other.store(*states(16))
    for name in ("k_words", "v_words", "k_exact", "v_exact"):
        assert torch.equal(cache.tensors()[name], other.tensors()[name])
    assert cache.attend(torch.randn(2, 2, 1, 128)).isfinite().all()


def test_memory_does_not_grow():
    cache = make(batch=1, kv_heads=1, max_tokens=16, effort=0)
    k, v = states(1, batch=1, kv_heads=1)
    query = torch.randn(1, 1, 1, 128)

    def steps(count):
        for _ in range(count):
            cache.store(k, v)
            cache.attend(query)
            cache.crop(1)
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    cache.store(*states(10, batch=1, kv_heads=1))
    pointers = [tensor.data_ptr() for tensor in cache.tensors().values()]
    first = steps(3)
    # a tensor kept per step would be 97 more; other tests' garbage may go meanwhile
    assert steps(100) < first + 50
    assert pointers == [tensor.data_ptr() for tensor in cache.tensors().values()]
