"""Fine-tune a small language model with quantized weights in the loop, and compare with rounding it after the fine-tuning.

    python examples/qat.py --bps 3

A byte-level Llama (0.4 million weights, built and trained here) reads the standard library's source. All variants start from the same
weights and get the same number of fine-tuning steps on the same batches.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hq_inductor import hyperquant_weight, quantization_report
from hq_inductor.integrations.qat import HyperQuantQATConfig

CONTEXT, BATCH = 64, 16


def text() -> torch.Tensor:
    """Bytes of some standard-library modules; the last tenth is held back."""
    source = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-h]*.py")))
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def batch(data: torch.Tensor, generator: torch.Generator, rows: int = BATCH) -> torch.Tensor:
    starts = torch.randint(len(data) - CONTEXT, (rows,), generator=generator)
    return torch.stack([data[start : start + CONTEXT] for start in starts])


def train(model: nn.Module, data: torch.Tensor, steps: int, rate: float, seed: int, description: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in tqdm(range(steps), desc=description):
        tokens = batch(data, generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def evaluate(model: nn.Module, data: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(99)
    batches = [batch(data, generator, 128) for _ in range(8)]
    return sum(model.eval()(tokens, labels=tokens).loss.item() for tokens in batches) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bps", type=float, default=3.0, help="bits per weight, a multiple of 1/8 (default 3)")
    parser.add_argument("--steps", type=int, default=400, help="steps of pretraining (default 400)")
    parser.add_argument("--finetune", type=int, default=80, help="steps of fine-tuning (default 80)")
    args = parser.parse_args()
    try:
        config = hyperquant_weight(bps=args.bps)
    except ValueError as error:
        parser.error(str(error))
    data = text()
    split = len(data) * 9 // 10
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=False))
    train(model, data[:split], args.steps, 3e-3, 0, "pretraining")

    aware = copy.deepcopy(model)
    train(model, data[:split], args.finetune, 5e-4, 1, "fine-tuning, float    ")
    rounded = copy.deepcopy(model)
    quantize_(rounded, config)

    quantize_(aware, HyperQuantQATConfig(config))
    train(aware, data[:split], args.finetune, 5e-4, 1, "fine-tuning, quantized")
    quantize_(aware, QATConfig(config, step="convert"))

    held_back = data[split:]
    exact, after, through = (evaluate(m, held_back) for m in (model, rounded, aware))
    report = quantization_report(aware)
    print(f"""
{len(report.quantized)} linear layers at {report.bits_per_weight:.3f} bits per weight; loss on held-back text in nats per byte
  float                              {exact:.4f}
  quantized after fine-tuning        {after:.4f}  (+{after - exact:.4f})
  quantized during fine-tuning       {through:.4f}  ({through - exact:+.4f})
  recovered                          {(after - through) / (after - exact):.0%} of the loss""")


if __name__ == "__main__":
    main()
