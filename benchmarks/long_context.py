"""Greedy decoding of a whole model at long context: what a sequence takes in memory, how many fit, and tokens per second with so many.

    python benchmarks/long_context.py [--quick] [--memory 80] [--contexts 8192 32768] [--cache-bps 4 2] [--json FILE] [--plot FILE]

The model, the step and the scaling to 32 layers are those of `decode_model.py`. bf16 weights with a bf16 `StaticCache` against our weights
(`--bps`) with a `HyperQuantCache`. A cache holds `context` tokens, all of them random states, ours in random slots of valid code; the last
step that is timed writes the last of them.

The largest batch is exact for what it counts: weights of 32 layers, embedding and head, and 32 layers of the cache with everything in it
fit into `--memory` GB (1e9 bytes). Activations and CUDA's own memory come on top and are not counted. Every format runs at its largest
batch, and at that of bf16.

The bf16 cache is read as fast as torch can: without a mask, the query heads of a group as rows, by the first that can of cuDNN, flash and
efficient attention. `bf16, masked` (left out by `--quick`) is what transformers does by default: a mask, and keys and values repeated for
all query heads. `--device cpu --tiny` runs the same code on a small model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import decode_model
import torch
import torch.nn.functional as F
import transformers
from attention import coded
from compiled_steps import MODES, compile_step, start_compiler, time_ms
from decode_model import LAYERS, LLAMA_3_8B, TINY, Decoder, make_model, stored_bytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from hq_inductor.integrations.transformers_cache import HyperQuantCache

FASTEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Format:
    """Weights (`"bf16"` or a rate), rate of the cache (None: bf16), and attention as transformers names it."""

    weights: str
    cache_bps: float | None
    attention: str = "sdpa"

    def __str__(self) -> str:
        if self.cache_bps is None:
            return "bf16" if self.attention == "rows" else "bf16, masked"
        return f"ours, weights {float(self.weights):g} bps, cache {self.cache_bps:g} bps"


@dataclass(frozen=True)
class Result:
    """One format at one context and batch.

    Attributes:
        largest_batch: sequences whose `sequence_bytes` fit beside `weight_bytes` and the cache's `shared_bytes`, of 32 layers all.
        step_ms: of `layers` layers; `head_ms` of norm, head and argmax alone.
    """

    format: str
    context: int
    batch: int
    largest_batch: int
    weight_bytes: int
    sequence_bytes: int
    shared_bytes: int
    layers: int
    step_ms: float
    head_ms: float

    @property
    def full_step_ms(self) -> float:
        """Of a model of 32 layers."""
        return self.head_ms + (self.step_ms - self.head_ms) * LAYERS / self.layers

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.batch / self.full_step_ms


def attention_of_rows(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one token per sequence with the whole cache, `[B, 1, Hq, D]`; heads that share keys are rows of one product."""
    batch, heads, _, head_dim = query.shape
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        out = F.scaled_dot_product_attention(query.reshape(batch, key.shape[1], -1, head_dim), key, value, scale=scaling)
    return out.reshape(batch, 1, heads, head_dim), None


# without a mask function of its own transformers makes no mask
AttentionInterface.register("rows", attention_of_rows)


