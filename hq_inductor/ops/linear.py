"""`hyperquant::rice_linear`: the whole quantized linear layer as one op.

Definition.  `y = RHT(x * act_pre_scale) W_r^T + bias`, W_r the dequantized rotated weight. The RHT is orthogonal, so this is the layer of
             `W = RHT^-1(W_r) * act_pre_scale`. Products are accumulated in fp32; `mma` (`hq_inductor.format.mma`) says what their
             operands are rounded to.
Choice.      On a CPU the operands of `"auto"` and `"bf16"` are not rounded (fp32, or fp64 for fp64 activations), and other formats are
             emulated. On CUDA, `"int8"` is the fused kernel for batches up to `FUSED_BATCH` (`RING_BATCH` on sm_90), which decodes into the
             operands of the tensor cores; larger ones decode to int8 codes for a product of our own, which scales tile by tile
             (`hq_inductor.ops.kernels.ring_matmul` on sm_90). `"auto"` is `"int8"` for half-precision activations, elsewhere than on sm_90
             below `LIBRARY_BATCH` only, else `"bf16"`: the weight decoded to the activations' dtype for a library product. `"fp8"` is the
             fused kernel on sm_90 for half-precision batches up to `RING_BATCH`, and else decodes to e4m3 for a library product. nvfp4 and
             mxfp4 are decoded, quantized and multiplied as what they are on sm_100, 103 and 120 (`hq_inductor.ops.fused_fp4`; compiled for
             these, never run there), and emulated elsewhere: rounded as the formats round, multiplied in the activations' dtype.
Gradients.   For `x` and `bias`; the weight is frozen. Backward decodes again instead of saving a dequantized weight.
             `torch.library.register_autograd` runs a layer of Python on every call, gradients or not, for 6 of
             the 16 us that a call costs (2-core CPU, torch 2.13). The overload `no_grad` is the same op without it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..format.codes import CodesLayout
from ..format.hadamard import hadamard_block, hadamard_ref
from ..format.lattice import embed
from ..format.layout import TileLayout
from ..format.mma import check_mma, quantize_mxfp4, quantize_nvfp4, round_operands
from .decode import decode_words
from .launch import FUSED_BATCH, LIBRARY_BATCH, RING_BATCH, block_scaled_products, fp8_products, fused_batch, ring_products
from .prologue import NO_PROLOGUE, Prologue
from .registry import LIBRARY, NAMESPACE, check_floating, check_qdata, register, traced

# rows are decoded in blocks of about this many weights: a float copy of a block stays small beside the packed weight
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# (row slice, dequantized rotated weight `[rows, columns]`) block by block
WeightBlocks = Iterator[tuple[slice, torch.Tensor]]


def check_linear(x: torch.Tensor, qdata: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout, in_features: int) -> None:
    check_activations(x, qdata, act_pre_scale, layout.tile, in_features)


def check_activations(x: torch.Tensor, qdata: torch.Tensor, act_pre_scale: torch.Tensor | None, tile: int, in_features: int) -> None:
    """`TypeError` or `ValueError` unless activations fit `qdata`, `[N, tiles, ...]`."""
    check_floating("x", x)
    columns = qdata.shape[1] * tile
    if not columns - tile < in_features <= columns:
        raise ValueError(
            f"x must have between {columns - tile + 1} and {columns} features for qdata of shape {tuple(qdata.shape)}, got {in_features}"
        )
    if act_pre_scale is not None and act_pre_scale.shape != (in_features,):
        raise ValueError(f"act_pre_scale must have shape ({in_features},), got {tuple(act_pre_scale.shape)}")


def rotate_activations(
    x: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout | CodesLayout, columns: int, seed: int
) -> torch.Tensor:
    """`RHT(x * act_pre_scale)` in fp32 (fp64 for fp64 input), `[M, columns]`; missing columns are zeros."""
    x = x.to(wide_dtype(x))
    if act_pre_scale is not None:
        x = x * act_pre_scale
    x = F.pad(x, (0, columns - x.shape[-1]))
    return hadamard_ref(x, hadamard_block(layout.tile), seed)


def row_blocks(qdata: torch.Tensor, columns: int) -> Iterator[slice]:
    """Rows of a weight with so many columns, a few at a time."""
    rows, step = qdata.shape[0], max(1, _BLOCK_WEIGHTS[qdata.device.type] // max(1, columns))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _weight_blocks(qdata: torch.Tensor, layout: TileLayout, dtype: torch.dtype) -> WeightBlocks:
    for block in row_blocks(qdata, qdata.shape[1] * layout.tile):
        if qdata.is_cuda and dtype != torch.float64:
            from .fused import decode  # Triton is there on Linux only

            yield block, decode(qdata[block].contiguous(), layout, dtype)[0]
            continue
        codes, scale = decode_words(qdata[block], layout)
        points = embed(codes, layout.lattice, dtype).unflatten(-1, (-1, layout.tile))
        yield block, points.mul_(scale[..., None]).flatten(-2)


def products(rotated: torch.Tensor, qdata: torch.Tensor, layout: TileLayout, mma: str) -> torch.Tensor:
    """`[M, N]`: rotated activations `[M, columns]` times the transposed rotated weight, operands rounded as `mma` says."""
    out = rotated.new_empty((rotated.shape[0], qdata.shape[0]))
    if mma == "nvfp4":  # one of its scales is the whole weight's
        weight = torch.cat([weight for _, weight in _weight_blocks(qdata, layout, rotated.dtype)])
        rotated, weight = round_operands(rotated, weight, mma, layout.tile)
        return torch.mm(rotated, weight.t(), out=out)
    for block, weight in _weight_blocks(qdata, layout, rotated.dtype):
        x_rounded, weight = round_operands(rotated, weight, mma, layout.tile)
        out[:, block] = x_rounded @ weight.t()
    return out


def _rice_linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lattice: str,
    tile: int,
    code: int,
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    layout = check_qdata(qdata, lattice, tile, code)
    check_linear(x, qdata, act_pre_scale, layout, x.shape[-1])
    check_mma(mma)
    rows, tiles, _ = qdata.shape
    rotated = rotate_activations(x.reshape(-1, x.shape[-1]), act_pre_scale, layout, tiles * tile, seed)
    out = products(rotated, qdata, layout, mma)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`[..., K]` as `[M, K]` with contiguous rows; a copy only where there is no such view."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def takes_fused_kernel(mma: str, dtype: torch.dtype, batch: int, most: int = FUSED_BATCH) -> bool:
    """Whether the fused CUDA kernel multiplies `batch` rows of activations as int8; `most` from `fused_batch` of the device."""
    return batch <= most and (mma == "int8" or (mma == "auto" and dtype != torch.float32))


def takes_fused_fp8(mma: str, x: torch.Tensor, layout: TileLayout, tiles: int) -> bool:
    """Whether the fused CUDA kernel multiplies activations `[M, K]` as e4m3."""
    if mma != "fp8" or x.dtype == torch.float32 or not 0 < x.shape[0] <= RING_BATCH or not ring_products(x.device):
        return False
    from .fused_rotation import fp8_rows_fit  # Triton is there on Linux only

    return fp8_rows_fit(x, layout, tiles)


def _rice_linear_cuda(
    x: torch.Tensor,
    qdata: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lattice: str,
    tile: int,
    code: int,
    seed: int,
    mma: str = "auto",
) -> torch.Tensor:
    from .fused import fused_linear  # Triton is there on Linux only, and takes its time to import

    layout = check_qdata(qdata, lattice, tile, code)
    check_linear(x, qdata, act_pre_scale, layout, x.shape[-1])
    check_mma(mma)
    if x.dtype == torch.float64:
        return _rice_linear(x, qdata, act_pre_scale, bias, lattice, tile, code, seed, mma)
    qdata = qdata.contiguous()
    flat = rows_of(x)
    fp8 = takes_fused_fp8(mma, flat, layout, qdata.shape[1])
    if fp8 or takes_fused_kernel(mma, x.dtype, flat.shape[0], fused_batch(x.device)):
        out = fused_linear(flat, qdata, act_pre_scale, bias, layout, seed, fp8=fp8)
    else:
        out = library_linear(flat, [qdata], act_pre_scale, [bias], [layout], seed, mma)
    return out.view(*x.shape[:-1], qdata.shape[0])


def library_linear(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    layouts: list[TileLayout],
    seed: int,
    mma: str,
    prologue: Prologue = NO_PROLOGUE,
) -> torch.Tensor:
    """On CUDA, `[M, sum N]` for activations `[M, K]`: rotate once, decode the siblings one below the other, one product."""
    from .fused import decode, int8_matmul
    from .fused_rotation import rotate

    rows, tiles, batch = [q.shape[0] for q in qdata], qdata[0].shape[1], x.shape[0]
    if batch == 0:
        # nothing is rotated, so the decoder would not know what it follows
        return x.new_empty((0, sum(rows)))
    # a scale of nvfp4 is the whole weight's, so siblings cannot be rounded as one
    if mma == "nvfp4" and len(qdata) > 1:
        parts = zip(qdata, bias, layouts, strict=True)
        return torch.cat([library_linear(x, [q], act_pre_scale, [b], [layout], seed, mma, prologue) for q, b, layout in parts], 1)
    # library products want all of one dtype; the other paths take any
    joined = _join_bias(bias, rows, x)
    int8 = mma == "int8" or (mma == "auto" and x.dtype != torch.float32 and (batch < LIBRARY_BATCH or ring_products(x.device)))
    fp8 = mma == "fp8" and fp8_products(x.device) and sum(rows) % 16 == 0 and x.dtype == torch.bfloat16
    if int8 and _takes_blocked(x, rows, tiles * layouts[0].tile):
        return _blocked_linear(x, qdata, act_pre_scale, joined, layouts, seed, prologue)
    dtype = torch.int8 if int8 else torch.float8_e4m3fn if fp8 else x.dtype
    rotated, act_scale = rotate(x, act_pre_scale, layouts[0], tiles, seed, dtype, prologue)
    weight = torch.empty((sum(rows), rotated.shape[1]), dtype=dtype, device=x.device)
    scales = [
        decode(q, layout, dtype, row_scale=fp8, out=out, after_rotation=True)[1]
        for q, layout, out in zip(qdata, layouts, weight.split(rows), strict=True)
    ]
    if int8 or fp8:
        scale = scales[0] if len(scales) == 1 else torch.cat(scales)
    if int8:
        return int8_matmul(rotated, act_scale, weight, scale, joined, x.dtype)
    if fp8:
        return fp8_matmul(rotated, act_scale, weight, scale, joined, x.dtype)
    if mma in ("nvfp4", "mxfp4") and x.dtype != torch.float32 and block_scaled_products(x.device):
        from .fused_fp4 import block_scaled_matmul

        quantize = quantize_nvfp4 if mma == "nvfp4" else quantize_mxfp4
        return block_scaled_matmul(quantize(rotated), quantize(weight), joined, x.dtype)
    rotated, weight = round_operands(rotated, weight, mma, layouts[0].tile)
    return F.linear(rotated, weight, joined)


def fp8_matmul(
    x: torch.Tensor, act_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`[M, N]` in `dtype` of e4m3 `x`, `[M, K]`, and `weight`, `[N, K]`, with fp32 scales of their rows.

    Sums as tensor cores keep them, of some 14 bits, as in the fused kernel. Promoted ones took 10 % longer at 1024 and 4096 rows for a
    relative error of 0.0017 instead of 0.0021 to 0.0033 (H100, K from 4096 to 14336), where e4m3 operands alone cost 0.037.
    """
    scales = {"scale_a": act_scale[:, None], "scale_b": scale[None]}
    return torch._scaled_mm(x, weight.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=True)


