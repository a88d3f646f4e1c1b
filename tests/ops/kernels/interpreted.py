"""Kernels under Triton's interpreter, in a process of its own: `TRITON_INTERPRET=1` must stand before the kernels are imported.

Compares the fused linear layer, the decoder and products of 4-bit floats with the specification and fails with an AssertionError. python -m
tests.ops.kernels.interpreted"""

from __future__ import annotations

from unittest import mock

import torch
import triton

from hq_inductor import HyperQuantTensor
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import TileLayout
from hq_inductor.format.mma import E4M3_MAX, fp8_scale, mxfp4_blocks, nvfp4_blocks, quantize_mxfp4, quantize_nvfp4
from hq_inductor.ops import fused_rotation
from hq_inductor.ops.fused import blocked_matmul, decode, decode_blocks, fused_linear, int8_matmul
from hq_inductor.ops.fused_fp4 import block_scaled_matmul
from hq_inductor.ops.fused_rotation import rotate, rotate_quantize
from hq_inductor.ops.launch import LinearLaunch, MatmulLaunch, RingLaunch

ops = torch.ops.hyperquant

# lattice, bps, rows, columns, tile, batch, launch: every Rice parameter, both lengths of stream planes, planes too long for a buffer,
# rows that do not fill a strip, several strips per block, runs of a warp that end within a strip or go on to the next one, warps without
# a tile
CASES = [
    ("e8", 4.0, 40, 512, None, 3, LinearLaunch(8, 2, 1)),
    ("e8", 2.0, 40, 384, 128, 9, LinearLaunch(16, 1, 4)),
    ("e8", 2.0, 40, 384, 128, 9, LinearLaunch(16, 2, 2)),
    ("e8", 3.0, 16, 256, 256, 2, LinearLaunch(8, 1, 4)),
    ("e8", 2.5, 20, 256, 256, 1, LinearLaunch(8, 1, 1)),
    ("e8", 5.0, 20, 256, None, 8, LinearLaunch(8, 1, 1)),
    ("e8", 6.0, 17, 256, None, 2, LinearLaunch(8, 1, 1)),
    ("e8", 4.0, 17, 896, 896, 2, LinearLaunch(8, 1, 1)),
    ("e8", 4.125, 17, 256, None, 2, LinearLaunch(8, 1, 2)),
    ("d4", 2.0, 20, 256, None, 2, LinearLaunch(8, 1, 1)),
    ("d4", 4.0, 20, 256, 128, 2, LinearLaunch(8, 1, 2)),
    ("a2", 3.0, 20, 384, None, 2, LinearLaunch(8, 1, 1)),
    ("z", 3.0, 20, 256, None, 2, LinearLaunch(8, 1, 1)),
    ("e8", 4.0, 20, 256, 128, 3, RingLaunch(8, 2, 4)),
    ("e8", 3.5, 20, 256, None, 18, RingLaunch(16, 1, 4)),
    ("d4", 3.0, 20, 256, 128, 2, RingLaunch(8, 1, 4)),
]
# products of e4m3
FP8_CASES = [
    ("e8", 4.0, 20, 256, 128, 3, RingLaunch(8, 2, 4, fp8=True)),
    ("a2", 3.0, 70, 256, 256, 9, RingLaunch(16, 1, 4, fp8=True)),
]


