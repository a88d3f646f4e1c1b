"""On a CUDA device: the KV cache's kernels against the contract in double precision."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from hq_inductor.format.kv import kv_layout  # noqa: E402
from hq_inductor.format.lattice import is_lattice_point  # noqa: E402
from hq_inductor.format.layout import TileLayout  # noqa: E402
from hq_inductor.format.rice import decode_tiles, encode_tiles  # noqa: E402

from .kv_reference import attend_ref, decode_slots, encode_slots, paged, random_cache  # noqa: E402


@pytest.fixture(autouse=True)
def _poison_new_memory():
    """What a kernel forgets to write is NaN, not the right answer of the call before."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def layout_of(bps: float, head_dim: int = 128) -> TileLayout:
    return kv_layout(head_dim, bps).tile


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.isfinite().all()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 1.5 * torch.finfo(found.dtype).eps, error


@pytest.mark.parametrize(
    ("bps", "dtype"),
    [(b, torch.bfloat16) for b in (1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.125, 6.0)] + [(b, torch.float16) for b in (2.0, 5.0)],
)
def test_attention_rates(bps, dtype):
    from hq_inductor.ops.fused_kv import attend

    layout, max_tokens = layout_of(bps), 1024
    cache = random_cache([layout, layout], 128, 2, 3, max_tokens, 1000, 4, 64, dtype, "cuda")
    query = torch.randn(2, 12, 1, 128, device="cuda").mul_(2).to(dtype)
    for length in (1000, 70, 69, 5, 1):
        arguments = (query, *cache, torch.tensor([length], device="cuda"), None, None, 128**-0.5, 4, 64, 0, layout, layout)
        if length < 1000:
            # the ring holds tokens of the longer text: only what it says of itself is compared
            arguments = (query, *random_cache([layout, layout], 128, 2, 3, max_tokens, length, 4, 64, dtype, "cuda"), *arguments[5:])
        check(attend(*arguments), attend_ref(*arguments))


@pytest.mark.parametrize(("k_bps", "v_bps"), [(4.0, 2.0), (1.75, 6.0)])
def test_attention_of_two_codes(k_bps, v_bps):
    from hq_inductor.ops.fused_kv import attend

    layouts = [layout_of(k_bps), layout_of(v_bps)]
    cache = random_cache(layouts, 128, 2, 2, 512, 500, 4, 64, torch.bfloat16, "cuda")
    query = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    arguments = (query, *cache, torch.tensor([500], device="cuda"), None, None, 128**-0.5, 4, 64, 0, *layouts)
    check(attend(*arguments), attend_ref(*arguments))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seen", ["all", "start", "mask"])
def test_attention_shapes(head_dim, seen):
    """Groups, numbers of queries, sinks, windows: one binary for all of them."""
    from hq_inductor.ops.fused_kv import attend

    layout, max_tokens, length = layout_of(4.0, head_dim), 640, 601
    start = torch.tensor([0, 217], device="cuda") if seen == "start" else None
    for sinks, window, sliding in ((4, 64, 0), (0, 3, 0), (4, 300, 0), (4, 32, 200)):
        cache = random_cache([layout, layout], head_dim, 2, 2, max_tokens, length, sinks, window, torch.bfloat16, "cuda")
        for group, queries in ((1, 1), (4, 1), (8, 1), (3, 3), (8, 2)):
            # as a projection leaves them
            shape = (2, queries, cache[2].shape[1] * group, head_dim)
            query = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            mask = torch.rand(2, 1, queries, max_tokens, device="cuda") < 0.9 if seen == "mask" else None
            lengths = torch.tensor([length], device="cuda")
            arguments = (query, *cache, lengths, start, mask, head_dim**-0.5, sinks, window, sliding, layout, layout)
            check(attend(*arguments), attend_ref(*arguments))