def empty_cache(config: LlamaConfig, cache_bps: float | None, batch: int, context: int, like: torch.Tensor) -> Cache:
    """A cache for `context` tokens, allocated; `like` gives dtype and device."""
    cache = StaticCache(config, max_cache_len=context) if cache_bps is None else HyperQuantCache(config, context, cache_bps)
    token = like.new_empty(batch, config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
        layer.fresh = False
    return cache


def cache_tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """Everything that a cache keeps on the device."""
    for layer in cache.layers:
        if isinstance(layer, transformers.cache_utils.StaticLayer):
            yield from (layer.keys, layer.values, layer.cumulative_length)
        else:
            states = layer.states
            yield from states.tensors().values()
            yield from (r for r in (states.k_rotation, states.v_rotation) if r is not None)


def full_cache_bytes(config: LlamaConfig, cache_bps: float | None, context: int, like: torch.Tensor) -> tuple[int, int]:
    """Of 32 layers: bytes per sequence, and those that any number of sequences share."""
    one, two = (sum(stored_bytes([t]) for t in cache_tensors(empty_cache(config, cache_bps, n, context, like))) for n in (1, 2))
    layers = config.num_hidden_layers
    return (two - one) * LAYERS // layers, (2 * one - two) * LAYERS // layers


def full_weight_bytes(model: nn.Module) -> int:
    """Of 32 layers, embedding, norms and head."""
    decoder = stored_bytes(model.model.layers.parameters())
    return stored_bytes(model.parameters()) - decoder + decoder * LAYERS // model.config.num_hidden_layers


class FullDecoder(Decoder):
    """As `Decoder`, with `context` tokens after `steps` steps, and a cache of either kind that has room for no more.

    Args:
        cache_bps: of a `HyperQuantCache`, or None for a `StaticCache`.
    """

    def __init__(self, model: nn.Module, cache_bps: float | None, batch: int, context: int, steps: int) -> None:
        self.model, self.context = model, context - steps
        like = model.lm_head.weight
        self.cache = empty_cache(model.config, cache_bps, batch, context, like)
        for layer in self.cache.layers:
            states = getattr(layer, "states", None)
            if states is None:
                layer.keys.normal_()
                layer.values.normal_()
                continue
            states.k_words.copy_(coded(batch, states.max_tokens, states.k_layout.tile, states.k_words.shape[1], like.device))
            states.v_words.copy_(coded(batch, states.max_tokens, states.v_layout.tile, states.v_words.shape[1], like.device))
            states.k_exact.normal_()
            states.v_exact.normal_()
        self.set_tokens(batch, like.device)
        self.rewind()

    def rewind(self) -> None:
        for layer in self.cache.layers:
            (layer.states.length if hasattr(layer, "states") else layer.cumulative_length).fill_(self.context)


@torch.no_grad()
def measure_step(model: nn.Module, form: Format, batch: int, context: int, steps: int, mode: str, device: torch.device) -> float:
    """Milliseconds per step."""
    torch._dynamo.reset()
    model.set_attn_implementation(form.attention)
    # compiling and capturing take two
    state = FullDecoder(model, form.cache_bps, batch, context, max(steps, 2))
    step, _ = compile_step(state.step, mode, device)
    return time_ms(step, steps, device, state.rewind)


@torch.no_grad()
def measure_head(model: nn.Module, batch: int, steps: int, mode: str, device: torch.device) -> float:
    hidden = torch.randn(batch, 1, model.config.hidden_size, device=device, dtype=model.dtype)
    head, _ = compile_step(lambda: model.lm_head(model.model.norm(hidden)).argmax(-1), mode, device)
    return time_ms(head, steps, device)


def measure(
    config: LlamaConfig, formats: list[Format], contexts: list[int], memory: float, steps: int, mode: str, device: torch.device
) -> list[Result]:
    """Every format at its largest batch and at that of the first one.

    Raises:
        ValueError: not even one sequence fits.
    """
    models = {name: make_model(config, name, device) for name in dict.fromkeys(form.weights for form in formats)}
    heads: dict[int, float] = {}
    results = []
    for context in tqdm(contexts, desc="contexts"):
        plan = []
        for form in formats:
            model = models[form.weights]
            per_sequence, shared = full_cache_bytes(config, form.cache_bps, context, model.lm_head.weight)
            weights = full_weight_bytes(model)
            largest = int(memory - weights - shared) // per_sequence
            if largest < 1:
                raise ValueError(f"memory must be at least {weights + shared + per_sequence} bytes for {form}, got {memory:g}")
            plan.append((form, largest, (weights, per_sequence, shared)))
        for form, largest, sizes in tqdm(plan, desc=f"{context} tokens", leave=False):
            model = models[form.weights]
            for batch in sorted({plan[0][1], largest}):
                if batch > largest:
                    continue
                if batch not in heads:
                    heads[batch] = measure_head(model, batch, steps, mode, device)
                step_ms = measure_step(model, form, batch, context, steps, mode, device)
                results.append(Result(str(form), context, batch, largest, *sizes, config.num_hidden_layers, step_ms, heads[batch]))
                decode_model.collect(device)
    return results


def table(results: list[Result]) -> str:
    mark = f" (scaled to {LAYERS} layers)" if any(r.layers != LAYERS for r in results) else ""
    lines = [
        f"| context | format | weights, GB | a sequence, MB | fit | batch | ms per step{mark} | tokens/s{mark} | against bf16 |",
        "|---" * 9 + "|",
    ]
    for r in results:
        base = next(b for b in results if b.context == r.context)
        lines.append(
            f"| {r.context} | {r.format} | {r.weight_bytes / 1e9:.4g} | {r.sequence_bytes / 1e6:.5g} | {r.largest_batch} | {r.batch} "
            f"| {r.full_step_ms:.2f} | {r.tokens_per_s:.0f} | {r.tokens_per_s / base.tokens_per_s:.2f}x |"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = list(dict.fromkeys(r.context for r in results))
    figure, axes = plt.subplots(1, len(contexts), figsize=(4.5 * len(contexts), 3.6), squeeze=False)
    for axis, context in zip(axes[0], contexts, strict=True):
        rows = [r for r in results if r.context == context]
        for name in dict.fromkeys(r.format for r in rows):
            points = [(r.batch, r.tokens_per_s) for r in rows if r.format == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=":" if name.startswith("bf16") else "-", label=name)
        axis.set(title=f"{context} tokens", xlabel="batch, up to the largest that fits", xscale="log", ylim=(0, None))
    axes[0][0].set_ylabel(f"tokens/s, {LAYERS} layers")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--memory", type=float, default=80.0, help="GB for weights and cache (default 80)")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens per sequence (default 8192 32768)")
    parser.add_argument("--bps", default="4", help="rate of our weights (default 4)")
    parser.add_argument("--cache-bps", type=float, nargs="+", default=[4.0, 2.0], help="rates of our cache (default 4 2)")
    parser.add_argument("--layers", type=int, help=f"decoder layers that run (default 4), scaled to {LAYERS}")
    parser.add_argument("--quick", action="store_true", help="2 layers and 32768 tokens, unless given otherwise, and without masked bf16")
    parser.add_argument("--steps", type=int, default=8, help="decoded per sample (default 8)")
    parser.add_argument("--mode", choices=MODES, default="graph", help="how steps are run (default graph)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few hundred thousand weights")
    parser.add_argument("--json", help="write all figures to a file")
    parser.add_argument("--plot", help="write a picture")
    args = parser.parse_args()
    device = torch.device(args.device)
    layers, contexts = args.layers or (2 if args.quick else 4), args.contexts or ([32768] if args.quick else [8192, 32768])
    shape = {**(TINY if args.tiny else LLAMA_3_8B), "max_position_embeddings": max(contexts)}
    config = LlamaConfig(**shape, num_hidden_layers=layers, tie_word_embeddings=False)
    formats = [Format("bf16", None, "rows")] + ([] if args.quick else [Format("bf16", None)])
    formats += [Format(args.bps, bps) for bps in args.cache_bps]
    torch.manual_seed(0)
    start_compiler(args.mode, device)
    results = measure(config, formats, contexts, 1e9 * args.memory, args.steps, args.mode, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}, {versions}, mode {args.mode}, {args.memory:g} GB, {layers} layers{' (tiny)' if args.tiny else ''}")
    print(table(results))
    if args.json:
        conditions = {"device": where, "torch": torch.__version__, "transformers": transformers.__version__, "mode": args.mode}
        with open(args.json, "w") as file:
            json.dump({**conditions, "memory_gb": args.memory, "results": [asdict(r) for r in results]}, file, indent=1)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
