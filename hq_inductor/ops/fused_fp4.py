"""Launch: products of nvfp4 and mxfp4 (`hq_inductor.ops.kernels.block_scaled_matmul`)."""

from __future__ import annotations

import torch

from ..format.mma import Fp4
from . import ahead
from .kernels.block_scaled_matmul import block_scaled_matmul_kernel

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 128
# with 4, sums of the epilogue spill
NUM_WARPS = 8


def block_scaled_matmul(x: Fp4, weight: Fp4, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`[M, N]` in `dtype` of activations `[M, K]` and weight `[N, K]` in one format, K a multiple of 128; `bias`: `[N]` or None."""
    (batch, half), rows = x.codes.shape, weight.codes.shape[0]
    out = torch.empty((batch, rows), dtype=dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    ahead.launch(
        block_scaled_matmul_kernel,
        (-(-batch // BLOCK_M) * -(-rows // BLOCK_N),),
        x.codes,
        x.scale,
        weight.codes,
        weight.scale,
        out if x.factor is None else x.factor,
        out if weight.factor is None else weight.factor,
        out if bias is None else bias.contiguous(),
        out,
        batch,
        rows,
        2 * half // BLOCK_K,
        GROUP=x.block,
        FACTORS=x.factor is not None,
        HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP_M=8,
        num_warps=NUM_WARPS,
        num_stages=3,
    )
    return out
