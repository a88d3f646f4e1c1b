"""Blocks of a diffusion transformer: time per forward with modulated norms in their own kernels, and in those of the quantized layers.

    python benchmarks/diffusion_block.py [--shapes dit-xl-2 large-1024 large-4096] [--images 1 4] [--fuse-norm off on auto] [--json FILE]

A block is self-attention, cross attention to 77 tokens of a text, and an MLP. The norms before self-attention and MLP have a shift and a
scale per image, computed from its time step (adaLN), the norm before cross attention has none. Weights are random. `dit-xl-2` is
DiT-XL/2's width on 256 tokens per image (256 x 256 pixels), `large-1024` and `large-4096` are as wide as Flux's. `bf16` is the plain model;
ours is the same compiled with the graph pass `fuse_norm` off, on, or as it is by default (`auto`), all other passes by default.

A forward is all blocks, compiled with `fullgraph=True` and captured in one CUDA graph. Kernels per layer are all that it runs, divided by
the layers: a fraction comes from the first and the last block. What the pass says it made and left is printed, and the SNR of what the
blocks add to their input against the forward with `fuse_norm` off: the two differ by roundings only, and the run fails if by more.
`--device cpu --tiny` runs the same code on a small model.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from compiled_steps import MODES, SAMPLES, cold_caches, compile_step, start_compiler, time_ms
from decode_model import collect, count_kernels, quantize_ours
from torch import nn
from tqdm import tqdm

from hq_inductor import passes

FUSE_NORM = {"off": False, "on": True, "auto": "auto"}
# roundings leave 34 to 38 on a CPU, without one norm it is below 2
MIN_SNR_DB = 25.0


@dataclass(frozen=True)
class Shape:
    """A block, and the tokens of an image and of its text."""

    hidden: int
    heads: int
    mlp: int
    tokens: int
    text: int = 77


SHAPES = {
    "dit-xl-2": Shape(1152, 16, 4608, 256),
    "large-1024": Shape(3072, 24, 12288, 1024),
    "large-4096": Shape(3072, 24, 12288, 4096),
}
TINY = {"tiny": Shape(128, 4, 256, 16, 5)}


@dataclass(frozen=True)
class Result:
    """One format of weights at one shape.

    Attributes:
        weights: `"bf16"`, or our rate.
        fuse_norm: of `FUSE_NORM`, None for bf16.
        kernels: in a forward, None where there was nothing to count on this device.
        made, left: norms that the pass moved, and those that it did not, by reason.
        snr_db: against `fuse_norm` off; infinite where all values are the same.
    """

    shape: str
    images: int
    layers: int
    weights: str
    fuse_norm: str | None
    forward_ms: float
    kernels: int | None = None
    made: int = 0
    left: dict[str, int] | None = None
    snr_db: float | None = None

    @property
    def name(self) -> str:
        return self.weights if self.fuse_norm is None else f"ours {float(self.weights):g} bits, fuse_norm {self.fuse_norm}"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DiTBlock(nn.Module):
    """Self-attention and MLP modulated by a time step, cross attention to a text."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.heads = shape.hidden, shape.heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False) for _ in range(3))
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, shape.mlp), nn.Linear(shape.mlp, hidden)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.o(attend(self.q(h), self.k(h), self.v(h), self.heads))
        x = x + self.cross_o(attend(self.cross_q(self.norm3(x)), self.cross_k(text), self.cross_v(text), self.heads))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


def make_blocks(shape: Shape, layers: int, device: torch.device) -> nn.ModuleList:
    with device:
        blocks = nn.ModuleList(DiTBlock(shape) for _ in range(layers))
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            # outputs as large as inputs: PyTorch's are smaller by sqrt(3), and an error in a norm would not show in the SNR
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return blocks.to(torch.bfloat16).eval().requires_grad_(False)


class Forward:
    """Blocks and their inputs and output, all of fixed address. `step` computes `out` once."""

    def __init__(self, blocks: nn.ModuleList, shape: Shape, images: int) -> None:
        self.blocks = blocks
        like = next(blocks.parameters())
        generator = torch.Generator(like.device).manual_seed(0)
        sizes = ((images, shape.tokens, shape.hidden), (images, shape.text, shape.hidden), (images, shape.hidden))
        self.x, self.text, self.time = (torch.randn(s, generator=generator, device=like.device, dtype=torch.bfloat16) for s in sizes)
        # nothing that a norm would leave as it is
        self.x.mul_(3).add_(1)
        self.out = torch.empty_like(self.x)
        for tensor in (self.x, self.text, self.time, self.out):
            torch._dynamo.mark_static_address(tensor)

    def step(self) -> None:
        x = self.x
        for block in self.blocks:
            x = block(x, self.text, self.time)
        self.out.copy_(x)

    def added(self) -> torch.Tensor:
        """What the blocks added to their input, as last computed."""
        return self.out.float() - self.x.float()


