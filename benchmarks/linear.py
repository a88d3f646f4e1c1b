"""Linear layers of Llama-3 8B and 70B on this GPU: ours by number format, and what else one could run.

"codes" are the same weights with `packing="codes"`, 8 bits each. Each figure is the median of CUDA-graph replays of calls that take turns
on copies of the weight that do not fit the L2 together, activations' transform and quantization included.

python benchmarks/linear.py [--quick] [--tune [--save FILE]] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from tqdm import tqdm

from hq_inductor import HyperQuantTensor
from hq_inductor.ops.fused import fused_linear
from hq_inductor.ops.kernels.linear import most_strips
from hq_inductor.ops.kernels.shared import row_bytes
from hq_inductor.ops.launch import (
    CLUSTER_SHARE,
    REGISTERS,
    RING_COLUMNS,
    RING_KINDS,
    TIGHT_REGISTERS,
    WARP_ROWS,
    LinearLaunch,
    RingLaunch,
    decode_warps,
    linear_launch,
    multiprocessors,
    ring_products,
)
from hq_inductor.ops.launch_table import Shape, batch_class, read_table, write_table
from hq_inductor.ops.registry import tile_layout

SHAPES = [(4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
QUICK_SHAPES, QUICK_BATCHES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)], [1, 8, 16, 32, 64, 256, 1024, 4096]
CALLS, REPLAYS = 12, 7
OURS = ("int8", "auto", "fp8", "bf16")
# packing="codes", 8 bits per weight
CODES = {"codes int8": "int8", "codes fp8": "fp8"}
# the smallest and the largest batch of each class that is launched alike; an entry of a table of launches is faster at both
TUNED_BATCHES = [1, 8, 9, 16, 17, 32]
TUNED_RING_BATCHES = [33, 64, 65, 96, 97, 128]
# by how much, at the least: less would be noise
LEAST_GAIN = 1.02


def time_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds per call, the calls taking turns."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(max(CALLS, len(calls))):
            calls[index % len(calls)]()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / max(CALLS, len(calls)))
    return statistics.median(times[1:])


def copies(size_bytes: int) -> int:
    """How many of a weight of this size do not fit the L2 together."""
    return max(2, int(2.5 * torch.cuda.get_device_properties(0).L2_cache_size / size_bytes) + 1)


def packed_weights(rows: int, columns: int, bps: float) -> list[HyperQuantTensor]:
    """Distinct packed weights; rows repeat after 1024, which no kernel can notice."""
    weight = HyperQuantTensor.from_hp(torch.randn(min(rows, 1024), columns, device="cuda", dtype=torch.bfloat16), bps=bps, effort=0)
    qdata = weight.qdata.repeat(-(-rows // weight.qdata.shape[0]), 1, 1)[:rows]
    number = copies(qdata.numel() * 4)
    return [weight._replace(qdata=qdata.roll(i, 0).contiguous(), shape=(rows, columns)) for i in range(number)]


def peers(rows: int, columns: int) -> dict[str, Callable[[torch.Tensor], list[Callable] | None]]:
    """For each peer: from activations to calls on different weights, or None where it does not exist."""
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies(rows * columns * 2))]
    fp8 = [torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies(rows * columns))]
    int8 = [torch.randint(-127, 128, (rows, columns), device="cuda", dtype=torch.int8) for _ in range(copies(rows * columns))]
    row_scale = torch.ones(1, rows, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(
        torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.int32).to(torch.uint8), 8
    )
    int4 = [packed.clone() for _ in range(copies(rows * columns // 2))]
    scales = torch.ones(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)

    def fp8_calls(x):
        scale = torch.ones(len(x), 1, device="cuda")

        def call(weight):
            # the activations' quantization is part of the layer
            x8 = (x / scale.to(x.dtype)).to(torch.float8_e4m3fn)
            return torch._scaled_mm(x8, weight.t(), scale_a=scale, scale_b=row_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

        return [lambda w=w: call(w) for w in fp8]

    def int8_calls(x):
        if len(x) <= 16:
            return None
        x8 = torch.randint(-127, 128, x.shape, device="cuda", dtype=torch.int8)
        return [lambda w=w: torch._int_mm(x8, w.t()) for w in int8]

    return {
        "cuBLAS bf16": lambda x: [lambda w=w: F.linear(x, w) for w in dense],
        "fp8 _scaled_mm": fp8_calls,
        "int8 _int_mm": int8_calls,
        "int4 tinygemm": lambda x: (
            [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in int4] if len(x) <= 64 else None
        ),
    }


def read_rate(results: list[dict]) -> float:
    """Bytes per microsecond at which cuBLAS reads its weights at its best here: about what the memory gives."""
    return max(2 * row["N"] * row["K"] / row["time_us"]["cuBLAS bf16"] for row in results)


def launches_to_try(shape: Shape, batch: int, processors: int, ring: bool) -> list[LinearLaunch | RingLaunch]:
    """Launches of the fused kernel, that of the rules first; arguments as of `linear_launch`."""
    warps = decode_warps(shape.row_bytes)
    launches = [linear_launch(batch, shape.rows, shape.tiles, processors, shape.row_bytes, ring)]
    columns = next((c for c in REGISTERS if batch <= c), max(REGISTERS))
    strips = -(-shape.rows // WARP_ROWS)
    fewest = -(-strips // most_strips(columns, warps, shape.row_bytes))
    for registers, held in ((REGISTERS[columns], 2), (TIGHT_REGISTERS, 3)):
        slots = max(1, held * processors * (8 // warps) // -(-batch // columns))
        counts = {min(strips, max(fewest, slots * waves)) for waves in (1, 2, 3, 4)}
        launches += [LinearLaunch(columns, blocks, warps, registers) for blocks in sorted(counts)]
    if ring:
        columns = next((c for c in RING_COLUMNS if batch <= c), max(RING_COLUMNS))
        kinds = [kind.registers for kind in RING_KINDS if kind.columns == columns]
        splits = sorted({1, 2, 3, 4, max(1, shape.tiles // 4), max(1, shape.tiles // 2), shape.tiles} & set(range(1, shape.tiles + 1)))
        ways = [(parts, False) for parts in splits] + [(parts, True) for parts in CLUSTER_SHARE if 1 < parts <= shape.tiles]
        launches += [
            RingLaunch(columns, parts, n, registers, cluster)
            for registers in kinds
            for parts, cluster in ways
            for n in (4, 8)
            if n <= warps
        ]
        if warps == 8:
            shared = [parts for parts in CLUSTER_SHARE if 2 * parts <= shape.tiles]
            launches += [RingLaunch(columns, parts, 8, registers, parts > 1, sharing=2) for registers in kinds for parts in shared]
    return list(dict.fromkeys(launches))


def tune(rows: int, columns: int, batches: list[int], bps: float) -> tuple[Shape, dict[int, dict[LinearLaunch | RingLaunch, float]]]:
    """The shape, with any batch, and for each batch microseconds by launch, that of the rules first."""
    weights = packed_weights(rows, columns, bps)
    layout = tile_layout("e8", weights[0].tile, weights[0].code, weights[0].qdata.shape[-1])
    shape = Shape(0, rows, columns // layout.tile, row_bytes(layout.stream_words))
    times = {}
    for batch in tqdm(batches, desc=f"{rows}x{columns}", leave=False):
        x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
        times[batch] = {}
        for launch in launches_to_try(shape, batch, multiprocessors(x.device), ring_products(x.device)):
            calls = [lambda w=w, launch=launch, x=x: fused_linear(x, w.qdata, None, None, layout, 0, launch) for w in weights]
            times[batch][launch] = time_us(calls)
    return shape, times


def faster_launches(shape: Shape, times: dict[int, dict[LinearLaunch | RingLaunch, float]]) -> dict[Shape, tuple]:
    """Of what `tune` found the entries for a table: for each class of batches the launch with the largest gain, if that is enough."""
    entries = {}
    for largest in sorted({batch_class(batch, True) for batch in times}):
        of_class = [found for batch, found in times.items() if batch_class(batch, True) == largest]
        # the least gain among the batches, over the rules' launch
        gains = {n: min(found[next(iter(found))] / found[n] for found in of_class) for n in of_class[0] if all(n in f for f in of_class)}
        best = max(gains, key=gains.get)
        if gains[best] > LEAST_GAIN:
            entries[shape._replace(batch=largest)] = best, gains[best]
    return entries


def tune_all(shapes, batches: list[int], bps: float, save: str | None) -> None:
    """Print the fastest launches; write those that the rules do not choose but should have to a file."""
    entries = {}
    for rows, columns in tqdm(shapes, desc="shapes"):
        shape, times = tune(rows, columns, batches, bps)
        entries |= faster_launches(shape, times)
        for batch, found in times.items():
            fastest = [f"{us:.1f} us {launch}" for launch, us in sorted(found.items(), key=lambda pair: pair[1])[:4]]
            tqdm.write("\n    ".join([f"{rows} x {columns}, batch {batch}; by rule {next(iter(found.values())):.1f} us:", *fastest]))
    if save:
        about = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/linear.py", *sys.argv[1:]]),
        }
        write_table(save, about, entries)
        read_table(save, True)  # it is one that will be taken
        print(f"{len(entries)} launches written to {save}")


def measure(shapes, batches, bps: float) -> list[dict]:
    rows_out = []
    for rows, columns in tqdm(shapes, desc="shapes"):
        others, weights = peers(rows, columns), packed_weights(rows, columns, bps)
        codes = {name: [w.repack("codes", mma=mma) for w in weights[: copies(rows * columns)]] for name, mma in CODES.items()}
        for batch in tqdm(batches, desc=f"{rows}x{columns}", leave=False):
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            times = {}
            for mma in OURS:
                if mma == "int8" and batch > 256:
                    continue
                faces = [w._replace(mma=mma) for w in weights]
                times[f"ours {mma}"] = time_us([lambda w=w, x=x: F.linear(x, w) for w in faces])
            for name, faces in codes.items():
                times[name] = time_us([lambda w=w, x=x: F.linear(x, w) for w in faces])
            for name, calls_of in others.items():
                calls = calls_of(x)
                if calls is not None:
                    times[name] = time_us(calls)
            rows_out.append({"N": rows, "K": columns, "M": batch, "time_us": {k: round(v, 2) for k, v in times.items()}})
        del others, weights, codes
        torch.cuda.empty_cache()
    return rows_out


def table(results: list[dict], bps: float) -> str:
    names = list(dict.fromkeys(name for row in results for name in row["time_us"]))
    lines = [f"| N x K | M | {' | '.join(names)} | best ours / bf16 | G weights/s | GB/s | floor |", "|---" * (len(names) + 6) + "|"]
    for row in results:
        times = row["time_us"]
        best = min(v for k, v in times.items() if k.startswith("ours"))
        weights = row["N"] * row["K"]
        cells = [f"{times[name]:.1f}" if name in times else "-" for name in names]
        floor = weights * bps / 8 / read_rate(results)
        lines.append(
            f"| {row['N']} x {row['K']} | {row['M']} | {' | '.join(cells)} | {times['cuBLAS bf16'] / best:.2f} | "
            f"{weights / best / 1e3:.0f} | {weights * bps / 8 / best / 1e3:.0f} | {floor:.1f} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in results))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [row for row in results if (row["N"], row["K"]) == shape]
        for name in dict.fromkeys(name for row in rows for name in row["time_us"] if name != "cuBLAS bf16"):
            points = [(r["M"], r["time_us"]["cuBLAS bf16"] / r["time_us"][name]) for r in rows if name in r["time_us"]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linestyle="-" if name.startswith("ours") else ":", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="batch", xscale="log", yscale="log")
    axes[0][0].set_ylabel("speed, cuBLAS bf16 = 1")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bps", type=float, default=4.0)
    parser.add_argument("--quick", action="store_true", help="half of the shapes and batches")
    parser.add_argument("--tune", action="store_true", help="time launches of the fused kernel instead")
    parser.add_argument("--save", help="with --tune: write a table of launches, as hq_inductor/ops/launches/ has them")
    parser.add_argument("--json", help="write all figures to a file")
    parser.add_argument("--plot", help="write a picture")
    arguments = parser.parse_args()
    if arguments.save and not arguments.tune:
        parser.error("--save needs --tune")
    torch.manual_seed(0)
    shapes, batches = (QUICK_SHAPES, QUICK_BATCHES) if arguments.quick else (SHAPES, BATCHES)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.bps:g} bps, e8; microseconds")
    if arguments.tune:
        ring = ring_products(torch.device("cuda", torch.cuda.current_device()))
        tune_all(shapes, TUNED_BATCHES + (TUNED_RING_BATCHES if ring else []), arguments.bps, arguments.save)
        return
    results = measure(shapes, batches, arguments.bps)
    print(table(results, arguments.bps))
    print(f"floor: time to read the packed weight at {read_rate(results) / 1e3:.0f} GB/s, cuBLAS' best on bf16 weights in this run")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bps": arguments.bps, "results": results}, file)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
