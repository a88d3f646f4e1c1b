"""Norms and gates before the rotation, under Triton's interpreter in a process of its own.

python -m tests.ops.kernels.interpreted_prologue, with `TRITON_INTERPRET=1`."""

from __future__ import annotations

from unittest import mock

import torch
import triton

from hq_inductor import HyperQuantTensor
from hq_inductor.format.codes import codes_layout
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import TileLayout
from hq_inductor.format.mma import E4M3_MAX, fp8_scale
from hq_inductor.format.rates import weight_layout
from hq_inductor.ops import fused_rotation
from hq_inductor.ops.fused import sibling_linear
from hq_inductor.ops.fused_rotation import rotate, rotate_quantize
from hq_inductor.ops.prologue import GATES, LAYER_NORMS, NO_PROLOGUE, NORMS, PROLOGUES, Prologue

from .interpreted import unpack

# features: one chunk of the statistics, several, a last one that is short; padding of the last tile
FEATURES = (384, 2048 + 200, 4096)
# for e4m3 more than a program has in registers
LONG = 32768 + 512


def make(name: str, features: int, dtype: torch.dtype, batch: int) -> tuple[torch.Tensor, Prologue]:
    # rows far from zero mean, a distance apart that is not their length; gates that are slices, as of a merged layer's output
    x = (torch.randn(batch, features + 8) + torch.arange(batch)[:, None]).to(dtype)[:, :features]
    gate = torch.randn(batch, 2 * features).to(dtype)[:, features:] if name in GATES else None
    # of a modulation one for each row, a distance apart; of both in the last case
    lead = (batch,) if name == "layer_norm_1p" else (1,) if name == "rms_norm_1p" else ()
    weight = torch.rand(*lead, 2 * features).add_(0.5).to(dtype)[..., features:] if name in NORMS else None
    bias = torch.randn(*lead, features).to(dtype) if name in LAYER_NORMS else None
    return x, Prologue(name, gate, weight, bias, 1e-5)


def check(name: str, features: int, dtype: torch.dtype) -> None:
    layout = weight_layout(features, 4.0, "e8").tile
    tiles, batch = -(-features // layout.tile), 3
    x, prologue = make(name, features, dtype, batch)
    pre_scale = torch.rand(features).add_(0.5).to(torch.float16) if dtype == torch.float32 else None

    activations = prologue.apply(x).double()
    assert name == "none" or (activations - x.double()).abs().max() > 0.1
    scaled = activations if pre_scale is None else activations * pre_scale.double()
    padded = torch.nn.functional.pad(scaled, (0, tiles * layout.tile - features))
    expected = hadamard_ref(padded, hadamard_block(layout.tile), 3)
    # a value within an fp32 error of the middle between two of the dtype may be rounded the other way, and the transform spreads it
    bound = 4e-6 * expected.abs().max() if dtype == torch.float32 else torch.finfo(dtype).eps * activations.abs().max()
    for many in (True, False) if features < LONG else ():
        with mock.patch.object(fused_rotation, "_whole_rows", return_value=many):
            found, _ = rotate(x, pre_scale, layout, tiles, 3, torch.float32, prologue)
            q, scale, _ = rotate_quantize(x, pre_scale, layout, tiles, 3, 8, 0, prologue)
        assert (found.double() - expected).abs().max() <= bound
        step = scale.double().t().repeat_interleave(layout.tile, 1)
        quantized = unpack(q, scale, layout.tile, False)
        assert ((quantized[:batch] - expected).abs() <= 0.501 * step[:batch] + bound).all()
        assert (quantized[batch:] == 0).all()
    check_fp8(*rotate(x, pre_scale, layout, tiles, 3, torch.float8_e4m3fn, prologue), expected, layout.tile, bound)


def check_fp8(found: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor, tile: int, bound: float) -> None:
    """e4m3 of rotated activations within a rounding, and the scale of the tiles' norms; `bound` on what may be added to an element."""
    torch.testing.assert_close(scale, fp8_scale(expected, tile), rtol=1e-5 + bound / expected.abs().max().item(), atol=0)
    exact = expected / scale[:, None].double()
    assert exact.abs().max() <= E4M3_MAX * 1.01
    # the interpreter of Triton 3.9 rounds 126 to 64: only what is not rounded up to a power of two
    stays = torch.frexp(exact).mantissa.abs() < 0.93
    assert stays.double().mean() > 0.8
    off = (found.double() - exact).abs() - exact.abs() / 15.9 - 2**-9 - bound / scale[:, None]
    assert found.shape == exact.shape and (off[stays] <= 0).all()


def check_rows(tile: int, tiles: int, features: int) -> None:
    """Whole rows of tiles of any shape, of elements whose squares overflow or vanish."""
    layout = codes_layout("a2", tile)
    for magnitude in (1.0, 1e25, 1e-25):
        x = torch.randn(2, features) * magnitude
        x[1, : features // 2] = 0
        padded = torch.nn.functional.pad(x.double(), (0, tiles * tile - features))
        expected = hadamard_ref(padded, hadamard_block(tile), 3)
        check_fp8(*rotate(x, None, layout, tiles, 3, torch.float8_e4m3fn), expected, tile, 1e-6 * expected.abs().max().item())
        with mock.patch.object(fused_rotation, "_whole_rows", return_value=True):
            q, scale = rotate(x, None, layout, tiles, 3, torch.int8)
        expected *= embed(torch.ones(1, tiles * tile, dtype=torch.int8), "a2", torch.float64)
        step = scale.double().t().repeat_interleave(tile, 1)
        assert ((q * step - expected).abs() <= 0.501 * step).all()
        assert ((q == 0) | (step > 0)).all() and (step[1] == 0).sum() == tile * (features // 2 // tile)
    print("ok rows", tile)


def check_siblings() -> None:
    """The whole layer for siblings of two rates, with a norm before: one rotation, two launches."""
    x, prologue = make("rms_norm", 384, torch.float32, 3)
    weights = [HyperQuantTensor.from_hp(torch.randn(rows, 384), bps=bps, seed=3) for rows, bps in ((20, 4.0), (17, 4.0), (5, 3.0))]
    layouts = [TileLayout("e8", w.tile, w.code, w.qdata.shape[-1]) for w in weights]
    bias = [None, torch.randn(17), None]
    found = sibling_linear(x, [w.qdata for w in weights], None, bias, layouts, 3, None, prologue)
    activations = prologue.apply(x)
    alone = [
        sibling_linear(activations, [w.qdata], None, [b], [layout], 3, None, NO_PROLOGUE)
        for w, b, layout in zip(weights, bias, layouts, strict=True)
    ]
    expected = torch.cat(alone, 1)
    # an activation may be rounded to the next int8 value
    assert (found - expected).abs().max() <= expected.abs().max() / 127 / 4
    assert found.shape == (3, 42)


def main() -> None:
    assert triton.knobs.runtime.interpret
    torch.manual_seed(0)
    for name in PROLOGUES:
        for features in FEATURES[1:2] if name.endswith("_1p") else FEATURES:
            for dtype in (torch.float32, torch.float16):
                check(name, features, dtype)
        print("ok", name)
    for name in ("layer_norm", "silu_mul"):
        check(name, LONG, torch.float16)
        print("ok long", name)
    for shape in ((128, 3, 300), (384, 7, 2688), (512, 5, 2500), (1536, 2, 2999), (1024, 2, 2048), (1408, 3, 4224)):
        check_rows(*shape)
    check_siblings()
    print("ok siblings")


if __name__ == "__main__":
    main()
