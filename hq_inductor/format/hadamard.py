"""Randomized Hadamard transform (RHT) of blocks along the last dimension.

Definition.  `y = H (s * x) / sqrt(B)` per block of B consecutive elements, H the Sylvester Hadamard matrix, s random signs. The inverse is
             `x = s * (H y) / sqrt(B)`. The same B signs serve every block, so a slice of columns at block boundaries needs no offset,
             and layers that read the same activation with the same seed share its transform.
Source.      HyperQuant, arXiv 2606.23406, section on incoherence processing; QuIP#, arXiv 2402.04396.
"""

from __future__ import annotations

import functools
import math

import torch

from .on_device import on_device

MAX_BLOCK = 512


def hadamard_block(tile: int) -> int:
    """Block of the transform: the largest power of two, at most 512, that divides the tile."""
    return min(tile & -tile, MAX_BLOCK)


@functools.lru_cache(maxsize=256)
def _sign_list(block: int, seed: int) -> tuple[float, ...]:
    signs = []
    for index in range(block):
        # the finalizer of MurmurHash3: the same bits on every device and torch version, cheap enough to recompute in a kernel
        h = (index * 0x9E3779B1 + seed * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        signs.append(-1.0 if (h ^ (h >> 16)) & 1 else 1.0)
    return tuple(signs)


def rht_signs(block: int, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The random signs of one block, `[block]`, +1 or -1, a pure function of (seed, position). Made once per device; not to be written
    to."""
    key = ("signs", block, seed, dtype)
    return on_device(key, lambda: torch.tensor(_sign_list(block, seed), dtype=dtype), torch.device(device))


def _walsh_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Unnormalized H x on the last dimension, which is `block` long."""
    shape = x.shape
    x = x.reshape(-1, block)
    span = 1
    while span < block:
        a, b = x.reshape(-1, block // (2 * span), 2, span).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).reshape(-1, block)
        span *= 2
    return x.reshape(shape)


def hadamard_ref(x: torch.Tensor, block: int, seed: int = 0, inverse: bool = False) -> torch.Tensor:
    """Randomized Hadamard transform of every block of the last dimension.

    Args:
        x: `[..., K]`, floating point; K a multiple of `block`. Computed in fp32 (fp64 for fp64 input).
        block: power of two.
        seed: selects the signs.
        inverse: apply the inverse instead.

    Returns:
        `[..., K]`, dtype of `x`.

    Raises:
        ValueError: `block` is not a power of two, or K is not a multiple of it.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    if x.shape[-1] % block:
        raise ValueError(f"last dimension must be a multiple of block={block}, got {x.shape[-1]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(dtype).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    signs = rht_signs(block, seed, x.device, dtype) * (1 / math.sqrt(block))
    out = _walsh_hadamard(blocks, block) * signs if inverse else _walsh_hadamard(blocks * signs, block)
    return out.reshape(x.shape).to(x.dtype)
