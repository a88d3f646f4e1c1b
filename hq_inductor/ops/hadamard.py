"""`hyperquant::hadamard`: randomized Hadamard transform of blocks of the last dimension, and its inverse."""

from __future__ import annotations

import torch

from ..format.hadamard import hadamard_ref
from .registry import LIBRARY, NAMESPACE, check_floating, register


def _hadamard(x: torch.Tensor, block: int, seed: int = 0, inverse: bool = False) -> torch.Tensor:
    check_floating("x", x)
    return hadamard_ref(x, block, seed, inverse).contiguous()


def _hadamard_fake(x: torch.Tensor, block: int, seed: int = 0, inverse: bool = False) -> torch.Tensor:
    check_floating("x", x)
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    if x.shape[-1] % block:
        raise ValueError(f"last dimension must be a multiple of block={block}, got {x.shape[-1]}")
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.block, ctx.seed, ctx.inverse = inputs


def _backward(ctx, grad: torch.Tensor):
    # orthogonal: the transpose is the inverse
    return torch.ops.hyperquant.hadamard(grad, ctx.block, ctx.seed, not ctx.inverse), None, None, None


register("hadamard(Tensor x, int block, int seed=0, bool inverse=False) -> Tensor", _hadamard_fake, CPU=_hadamard, CUDA=_hadamard)
torch.library.register_autograd(f"{NAMESPACE}::hadamard", _backward, setup_context=_setup_context, lib=LIBRARY)
