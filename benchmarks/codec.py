"""CPU codec speed and Gaussian quality: quantize + encode, decode, SNR at an exact rate on a 4096 x 4096 N(0, 1) matrix.

python benchmarks/codec.py
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
from tqdm import tqdm

from hq_inductor import HyperQuantTensor

ROWS = COLUMNS = 4096
RUNS = 3


def seconds(function) -> float:
    """Median wall time of `RUNS` calls."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    millions = weight.numel() / 1e6
    rows = []
    for bps in tqdm((4.0, 3.0, 2.0), desc="rates"):
        begin = time.perf_counter()
        packed = HyperQuantTensor.from_hp(weight, bps=bps)
        encode = time.perf_counter() - begin
        decode = seconds(lambda packed=packed: torch.ops.hyperquant.rice_decode(packed.qdata, packed.lattice, packed.tile, packed.code))
        error = packed.dequantize() - weight
        snr_db = -10 * torch.log10(error.square().mean() / weight.square().mean()).item()
        rows.append((bps, packed.bits_per_weight, snr_db, millions / encode, millions / decode))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("| bps | bits per weight, all in | SNR, dB | quantize + encode, M weights/s | decode, M weights/s |")
    print("|---|---|---|---|---|")
    for row in rows:
        print("| {:g} | {:.4f} | {:.2f} | {:.1f} | {:.0f} |".format(*row))


if __name__ == "__main__":
    main()
