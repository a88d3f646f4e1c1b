"""What a quantized KV cache does to a language model: bits per byte, and KL divergence from the exact cache.

    python benchmarks/kv_quality.py --model PATH --text FILE

Model, text and windows as for `perplexity.py`, whose measures these are. Every token is predicted as when decoding one by one: its query
sees the exact keys and values of the first `sinks` tokens and the newest `window`, quantized ones of all between. That is one forward pass
per window, with two score matrices, and equals generating with a `HyperQuantCache` (the tests compare). Our keys are centered by the mean
of the first 64. Everything runs in float32.

Peers quantize the same vectors at their true rates: Lloyd-Max levels after a Haar rotation with one 16-bit scale per vector (TurboQuant),
integers with scale and zero point by group of a token's values, and `KIVI`: keys by channel in groups of 32 tokens, values by token.

Prints a table and writes `kv_quality.json` to `--output`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import peers
import torch
from perplexity import Evaluation, Method, Result, read_windows
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hq_inductor.format.kv import kv_layout
from hq_inductor.format.rotation import ROTATIONS, role_seed, rotation_matrix

IMPLEMENTATION = "kv_quality"
ROLES = ("k", "v")
SETTINGS = ("center", "windows", "effort", "layers", "dither")
# first tokens whose mean centers the keys
PROMPT = 64


class CacheModel(nn.Module):
    """What the cache of one layer does to keys and values.

    Args:
        quantize: `(x [B, kv_heads, S, D], layer, role)` to what decoding gives.
        window, sinks: newest and first tokens that are exact.
        prompt: tokens that attend to each other exactly, as in a prefill.
    """

    def __init__(self, quantize: Callable, window: int, sinks: int, prompt: int = 0) -> None:
        super().__init__()
        self.quantize, self.window, self.sinks, self.prompt = quantize, window, sinks, prompt

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        """Causal attention `[B, Hq, S, D]` in which each query sees its own mixture of exact and quantized tokens."""
        tokens, group = query.shape[2], query.shape[1] // key.shape[1]
        coded_key, coded_value = (
            self.quantize(x, layer, role).repeat_interleave(group, 1) for x, role in zip((key, value), ROLES, strict=True)
        )
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        position = torch.arange(tokens)
        age = position[:, None] - position
        exact = (position < self.sinks) | (age < self.window) | (position[:, None] < self.prompt)
        scores = torch.where(exact, query @ key.mT, query @ coded_key.mT) * scale
        weights = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
        return (weights * exact) @ value + (weights * ~exact) @ coded_value


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return module.kv_cache_model.attend(query, key, value, scaling, module.layer_idx).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _attention)


def cached(
    name: str, bits: float, quantize: Callable, window: int, sinks: int, exact_layers: tuple[int, ...] = (), prompt: int = 0
) -> Method:
    """A method for `perplexity.Evaluation`: the model with a cache of `bits` bits per value outside of the exact tokens and layers."""

    def apply(model: nn.Module) -> float:
        model.set_attn_implementation(IMPLEMENTATION)
        modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
        exact = {index % len(modules) for index in exact_layers}
        for module in modules:
            keep = module.layer_idx in exact
            module.kv_cache_model = CacheModel((lambda x, layer, role: x) if keep else quantize, window, sinks, prompt)
        return bits

    return Method(name, apply)


def hyperquant(
    bps: float, head_dim: int, rotation: str = "haar", dither: str | None = None, effort: int = 1, lattice: str = "e8", prompt: int = PROMPT
):
    """`quantize` of our slots, keys less the mean of the first `prompt` (0: not centered), and the rate."""
    layout = kv_layout(head_dim, bps, lattice, dither)
    key = (lattice, layout.tile.tile, layout.tile.code)

    def quantize(x: torch.Tensor, layer: int, role: str) -> torch.Tensor:
        batch, heads, tokens, _ = x.shape
        matrix, seed = rotation_matrix(rotation, head_dim, 0, layer, role), role_seed(0, layer, role)
        offset = x[:, :, :prompt].mean(2, keepdim=True) if prompt and role == "k" else 0.0
        x = x - offset
        words = torch.zeros(batch, layout.slots(heads), tokens, layout.tile.words, dtype=torch.int32)
        torch.ops.hyperquant.kv_store(words, x @ matrix, torch.arange(tokens), *key, effort, dither, seed)
        return torch.ops.hyperquant.kv_load(words, head_dim, *key, torch.float32, dither, seed)[:, :heads] @ matrix.t() + offset

    return quantize, 32 * layout.tile.words / layout.tile.tile


def lloyd_max(levels: int, head_dim: int):
    """Scalar levels after a Haar rotation, the norm in 16 bits (TurboQuant), and the rate."""

    def quantize(x: torch.Tensor, layer: int, role: str) -> torch.Tensor:
        matrix = rotation_matrix("haar", head_dim, 0, layer, role)
        rotated = x @ matrix
        scale = rotated.square().mean(-1, keepdim=True).sqrt().to(torch.bfloat16).to(torch.float32).clamp(min=1e-30)
        return peers._nearest_level(rotated / scale, peers.lloyd_max_levels(levels)) * scale @ matrix.t()

    return quantize, math.log2(levels) + 16 / head_dim


def integers(bits: int, group: int):
    """Groups of a token's values with a 16-bit scale and zero point, and the rate."""
    return lambda x, layer, role: peers._integer(x, bits, group), bits + 32 / group


