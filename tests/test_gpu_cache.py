"""On a CUDA device: the cache's ops against the CPU's, and `generate` compiled into CUDA graphs against eager."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from hq_inductor.cache import KVConfig, PagedKV, PageTable, QuantizedKV  # noqa: E402


def caches(batch, kv_heads, head_dim, dtype, **options):
    return [
        QuantizedKV(KVConfig(window=8, sinks=2, **options), batch, kv_heads, head_dim, 96, dtype=dtype, device=device)
        for device in ("cpu", "cuda")
    ]


def snr_db(x, y):
    return 10 * torch.log10(x.square().sum() / (x - y).square().sum()).item()


@pytest.mark.parametrize(("head_dim", "kv_heads"), [(128, 2), (64, 3), (80, 2), (96, 4), (256, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"k_bps": 2, "v_bps": 2}, {"k_bps": 3, "effort": 0}, {"lattice": "d4"}, {"dither": "full"}], ids=str
)
def test_stored_and_attended_as_on_a_cpu(head_dim, kv_heads, options):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, kv_heads, 60, head_dim, generator=generator).bfloat16() for _ in range(2))
    cpu, cuda = caches(2, kv_heads, head_dim, torch.bfloat16, **options)
    for cache in (cpu, cuda):
        device = cache.length.device
        cache.store(k[:, :, :50].to(device), v[:, :, :50].to(device))
        for token in range(50, 60):
            cache.store(k[:, :, token : token + 1].to(device), v[:, :, token : token + 1].to(device))
    for x, a, b in zip((k, v), cpu.dequantize(), cuda.dequantize(), strict=True):
        x, a, b = x.float(), a[:, :, :60].float(), b[:, :, :60].float().cpu()
        exact = [0, 1, *range(52, 60)]
        assert torch.allclose(x[:, :, exact], b[:, :, exact], atol=0.05)
        gain = snr_db(x[:, :, 2:52], b[:, :, 2:52]) - snr_db(x[:, :, 2:52], a[:, :, 2:52])
        # with effort 0 the kernel searches finer scales than the reference does, and is better
        assert gain > -0.2 and (options.get("effort") == 0 or gain < 0.2)
    # the same words on both: what remains is arithmetic
    for name, tensor in cpu.tensors().items():
        tensor.copy_(cuda.tensors()[name])
    query = torch.randn(2, 4 * kv_heads, 1, head_dim, generator=generator).bfloat16()
    mask = torch.rand(2, 1, 1, 96, generator=generator) < 0.7
    for arguments in ((None,), (mask,)):
        expected = cpu.attend(query, *arguments).float()
        out = cuda.attend(query.cuda(), *(a if a is None else a.cuda() for a in arguments)).float().cpu()
        assert (out - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("head_dim", [96, 128])
def test_paged_steps_in_a_cuda_graph(head_dim):
    """Rows of different length, one of which ends while the graph stays; each as in a cache of its own."""
    pages = PageTable(2, 8, 16, 64, device="cuda")
    config = KVConfig(window=8, sinks=2)
    paged = PagedKV(config, pages, 4, head_dim)
    rows = [QuantizedKV(config, 1, 4, head_dim, 64, device="cuda") for _ in range(2)]
    k, v, query = (torch.randn(2, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 4, 8))
    tokens = torch.ones(2, dtype=torch.int64, device="cuda")

    def step():
        paged.store(k, v, tokens)
        return paged.attend(query)

    pages.reserve([1, 1])
    step()
    torch.cuda.synchronize()
    paged.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    lengths = [0, 0]
    for index in range(50):
        if index == 40:
            pages.free(1)
            paged.reset(1)
            rows[1].reset()
            lengths[1] = 0
        new = [1, index % 2]
        lengths = [a + b for a, b in zip(lengths, new, strict=True)]
        pages.reserve(lengths)
        for x in (k, v, query):
            x.normal_()
        tokens.copy_(torch.tensor(new))
        graph.replay()
        for b, row in enumerate(rows):
            row.store(k[b : b + 1, :, : new[b]], v[b : b + 1, :, : new[b]])
            if lengths[b]:
                expected = row.attend(query[b : b + 1])
                assert (found[b : b + 1] - expected).abs().max() < 0.02 * expected.abs().max()
    assert paged.length.tolist() == lengths == [50, 5]


def model_and_prompts(dtype, batch, padded, layers=2):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval().to("cuda", dtype)
    tokens = torch.randint(1, 64, (batch, 12), device="cuda")
    mask = torch.ones_like(tokens)
    for row in range(batch if padded else 0):
        mask[row, : (row + 3) % 7] = 0
    return model, {"input_ids": tokens * mask, "attention_mask": mask, "do_sample": False, "max_new_tokens": 40}


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (1, True), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_in_cuda_graphs_is_eager_generate(batch, padded, dtype):
    from hq_inductor.integrations.transformers_cache import HyperQuantCache

    model, arguments = model_and_prompts(dtype, batch, padded)
    eager, compiled = (
        model.generate(
            **arguments,
            past_key_values=HyperQuantCache(model.config, 64, window=8, sinks=2),
            disable_compile=disable,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for disable in (True, False)
    )
    if dtype == torch.float32:
        assert torch.equal(eager.sequences, compiled.sequences)
    # half precision rounds elsewhere in a compiled graph, so that some codes are others: up to the first token that differs, logits agree
    # but for what coding costs them
    a, b = (torch.stack(out.logits, 1).float() for out in (eager, compiled))
    for row in range(batch):
        different = (eager.sequences[row, 12:] != compiled.sequences[row, 12:]).nonzero()
        until = int(different[0]) + 1 if len(different) else 40
        assert (a[row, :until] - b[row, :until]).square().mean().sqrt() < 0.2 * a.std()


def test_memory_does_not_grow_in_ten_thousand_steps():
    """`generate` in CUDA graphs: what is allocated after the last step is what was after the first hundred, and the ids and their mask."""
    from hq_inductor.integrations.transformers_cache import HyperQuantCache

    model, arguments = model_and_prompts(torch.bfloat16, 2, True, layers=1)
    steps, allocated = 10_000, []

    def record(input_ids, scores, **kwargs):
        if input_ids.shape[1] - 12 in (100, steps):
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    cache = HyperQuantCache(model.config, 12 + steps, window=8, sinks=2)
    out = model.generate(**{**arguments, "max_new_tokens": steps}, past_key_values=cache, stopping_criteria=[record])
    assert out.shape == (2, 12 + steps) and cache.layers[0].states.length.item() == 12 + steps - 1
    first, last = allocated
    # the ids and the mask, each with the next one; a kept tensor of the least size would be 5 MB
    assert last - first < 2 * 2 * 2 * 8 * steps + (1 << 20)