def _takes_blocked(x: torch.Tensor, rows: list[int], columns: int) -> bool:
    """Whether int8 products of decoded weights come from blocks (sm_90); the kernels' offsets have 31 bits."""
    if not ring_products(x.device) or any(n % 64 for n in rows[:-1]):
        return False
    return (len(x) + 128) * columns < 2**31


def _blocked_linear(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    layouts: list[TileLayout],
    seed: int,
    prologue: Prologue,
) -> torch.Tensor:
    from .fused import MATMUL_COLUMNS, blocked_matmul, decode_blocks
    from .fused_rotation import rotate_quantize

    padded = -(-len(x) // MATMUL_COLUMNS) * MATMUL_COLUMNS
    tiles = qdata[0].shape[1]
    rotated, act_scale, _ = rotate_quantize(
        x, act_pre_scale, layouts[0], tiles, seed, padded, 0, prologue, MATMUL_COLUMNS, before_decoder=True
    )
    codes, scale = decode_blocks(qdata, layouts, after_rotation=True)
    return blocked_matmul(rotated, act_scale, codes, scale, bias, len(x), sum(q.shape[0] for q in qdata), x.dtype)


def _join_bias(bias: list[torch.Tensor | None], rows: list[int], x: torch.Tensor) -> torch.Tensor | None:
    """Biases of siblings one after the other, zeros where there is none, in the dtype of `x`."""
    if len(bias) == 1 or all(b is None for b in bias):
        return None if bias[0] is None else bias[0].to(x.dtype)
    return torch.cat([x.new_zeros(n) if b is None else b.to(x.dtype) for b, n in zip(bias, rows, strict=True)])


def _rice_linear_fake(x, qdata, act_pre_scale, bias, lattice, tile, code, seed, mma="auto"):
    traced()
    layout = check_qdata(qdata, lattice, tile, code)
    check_linear(x, qdata, act_pre_scale, layout, x.shape[-1])
    check_mma(mma)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


for _overload in ("rice_linear", "rice_linear.no_grad"):
    register(
        f"{_overload}(Tensor x, Tensor qdata, Tensor? act_pre_scale, Tensor? bias, str lattice, int tile, int code, int seed, "
        'str mma="auto") -> Tensor',
        _rice_linear_fake,
        replay=True,
        CPU=_rice_linear,
        CUDA=_rice_linear_cuda,
    )


def call_linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lattice: str,
    tile: int,
    code: int,
    seed: int,
    mma: str,
) -> torch.Tensor:
    """`hyperquant::rice_linear`, where gradients are off by the overload without any. Compilers always see the default one."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.ops.hyperquant.rice_linear.default(x, qdata, act_pre_scale, bias, lattice, tile, code, seed, mma)
    return torch.ops.hyperquant.rice_linear.no_grad(x, qdata, act_pre_scale, bias, lattice, tile, code, seed, mma)


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of `x` are computed in where no tensor core rounds: fp32, of fp64 that."""
    return torch.promote_types(x.dtype, torch.float32)


