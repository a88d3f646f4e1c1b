"""`hyperquant::codes_linear`: the quantized linear layer of a weight that is kept as the tensor cores' operands.

Definition.  `y = RHT(x * act_pre_scale) W_r^T + bias`, W_r the rotated weight of `hq_inductor.format.codes`; as `rice_linear`
             (`hq_inductor.ops.linear`) in all else: number formats, dtypes, gradients.
Choice.      On CUDA, codes go to the int8 tensor cores (`mma="int8"`, and `"auto"` for half precision) whatever the batch, and e4m3
             (`mma="fp8"`) to the library's fp8 product, where the device, bf16 activations and a multiple of 16 rows allow it. Otherwise,
             and on a CPU, the weight is multiplied in the activations' dtype, activations rounded as the format rounds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..format.codes import CodesLayout, check_packing, codes_layout, coefficients
from ..format.mma import fp8_rows, int8_tiles
from .launch import fp8_products
from .linear import WeightBlocks, check_activations, fp8_matmul, input_gradient, rotate_activations, row_blocks, rows_of, wide_dtype
from .registry import LIBRARY, NAMESPACE, register, traced


def check_stored(qdata: torch.Tensor, scale: torch.Tensor, lattice: str) -> CodesLayout:
    """The layout of stored codes, or `TypeError` / `ValueError`."""
    if qdata.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"qdata must be int8 (codes) or uint8 (e4m3), got {qdata.dtype}")
    if scale.dtype != torch.int32:
        raise TypeError(f"scale must be int32 (bits of fp32), got {scale.dtype}")
    if qdata.dim() != 3:
        raise ValueError(f"qdata must be [N, K / tile, tile], got shape {tuple(qdata.shape)}")
    expected = (qdata.shape[0], 1 if qdata.dtype == torch.uint8 else qdata.shape[1])
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale must have shape {expected} for qdata of shape {tuple(qdata.shape)}, got {tuple(scale.shape)}")
    return codes_layout(lattice, int(qdata.shape[2]))


def _check(x, qdata, scale, act_pre_scale, lattice: str, mma: str, in_features: int) -> CodesLayout:
    layout = check_stored(qdata, scale, lattice)
    check_activations(x, qdata, act_pre_scale, layout.tile, in_features)
    check_packing("codes", mma)
    if (mma == "fp8") != (qdata.dtype == torch.uint8):
        raise ValueError(f'mma must be "fp8" for e4m3 (uint8) and for nothing else, got {mma!r} and {qdata.dtype}')
    return layout


def _weight_blocks(qdata: torch.Tensor, scale: torch.Tensor, lattice: str, dtype: torch.dtype) -> WeightBlocks:
    for block in row_blocks(qdata, qdata.shape[1] * qdata.shape[2]):
        yield block, coefficients(qdata[block], scale[block], lattice, dtype)


def _round(rotated: torch.Tensor, tile: int, mma: str) -> torch.Tensor:
    """Rotated activations as the product in a format sees them, in their dtype."""
    if mma == "int8":
        return int8_tiles(rotated, tile).to(rotated.dtype)
    return fp8_rows(rotated, tile).to(rotated.dtype) if mma == "fp8" else rotated


def _codes_linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lattice: str,
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    layout = _check(x, qdata, scale, act_pre_scale, lattice, mma, x.shape[-1])
    rows, tiles, tile = qdata.shape
    rotated = _round(rotate_activations(x.reshape(-1, x.shape[-1]), act_pre_scale, layout, tiles * tile, seed), tile, mma)
    out = rotated.new_empty((rotated.shape[0], rows))
    for block, weight in _weight_blocks(qdata, scale, lattice, rotated.dtype):
        out[:, block] = rotated @ weight.t()
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def _codes_linear_cuda(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lattice: str,
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    if x.dtype == torch.float64:
        return _codes_linear(x, qdata, scale, act_pre_scale, bias, lattice, seed, mma)
    # Triton is there on Linux only, and takes its time to import
    from .fused import int8_matmul
    from .fused_rotation import rotate

    layout = _check(x, qdata, scale, act_pre_scale, lattice, mma, x.shape[-1])
    rows, tiles, _ = qdata.shape
    flat, values = rows_of(x), qdata.contiguous().flatten(1)
    bias = None if bias is None else bias.to(x.dtype)
    int8 = mma == "int8" or (mma == "auto" and x.dtype != torch.float32)
    fp8 = mma == "fp8" and fp8_products(x.device) and rows % 16 == 0 and flat.shape[0] > 0 and x.dtype == torch.bfloat16
    dtype = torch.int8 if int8 else torch.float8_e4m3fn if fp8 else x.dtype
    rotated, act_scale = rotate(flat, act_pre_scale, layout, tiles, seed, dtype)
    if int8:
        out = int8_matmul(rotated, act_scale, values, scale.contiguous().view(torch.float32), bias, x.dtype)
    elif fp8:
        row_scale = scale.contiguous().view(torch.float32).view(-1)
        out = fp8_matmul(rotated, act_scale, values.view(torch.float8_e4m3fn), row_scale, bias, x.dtype)
    else:
        out = F.linear(_round(rotated, layout.tile, mma), coefficients(qdata, scale, lattice, x.dtype), bias)
    return out.view(*x.shape[:-1], rows)


def _codes_linear_fake(x, qdata, scale, act_pre_scale, bias, lattice, seed, mma="auto"):
    traced()
    _check(x, qdata, scale, act_pre_scale, lattice, mma, x.shape[-1])
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


register(
    "codes_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? act_pre_scale, Tensor? bias, str lattice, int seed, "
    'str mma="auto") -> Tensor',
    _codes_linear_fake,
    replay=True,
    CPU=_codes_linear,
    CUDA=_codes_linear_cuda,
)


def _codes_linear_backward(
    grad: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    lattice: str,
    seed: int,
    in_features: int,
) -> torch.Tensor:
    layout = check_stored(qdata, scale, lattice)
    blocks = _weight_blocks(qdata, scale, lattice, wide_dtype(grad))
    return input_gradient(grad, blocks, act_pre_scale, layout, qdata.shape[1] * layout.tile, seed, in_features)


def _codes_linear_backward_fake(grad, qdata, scale, act_pre_scale, lattice, seed, in_features):
    layout = check_stored(qdata, scale, lattice)
    check_activations(grad, qdata, act_pre_scale, layout.tile, in_features)
    return grad.new_empty((*grad.shape[:-1], in_features))


register(
    "codes_linear_backward(Tensor grad, Tensor qdata, Tensor scale, Tensor? act_pre_scale, str lattice, int seed, "
    "int in_features) -> Tensor",
    _codes_linear_backward_fake,
    CPU=_codes_linear_backward,
    CUDA=_codes_linear_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, qdata, scale, act_pre_scale, _, ctx.lattice, ctx.seed = inputs[:7]
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(qdata, scale, act_pre_scale)


def _backward(ctx, grad: torch.Tensor):
    qdata, scale, act_pre_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hyperquant.codes_linear_backward(grad, qdata, scale, act_pre_scale, ctx.lattice, ctx.seed, ctx.in_features)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::codes_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
