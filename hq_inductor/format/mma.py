"""The number formats of the matrix products: what activations and rotated weights are rounded to before they are multiplied.

| `mma`   | activations                                   | weights                                  |
| `int8`  | int8, one fp32 scale per row and tile         | lattice codes as they are, exact         |
| `fp8`   | e4m3, one fp32 scale per row                  | e4m3, one fp32 scale per row             |
| `bf16`  | the activations' own dtype                    | the same dtype                           |
| `nvfp4` | e2m1, an e4m3 scale per 16, one fp32 per tensor | the same                               |
| `mxfp4` | e2m1, a power-of-two scale per 32             | the same                                 |

Each function rounds and gives back real values: the reference for kernels, and what runs where the hardware has no such format. Rounding of
elements is to nearest, ties to even; scales are chosen as the formats' specifications do. `quantize_nvfp4` and `quantize_mxfp4` give the
bits instead, for tensor cores that multiply them.
Source.  OCP Microscaling Formats 1.0 (mxfp4: shared exponent `floor(log2(max)) - 2`); NVIDIA's nvfp4 (block scale `max / 6` in e4m3,
             tensor scale
         `max / (6 * 448)`); HyperQuant, arXiv 2606.23406 (tensor-core paths).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MMA = ("auto", "int8", "fp8", "bf16", "nvfp4", "mxfp4")
E4M3_MAX = 448.0
E2M1_MAX = 6.0
_SMALLEST = 2.0**-126


def check_mma(mma: str) -> None:
    if mma not in MMA:
        raise ValueError(f"mma must be one of {', '.join(map(repr, MMA))}, got {mma!r}")


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even mantissa; larger values saturate."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    # steps of a half up to 2, of one up to 4, of two up to 6
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign(torch.round(magnitude / step) * step, x)


def int8_tiles(x: torch.Tensor, tile: int) -> torch.Tensor:
    """Rotated activations `[M, K]` rounded to int8 with one scale per row and `tile` columns; returned as fp32."""
    tiles = x.to(torch.float32).unflatten(-1, (-1, tile))
    scale = tiles.abs().amax(-1, keepdim=True) / 127
    return (torch.round(tiles / scale.clamp(min=_SMALLEST)) * scale).flatten(-2)


def fp8_scale(x: torch.Tensor, tile: int) -> torch.Tensor:
    """Scale `[M]` of each row of `[M, K]`: the largest norm of its tiles, which no element exceeds, at the end of e4m3.

    A norm is known before the rotation, and a floating point format loses no precision to a bound that is a few times too large.
    """
    tiles = x.to(torch.float32).unflatten(-1, (-1, tile))
    # squares of large elements would overflow
    largest = tiles.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    return (((tiles / largest).norm(dim=-1) * (largest / E4M3_MAX)[..., 0]).amax(-1)).clamp(min=_SMALLEST)


def fp8_rows(x: torch.Tensor, tile: int) -> torch.Tensor:
    """Rows of `[M, K]` rounded to e4m3 with one scale each; returned as fp32."""
    scale = fp8_scale(x, tile)[:, None]
    return (x.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale


@dataclass(frozen=True)
class Fp4:
    """A matrix of 4-bit floats with a scale per block of a row.

    Args:
        codes: `[M, K / 2]` uint8, of `pack_e2m1`.
        scale: `[M, K / block]`: e4m3 (nvfp4), or uint8 exponents plus 127 (e8m0, mxfp4).
        block: 16 (nvfp4) or 32 (mxfp4).
        factor: scale of the whole matrix, `[]` fp32 (nvfp4), or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    block: int
    factor: torch.Tensor | None = None


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Values of `round_e2m1`, `[..., K]`, as bytes `[..., K / 2]`: sign, two bits of exponent, one of mantissa; even indices are low."""
    magnitude = values.abs()
    # 0, 0.5, 1, 1.5 | 2, 3 | 4, 6
    code = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4)).to(torch.uint8)
    low, high = (code | (torch.signbit(values).to(torch.uint8) << 3)).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def _round_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements `[M, K / 16, 16]`, scales of blocks `[M, K / 16]` e4m3, and of the matrix."""
    blocks = x.to(torch.float32).unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    # a zero, or of no rows there were no largest one
    factor = (torch.cat((largest.flatten(), largest.new_zeros(1))).amax() / (E2M1_MAX * E4M3_MAX)).clamp(min=_SMALLEST)
    scale = (largest / (E2M1_MAX * factor)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scale.to(torch.float32) * factor).clamp(min=_SMALLEST)
    return round_e2m1(blocks / step[..., None]), scale, factor


def _round_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements `[M, K / 32, 32]`, and exponents of blocks `[M, K / 32]`, int32 with a bias of 127."""
    blocks = x.to(torch.float32).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1).clamp(min=_SMALLEST)
    # of a block that is not finite the specification's NaN, 255, of which the fp32 of the same bits is infinity
    exponent = (torch.floor(torch.log2(largest)) - 2).nan_to_num(128, 128).clamp(min=-126).to(torch.int32) + 127
    return round_e2m1(blocks / (exponent << 23).view(torch.float32)[..., None]), exponent


def quantize_nvfp4(x: torch.Tensor) -> Fp4:
    """`[M, K]`, K a multiple of 16, rounded to nvfp4."""
    elements, scale, factor = _round_nvfp4(x)
    return Fp4(pack_e2m1(elements.flatten(-2)), scale, 16, factor)


def quantize_mxfp4(x: torch.Tensor) -> Fp4:
    """`[M, K]`, K a multiple of 32, rounded to mxfp4."""
    elements, exponent = _round_mxfp4(x)
    return Fp4(pack_e2m1(elements.flatten(-2)), exponent.to(torch.uint8), 32)


def nvfp4_blocks(x: torch.Tensor) -> torch.Tensor:
    """`[M, K]`, K a multiple of 16, rounded to nvfp4; returned as fp32."""
    elements, scale, factor = _round_nvfp4(x)
    return (elements * (scale.to(torch.float32) * factor)[..., None]).flatten(-2)


def mxfp4_blocks(x: torch.Tensor) -> torch.Tensor:
    """`[M, K]`, K a multiple of 32, rounded to mxfp4; returned as fp32."""
    elements, exponent = _round_mxfp4(x)
    return (elements * (exponent << 23).view(torch.float32)[..., None]).flatten(-2)


def round_operands(x: torch.Tensor, weight: torch.Tensor, mma: str, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated activations `[M, K]` and weight `[N, K]` as the product in format `mma` sees them, in the dtype of `x`."""
    if mma == "int8":
        return int8_tiles(x, tile).to(x.dtype), weight
    rounding = {"fp8": lambda rows: fp8_rows(rows, tile), "nvfp4": nvfp4_blocks, "mxfp4": mxfp4_blocks}.get(mma)
    if rounding is None:
        return x, weight
    return rounding(x).to(x.dtype), rounding(weight).to(x.dtype)