def snr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found - expected).square().mean().item()
    return math.inf if noise == 0 else 10 * math.log10(expected.square().mean().item() / noise)


@torch.no_grad()
def measure(
    name: str, shape: Shape, layers: int, images: list[int], bps: float, switches: list[str], steps: int, mode: str, device: torch.device
) -> list[Result]:
    """One shape: bf16, then ours once per switch of `fuse_norm`, for each number of images. The weights are gone afterwards."""
    found = []
    expected: dict[int, torch.Tensor] = {}
    blocks = make_blocks(shape, layers, device)
    for switch in tqdm([None, *switches], desc=name, leave=False):
        if switch is not None and switch == switches[0]:
            quantize_ours([module for module in blocks.modules() if isinstance(module, nn.Linear)], bps)
        for batch in images:
            state = Forward(blocks, shape, batch)
            passes.reset_report()
            with passes.configured(**({} if switch is None else {"fuse_norm": FUSE_NORM[switch]})):
                step, _ = compile_step(state.step, mode, device)
            report = passes.report()
            forward_ms = time_ms(step, steps, device)
            kernels = count_kernels(step).total() if device.type == "cuda" else None
            snr = None
            if switch == "off":
                expected[batch] = state.added()
            elif switch is not None and batch in expected:
                snr = snr_db(state.added(), expected[batch])
            made, left = report.made["fuse_norm"], {reason: count for (of, reason), count in report.left.items() if of == "fuse_norm"}
            weights = "bf16" if switch is None else str(bps)
            found.append(Result(name, batch, layers, weights, switch, forward_ms, kernels, made, left, snr))
            del state, step
            collect(device)
    return found


def table(results: list[Result]) -> str:
    base = {(r.shape, r.images): r for r in results if r.weights == "bf16"}
    lines = [
        f"| shape | images | weights | ms per forward of {results[0].layers} layers | against bf16 | kernels per layer | norms moved | "
        "norms left | SNR against off, dB |",
        "|---" * 9 + "|",
    ]
    for r in results:
        ratio = base[r.shape, r.images].forward_ms / r.forward_ms
        kernels = "-" if r.kernels is None else f"{r.kernels / r.layers:.4g}"
        left = ", ".join(f"{count}: {reason}" for reason, count in sorted((r.left or {}).items())) or "-"
        made = "-" if r.fuse_norm is None else str(r.made)
        snr = "-" if r.snr_db is None else "same" if math.isinf(r.snr_db) else f"{r.snr_db:.1f}"
        lines.append(f"| {r.shape} | {r.images} | {r.name} | {r.forward_ms:.3f} | {ratio:.2f}x | {kernels} | {made} | {left} | {snr} |")
    return "\n".join(lines)


def check(results: list[Result]) -> None:
    """
    Raises:
        SystemExit: moving norms changed more than roundings.
    """
    wrong = [r for r in results if r.snr_db is not None and not r.snr_db >= MIN_SNR_DB]
    if wrong:
        where = ", ".join(f"{r.shape} with {r.images} images, fuse_norm {r.fuse_norm}: {r.snr_db:.1f} dB" for r in wrong)
        raise SystemExit(f"SNR against fuse_norm off must be at least {MIN_SNR_DB:g} dB, got {where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["dit-xl-2", "large-1024"], help="(default dit-xl-2 large-1024)")
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="per forward (default 1)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (default 4)")
    parser.add_argument("--bps", type=float, default=4.0, help="rate of our weights (default 4)")
    parser.add_argument("--fuse-norm", nargs="+", choices=FUSE_NORM, default=["off", "on"], help="settings of the pass (default off on)")
    parser.add_argument("--steps", type=int, default=20, help=f"forwards per sample, of which there are {SAMPLES} (default 20)")
    parser.add_argument("--mode", choices=MODES, default="graph", help="how forwards are run (default graph)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="blocks of a few hundred thousand weights")
    parser.add_argument("--json", help="write all figures to a file")
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes}
    # what the others are compared with comes first
    switches = [name for name in FUSE_NORM if name in args.fuse_norm]
    torch.manual_seed(0)
    start_compiler(args.mode, device)
    results = []
    # one cache for all: what is measured is not compiling, and the graphs differ
    with cold_caches(args.mode):
        for name, shape in tqdm(shapes.items(), desc="shapes"):
            results += measure(name, shape, args.layers, args.images, args.bps, switches, args.steps, args.mode, device)
            collect(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, mode {args.mode}, {args.layers} layers{' (tiny)' if args.tiny else ''}")
    print(table(results))
    if args.json:
        conditions = {"device": where, "torch": torch.__version__, "mode": args.mode}
        with open(args.json, "w") as file:
            # JSON has no infinity
            rows = [{**asdict(r), "snr_db": r.snr_db if r.snr_db != math.inf else None} for r in results]
            json.dump({**conditions, "results": rows}, file, indent=1)
    check(results)


if __name__ == "__main__":
    main()