def input_gradient(
    grad: torch.Tensor,
    blocks: WeightBlocks,
    act_pre_scale: torch.Tensor | None,
    layout: TileLayout | CodesLayout,
    columns: int,
    seed: int,
    in_features: int,
) -> torch.Tensor:
    """`[..., in_features]` from the gradient of a layer's output and its rotated weight of `columns`, in `wide_dtype(grad)`."""
    flat = grad.reshape(-1, grad.shape[-1]).to(wide_dtype(grad))
    rotated = flat.new_zeros((flat.shape[0], columns))
    for block, weight in blocks:
        rotated.addmm_(flat[:, block], weight)
    out = hadamard_ref(rotated, hadamard_block(layout.tile), seed, inverse=True)[:, :in_features]
    if act_pre_scale is not None:
        out = out * act_pre_scale
    return out.to(grad.dtype).reshape(*grad.shape[:-1], in_features).contiguous()


def _rice_linear_backward(
    grad: torch.Tensor,
    qdata: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    lattice: str,
    tile: int,
    code: int,
    seed: int,
    in_features: int,
) -> torch.Tensor:
    layout = check_qdata(qdata, lattice, tile, code)
    blocks = _weight_blocks(qdata, layout, wide_dtype(grad))
    return input_gradient(grad, blocks, act_pre_scale, layout, qdata.shape[1] * tile, seed, in_features)


def _rice_linear_backward_fake(grad, qdata, act_pre_scale, lattice, tile, code, seed, in_features):
    layout = check_qdata(qdata, lattice, tile, code)
    check_linear(grad, qdata, act_pre_scale, layout, in_features)
    return grad.new_empty((*grad.shape[:-1], in_features))


register(
    "rice_linear_backward(Tensor grad, Tensor qdata, Tensor? act_pre_scale, str lattice, int tile, int code, int seed, "
    "int in_features) -> Tensor",
    _rice_linear_backward_fake,
    CPU=_rice_linear_backward,
    CUDA=_rice_linear_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, qdata, act_pre_scale, _, ctx.lattice, ctx.tile, ctx.code, ctx.seed = inputs[:8]
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(qdata, act_pre_scale)


def _backward(ctx, grad: torch.Tensor):
    qdata, act_pre_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hyperquant.rice_linear_backward(
            grad, qdata, act_pre_scale, ctx.lattice, ctx.tile, ctx.code, ctx.seed, ctx.in_features
        )
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::rice_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
