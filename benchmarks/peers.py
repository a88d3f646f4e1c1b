"""Other quantizers, written compactly from their definitions, for comparison at their true rates.

Every peer takes a weight `[N, K]` and returns what its decoder would: `[N, K]` fp32. `bits_per_weight(K)` counts codes and scales.
Nothing here is packed or fast; none of it is tuned against our own format.

Sources.  Lloyd-Max: Max, Quantizing for minimum distortion, 1960; as weights after a random rotation: TurboQuant, arXiv 2504.19874.
          HIGGS: arXiv 2411.17525 (random Hadamard, one scale per group, a grid of n points in p dimensions optimal for N(0, I)).
          NF4: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E. int4, int3: minimum and maximum of a group, as in torchao.
          nvfp4: NVIDIA, Transformer Engine (blocks of 16, e4m3 scales, one fp32 scale per tensor). mxfp4: OCP Microscaling Formats
          specification 1.0 (blocks of 32, e8m0 scales). Shannon: rate-distortion function of the Gaussian source.
          Trellis coding: `benchmarks/trellis.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hq_inductor.format.hadamard import hadamard_ref

_GRID_SAMPLES = 1 << 16


def shannon_snr_db(bits: float) -> float:
    """The least distortion any code can have on N(0, 1), as an SNR: `D(R) = 2^(-2 R)`."""
    return 20 * math.log10(2) * bits


@dataclass(frozen=True)
class Peer:
    """A quantizer at its true rate.

    Attributes:
        name: as printed in tables.
        quantize: `[N, K]` floating point to `[N, K]` fp32.
        code_bits: bits per weight of the codes alone.
        scale_bits, group: bits of scales (and zero points) per `group` weights; `group=None` means one per row.
        published_snr_db: the figure on N(0, 1) that the source prints or implies, or None.
    """

    name: str
    quantize: Callable[[torch.Tensor], torch.Tensor]
    code_bits: float
    scale_bits: int
    group: int | None
    published_snr_db: float | None = None

    def bits_per_weight(self, columns: int) -> float:
        return self.code_bits + self.scale_bits / (self.group or columns)


def _nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest of ascending levels to each element."""
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


@functools.lru_cache(maxsize=64)
def lloyd_max_levels(count: int) -> torch.Tensor:
    """The `count` levels of least mean squared error for N(0, 1), ascending, by Lloyd's fixed point in fp64."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    # Panter and Dite: optimal levels are spread like the density of N(0, 3)
    levels = math.sqrt(3) * normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(20000):
        edges = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        updated = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
        if (updated - levels).abs().max() < 1e-10:
            break
        levels = updated
    return levels.to(torch.float32)


def _nearest_grid(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Index of the nearest grid point `[n, p]` to each row of `x` `[m, p]`; blocks bound the memory."""
    offset = grid.square().sum(-1) / 2
    return torch.cat([(block @ grid.t() - offset).argmax(-1) for block in x.split(1 << 14)])


@functools.lru_cache(maxsize=8)
def higgs_grid(points: int, dimensions: int = 2) -> torch.Tensor:
    """A grid `[points, dimensions]` of least mean squared error for N(0, I): k-means on a fixed low-discrepancy sample."""
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(_GRID_SAMPLES, dtype=torch.float64)
    sample = torch.distributions.Normal(0.0, 1.0).icdf(uniform.clamp(1e-9, 1 - 1e-9)).to(torch.float32)
    # spread like the density to the power d / (d + 2), which is where optimal points lie
    grid = sample[:points] * math.sqrt((dimensions + 2) / dimensions)
    for _ in range(60):
        index = _nearest_grid(sample, grid)
        count = torch.bincount(index, minlength=points)
        sums = torch.zeros_like(grid).index_add_(0, index, sample)
        grid = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], grid)
    return grid


