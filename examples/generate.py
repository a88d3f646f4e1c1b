"""Generate text with a quantized KV cache, beside the same model with its exact cache.

    python examples/generate.py --bps 4 3 2
    python examples/generate.py --model PATH --prompt "def main(" --compile

Without `--model`, a byte-level Llama (0.7 million weights) is built and trained on the standard library's source, in half a minute on a
CPU. Text is sampled with the same random numbers for every cache. Prints, for each rate, the text, how many tokens agree with the exact
cache's before the first that does not, how far the predictions for the exact cache's text move, and bytes.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from hq_inductor.integrations.transformers_cache import HyperQuantCache

CONTEXT, BATCH = 128, 8


class Bytes:
    """A tokenizer: UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def trained_model(steps: int) -> nn.Module:
    """A small Llama that has read some of the standard library."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    source = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-h]*.py")))
    data = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training a small model"):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        tokens = torch.stack([data[start : start + CONTEXT] for start in starts])
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: torch.Tensor, prompt: int, cache) -> torch.Tensor:
    """Predictions for the tokens after the prompt, each made from the cache, `[new, vocabulary]`."""
    out = [model(tokens[:, :prompt], past_key_values=cache).logits[0, -1]]
    out += [model(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(prompt, tokens.shape[1] - 1)]
    return torch.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="directory of a causal language model (default: train a small one)")
    parser.add_argument("--prompt", default="import argparse\n\n\ndef main(", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--bps", type=float, nargs="+", default=[4.0, 2.0], help="bits per key and value (default 4 2)")
    parser.add_argument("--window", type=int, default=16, help="newest tokens that stay exact (default 16)")
    parser.add_argument("--rotation", default="haar", help="haar, hadamard or none (default haar)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step, on a CPU too")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the small model (default 200)")
    args = parser.parse_args()

    transformers_logging.disable_progress_bar()
    if args.model is None:
        model, tokenizer = trained_model(args.steps), Bytes()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model) if (args.model / "tokenizer_config.json").exists() else Bytes()
        model = model.cuda() if torch.cuda.is_available() else model
    prompt = torch.tensor([tokenizer.encode(args.prompt)], device=model.device)
    options = {
        "max_new_tokens": args.tokens,
        "do_sample": True,
        "temperature": 0.7,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    if args.compile:
        options["compile_config"] = CompileConfig(fullgraph=True, mode=None)
        options["compile_config"]._compile_all_devices = True

    def generate(cache) -> torch.Tensor:
        # the same dice for every cache
        torch.manual_seed(args.seed)
        return model.generate(prompt, past_key_values=cache, **options)

    total = prompt.shape[1] + args.tokens
    exact = generate(StaticCache(model.config, total))
    reference = logits_of(model, exact, prompt.shape[1], StaticCache(model.config, total)).log_softmax(-1)
    print(f"\nexact cache:\n{tokenizer.decode(exact[0].tolist())}")
    for bps in args.bps:

        def cache(bps: float = bps) -> HyperQuantCache:
            return HyperQuantCache(model.config, total, bps=bps, window=args.window, rotation=args.rotation)

        used = cache()
        tokens = generate(used)
        different = (tokens[0] != exact[0]).nonzero()
        agree = (int(different[0]) if len(different) else total) - prompt.shape[1]
        log_q = logits_of(model, exact, prompt.shape[1], cache()).log_softmax(-1)
        kl = F.kl_div(log_q, reference, log_target=True, reduction="batchmean").item()
        states = used.layers[0].states
        slots = sum(t.numel() * t.element_size() for layer in used.layers for t in (layer.states.k_words, layer.states.v_words))
        bf16 = 2 * len(used.layers) * states.kv_heads * states.head_dim * states.max_tokens * 2
        print(f"\n{bps:g} bits per key and value:\n{tokenizer.decode(tokens[0].tolist())}")
        print(
            f"{agree} of {args.tokens} tokens before the first other one, KL {1000 * kl:.2f} millinats per token\n"
            f"slots for {states.max_tokens} tokens: {slots:,} bytes = {states.slot_bits_per_value:g} bits per value, "
            f"{bf16 / slots:.2f} times fewer than bf16; exact tokens {used.size_bytes - slots:,} bytes"
        )


if __name__ == "__main__":
    main()
