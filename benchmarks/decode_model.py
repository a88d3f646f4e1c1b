"""Greedy decoding with a whole model: tokens per second, weight memory, kernels per layer and compile time, by weight format.

    python benchmarks/decode_model.py [--quick] [--layers N] [--weights bf16 int4wo 3 4 5] [--batches 1 8 32] [--json FILE]

A Hugging Face model of Llama-3-8B's shape with random weights and a `StaticCache` that holds `--context` random tokens. A step is the
whole model, the output head and the argmax, compiled with `fullgraph=True` and captured in one CUDA graph; `--mode reduce-overhead` leaves
graphs to Inductor instead, so that guards and everything else the host does per step count. Linear layers of the decoder are quantized,
the output head and the embedding stay in bf16, as transformers does by default.

`bf16` is the plain model, `int4wo` is torchao's `Int4WeightOnlyConfig` (groups of 128, 4.25 bits, tinygemm), a number is our rate in bits
per weight. Ours are one random weight per shape, rolled by the layer's index: no two layers share memory, and no kernel reads values that
it could skip.

The graph passes of `hq_inductor` rewrite what is compiled, as they do for everybody, and their report is printed; `--no-passes` leaves
them out.

With fewer than 32 layers (`--quick`: 8, bf16 and 4 bits only) the time of 32 is the measured time, less that of norm, head and argmax
alone, times 32 / layers, plus that again; figures made so are marked. `--device cpu --tiny` runs the same code on a small model.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import transformers
from compiled_steps import MODES, SAMPLES, cold_caches, compile_step, start_compiler, time_ms
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from hq_inductor import HyperQuantLinear, HyperQuantTensor, passes
from hq_inductor.compile import uninstall

LAYERS = 32
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Result:
    """One weight format at one batch. Times are those of `layers` layers; None where there was nothing to count on this device."""

    weights: str
    batch: int
    layers: int
    step_ms: float
    head_ms: float
    decoder_bytes: int
    other_bytes: int
    kernels_per_layer: int | None
    kernels_per_step: int | None
    compile_s: float

    @property
    def full_step_ms(self) -> float:
        """Of a model of 32 layers."""
        return self.head_ms + (self.step_ms - self.head_ms) * LAYERS / self.layers

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.batch / self.full_step_ms

    @property
    def full_bytes(self) -> float:
        return self.other_bytes + self.decoder_bytes * LAYERS / self.layers


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"model.{name}": module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}


def quantize_ours(linears: Iterable[nn.Linear], bps: float) -> None:
    """Random weights at a rate: rows repeat after 1024, each layer's words are a roll of the same ones in memory of their own."""
    made: dict[tuple[int, int], HyperQuantTensor] = {}
    for index, linear in enumerate(linears):
        rows, _ = shape = linear.out_features, linear.in_features
        if shape not in made:
            part = linear.weight.detach()[:1024]
            made[shape] = HyperQuantTensor.from_hp(part, bps=bps, effort=0)
        words = made[shape].qdata
        words = words.repeat(-(-rows // len(words)), 1, 1)[:rows].roll(index, 0)
        HyperQuantLinear.from_linear(linear, made[shape]._replace(qdata=words.contiguous(), shape=shape))


def quantize_int4(model: nn.Module) -> None:
    from torchao.quantization import Int4WeightOnlyConfig

    # set_inductor_config would change how the other formats are compiled too
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    names = decoder_linears(model)
    quantize_(model, config, lambda module, name: name in names)


def make_model(config: LlamaConfig, weights: str, device: torch.device) -> nn.Module:
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    if weights == "int4wo":
        quantize_int4(model)
    elif weights != "bf16":
        quantize_ours(decoder_linears(model).values(), float(weights))
    return model


def stored_bytes(tensors) -> int:
    """Bytes of tensors, those inside subclasses counted."""
    total = 0
    for tensor in tensors:
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        total += stored_bytes(getattr(tensor, name) for name in inner) if inner else tensor.numel() * tensor.element_size()
    return total


class Decoder:
    """A model, a filled cache and the next tokens, all of fixed address. `step` decodes one token of each sequence.

    Args:
        model: causal language model of transformers.
        batch: sequences.
        context: tokens in the cache at the start.
        steps: that may be taken before `rewind`.
    """

    def __init__(self, model: nn.Module, batch: int, context: int, steps: int) -> None:
        self.model, self.context, config = model, context, model.config
        device, dtype = model.device, model.dtype
        self.cache = StaticCache(config=config, max_cache_len=context + steps)
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
            self.cache.update(keys, values, layer)
        self.set_tokens(batch, device)

    def set_tokens(self, batch: int, device: torch.device) -> None:
        self.tokens = torch.arange(batch, device=device)[:, None]
        torch._dynamo.mark_static_address(self.tokens)

    def step(self) -> None:
        logits = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True).logits
        self.tokens.copy_(logits[:, -1:].argmax(-1))

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)


