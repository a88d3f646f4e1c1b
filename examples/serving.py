"""Load a packed checkpoint the way vLLM does, on one or more processes, and compare what it generates with transformers.

    python examples/serving.py --ranks 2
    python examples/serving.py --vllm        # and in vLLM itself, where it is installed

An engine makes room for the weights of its rank by quantizing empty memory with the config of the checkpoint, then narrows its parameters
and the loaded weights to the same shard and copies: q, k and v into one parameter, gate and up into another. The model is built here with
random weights; the processes are gloo processes on this machine's CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torchao.core.config import AOBaseConfig, config_from_dict
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.utils import logging as transformers_logging

from hq_inductor import hyperquant_weight
from hq_inductor.integrations import vllm as plugin

PROMPT, NEW_TOKENS = list(range(10, 26)), 16
# projections that an engine keeps in one parameter, and their place in it
MERGED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class ServedLinear(nn.Module):
    """The share of one rank in some projections of the same activations, split by rows (`dim` 0) or columns (1)."""

    def __init__(self, sizes: list[int], in_features: int, dim: int, config: AOBaseConfig, ranks: int):
        super().__init__()
        self.dim, self.sizes = dim, [n // ranks for n in sizes] if dim == 0 else sizes
        shape = sum(self.sizes), in_features // ranks if dim == 1 else in_features
        with torch.device("meta"):
            room = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
        room[0].weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        quantize_(room, config)
        self.register_parameter("weight", room[0].weight)

    def load(self, weight: torch.Tensor, index: int, rank: int) -> None:
        target = self.weight.data.narrow(0, sum(self.sizes[:index]), self.sizes[index])
        size = target.shape[self.dim]
        target.copy_(weight.narrow(self.dim, rank * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight)
        if self.dim == 1:
            dist.all_reduce(y)
        return y


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions, `[heads, tokens, head_dim]`."""
    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class ServedLlama(nn.Module):
    """A Llama with merged, tensor-parallel projections; embeddings and head are on every rank."""

    def __init__(self, config: SimpleNamespace, quantization: AOBaseConfig, ranks: int):
        super().__init__()
        self.config, hidden = config, config.hidden_size
        attention, cache = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        layers = []
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.qkv_proj = ServedLinear([attention, cache, cache], hidden, 0, quantization, ranks)
            layer.o_proj = ServedLinear([hidden], attention, 1, quantization, ranks)
            layer.gate_up_proj = ServedLinear([config.intermediate_size] * 2, hidden, 0, quantization, ranks)
            layer.down_proj = ServedLinear([hidden], config.intermediate_size, 1, quantization, ranks)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        self.plain: dict[str, torch.Tensor] = {}

    def load(self, directory: Path, rank: int) -> None:
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                stored, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
            weights, _ = unflatten_tensor_state_dict(stored, metadata)
            for name, weight in weights.items():
                *_, projection, _ = ["", *name.split(".")]
                merged, index = MERGED.get(projection, (projection, 0))
                if merged.endswith("_proj"):
                    layer = self.layers[int(name.split(".")[2])]
                    layer.get_submodule(merged).load(weight, index, rank)
                else:
                    self.plain[name] = weight

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.plain[f"model.{name}.weight"], self.config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocab]` of a sequence `[tokens]`."""
        config = self.config
        x = self.plain["model.embed_tokens.weight"][tokens]
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv_proj(self.norm(x, f"layers.{i}.input_layernorm"))
            q, k, v = (t.unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for t in qkv.split(layer.qkv_proj.sizes, -1))
            q, k = (rotate(t, config.rope_parameters["rope_theta"]) for t in (q, k))
            heads = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
            x = x + layer.o_proj(heads.transpose(0, 1).flatten(1))
            gate, up = layer.gate_up_proj(self.norm(x, f"layers.{i}.post_attention_layernorm")).chunk(2, -1)
            x = x + layer.down_proj(F.silu(gate) * up)
        return F.linear(self.norm(x, "norm"), self.plain["lm_head.weight"])


def serve(rank: int, ranks: int, directory: str) -> None:
    """One rank: read the config, make room, load, generate; rank 0 writes what it found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plugin.register()  # vLLM calls it in each of its processes
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    config = json.loads(Path(directory, "packed", "config.json").read_text())
    quantization = config_from_dict(config["quantization_config"]["quant_type"]["default"])
    with torch.inference_mode():
        model = ServedLlama(SimpleNamespace(**config), quantization, ranks)
        model.load(Path(directory, "packed"), rank)
        tokens = torch.tensor(PROMPT)
        prompt_logits = model(tokens)
        for _ in range(NEW_TOKENS):
            tokens = torch.cat([tokens, model(tokens)[-1:].argmax(-1)])
    if rank == 0:
        size = sum(p.size_bytes for p in model.parameters())
        torch.save({"logits": prompt_logits, "tokens": tokens[len(PROMPT) :].tolist(), "size": size}, Path(directory, "served.pt"))
    dist.destroy_process_group()


def vllm_tokens(directory: Path, ranks: int) -> list[int]:
    """The same tokens from vLLM itself."""
    # on a CPU, vLLM wants a memory node for each rank or no binding of threads
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True, tensor_parallel_size=ranks
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, detokenize=False)
    return list(engine.generate([{"prompt_token_ids": PROMPT}], sampling)[0].outputs[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2], help="processes (default 2)")
    parser.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    parser.add_argument("--vllm", action="store_true", help="serve it with vLLM too")
    args = parser.parse_args()
    try:
        # tiles of 128: columns split among ranks at multiples of a tile
        quantization = TorchAoConfig(hyperquant_weight(bps=args.bps, tile=128, check_values=False))
    except ValueError as error:
        parser.error(str(error))
    plugin.register()  # torchao's file format takes only classes that it knows
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    with tempfile.TemporaryDirectory() as directory:
        floating, packed = Path(directory, "float"), Path(directory, "packed")
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(floating)
        model = AutoModelForCausalLM.from_pretrained(floating, quantization_config=quantization)
        model.save_pretrained(packed)
        with torch.inference_mode():
            expected = model(torch.tensor([PROMPT])).logits[0]
            tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(PROMPT) :].tolist()

        mp.spawn(serve, (args.ranks, directory), nprocs=args.ranks)
        served = torch.load(Path(directory, "served.pt"))
        error = ((served["logits"] - expected).norm() / expected.norm()).item()
        print(f"{args.ranks} processes, {served['size']:,} bytes of packed weights on each")
        print(f"  transformers   {tokens}")
        print(f"  loaded shards  {served['tokens']}, relative difference of the prompt's logits {error:.1e}")
        same = served["tokens"] == tokens and error < 1e-5
        if args.vllm:
            found = vllm_tokens(packed, args.ranks)
            print(f"  vLLM           {found}")
            same = same and found == tokens
    if not same:
        raise SystemExit("the engines disagree")


if __name__ == "__main__":
    main()