def kivi(bits: int, group: int = 32):
    """Keys by channel over groups of tokens, values by token, and the rate."""

    def quantize(x: torch.Tensor, layer: int, role: str) -> torch.Tensor:
        if role == "v":
            return peers._integer(x, bits, math.gcd(group, x.shape[3]))
        tokens = x.shape[2]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % group))
        return peers._integer(padded.mT.contiguous(), bits, group).mT[:, :, :tokens]

    return quantize, bits + 32 / group


def methods(rates: list[float], head_dim: int, window: int, sinks: int, rotations: list[str], settings: list[str]) -> list[Method]:
    """Ours for each rotation, and for the Haar rotation in other settings."""

    def ours(name: str, bps: float, own_window: int, own_sinks: int, exact_layers: tuple[int, ...] = (), **options) -> Method:
        quantize, bits = hyperquant(bps, head_dim, **options)
        return cached(f"e8 {name}, window {own_window}, sinks {own_sinks}", bits, quantize, own_window, own_sinks, exact_layers)

    out = [ours(rotation, bps, window, sinks, rotation=rotation) for rotation in rotations for bps in rates]
    for bps in rates:
        if "center" in settings:
            out.append(ours("haar, keys not centered", bps, window, sinks, prompt=0))
        if "windows" in settings:
            out += [ours("haar", bps, *setting) for setting in ((0, 0), (0, sinks))]
        if "effort" in settings:
            out.append(ours("haar, effort 0", bps, window, sinks, effort=0))
        if "layers" in settings:
            out.append(ours("haar, first and last layer exact", bps, window, sinks, (0, -1)))
        if "dither" in settings:
            out += [ours(f"haar, dither {dither}", bps, window, sinks, dither=dither) for dither in ("half", "full")]
    return out


def peer_methods(head_dim: int, window: int, sinks: int) -> list[Method]:
    theirs = [(f"Lloyd-Max {n}", *lloyd_max(n, head_dim)) for n in (16, 14, 8, 7, 5, 4, 3)]
    groups = [(bits, math.gcd(group, head_dim)) for bits, group in ((4, 128), (3, 128), (2, 32), (2, 64), (2, 128))]
    theirs += [(f"int{bits} g{group}", *integers(bits, group)) for bits, group in dict.fromkeys(groups)]
    theirs.append(("KIVI int2 g32", *kivi(2)))
    return [cached(f"{name}, window {window}, sinks {sinks}", bits, quantize, window, sinks) for name, quantize, bits in theirs]


def print_table(bits_per_byte: float, results: list[Result]) -> None:
    print(f"exact cache: {bits_per_byte:.4f} bits per byte")
    print("| cache | bits per value | bits per byte | change, % | KL, millibits per token |")
    print("|---|---|---|---|---|")
    for r in results:
        change, kl = f"{r.change:+.2f} ± {r.change_error:.2f}", f"{r.kl:.2f} ± {r.kl_error:.2f}"
        print(f"| {r.method} | {r.bits_per_weight:.3f} | {r.bits_per_byte:.4f} | {change} | {kl} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a Hugging Face causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text to predict")
    parser.add_argument("--sequences", type=int, default=16, help="windows of text (default 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window (default 1024)")
    parser.add_argument("--batch", type=int, default=4, help="windows per forward pass (default 4)")
    parser.add_argument("--bps", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.0, 1.75], help="our rates")
    parser.add_argument("--window", type=int, default=64, help="newest tokens that are exact (default 64)")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that are exact (default 4)")
    parser.add_argument("--rotations", nargs="*", default=ROTATIONS, choices=ROTATIONS, help="of ours (default all)")
    parser.add_argument(
        "--settings", nargs="*", default=SETTINGS, choices=SETTINGS, help="other than the default ones, of ours (default all)"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure ours only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows, _, bytes_per_token = read_windows(args.model, args.text, model.config.vocab_size, args.sequences, args.length)
    head_dim = getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads)
    evaluation = Evaluation(model, windows, bytes_per_token, args.batch)
    args.output.mkdir(parents=True, exist_ok=True)
    data = {"arguments": {name: str(value) for name, value in vars(args).items()}, "torch": torch.__version__}
    data["bits_per_byte"] = evaluation.bits_per_byte
    results: list[Result] = []
    own = methods(args.bps, head_dim, args.window, args.sinks, args.rotations, args.settings)
    theirs = [] if args.no_peers else peer_methods(head_dim, args.window, args.sinks)
    for method in tqdm(own + theirs, desc="caches"):
        results.append(evaluation.run(method))
        # a run takes its time: what is there is kept
        (args.output / "kv_quality.json").write_text(json.dumps(data | {"results": [asdict(r) for r in results]}, indent=1))
    print_table(evaluation.bits_per_byte, results)


if __name__ == "__main__":
    main()