def launches(names: Counter[str], layers: int) -> tuple[int, int]:
    """Kernels per decoder layer and per step, from how often each ran in one step: what runs once per step does not reach `layers`."""
    return sum(count // layers for count in names.values()), sum(names.values())


def count_kernels(call: Callable[[], object]) -> Counter[str]:
    """How often each kernel, copy and fill runs in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return Counter(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


@torch.no_grad()
def measure(
    config: LlamaConfig, weights: str, batches: list[int], context: int, steps: int, mode: str, device: torch.device
) -> list[Result]:
    """All batches of one weight format; the model is gone afterwards."""
    model = make_model(config, weights, device)
    decoder = stored_bytes(model.model.layers.parameters())
    others = stored_bytes(model.parameters()) - decoder
    found = []
    for batch in tqdm(batches, desc=weights, leave=False):
        state = Decoder(model, batch, context, steps + 4)
        hidden = torch.randn(batch, 1, config.hidden_size, device=device, dtype=model.dtype)
        with cold_caches(mode):
            step, seconds = compile_step(state.step, mode, device)
            step_ms = time_ms(step, steps, device, state.rewind)
            per_layer = per_step = None
            if device.type == "cuda":
                state.rewind()
                per_layer, per_step = launches(count_kernels(step), config.num_hidden_layers)
            head, _ = compile_step(lambda hidden=hidden: model.lm_head(model.model.norm(hidden)).argmax(-1), mode, device)
            head_ms = time_ms(head, steps, device)
        found.append(Result(weights, batch, config.num_hidden_layers, step_ms, head_ms, decoder, others, per_layer, per_step, seconds))
        del state, step, head
    return found


def collect(device: torch.device) -> None:
    """Give back what compiled steps held: graphs keep their memory until they are collected."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(results: list[Result]) -> str:
    scaled = any(result.layers != LAYERS for result in results)
    mark = f" (scaled to {LAYERS} layers)" if scaled else ""
    base = {result.batch: result for result in results if result.weights == "bf16"}
    lines = [
        f"| weights | batch | tokens/s{mark} | against bf16 | ms per step of {results[0].layers} layers | of it head, ms | "
        f"decoder weights, GB{mark} | all weights, GB{mark} | kernels per layer | kernels per step | compile, s |",
        "|---" * 11 + "|",
    ]
    for r in results:
        ratio = f"{base[r.batch].full_step_ms / r.full_step_ms:.2f}x" if r.batch in base else "-"
        name = r.weights if r.weights in ("bf16", "int4wo") else f"ours {float(r.weights):g} bps"
        kernels = " | ".join("-" if k is None else str(k) for k in (r.kernels_per_layer, r.kernels_per_step))
        lines.append(
            f"| {name} | {r.batch} | {r.tokens_per_s:.1f} | {ratio} | {r.step_ms:.3f} | {r.head_ms:.3f} | "
            f"{(r.full_bytes - r.other_bytes) / 1e9:.4g} | {r.full_bytes / 1e9:.4g} | {kernels} | {r.compile_s:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", nargs="+", help="bf16, int4wo or our rates (default: bf16 int4wo 3 4 5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--layers", type=int, help=f"decoder layers (default {LAYERS}); fewer are scaled up")
    parser.add_argument("--quick", action="store_true", help="8 layers, bf16 and 4 bits, unless given otherwise")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache (default 512)")
    parser.add_argument("--steps", type=int, default=16, help=f"decoded per sample, of which there are {SAMPLES} (default 16)")
    parser.add_argument("--mode", choices=MODES, default="graph", help="how steps are run (default graph)")
    parser.add_argument("--no-passes", action="store_true", help="compile without the graph passes of hq_inductor")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few hundred thousand weights")
    parser.add_argument("--json", help="write all figures to a file")
    args = parser.parse_args()
    weights = args.weights or (["bf16", "4"] if args.quick else ["bf16", "int4wo", "3", "4", "5"])
    layers = args.layers or (8 if args.quick else LAYERS)
    device = torch.device(args.device)
    if device.type != "cuda" and "int4wo" in weights:
        raise SystemExit("int4wo packs its weights for CUDA; give --weights without it")
    if args.no_passes:
        uninstall()
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if args.tiny else LLAMA_3_8B), num_hidden_layers=layers, tie_word_embeddings=False)
    start_compiler(args.mode, device)
    results = []
    for name in tqdm(weights, desc="weights"):
        results += measure(config, name, args.batches, args.context, args.steps, args.mode, device)
        collect(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, mode {args.mode}, context {args.context}, "
        f"{layers} layers{' (tiny)' if args.tiny else ''}"
    )
    print(table(results))
    if args.mode != "eager":
        print(f"\ngraph passes {'left out' if args.no_passes else 'over all compilations'}:\n{passes.report()}")
    if args.json:
        conditions = {
            "passes": not args.no_passes,
            "device": where,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mode": args.mode,
        }
        with open(args.json, "w") as file:
            json.dump({**conditions, "context": args.context, "results": [asdict(result) for result in results]}, file, indent=1)


if __name__ == "__main__":
    main()
