"""Attention of one new token over the KV cache, heads of Llama-3 8B (32 of queries, 8 of keys and values, 128 dimensions), on this GPU.

Ours reads coded slots, 4 first and 64 newest tokens exact. Against `scaled_dot_product_attention` on a bf16 cache, the fastest of its
backends, queries of a group as heads or as rows. No attention on an fp8 cache comes with torch; `fp8 bound` is half the bf16 time, what
one would take that reads half the bytes at the same rate. Medians of CUDA-graph replays of calls that take turns on caches that do not fit
the L2 together. `--page-size` adds the same cache in pages of so many tokens, in random order, a length for each row. The second table is
the encoder: keys and values of one new token, or of a prompt, one launch.
python benchmarks/attention.py [--quick] [--bps 2 3 4] [--page-size 64] [--heads 32 8 128] [--tune] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from linear import copies
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hq_inductor.format.kv import KVLayout, kv_layout
from hq_inductor.format.layout import TileLayout
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rates import start_rms
from hq_inductor.format.rice import encode_tiles
from hq_inductor.ops.fused_kv import AttentionLaunch, attend, attention_launch, store

SINKS, WINDOW = 4, 64
BATCHES, CONTEXTS = [1, 8, 32], [1024, 8192, 32768, 131072]
QUICK_BATCHES, QUICK_CONTEXTS = [1, 8, 32], [1024, 32768]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
CALLS, ROUNDS = 8, 9


@dataclass(frozen=True)
class Heads:
    """Heads of the queries and of the cache, and values of each; those of Llama-3 8B."""

    query: int = 32
    kv: int = 8
    dim: int = 128

    def layout(self, bps: float) -> KVLayout:
        return kv_layout(self.dim, bps)


def graph_of(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph in which the calls take turns, and how many there are in it."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, number = torch.cuda.CUDAGraph(), max(CALLS, len(calls))
    with torch.cuda.graph(graph):
        for index in range(number):
            calls[index % len(calls)]()
    return graph, number


def times_us(named_calls: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """Median microseconds per call of each name, the names taking turns; names that cannot run are left out."""
    graphs = {}
    for name, calls in named_calls.items():
        try:
            graphs[name] = graph_of(calls)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, number) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / number)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def coded(batch: int, context: int, layout: TileLayout, slots: int, device: torch.device | str = "cuda") -> torch.Tensor:
    """Slots `[batch, slots, context, words]` of few random tokens in random order, which no kernel can notice."""
    x = torch.randn(512, layout.tile, device=device)
    words = encode_tiles(*quantize_tiles(x, layout, start_rms(layout.code / 8, "e8"), 0), layout)
    return words[torch.randint(0, 512, (batch, slots, context), device=device)]


def ours(
    heads: Heads, batch: int, context: int, bps: float, launch: AttentionLaunch | None = None, page_size: int | None = None
) -> tuple[list[Callable[[], object]], int]:
    """Calls on different caches, in pages if there is a page size, and the bytes of one."""
    layout, slots = heads.layout(bps).tile, heads.layout(bps).slots(heads.kv)
    query = torch.randn(batch, heads.query, 1, heads.dim, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([context] * (batch if page_size else 1), device="cuda")
    max_pages = -(-context // page_size) if page_size else 0
    size = 2 * batch * (4 * slots * context * layout.words + 2 * heads.kv * (SINKS + WINDOW) * heads.dim)
    calls = []
    for _ in range(copies(size)):
        sides = [coded(batch * max_pages if page_size else batch, page_size or context, layout, slots) for _ in range(2)]
        table = torch.randperm(batch * max_pages, device="cuda").view(batch, max_pages).to(torch.int32) if page_size else None
        sides += [torch.randn(batch, heads.kv, SINKS + WINDOW, heads.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        arguments = (query, *sides, length, None, None, heads.dim**-0.5, SINKS, WINDOW, 0, layout, layout)
        calls.append(lambda arguments=arguments, table=table: attend(*arguments, launch, table))
    return calls, size


def bf16(heads: Heads, batch: int, context: int) -> tuple[dict[str, list[Callable[[], object]]], int]:
    """By name, calls on different caches; and the bytes of one."""
    query = torch.randn(batch, heads.query, 1, heads.dim, device="cuda", dtype=torch.bfloat16)
    rows = query.view(batch, heads.kv, -1, heads.dim)
    size = 2 * 2 * batch * heads.kv * context * heads.dim
    caches = [torch.randn(2, batch, heads.kv, context, heads.dim, device="cuda", dtype=torch.bfloat16) for _ in range(copies(size))]

    def call(cache, backend, folded):
        with sdpa_kernel(backend):
            if folded:
                return F.scaled_dot_product_attention(rows, cache[0], cache[1])
            return F.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=True)

    named = {}
    for name, backend in BACKENDS.items():
        for folded in (False, True):
            named[f"{name} {'rows' if folded else 'gqa'}"] = [lambda c=c, b=backend, f=folded: call(c, b, f) for c in caches]
    return named, size


def measure(heads: Heads, batches: list[int], contexts: list[int], rates: list[float], page_size: int | None = None) -> list[dict]:
    results = []
    for batch in tqdm(batches, desc="batches"):
        for context in tqdm(contexts, desc=f"batch {batch}", leave=False):
            # both kinds of cache, and what makes the random one
            if 6 * 2 * batch * heads.kv * context * heads.dim > 0.9 * torch.cuda.mem_get_info()[0]:
                continue
            named, bytes_bf16 = bf16(heads, batch, context)
            sizes = {}
            for bps in rates:
                calls, sizes[bps] = ours(heads, batch, context, bps)
                named[f"ours {bps:g}"] = calls
                if page_size:
                    named[f"ours {bps:g} paged"], _ = ours(heads, batch, context, bps, page_size=page_size)
            results.append({"batch": batch, "context": context, "bytes": sizes, "bytes_bf16": bytes_bf16, "time_us": times_us(named)})
            del named, calls
            torch.cuda.empty_cache()
    return results


def tune(heads: Heads, batch: int, context: int, bps: float) -> list[tuple[float, AttentionLaunch]]:
    """Launches of the attention kernel, fastest first."""
    layout, units = heads.layout(bps).tile, batch * heads.layout(bps).slots(heads.kv)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    usual = attention_launch(units, context, processors, layout, layout, heads.dim)
    splits = {max(1, round(usual.splits * share)) for share in (0.12, 0.25, 0.5, 0.75, 1, 1.5, 2)}
    launches = [replace(usual, splits=n) for n in sorted(splits)]
    launches.append(replace(usual, num_warps=max(1, usual.num_warps // 2), splits=2 * usual.splits))
    times = times_us({str(i): ours(heads, batch, context, bps, launch)[0] for i, launch in enumerate(launches)})
    return sorted(((us, launches[int(name)]) for name, us in times.items()), key=lambda pair: pair[0])


def table(results: list[dict]) -> str:
    paged = any(name.endswith("paged") for row in results for name in row["time_us"])
    lines = [
        "| batch | context | bps | ours, us | bf16, us | by | ours is | fp8 bound, us | cache, MB | GB/s |" + " paged, us |" * paged,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * paged,
    ]
    for row in results:
        times = row["time_us"]
        best, name = min((us, name) for name, us in times.items() if not name.startswith("ours"))
        for bps, size in row["bytes"].items():
            us = times[f"ours {bps:g}"]
            lines.append(
                f"| {row['batch']} | {row['context']} | {bps:g} | {us:.1f} | {best:.1f} | {name} | {best / us:.2f}x | {best / 2:.1f} "
                f"| {size / 1e6:.1f} | {size / us / 1e3:.0f} |" + (f" {times[f'ours {bps:g} paged']:.1f} |" if paged else "")
            )
    return "\n".join(lines)


def measure_store(heads: Heads, batches: list[int], prompts: list[int], rates: list[float]) -> list[dict]:
    """Microseconds of storing keys and values of one layer."""
    results = []
    for batch, tokens in [(batch, 1) for batch in batches] + [(1, prompt) for prompt in prompts]:
        x = torch.randn(2, batch, heads.kv, tokens, heads.dim, device="cuda", dtype=torch.bfloat16)
        position = torch.arange(tokens, device="cuda")
        named = {}
        for bps in rates:
            layout, slots = heads.layout(bps).tile, heads.layout(bps).slots(heads.kv)
            words = torch.zeros(2, batch, slots, tokens, layout.words, dtype=torch.int32, device="cuda")
            for effort in (0, 1):

                def call(words=words, layout=layout, effort=effort, x=x, position=position):
                    store(words[0], x[0], position, layout, effort, other=(words[1], x[1]))

                named[f"{bps:g} bps, effort {effort}"] = [call]
        results.append({"batch": batch, "tokens": tokens, "time_us": times_us(named)})
    return results


def store_table(results: list[dict]) -> str:
    names = list(results[0]["time_us"])
    lines = ["| batch | tokens | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in results:
        lines.append(f"| {row['batch']} | {row['tokens']} | " + " | ".join(f"{row['time_us'][name]:.1f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bps", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--context", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="half of the contexts")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="of queries, of the cache, and values of each")
    parser.add_argument("--page-size", type=int, help="also time caches in pages of so many tokens: a power of two of at least 16")
    parser.add_argument("--json", help="write all figures to a file")
    parser.add_argument("--tune", action="store_true", help="time launches of the attention kernel instead")
    arguments = parser.parse_args()
    heads = Heads(*arguments.heads)
    torch.manual_seed(0)
    batches = arguments.batch or (QUICK_BATCHES if arguments.quick else BATCHES)
    contexts = arguments.context or (QUICK_CONTEXTS if arguments.quick else CONTEXTS)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; one token, {heads}")
    if arguments.tune:
        for batch in batches:
            for context in contexts:
                found = tune(heads, batch, context, arguments.bps[-1])
                print(f"batch {batch}, context {context}:", *[f"{us:.1f} us {launch}" for us, launch in found], sep="\n    ", flush=True)
        return
    results = measure(heads, batches, contexts, arguments.bps, arguments.page_size)
    print(table(results))
    stored = measure_store(heads, batches, [1024] if arguments.quick else [1024, 8192], arguments.bps)
    print("\nStoring keys and values, us\n" + store_table(stored))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results, "store": stored}, file)


if __name__ == "__main__":
    main()
