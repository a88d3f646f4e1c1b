"""A packed Llama on several processes: tensor parallel inference, then LoRA with FSDP2, both against one process.

    python examples/distributed.py --ranks 2

The model is built here with random weights; the processes are gloo processes on this machine's CPU. FSDP2 gathers packed words, not
dequantized weights: the bytes that a layer gathers are printed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from hq_inductor import hyperquant_weight
from hq_inductor.integrations.distributed import HyperQuantColwiseParallel, HyperQuantRowwiseParallel, unshardable
from hq_inductor.integrations.peft import hyperquant_lora


def packed_llama(bps: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
    # tiles of 128: columns split among ranks at multiples of a tile
    quantize_(model.model, hyperquant_weight(bps=bps, tile=128))
    return model


def tensor_parallel(model: nn.Module, mesh) -> nn.Module:
    """Each rank computes some heads and some hidden units of every layer."""
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            plan = {name: HyperQuantColwiseParallel() for name, _ in block.named_children() if name in columns}
            plan |= {name: HyperQuantRowwiseParallel() for name, _ in block.named_children() if name in rows}
            parallelize_module(block, mesh, plan)
    return model


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def worker(rank: int, ranks: int, store: str, bps: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tokens = torch.arange(64).view(2, 32)

    model = packed_llama(bps)
    with torch.inference_mode():
        expected = model(tokens).logits
        found = tensor_parallel(copy.deepcopy(model), mesh)(tokens).logits
    error = ((found - expected).norm() / expected.norm()).item()

    torch.manual_seed(1)
    adapted = get_peft_model(
        model, hyperquant_lora(LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    )
    single = train(copy.deepcopy(adapted), tokens)
    layers = adapted.base_model.model.model.layers
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    dense = sum(m.in_features * m.out_features * 4 for m in layers[0].modules() if isinstance(m, nn.Linear))
    whole = unshardable(adapted)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(adapted, mesh=mesh, ignored_params=whole)
    sharded = train(adapted, tokens)
    if rank == 0:
        print(f"tensor parallel on {ranks} processes: relative difference of the logits {error:.2e}")
        print(f"FSDP2 on {ranks} processes: losses {', '.join(f'{x:.5f}' for x in sharded)}")
        print(f"         one process: losses {', '.join(f'{x:.5f}' for x in single)}")
        print(f"a layer gathers {sizes[0]:,} bytes (words, norms, adapters); its float32 weights would be {dense:,}")
    dist.destroy_process_group()
    if error > 1e-4 or any(abs(a - b) > 1e-3 for a, b in zip(single, sharded, strict=True)):
        raise SystemExit("processes disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 4], help="processes (default 2)")
    parser.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    args = parser.parse_args()
    try:
        hyperquant_weight(bps=args.bps)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(worker, (args.ranks, str(Path(directory) / "store"), args.bps), nprocs=args.ranks)


if __name__ == "__main__":
    main()
