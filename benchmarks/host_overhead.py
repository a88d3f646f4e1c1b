"""What the host pays per quantized layer: a step of many small linear layers, quantized and not, wall time and compile time.

    python benchmarks/host_overhead.py [--layers 224] [--features 256] [--modes eager default reduce-overhead] [--json FILE]

Layers are so small that a GPU is done before the host is. On a CPU the decoder's own work would hide what is looked for, so each kind of
layer is also timed with a kernel that returns at once: what is left is dispatch, guards and generated code. On a CPU times are those of
the one thread that does all this, whatever else the machine is doing.

    linear            nn.Linear
    linear, empty     the same weights through an op that returns at once
    ours              HyperQuantLinear
    ours, empty       the same with a kernel that returns at once
    subclass, empty   a HyperQuantTensor as the parameter of an nn.Linear: what HyperQuantLinear is there to avoid
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from compiled_steps import MODES, cold_caches, compile_step, start_compiler, time_ms
from torch import nn
from tqdm import tqdm

from hq_inductor import HyperQuantLinear, HyperQuantTensor
from hq_inductor.passes import configured

KINDS = ("linear", "linear, empty", "ours", "ours, empty", "subclass, empty")
BASE = {"ours": "linear", "ours, empty": "linear, empty", "subclass, empty": "linear, empty"}


@dataclass(frozen=True)
class Result:
    kind: str
    mode: str
    step_ms: float
    compile_s: float


def _empty_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# registered like ours: the least that an opaque linear layer can cost
_LIBRARY = torch.library.Library("host_overhead", "DEF")
_LIBRARY.define("empty_linear(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.impl("empty_linear", _empty_linear, "CPU")
_LIBRARY.impl("empty_linear", _empty_linear, "CUDA")
torch.library.register_fake("host_overhead::empty_linear", _empty_linear, lib=_LIBRARY)


class EmptyLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.host_overhead.empty_linear(input, self.weight)


@contextlib.contextmanager
def empty_kernels() -> Iterator[None]:
    """`hyperquant::rice_linear` returns at once, uninitialized memory. Generated code calls it by the dispatcher, or would not find it."""
    library = torch.library.Library("hyperquant", "IMPL")

    def call(x, qdata, act_pre_scale, bias, lattice, tile, code, seed, mma="auto"):
        return _empty_linear(x, qdata)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Oo]verrid", UserWarning)
        for key in ("CPU", "CUDA"):
            for overload in ("rice_linear", "rice_linear.no_grad"):
                library.impl(overload, call, key, allow_override=True)
    try:
        with configured(direct_calls=False):
            yield
    finally:
        library._destroy()


def make_model(kind: str, layers: int, features: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`layers` layers with weights of their own that keep the size of activations."""
    weight = torch.randn(features, features, device=device, dtype=dtype) / features**0.5
    packed = HyperQuantTensor.from_hp(weight, bps=4, effort=0)
    model = nn.Sequential()
    for index in range(layers):
        linear = nn.Linear(features, features, bias=False, device="meta", dtype=dtype).eval().requires_grad_(False)
        # rows in another order: memory of its own at no cost
        face = packed._replace(qdata=packed.qdata.roll(index, 0))
        if kind.startswith("ours"):
            HyperQuantLinear.from_linear(linear, face)
        else:
            own = face if kind.startswith("subclass") else weight.roll(index, 0)
            linear.weight = nn.Parameter(own, requires_grad=False)
        if kind == "linear, empty":
            linear.__class__ = EmptyLinear
        model.append(linear)
    return model


@torch.no_grad()
def measure(kind: str, mode: str, layers: int, features: int, batch: int, steps: int, device: torch.device) -> Result:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(kind, layers, features, device, dtype)
    x = torch.randn(batch, features, device=device, dtype=dtype)
    with empty_kernels() if kind in ("ours, empty", "subclass, empty") else contextlib.nullcontext(), cold_caches(mode):
        step, seconds = compile_step(lambda: model(x), mode, device)
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        return Result(kind, mode, time_ms(step, steps, device, clock=clock), seconds)


def table(results: list[Result], layers: int) -> str:
    lines = ["| layers | mode | ms per step | us per layer | wall time, ratio | compile, s | compile, ratio |", "|---" * 7 + "|"]
    for r in results:
        base = next((b for b in results if b.kind == BASE.get(r.kind) and b.mode == r.mode), None)
        ratio = f"{r.step_ms / base.step_ms:.2f}" if base else "-"
        compile_ratio = f"{r.compile_s / base.compile_s:.2f}" if base and base.compile_s else "-"
        seconds = f"{r.compile_s:.1f}" if r.compile_s else "-"
        lines.append(f"| {r.kind} | {r.mode} | {r.step_ms:.3f} | {1e3 * r.step_ms / layers:.2f} | {ratio} | {seconds} | {compile_ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=224, help="as many as an 8B model has (default 224)")
    parser.add_argument("--features", type=int, default=256, help="rows and columns of a layer (default 256)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="per sample (default 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: eager default, and reduce-overhead on CUDA")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of layers (default all; without `ours` on a CPU)")
    parser.add_argument("--json", help="write all figures to a file")
    args = parser.parse_args()
    device = torch.device(args.device)
    modes = args.modes or ["eager", "default", *(["reduce-overhead"] if device.type == "cuda" else [])]
    kinds = args.kinds or [kind for kind in KINDS if kind != "ours" or device.type == "cuda"]
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    start_compiler(modes[-1], device)
    results = []
    for mode in modes:
        for kind in tqdm(kinds, desc=mode, leave=False):
            results.append(measure(kind, mode, args.layers, args.features, args.batch, args.steps, device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, 1 thread"
    print(f"{where}, torch {torch.__version__}; {args.layers} layers of {args.features} x {args.features}, batch {args.batch}")
    print(table(results, args.layers))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": where, "torch": torch.__version__, "results": [asdict(r) for r in results]}, file, indent=1)


if __name__ == "__main__":
    main()