def unpack(q: torch.Tensor, scale: torch.Tensor, tile: int, ring: bool) -> torch.Tensor:
    """Rotated activations `[padded, K]` in fp64 from the kernel's order."""
    padded = scale.shape[1]
    if ring:  # [blocks of rows, blocks of 32, half, row, lane, 4]
        columns = q.shape[2]
        rows = q.view(padded // columns, -1, 2, columns, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(padded, -1)
        return rows.double() * scale.double().t().repeat_interleave(tile, 1)
    rows = q.view(-1, padded, 4, 2, 8).permute(1, 0, 3, 2, 4).reshape(padded, -1)
    return rows.double() * scale.double().t().repeat_interleave(tile, 1)


def check_case(lattice: str, bps: float, rows: int, columns: int, tile: int | None, batch: int, launch: LinearLaunch | RingLaunch) -> None:
    weight = HyperQuantTensor.from_hp(torch.randn(rows, columns), bps=bps, lattice=lattice, tile=tile, seed=3)
    words = weight.qdata
    layout = TileLayout(lattice, weight.tile, weight.code, words.shape[-1])
    tiles = words.shape[1]
    x = torch.randn(batch, columns).to(torch.float16)
    pre_scale = torch.rand(columns).add_(0.5).to(torch.float16) if bps == 4.0 else None
    bias = torch.randn(rows).to(torch.float16)

    padded = -(-batch // launch.columns) * launch.columns
    ring = launch.columns if isinstance(launch, RingLaunch) else 0
    rotated = hadamard_ref(x.double() * (1 if pre_scale is None else pre_scale.double()), hadamard_block(layout.tile), 3)
    embedded = rotated * embed(torch.ones(1, columns, dtype=torch.int8), "a2", torch.float64) if lattice == "a2" else rotated
    # whole rows at a time, then tiles, as few of them are
    for many in (True, False):
        with mock.patch.object(fused_rotation, "_whole_rows", return_value=many):
            q, scale, counters = rotate_quantize(x, pre_scale, layout, tiles, 3, padded, 5, ring=ring)
            plain, _ = rotate(x, pre_scale, layout, tiles, 3, torch.float32)
            plain_q, plain_scale = rotate(x, pre_scale, layout, tiles, 3, torch.int8)
        assert (counters == 0).all()
        torch.testing.assert_close(plain.double(), rotated, rtol=1e-5, atol=1e-5)
        found = unpack(q, scale, layout.tile, ring > 0)
        step = scale.double().t().repeat_interleave(layout.tile, 1)
        torch.testing.assert_close(
            scale[:, :batch].t().double(), embedded.unflatten(1, (tiles, -1)).abs().amax(-1) / 127, rtol=1e-5, atol=0
        )
        assert ((found[:batch] - embedded).abs() <= (0.5 + 1e-4) * step[:batch] + 1e-5).all()
        assert (found[batch:] == 0).all() and (scale[:, batch:] == 0).all()
        assert torch.equal(plain_q.double() * plain_scale.double().t().repeat_interleave(layout.tile, 1), found[:batch])

    codes, scales = ops.rice_decode(words, lattice, layout.tile, layout.code)
    exact = found[:batch] @ (codes.double() * scales.double().repeat_interleave(layout.tile, 1)).t() + bias.double()
    out = fused_linear(x, words, pre_scale, bias, layout, 3, launch)
    assert out.shape == (batch, rows)
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(torch.float16).eps, error

    # 128 columns at least, which takes its time
    if (lattice, bps) in (("e8", 4.0), ("d4", 4.0), ("a2", 3.0)) and not ring:
        blocked_q, blocked_scale, _ = rotate_quantize(x, pre_scale, layout, tiles, 3, 128, 0, ring=128)
        out = blocked_matmul(blocked_q, blocked_scale, *decode_blocks([words], [layout]), bias, batch, rows, torch.float16)
        assert (out.double() - exact).abs().max() / exact.abs().max() <= torch.finfo(torch.float16).eps

    for splits in {1, min(2, tiles)}:
        out = int8_matmul(plain_q, plain_scale, codes, scales, bias, torch.float16, MatmulLaunch(16, 16, 128, 1, 1, splits))
        assert (out.double() - exact).abs().max() / exact.abs().max() <= torch.finfo(torch.float16).eps

    # of fp8 only the scales: the interpreter of Triton 3.9 rounds 126 to 64
    _, row_scale = decode(words, layout, torch.float8_e4m3fn, row_scale=True)
    assert torch.equal(row_scale, torch.exp2(torch.ceil(torch.log2(scales.amax(1) * (layout.largest_value / E4M3_MAX)))))
    _, x_scale = rotate(x, pre_scale, layout, tiles, 3, torch.float8_e4m3fn)
    torch.testing.assert_close(x_scale, fp8_scale(plain, layout.tile), rtol=1e-5, atol=0)

    decoded, decoded_scale = decode(words, layout, torch.int8)
    assert torch.equal(decoded, codes) and torch.equal(decoded_scale, scales)
    dense, _ = decode(words, layout, torch.float32)
    torch.testing.assert_close(dense, ops.lattice_dequant(codes, scales, lattice, torch.float32), rtol=1e-6, atol=0)
    # any bits: no access out of range (numpy would raise), every element written
    noise = torch.randint(-(2**31), 2**31, words.shape).to(torch.int32)
    assert decode(noise, layout, torch.float32)[0].isfinite().all()


def check_fp8_case(lattice: str, bps: float, rows: int, columns: int, tile: int, batch: int, launch: RingLaunch) -> None:
    """Products of e4m3 against those of operands as the definition has them; activations as the kernel before rounded them."""
    weight = HyperQuantTensor.from_hp(torch.randn(rows, columns), bps=bps, lattice=lattice, tile=tile, seed=3)
    words = weight.qdata
    layout = TileLayout(lattice, weight.tile, weight.code, words.shape[-1])
    tiles = words.shape[1]
    x, bias = torch.randn(batch, columns).to(torch.float16), torch.randn(rows)
    padded = -(-batch // launch.columns) * launch.columns
    q, x_scale, _ = rotate_quantize(x, None, layout, tiles, 3, padded, 0, ring=launch.columns, fp8=True)
    codes, scales = ops.rice_decode(words, lattice, layout.tile, layout.code)
    row_scale = torch.exp2(torch.ceil(torch.log2(scales.amax(1) * (layout.largest_value / E4M3_MAX))))
    factor = (scales / row_scale[:, None]).repeat_interleave(layout.tile, 1)
    factor *= embed(torch.ones(1, columns, dtype=torch.int8), lattice, torch.float32) if lattice == "a2" else 1
    # halves first, as the kernel has them
    rounded = (codes.to(torch.float16) * factor.to(torch.float16)).to(torch.float8_e4m3fn)
    rows_of_x = q.float().view(padded // launch.columns, -1, 2, launch.columns, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(padded, -1)
    exact = rows_of_x[:batch].double() @ rounded.double().t() * x_scale[:batch, None].double() * row_scale.double() + bias.double()
    out = fused_linear(x, words, None, bias, layout, 3, launch, fp8=True)
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(torch.float16).eps, error


def check_siblings(counts: tuple[int, ...], blocks: int, with_bias: bool) -> None:
    """Weights that share a launch give what each gives alone; the residual is added last."""
    weights = [HyperQuantTensor.from_hp(torch.randn(rows, 256), bps=3.5) for rows in counts]
    layout = TileLayout("e8", weights[0].tile, weights[0].code, weights[0].qdata.shape[-1])
    x = torch.randn(3, 256).to(torch.bfloat16)
    biases = [torch.randn(rows).to(torch.bfloat16) for rows in counts] if with_bias else None
    residual = torch.randn(3, sum(counts) + 5).to(torch.bfloat16)[:, : sum(counts)]
    launch = LinearLaunch(8, blocks, 2)
    words = [weight.qdata for weight in weights]
    alone = [fused_linear(x.float(), w, None, b, layout, 0, launch) for w, b in zip(words, biases or [None] * len(words), strict=True)]
    found = fused_linear(x.float(), words, None, biases, layout, 0, launch, residual)
    torch.testing.assert_close(found, torch.cat(alone, 1) + residual.float(), rtol=1e-5, atol=1e-5)
    print("ok siblings", counts)


def check_fp4(quantize, batch: int, rows: int, columns: int, with_bias: bool) -> None:
    """Products of 4-bit floats against those of their real values, tails of blocks in both directions."""
    rounded = {quantize_nvfp4: nvfp4_blocks, quantize_mxfp4: mxfp4_blocks}[quantize]
    x, weight = torch.randn(batch, columns), torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1))
    bias = torch.randn(rows) if with_bias else None
    exact = rounded(x).double() @ rounded(weight).double().t()
    exact += 0 if bias is None else bias.double()
    out = block_scaled_matmul(quantize(x), quantize(weight), bias, torch.float32)
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-6, error
    print("ok fp4", quantize.__name__, batch, rows, columns)


def main() -> None:
    assert triton.knobs.runtime.interpret
    torch.manual_seed(0)
    check_siblings((17, 40), 5, False)
    check_siblings((16, 5, 33), 4, True)
    check_siblings((20, 16, 7, 40), 3, True)
    for case in CASES:
        check_case(*case)
        print("ok", *case)
    for case in FP8_CASES:
        check_fp8_case(*case)
        print("ok", *case)
    check_fp4(quantize_nvfp4, 3, 130, 256, True)
    check_fp4(quantize_mxfp4, 129, 20, 384, False)
    check_fp4(quantize_mxfp4, 1, 1, 128, True)


if __name__ == "__main__":
    main()
