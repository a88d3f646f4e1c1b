"""What quantized weights do to a language model: bits per byte, and KL divergence from the unquantized model.

    python benchmarks/perplexity.py --model PATH --text FILE

`--model` is a directory of a Hugging Face causal language model, `--text` any text it should predict; a model without a tokenizer and with
a vocabulary of 256 reads bytes. Text is cut into `--sequences` windows of `--length` tokens, evenly spaced over the file. All linear layers
but the output head are quantized (`--head` includes it), by ours and by the peers of `peers.py`, each at its true rate. Weights are what a
decoder gets back from the packed words; the model then runs in float32.

Variants of ours: `plain` as `hyperquant_weight(bps)` does it, `balanced` after `balance_columns`, `mixed` with `allocate_rates` on top,
`feedback` with `measure_moments` on top of `balanced`; all but `plain` see eight windows between the measured ones. `--arithmetic` also
quantizes activations, in the rotated domain, as matrix units with that format would (per token for int8 and fp8; nvfp4 and mxfp4 in
blocks, weights re-quantized too).

Prints a table and writes `perplexity.json` and `perplexity.png` to `--output`. Logits of the unquantized model stay in memory (4 bytes x
tokens x vocabulary).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import MXFP4, NVFP4, PEERS, Peer
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hq_inductor import HyperQuantLinear, allocate_rates, balance_columns, hyperquant_weight, measure_moments, quantization_report
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref

VARIANTS = ("plain", "balanced", "mixed", "feedback")
CALIBRATION_WINDOWS = 8


@dataclass(frozen=True)
class Result:
    """One way of quantizing, measured.

    `kl` is in millibits per token, `kl_error` its standard error over windows; `change` is that of the bits per byte, in percent, and
    `change_error` its standard error over windows (paired with the unquantized model).
    """

    method: str
    bits_per_weight: float
    bits_per_byte: float
    change: float
    change_error: float
    kl: float
    kl_error: float


@dataclass(frozen=True)
class Method:
    """A name and a function that quantizes a copy of the model in place and returns the bits per weight, everything included."""

    name: str
    apply: Callable[[nn.Module], float]


def linear_names(model: nn.Module, head: bool) -> list[str]:
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and (head or module is not output)]


def _int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(x / scale) * scale


def _fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale


# (activations, weights) by arithmetic: int8 and fp8 (up to its 4 significant bits) multiply lattice codes; the FP4 units need other weights
ARITHMETIC: dict[str, tuple[Callable, Callable]] = {
    "float": (lambda x: x, lambda w: w),
    "int8": (_int8, lambda w: w),
    "fp8": (_fp8, lambda w: w),
    "nvfp4": (NVFP4.quantize, NVFP4.quantize),
    "mxfp4": (MXFP4.quantize, MXFP4.quantize),
}


class RotatedLinear(nn.Module):
    """What a linear layer computes on matrix units: both factors rotated, activations in a narrow format."""

    def __init__(self, module: HyperQuantLinear, arithmetic: str) -> None:
        super().__init__()
        self.block, self.seed, self.bias = hadamard_block(module.tile), module.seed, module.bias
        self.scale = module.act_pre_scale
        self.narrow_activations, narrow_weights = ARITHMETIC[arithmetic]
        codes, scale = torch.ops.hyperquant.rice_decode(module.qdata, module.lattice, module.tile, module.code)
        rotated = torch.ops.hyperquant.lattice_dequant(codes, scale, module.lattice, torch.float32)
        self.register_buffer("weight", narrow_weights(rotated))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.scale is None else x * self.scale
        rotated = hadamard_ref(F.pad(x, (0, self.weight.shape[1] - x.shape[-1])), self.block, self.seed)
        return F.linear(self.narrow_activations(rotated), self.weight, self.bias)


def with_dense_weights(model: nn.Module, arithmetic: str = "float") -> nn.Module:
    """Replace quantized layers by plain ones with the weights that decoding gives; the same function, faster on a CPU."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HyperQuantLinear):
            if arithmetic == "float":
                dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                dense.weight.data, dense.bias = module.weight.dequantize(), module.bias
            else:
                dense = RotatedLinear(module, arithmetic)
            model.set_submodule(name, dense)
    return model