def _rotated(quantize_rows: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A quantizer of rows with unit root mean square, after a random Hadamard transform; one 16-bit scale per row."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        columns = weight.shape[1]
        block = min(columns & -columns, 1024)
        x = hadamard_ref(weight.to(torch.float32), block)
        scale = x.square().mean(-1, keepdim=True).sqrt().to(torch.bfloat16).to(torch.float32).clamp(min=1e-30)
        return hadamard_ref(quantize_rows(x / scale) * scale, block, inverse=True)

    return quantize


def lloyd_max(levels: int) -> Peer:
    """Scalar Lloyd-Max levels after a rotation (TurboQuant's quantizer); `log2(levels)` bits."""
    # distortions of Max's table I
    published = {4: 9.30, 8: 14.62, 16: 20.22, 32: 26.01}.get(levels)
    return Peer(
        f"Lloyd-Max {levels}", _rotated(lambda x: _nearest_level(x, lloyd_max_levels(levels))), math.log2(levels), 16, None, published
    )


def higgs(points: int, dimensions: int = 2) -> Peer:
    """HIGGS: a grid of `points` in `dimensions` after a random Hadamard transform; `log2(points) / dimensions` bits."""

    def quantize_rows(x: torch.Tensor) -> torch.Tensor:
        grid = higgs_grid(points, dimensions)
        return grid[_nearest_grid(x.reshape(-1, dimensions), grid)].reshape(x.shape)

    published = {(256, 2): 20.97, (64, 2): 15.24, (16, 2): 9.70}.get((points, dimensions))
    return Peer(f"HIGGS p={dimensions} n={points}", _rotated(quantize_rows), math.log2(points) / dimensions, 16, None, published)


@functools.lru_cache(maxsize=1)
def nf4_levels() -> torch.Tensor:
    """The 16 NormalFloat levels: quantiles of N(0, 1), eight negative and nine from zero up, scaled to [-1, 1]."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat((negative, torch.zeros(1), positive)).sort().values
    return levels / levels.abs().max()


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.to(torch.float32).unflatten(-1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True).to(torch.bfloat16).to(torch.float32).clamp(min=1e-30)
    return (_nearest_level(groups / scale, nf4_levels()) * scale).flatten(-2)


def _integer(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    groups = weight.to(torch.float32).unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).to(torch.bfloat16).to(torch.float32).clamp(min=1e-30)
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(-2)


E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    levels = x.new_tensor(sorted({sign * level for sign in (-1, 1) for level in E2M1_LEVELS}))
    return _nearest_level(x.clamp(-6, 6), levels)


def _nvfp4(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.to(torch.float32)
    tensor_scale = (weight.abs().amax() / (6 * 448)).clamp(min=1e-30)
    blocks = weight.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / tensor_scale).to(torch.float8_e4m3fn).to(torch.float32) * tensor_scale
    scale = scale.clamp(min=1e-30)
    return (_e2m1(blocks / scale) * scale).flatten(-2)


def _mxfp4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.to(torch.float32).unflatten(-1, (-1, 32))
    # the specification's shared exponent: that of the largest element, less the largest exponent of e2m1
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120))) - 2
    return (_e2m1(blocks / torch.exp2(exponent)) * torch.exp2(exponent)).flatten(-2)


NF4 = Peer("NF4 g64", _nf4, 4, 16, 64, 20.7)
INT4 = Peer("int4 g128", functools.partial(_integer, bits=4, group=128), 4, 32, 128, 20.0)
INT3 = Peer("int3 g128", functools.partial(_integer, bits=3, group=128), 3, 32, 128)
NVFP4 = Peer("nvfp4", _nvfp4, 4, 8, 16, 20.5)
MXFP4 = Peer("mxfp4", _mxfp4, 4, 8, 32, 18.8)

PEERS: tuple[Peer, ...] = (
    *(higgs(points) for points in (16, 64, 256)),
    *(lloyd_max(levels) for levels in (4, 8, 16)),
    NF4,
    INT4,
    INT3,
    NVFP4,
    MXFP4,
)


def snr_db(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """`10 log10(sum(w^2) / sum((w - q)^2))`."""
    error = (quantized.to(torch.float64) - weight.to(torch.float64)).square().sum()
    return 10 * math.log10((weight.to(torch.float64).square().sum() / error).item())
