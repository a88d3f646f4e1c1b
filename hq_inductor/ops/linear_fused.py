"""`hyperquant::rice_linear_fused`: linear layers that read the same activations, with what comes before and after, as one op.

Definition.  `y = concat_i(rice_linear(prologue(x), qdata_i, act_pre_scale, bias_i)) + residual`; `hq_inductor.ops.prologue` defines the
             prologues. Biases and the residual are added to the fp32 sums before the one rounding to the dtype of x; after library
             products, which round by themselves, the residual is.
Why.         Siblings share the rotation and quantization of activations, the launch over their tiles and, for large batches, the library
             product. `hq_inductor.passes` writes this op; nobody needs to call it.
Choice.      As `rice_linear` (`hq_inductor.ops.linear`), whose mma formats it takes. On CUDA the prologue is computed by the kernel that
             rotates, for every batch size.
Gradients.   None: graph passes leave training graphs alone.
"""

from __future__ import annotations

import torch

from ..format.layout import TileLayout
from ..format.mma import check_mma
from .launch import fused_batch
from .linear import check_linear, library_linear, products, rotate_activations, rows_of, takes_fused_fp8, takes_fused_kernel
from .prologue import Prologue
from .registry import check_qdata, register


def _check(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    residual: torch.Tensor | None,
    prologue: Prologue,
    lattice: str,
    tile: int,
    code: list[int],
    mma: str,
) -> list[TileLayout]:
    """The siblings' layouts."""
    if not len(qdata) == len(bias) == len(code) >= 1:
        raise ValueError(f"qdata, bias and code must have one item per weight, got {len(qdata)}, {len(bias)} and {len(code)}")
    layouts = [check_qdata(q, lattice, tile, c) for q, c in zip(qdata, code, strict=True)]
    check_mma(mma)
    for q, b, layout in zip(qdata, bias, layouts, strict=True):
        check_linear(x, q, act_pre_scale, layout, x.shape[-1])
        if b is not None and b.shape != q.shape[:1]:
            raise ValueError(f"bias must have shape ({q.shape[0]},), got {tuple(b.shape)}")
    prologue.check(x)
    if residual is not None:
        if len(qdata) > 1:
            raise ValueError(f"residual must be None for more than one weight, got {len(qdata)} weights")
        if residual.shape != (*x.shape[:-1], qdata[0].shape[0]):
            raise ValueError(f"residual must have shape {(*x.shape[:-1], qdata[0].shape[0])}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    return layouts


def _rice_linear_fused(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    prologue: str,
    eps: float,
    lattice: str,
    tile: int,
    code: list[int],
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    before = Prologue(prologue, gate, norm_weight, norm_bias, eps)
    layouts = _check(x, qdata, act_pre_scale, bias, residual, before, lattice, tile, code, mma)
    flat = before.apply(x).reshape(-1, x.shape[-1])
    rotated = rotate_activations(flat, act_pre_scale, layouts[0], qdata[0].shape[1] * tile, seed)
    outs = [products(rotated, q, layout, mma) for q, layout in zip(qdata, layouts, strict=True)]
    out = torch.cat([out if b is None else out + b for out, b in zip(outs, bias, strict=True)], 1)
    if residual is not None:
        out = out + residual.reshape(out.shape)
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[1])


def _rice_linear_fused_cuda(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    prologue: str,
    eps: float,
    lattice: str,
    tile: int,
    code: list[int],
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    if x.dtype == torch.float64:
        return _rice_linear_fused(
            x, qdata, act_pre_scale, bias, gate, norm_weight, norm_bias, residual, prologue, eps, lattice, tile, code, seed, mma
        )
    from .fused import sibling_linear  # Triton is there on Linux only, and takes its time to import

    before = Prologue(prologue, gate, norm_weight, norm_bias, eps)
    layouts = _check(x, qdata, act_pre_scale, bias, residual, before, lattice, tile, code, mma)
    # kernels take rows
    before = Prologue(prologue, *(None if t is None else rows_of(t) for t in (gate, norm_weight, norm_bias)), eps)
    flat, qdata = rows_of(x), [q.contiguous() for q in qdata]
    added = None if residual is None else rows_of(residual)
    fp8 = takes_fused_fp8(mma, flat, layouts[0], qdata[0].shape[1])
    if fp8 or takes_fused_kernel(mma, x.dtype, flat.shape[0], fused_batch(x.device)):
        out = sibling_linear(flat, qdata, act_pre_scale, bias, layouts, seed, added, before, fp8)
    else:
        out = library_linear(flat, qdata, act_pre_scale, bias, layouts, seed, mma, before)
        if added is not None:
            out += added
    return out.view(*x.shape[:-1], out.shape[1])


def _rice_linear_fused_fake(
    x,
    qdata,
    act_pre_scale,
    bias,
    gate,
    norm_weight,
    norm_bias,
    residual,
    prologue,
    eps,
    lattice,
    tile,
    code,
    seed,
    mma="auto",
):
    before = Prologue(prologue, gate, norm_weight, norm_bias, eps)
    _check(x, qdata, act_pre_scale, bias, residual, before, lattice, tile, code, mma)
    return x.new_empty((*x.shape[:-1], sum(q.shape[0] for q in qdata)))


register(
    "rice_linear_fused(Tensor x, Tensor[] qdata, Tensor? act_pre_scale, Tensor?[] bias, Tensor? gate, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? residual, str prologue, float eps, str lattice, int tile, int[] code, int seed, "
    'str mma="auto") -> Tensor',
    _rice_linear_fused_fake,
    # views of other layers' outputs come in: rows may lie any distance apart
    tags=(torch.Tag.flexible_layout,),
    replay=True,
    CPU=_rice_linear_fused,
    CUDA=_rice_linear_fused_cuda,
)