def ours(names: list[str], calibration: list[torch.Tensor], variant: str, arithmetic: str = "float", **arguments) -> Method:
    """`hyperquant_weight(**arguments)` on the named layers, in one of `VARIANTS`."""

    def chosen(module: nn.Module, name: str) -> bool:
        return name in names

    def apply(model: nn.Module) -> float:
        if variant != "plain":
            balance_columns(model, calibration, chosen)
        if variant == "feedback":
            measure_moments(model, calibration, chosen)
        if variant == "mixed":
            quantize_(model, allocate_rates(model, batches=calibration, filter_fn=chosen, **arguments), filter_fn=None)
        else:
            quantize_(model, hyperquant_weight(**arguments), filter_fn=chosen)
        bits = quantization_report(model).bits_per_weight
        with_dense_weights(model, arithmetic)
        return bits

    name = f"{arguments.get('lattice', 'e8')} {variant}"
    return Method(name if arithmetic == "float" else f"{name} {arithmetic}", apply)


def theirs(names: list[str], peer: Peer) -> Method:
    def apply(model: nn.Module) -> float:
        bits = weights = 0.0
        for name in names:
            weight = model.get_submodule(name).weight
            weight.data = peer.quantize(weight.data)
            bits += weight.numel() * peer.bits_per_weight(weight.shape[1])
            weights += weight.numel()
        return bits / weights

    return Method(peer.name, apply)