@pytest.mark.parametrize(
    ("bps", "head_dim", "kv_heads"), [((4.0, 4.0), 96, 8), ((2.0, 3.0), 96, 3), ((4.0, 4.0), 80, 8), ((6.0, 2.0), 80, 5)]
)
def test_attention_of_long_slots(bps, head_dim, kv_heads):
    """More heads in a slot than a warp keeps sums of."""
    from hq_inductor.ops.fused_kv import attend, attention_launch

    layouts, max_tokens, length = [layout_of(b, head_dim) for b in bps], 640, 601
    join = layouts[0].tile // head_dim
    cache = random_cache(layouts, head_dim, 2, -(-kv_heads // join), max_tokens, length, 4, 32, torch.bfloat16, "cuda")
    stored = (*cache[:2], *(x[:, :kv_heads].contiguous() for x in cache[2:]))
    lengths = torch.tensor([length], device="cuda")
    for group, queries in ((1, 1), (2, 2), (4, 1)):
        query = torch.randn(2, kv_heads * group, queries, head_dim, device="cuda", dtype=torch.bfloat16)
        arguments = (query, *stored, lengths, None, None, head_dim**-0.5, 4, 32, 0, *layouts)
        expected = attend_ref(*arguments)
        check(attend(*arguments), expected)
        one = attention_launch(4096, max_tokens, 132, *layouts, head_dim)
        assert one.splits == 1
        check(attend(*arguments, one), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_attention_masks_of_heads(head_dim, dtype):
    """Seen by some heads, or added to the scores; all rows of the batch share the first kind."""
    from hq_inductor.ops.fused_kv import attend

    layout, max_tokens, length = layout_of(4.0, head_dim), 640, 601
    cache = random_cache([layout, layout], head_dim, 2, 2, max_tokens, length, 4, 32, torch.bfloat16, "cuda")
    for group, queries in ((4, 1), (3, 3)):
        heads = cache[2].shape[1] * group
        query = torch.randn(2, heads, queries, head_dim, device="cuda", dtype=torch.bfloat16)
        mask = torch.randn(1 if dtype == torch.bool else 2, heads, queries, max_tokens + 8, device="cuda") * 2
        mask = mask < 1 if dtype == torch.bool else mask.masked_fill(mask > 3, float("-inf")).to(dtype)
        lengths = torch.tensor([length], device="cuda")
        arguments = (query, *cache, lengths, None, mask, head_dim**-0.5, 4, 32, 0, layout, layout)
        check(attend(*arguments), attend_ref(*arguments))


@pytest.mark.parametrize(("batch", "heads", "max_tokens"), [(1, 8, 16384), (3, 8, 4096), (32, 8, 1024), (1, 1, 100)])
def test_attention_splits(batch, heads, max_tokens):
    """From one program per head to all of them on one; peaked scores, of which a part sees the largest or does not."""
    from hq_inductor.ops.fused_kv import attend

    layout, length = layout_of(3.0), max_tokens - 3
    few = random_cache([layout, layout], 128, batch, heads, 96, 96, 4, 16, torch.bfloat16, "cuda")
    words = [w[:, :, torch.randint(0, 96, (max_tokens,), device="cuda")].contiguous() for w in few[:2]]
    query = torch.randn(batch, heads * 4, 1, 128, device="cuda", dtype=torch.bfloat16) * 8
    arguments = (query, *words, *few[2:], torch.tensor([length], device="cuda"), None, None, 128**-0.5, 4, 16, 0, layout, layout)
    check(attend(*arguments), attend_ref(*arguments))


def test_attention_of_corrupt_slots_is_finite():
    from hq_inductor.ops.fused_kv import attend

    for bps in (2.0, 2.5, 3.0, 4.0, 6.0):
        layout = layout_of(bps)
        cache = random_cache([layout, layout], 128, 2, 2, 512, 500, 4, 16, torch.bfloat16, "cuda")
        noise = [torch.randint(-(2**31), 2**31, words.shape, device="cuda").to(torch.int32) for words in cache[:2]]
        query = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
        arguments = (query, *noise, *cache[2:], torch.tensor([500], device="cuda"), None, None, 0.1, 4, 16, 0, layout, layout)
        assert attend(*arguments).isfinite().all()


def test_attention_in_a_graph_while_the_length_grows():
    from hq_inductor.ops.fused_kv import attend

    torch.use_deterministic_algorithms(False)
    layout = layout_of(4.0)
    cache = random_cache([layout, layout], 128, 1, 2, 512, 512, 4, 512, torch.bfloat16, "cuda")
    query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([40], device="cuda")
    exact = [x[:, :, :20].contiguous() for x in cache[2:]]
    arguments = (query, *cache[:2], *exact, length, None, None, 128**-0.5, 4, 16, 0, layout, layout)
    attend(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(*arguments)
    for n in (40, 41, 100, 333, 512):
        length.fill_(n)
        graph.replay()
        check(found, attend_ref(*arguments))


def ragged(lengths, layouts, head_dim, heads, max_tokens, sinks, window):
    """A cache of rows of different length."""
    rows = [random_cache(layouts, head_dim, 1, heads, max_tokens, n, sinks, window, torch.bfloat16, "cuda") for n in lengths]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize(("bps", "head_dim"), [((4.0, 4.0), 128), ((3.5, 2.0), 128), ((3.0, 3.0), 64), ((4.0, 4.0), 256)])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_paged_attention(bps, head_dim, page_size, masked):
    """Bit by bit that of the contiguous cache, which is each row's on its own; what has no page is as good as masked."""
    from hq_inductor.ops.fused_kv import attend

    layouts, max_tokens, lengths, sinks, window = [layout_of(b, head_dim) for b in bps], 768, [768, 70, 1, 333], 4, 32
    cache = ragged(lengths, layouts, head_dim, 2, max_tokens, sinks, window)
    pools, table = paged(cache[:2], page_size)
    for group, queries in ((4, 1), (2, 3)):
        query = torch.randn(4, cache[2].shape[1] * group, queries, head_dim, device="cuda", dtype=torch.bfloat16)
        mask = torch.rand(4, 1, queries, max_tokens, device="cuda") < 0.9 if masked else None
        if masked:
            mask[..., 0] = True  # the only token of a row
        length, tail = torch.tensor(lengths, device="cuda"), (head_dim**-0.5, sinks, window, 0, *layouts)
        found = attend(query, *pools, *cache[2:], length, None, mask, *tail, page_table=table)
        assert torch.equal(found, attend(query, *cache, length, None, mask, *tail))
        seen = torch.ones(4, 1, queries, max_tokens, device="cuda", dtype=torch.bool) if mask is None else mask.clone()
        absent = table.clone()
        for b, entry in enumerate((-1, pools[0].shape[0], 2**31 - 1, -(2**31))):
            absent[b, 1:2] = entry
            seen[b, ..., max(page_size, sinks) : max(0, min(2 * page_size, lengths[b] - window))] = False
        # rows that lost nothing of theirs keep it to the bit
        without = attend(query, *pools, *cache[2:], length, None, mask, *tail, page_table=absent)
        for b, n in enumerate(lengths):
            row = [x[b : b + 1] for x in (query, *cache)]
            for out, own in ((found, mask), (without, seen)):
                check(out[b : b + 1], attend_ref(*row, length[b : b + 1], None, None if own is None else own[b : b + 1], *tail))
            assert n > page_size + window or torch.equal(found[b], without[b])


@pytest.mark.parametrize("page_size", [16, 48])
def test_paged_store(page_size):
    """In pages the slots of a contiguous cache; nothing anywhere else, and nothing without a page."""
    from hq_inductor.ops.fused_kv import store

    layout, max_tokens = layout_of(3.0), 4 * page_size
    words = torch.full((3, 2, max_tokens, layout.words), 77, dtype=torch.int32, device="cuda")
    (pool,), table = paged([words], page_size)
    buffer = torch.full((pool.shape[0] + 2, *pool.shape[1:]), 77, dtype=torch.int32, device="cuda")
    x = torch.randn(3, 2, 40, 128, device="cuda", dtype=torch.bfloat16)
    position = torch.stack([torch.randperm(max_tokens + 4, device="cuda")[:40] - 2 for _ in range(3)])
    for b in range(3):
        store(words[b : b + 1], x[b : b + 1], position[b], layout)
    for entries in (table, torch.full_like(table, -1), torch.full_like(table, 2**31 - 1), torch.full_like(table, pool.shape[0])):
        store(buffer[1:-1], x, position, layout, page_table=entries)
        assert torch.equal(buffer[1:-1][table.long()].transpose(1, 2).reshape(words.shape), words)
        assert (buffer != 77).any(-1).sum() == (words != 77).any(-1).sum()
    apart = torch.full_like(words, 77)
    store(apart, x, position, layout)
    assert torch.equal(apart, words)


@pytest.mark.parametrize("head_dim", [96, 128, 320])
def test_paged_ops_are_those_on_a_cpu(head_dim):
    """With the kernel, and where it does not fit; what has no page is not seen."""
    layout = kv_layout(head_dim, 4.0)
    tile = layout.tile
    cache = ragged([250, 90], [tile, tile], head_dim, 2, 256, 2, 16)
    pools, table = paged(cache[:2], 32)
    table[0, 3], table[1, 1] = -1, 1 << 30
    query = torch.randn(2, cache[2].shape[1] * 2, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([250, 90], device="cuda")

    def run(device):
        given = [t.to(device) for t in (query, *pools, *cache[2:], length)]
        key = (tile.lattice, tile.tile, tile.code, tile.code)
        op = torch.ops.hyperquant.kv_attention
        return op(*given, None, None, head_dim**-0.5, 2, 16, 0, *key, page_table=table.to(device)).float().cpu()

    found, expected = run("cuda"), run("cpu")
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def snr_db(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return (-10 * torch.log10((x - decoded).square().mean() / x.square().mean())).item()


@pytest.mark.parametrize("effort", [0, 1])
@pytest.mark.parametrize(
    ("bps", "tile", "head_dim"), [(b, 128, 128) for b in (1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)] + [(4.0, 256, 256)]
)
def test_store_is_as_good_as_the_reference(bps, tile, head_dim, effort):
    """On Gaussians within 0.05 dB at equal effort, and what is written is exactly what an encoder of those codes writes."""
    from hq_inductor.ops.fused_kv import FEW, MANY, store

    layout = layout_of(bps, head_dim)
    x = torch.randn(2, 512, 4, head_dim, device="cuda").transpose(1, 2)
    reference = decode_slots(encode_slots(x.contiguous(), layout, effort), layout)
    for launches in (FEW, MANY):
        words = torch.empty(2, 4, 512, layout.words, dtype=torch.int32, device="cuda")
        store(words, x, torch.arange(512, device="cuda"), layout, effort, launches[effort])
        codes, scale = decode_tiles(words.view(-1, layout.words), layout)
        assert is_lattice_point(codes.view(-1, 8), "e8").all()
        assert torch.equal(encode_tiles(codes, scale, layout).view_as(words), words)
        assert snr_db(x.double(), decode_slots(words, layout)) > snr_db(x.double(), reference) - 0.05


@pytest.mark.parametrize(
    ("head_dim", "tile", "kv_heads", "dtype"),
    [
        (64, 128, 5, torch.bfloat16),
        (80, 640, 8, torch.bfloat16),
        (96, 384, 3, torch.float16),
        (128, 128, 3, torch.float32),
        (256, 256, 1, torch.bfloat16),
    ],
)
def test_store_in_place(head_dim, tile, kv_heads, dtype):
    """Joined heads, strides, positions out of range, vectors of zeros, outliers, NaN; and another x in the same launch."""
    from hq_inductor.ops.fused_kv import store

    layout, join = layout_of(3.0, head_dim), tile // head_dim
    heads, max_tokens = -(-kv_heads // join), 40
    x = torch.randn(2, 6, kv_heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    x[:, :, 1] = 0
    x[:, :, 2, 3:] = 0
    x[0, 0, 3, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    position = torch.tensor([39, 0, 7, 8, -1, 40], device="cuda")
    words = torch.full((2, heads, max_tokens, layout.words), 77, dtype=torch.int32, device="cuda")
    other, beside, alone = torch.randn_like(x), words.clone(), words.clone()
    store(words, x, position, layout, 1, other=(beside, other))
    store(alone, other, position, layout, 1)
    assert torch.equal(beside, alone) and not torch.equal(beside, words)
    padded = torch.zeros(2, heads * join, 6, head_dim, device="cuda")
    padded[:, :kv_heads] = x.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    slots = padded.unflatten(1, (heads, join)).transpose(2, 3).flatten(-2)[:, :, :4]
    untouched = torch.ones(max_tokens, dtype=torch.bool, device="cuda")
    untouched[position[:4]] = False
    assert (words[:, :, untouched] == 77).all()
    decoded = decode_slots(words[:, :, position[:4]], layout)
    for token in (0, 3):
        assert snr_db(slots[:, :, token].double(), decoded[:, :, token]) > 13
    # few values hold all the energy, and clipping decides: the two searches stop at different scales that both are allowed
    sparse, reference = slots[:, :, 2], decode_slots(encode_slots(slots[:, :, 2], layout, 1), layout)
    assert (decoded[:, :, 2] - sparse).square().sum() <= 2 * (reference - sparse).square().sum()
    assert (decoded[:, :, 1] == 0).all()


def test_store_and_attention_in_a_graph():
    """A step of decoding: store at a position and attend up to it, replayed while both move; the same as eager."""
    from hq_inductor.ops.fused_kv import attend

    torch.use_deterministic_algorithms(False)
    layout = layout_of(4.0)
    words = [torch.zeros(1, 2, 64, layout.words, dtype=torch.int32, device="cuda") for _ in range(2)]
    exact = [torch.empty(1, 2, 0, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    x, y, query = (torch.randn(1, n, 1, 128, device="cuda", dtype=torch.bfloat16) for n in (2, 2, 8))
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        torch.ops.hyperquant.kv_store_pair(*words, x, y, position, "e8", 128, layout.code, layout.code, 1)
        return attend(query, *words, *exact, position + 1, None, None, 0.1, 0, 0, 0, layout, layout)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for n in range(60):
        x.normal_()
        y.normal_()
        position.fill_(n)
        graph.replay()
    check(found, attend_ref(query, *words, *exact, torch.tensor([60]), None, None, 0.1, 0, 0, 0, layout, layout))
    for side in words:
        assert side[:, :, :60].ne(0).any(-1).all() and side[:, :, 60:].eq(0).all()


@pytest.mark.parametrize("max_tokens", [64, 2048])
def test_plans_of_steps(max_tokens):
    """Store and attention from plans, with one part of the tokens and several that are combined: bit for bit what the calls give."""
    from hq_inductor.ops import replay
    from hq_inductor.ops.registry import cuda_function

    torch.use_deterministic_algorithms(False)
    replay.forget_plans()
    ops, layout = torch.ops.hyperquant, layout_of(4.0)
    code = layout.code
    caches = [[torch.zeros(1, 2, max_tokens, layout.words, dtype=torch.int32, device="cuda") for _ in range(2)] for _ in range(2)]
    exact = [torch.randn(1, 2, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for n in range(5):
        both = torch.randn(1, 4, 1, 128, device="cuda", dtype=torch.bfloat16).chunk(2, 1)
        query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
        position = torch.full((1,), n, device="cuda")
        ops.kv_store_pair(*caches[0], *both, position, "e8", 128, code, code, 1)
        cuda_function(ops.kv_store_pair.default)(*caches[1], *both, position, "e8", 128, code, code, 1)
        rest = (*exact, position + 1, None, None, 0.1, 0, 16, 0, "e8", 128, code, code)
        assert torch.equal(ops.kv_attention(query, *caches[0], *rest), cuda_function(ops.kv_attention.default)(query, *caches[1], *rest))
    assert all(torch.equal(*sides) for sides in zip(*caches, strict=True)) and caches[0][0].any()
    assert [type(plan) for plan in replay._plans.values()] == [replay.Plan] * 2