def read_windows(
    model_path: Path, text: Path, vocabulary: int, sequences: int, length: int
) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """Tokens `[sequences, length + 1]` evenly spaced over the text, inputs `[2, length]` for calibration, and bytes per token."""
    data = text.read_bytes()
    if (model_path / "tokenizer_config.json").exists():
        tokens = AutoTokenizer.from_pretrained(model_path)(data.decode(errors="replace"), return_tensors="pt", verbose=False).input_ids[0]
    elif vocabulary == 256:
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)
    else:
        raise SystemExit(f"{model_path} has no tokenizer and a vocabulary of {vocabulary}; only a vocabulary of 256 can mean bytes")
    if len(tokens) < length + 1:
        raise SystemExit(f"{text} must have more than {length} tokens, got {len(tokens)}")
    starts = torch.linspace(0, len(tokens) - length - 1, sequences).to(torch.int64)
    # between two windows, where the text is long enough for that
    middle = ((starts[1:] + starts[:-1]) // 2)[:: max(1, (sequences - 1) // CALIBRATION_WINDOWS)][:CALIBRATION_WINDOWS]
    calibration = tokens[middle[:, None] + torch.arange(length)]
    return tokens[starts[:, None] + torch.arange(length + 1)], list(calibration.split(2)), len(data) / len(tokens)


@torch.inference_mode()
def log_probabilities(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(batch[:, :-1]).logits.to(torch.float32), dim=-1)


def nll(log_p: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of each window's next tokens, nats."""
    return -log_p.gather(-1, batch[:, 1:, None]).squeeze(-1).mean(-1)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


class Evaluation:
    """The unquantized model's predictions on fixed windows, and the comparison of quantized copies with them."""

    def __init__(self, model: nn.Module, windows: torch.Tensor, bytes_per_token: float, batch: int) -> None:
        self.model, self.batches = model, windows.split(batch)
        self.bits_per_nat = 1 / (math.log(2) * bytes_per_token)
        self.reference = [log_probabilities(model, b) for b in tqdm(self.batches, desc="unquantized", leave=False)]
        self.reference_nll = torch.cat([nll(log_p, b) for log_p, b in zip(self.reference, self.batches, strict=True)])

    @property
    def bits_per_byte(self) -> float:
        return self.reference_nll.mean().item() * self.bits_per_nat

    def run(self, method: Method) -> Result:
        model = copy.deepcopy(self.model)
        bits = method.apply(model)
        losses, divergences = [], []
        for log_p, batch in zip(self.reference, tqdm(self.batches, desc=method.name, leave=False), strict=True):
            log_q = log_probabilities(model, batch)
            losses.append(nll(log_q, batch))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(-1))
        loss = torch.cat(losses)
        change, change_error = mean_and_error(100 * (loss - self.reference_nll) / self.reference_nll.mean())
        kl, kl_error = mean_and_error(torch.cat(divergences) * (1000 / math.log(2)))
        return Result(method.name, bits, loss.mean().item() * self.bits_per_nat, change, change_error, kl, kl_error)


def print_table(evaluation: Evaluation, results: list[Result]) -> None:
    print(f"unquantized: {evaluation.bits_per_byte:.4f} bits per byte")
    print("| weights | bits per weight, all in | bits per byte | change, % | KL, millibits per token |")
    print("|---|---|---|---|---|")
    for r in results:
        change, kl = f"{r.change:+.2f} ± {r.change_error:.2f}", f"{r.kl:.2f} ± {r.kl_error:.2f}"
        print(f"| {r.method} | {r.bits_per_weight:.3f} | {r.bits_per_byte:.4f} | {change} | {kl} |")


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    curves: dict[str, list[Result]] = {}
    for r in results:
        curves.setdefault(r.method, []).append(r)
    for label, curve in curves.items():
        curve = sorted(curve, key=lambda r: r.bits_per_weight)
        axes.plot([r.bits_per_weight for r in curve], [r.kl for r in curve], "o-" if len(curve) > 1 else "s", label=label, markersize=4)
    axes.set(xlabel="bits per weight, all in", ylabel="KL from the unquantized model, millibits per token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a Hugging Face causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text to predict")
    parser.add_argument("--sequences", type=int, default=64, help="windows of text (default 64)")
    parser.add_argument("--length", type=int, default=512, help="tokens per window (default 512)")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward pass (default 8)")
    parser.add_argument("--bps", type=float, nargs="+", default=[2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0], help="our rates")
    parser.add_argument("--lattices", nargs="+", default=["e8"], help="our lattices (default e8)")
    parser.add_argument("--variants", nargs="+", default=["plain", "balanced", "mixed", "feedback"], choices=VARIANTS)
    parser.add_argument("--arithmetic", nargs="+", default=["float"], choices=ARITHMETIC, help="formats of activations (default float)")
    parser.add_argument("--effort", type=int, default=1, help="encoder's effort, 0 to 2 (default 1)")
    parser.add_argument("--no-peers", action="store_true", help="measure ours only")
    parser.add_argument("--head", action="store_true", help="quantize the output head too")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the plot and the JSON")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows, calibration, bytes_per_token = read_windows(args.model, args.text, model.config.vocab_size, args.sequences, args.length)
    names = linear_names(model, args.head)
    methods = [
        ours(names, calibration, variant, arithmetic, bps=bps, lattice=lattice, effort=args.effort)
        for arithmetic in args.arithmetic
        for lattice in args.lattices
        for variant in args.variants
        for bps in args.bps
    ]
    if not args.no_peers:
        methods += [theirs(names, peer) for peer in PEERS]
    evaluation = Evaluation(model, windows, bytes_per_token, args.batch)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for method in tqdm(methods, desc="methods"):
            results.append(evaluation.run(method))
    args.output.mkdir(parents=True, exist_ok=True)
    data = {
        "model": str(args.model),
        "text": str(args.text),
        "sequences": args.sequences,
        "length": args.length,
        "torch": torch.__version__,
        "bits_per_byte": evaluation.bits_per_byte,
        "results": [asdict(r) for r in results],
    }
    (args.output / "perplexity.json").write_text(json.dumps(data, indent=1))
    plot(results, args.output / "perplexity.png")
    print_table(evaluation, results)


if __name__ == "__main__":
    main()
