"""On a CUDA device: kernels against the specification on the CPU, exactly where integers are concerned, and models that compile."""

import dataclasses

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from hq_inductor import HyperQuantTensor, hyperquant_weight
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import LATTICES, TileLayout
from hq_inductor.format.mma import MMA, mxfp4_blocks, nvfp4_blocks, quantize_mxfp4, quantize_nvfp4
from hq_inductor.ops import linear as linear_module
from hq_inductor.ops import replay
from hq_inductor.ops.fused_fp4 import block_scaled_matmul
from hq_inductor.ops.registry import cuda_function

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ops = torch.ops.hyperquant


@pytest.fixture(autouse=True)
def _poison_new_memory():
    """What a kernel forgets to write is NaN, not the right answer of the call before."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# a layout is a compilation: every Rice parameter and kind of plane of e8, every lattice, tiles that are no power of two
@pytest.mark.parametrize(
    ("lattice", "bps", "columns"),
    [
        *(("e8", bps, 1024) for bps in (2.0, 3.0, 3.5, 4.0, 4.125, 6.0)),
        *((lattice, bps, 1024) for lattice in LATTICES if lattice != "e8" for bps in (2.0, 4.0, 6.0)),
        ("e8", 4.0, 384),
        ("e8", 3.5, 896),
    ],
)
def test_words_and_codes_equal_the_cpu(lattice, bps, columns):
    weight = HyperQuantTensor.from_hp(torch.randn(20, columns), bps=bps, lattice=lattice)
    layout = (lattice, weight.tile, weight.code)
    codes, scale = ops.rice_decode(weight.qdata, *layout)
    gpu_codes, gpu_scale = ops.rice_decode(weight.qdata.cuda(), *layout)
    assert torch.equal(gpu_codes.cpu(), codes) and torch.equal(gpu_scale.cpu(), scale)
    again = ops.rice_encode(gpu_codes, gpu_scale, *layout, weight.qdata.shape[-1])
    assert torch.equal(again.cpu(), weight.qdata)


def int8_linear_in_double(x, weight):
    """The fused kernel's layer from its own int8 activations: all that is left to differ is the order of fp32 sums."""
    from hq_inductor.ops.fused_rotation import rotate_quantize

    layout = TileLayout(weight.lattice, weight.tile, weight.code, weight.qdata.shape[-1])
    tiles, batch = weight.qdata.shape[1], x.shape[0]
    q, scale, _ = rotate_quantize(x, None, layout, tiles, weight.seed, batch, 0)
    step = scale.double().t().repeat_interleave(layout.tile, 1)
    activations = q.view(-1, batch, 4, 2, 8).permute(1, 0, 3, 2, 4).reshape(batch, -1).double() * step
    exact = hadamard_ref(x.double(), hadamard_block(layout.tile), weight.seed)
    if weight.lattice == "a2":
        exact *= embed(torch.ones_like(exact, dtype=torch.int8), "a2", torch.float64)
    assert ((activations - exact).abs() <= 0.501 * step + 1e-6).all()
    codes, scales = ops.rice_decode(weight.qdata, weight.lattice, weight.tile, weight.code)
    return activations @ (codes.double() * scales.double().repeat_interleave(layout.tile, 1)).t()


@pytest.mark.parametrize(("bps", "batches"), [(4.0, range(1, 131)), (3.5, (1, 8, 9, 16, 17, 32, 33, 65, 130)), (2.0, (1, 7, 31, 63))])
def test_fused_linear_every_batch(bps, batches):
    """Batches 1 to 130 on a matrix whose rows fill no block, inputs drawn afresh."""
    weight = HyperQuantTensor.from_hp(torch.randn(200, 1536, device="cuda"), bps=bps, mma="int8", seed=5)
    for batch in batches:
        x = torch.randn(batch, 1536, device="cuda").to(torch.float16)
        found, exact = nn.functional.linear(x, weight).double(), int8_linear_in_double(x, weight)
        assert found.isfinite().all()
        assert (found - exact).abs().max() / exact.abs().max() < torch.finfo(torch.float16).eps, batch


@pytest.mark.parametrize(
    ("lattice", "rows", "columns", "tile"),
    [
        *((lattice, 33, 4096, None) for lattice in LATTICES),
        ("e8", 4096, 512, None),
        ("e8", 33, 896, 896),
        ("e8", 3000, 256, 128),
        ("d4", 1024, 4096, 256),
    ],
)
def test_fused_linear_shapes(lattice, rows, columns, tile):
    weight = HyperQuantTensor.from_hp(torch.randn(rows, columns, device="cuda"), lattice=lattice, tile=tile, mma="int8")
    for batch in (1, 5, 33):
        x = torch.randn(batch, columns, device="cuda").to(torch.bfloat16)
        found, exact = nn.functional.linear(x, weight).double(), int8_linear_in_double(x, weight)
        assert (found - exact).abs().max() / exact.abs().max() < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("lattice", "bps", "warps"), [("e8", 4.0, 8), ("e8", 3.5, 4), ("e8", 6.0, 4), ("d4", 3.0, 2)])
@pytest.mark.parametrize("columns", [8, 16, 32])
def test_every_deal(columns, lattice, bps, warps):
    """Blocks with one strip of rows to as many as they can have, whose warps go on from one strip to the next, or have no tile at all."""
    from hq_inductor.ops.fused import fused_linear
    from hq_inductor.ops.launch import LinearLaunch

    rows, batch = 203, columns - 1
    x, residual = torch.randn(batch, 2560, device="cuda"), torch.randn(batch, 2 * rows, device="cuda")
    weights = [HyperQuantTensor.from_hp(torch.randn(rows, 2560, device="cuda"), bps=bps, lattice=lattice, mma="int8") for _ in range(2)]
    words = [weight.qdata for weight in weights]
    layout = TileLayout(lattice, weights[0].tile, weights[0].code, words[0].shape[-1])
    exact = [int8_linear_in_double(x, weight) for weight in weights]
    for blocks in (2, 3, 5, 13):
        launch = LinearLaunch(columns, blocks, warps, 128)
        torch.full((batch, rows), torch.nan, device="cuda")
        found = fused_linear(x, words[0], None, None, layout, 0, launch).double()
        assert (found - exact[0]).abs().max() < 2e-6 * exact[0].abs().max(), launch
        found = fused_linear(x, words, None, None, layout, 0, launch, residual).double() - residual.double()
        assert (found - torch.cat(exact, 1)).abs().max() < 2e-6 * exact[0].abs().max(), launch
        # the order of all sums is fixed
        assert torch.equal(
            fused_linear(x, words[0], None, None, layout, 0, launch), fused_linear(x, words[0], None, None, layout, 0, launch)
        )


# (columns, splits, warps, registers, cluster, e4m3, sharing): one part, parts that meet in global memory, parts that meet in a cluster,
# groups of warps that share rows
RINGS = [
    (64, 1, 8, 128, False),
    (64, 3, 8, 128, False),
    (64, 8, 8, 128, True),
    (64, 2, 8, 128, True, False, 2),
    (96, 4, 4, 0, True),
    (96, 1, 8, 0, False, False, 2),
    (128, 1, 8, 0, False),
    (128, 2, 4, 0, True),
    (128, 2, 8, 0, True, False, 2),
]
FP8_RINGS = [
    (16, 2, 8, 128, True, True),
    (16, 2, 8, 128, True, True, 2),
    (128, 3, 4, 0, False, True),
    (128, 1, 8, 0, False, True, 2),
    (256, 1, 8, 0, False, True),
    (256, 4, 8, 0, False, True),
    (256, 2, 8, 0, True, True),
    (256, 2, 8, 0, True, True, 2),
]


@pytest.mark.parametrize("with_more", [False, True])
@pytest.mark.parametrize("shape", [*RINGS, *FP8_RINGS], ids=str)
def test_every_ring(shape, with_more):
    """Rows that fill no block, or whole ones with bias and residual, which are read and written by four; outputs poisoned before."""
    from hq_inductor.ops.fused import decode, fused_linear
    from hq_inductor.ops.fused_rotation import rotate
    from hq_inductor.ops.launch import RingLaunch, ring_products

    if not ring_products(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs sm_90")
    launch = RingLaunch(*shape)
    rows, batch, dtype = (512, launch.columns + 1, torch.float16) if with_more else (203, launch.columns - 3, torch.float32)
    weight = HyperQuantTensor.from_hp(torch.randn(rows, 4096, device="cuda"), mma="int8", seed=2)
    layout = TileLayout("e8", weight.tile, weight.code, weight.qdata.shape[-1])
    x = torch.randn(batch, 4096, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype) if with_more else None
    residual = torch.randn(batch, rows, device="cuda").to(dtype) if with_more else None
    if launch.fp8:
        q, x_scale = rotate(x, None, layout, weight.qdata.shape[1], 2, torch.float8_e4m3fn)
        rounded, row_scale = decode(weight.qdata, layout, torch.float8_e4m3fn, row_scale=True)
        exact = (q.double() * x_scale.double()[:, None]) @ (rounded.double() * row_scale.double()[:, None]).t()
    else:
        exact = int8_linear_in_double(x, weight)
    if with_more:
        exact = exact + bias.double() + residual.double()
    torch.full((batch, rows), torch.nan, dtype=dtype, device="cuda")
    found = fused_linear(x, weight.qdata, None, bias, layout, 2, launch, residual, fp8=launch.fp8).double()
    assert found.isfinite().all()
    rounding = torch.finfo(dtype).eps
    if launch.fp8:
        # tensor cores keep some 14 bits of sums of e4m3; products of e4m3 are 0.037 away from those of what was rounded
        assert (found - exact).square().mean().sqrt() < (4e-3 + rounding) * exact.square().mean().sqrt()
    else:
        assert (found - exact).abs().max() < max(rounding, 2e-6) * exact.abs().max()


@pytest.mark.parametrize(
    ("lattice", "rows", "columns", "tile"),
    [*((lattice, 1000, 4096, None) for lattice in LATTICES), ("e8", 33, 896, 896), ("a2", 300, 384, 128)],
)
def test_int8_of_large_batches(lattice, rows, columns, tile):
    """Decoded codes, own product: the same int8 activations as the fused kernel's, so the same result."""
    weight = HyperQuantTensor.from_hp(torch.randn(rows, columns, device="cuda"), lattice=lattice, tile=tile, mma="int8")
    for batch in (33, 64, 65, 200, 1000):
        x = torch.randn(batch, columns, device="cuda").to(torch.bfloat16)
        found, exact = nn.functional.linear(x, weight).double(), int8_linear_in_double(x, weight)
        assert (found - exact).abs().max() / exact.abs().max() < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("rows", [(192, 64, 40), (100, 64), (64, 0, 7)])
def test_int8_of_siblings(rows):
    """Large batches of siblings: decoded one below the other, in blocks of 64 rows where they fill these."""
    from hq_inductor.ops.linear import library_linear

    weights = [HyperQuantTensor.from_hp(torch.randn(max(n, 1), 1024, device="cuda"), mma="int8")[:n] for n in rows]
    layouts = [TileLayout("e8", w.tile, w.code, w.qdata.shape[-1]) for w in weights]
    for batch in (257, 640):
        x = torch.randn(batch, 1024, device="cuda").to(torch.float16)
        biases = [torch.randn(n, device="cuda").to(torch.float16) for n in rows]
        exact = torch.cat([int8_linear_in_double(x, w) + b.double() for w, b in zip(weights, biases, strict=True)], 1)
        torch.full_like(exact, torch.nan, dtype=torch.float16)
        found = library_linear(x, [w.qdata for w in weights], None, biases, layouts, 0, "int8").double()
        assert found.isfinite().all() and (found - exact).abs().max() < torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("lattice", "rows", "columns", "tile"),
    [*((lattice, 1000, 4096, None) for lattice in LATTICES), ("e8", 33, 896, 896), ("a2", 300, 384, 128)],
)
def test_int8_codes(lattice, rows, columns, tile):
    """`packing="codes"`: the fused kernel's layer, for one row and for many, with nothing decoded."""
    words = HyperQuantTensor.from_hp(torch.randn(rows, columns, device="cuda"), lattice=lattice, tile=tile)
    codes = words.repack("codes")
    assert torch.equal(codes.qdata.cpu(), words.to("cpu").repack("codes").qdata) and torch.equal(codes.repack("rice").qdata, words.qdata)
    for batch in (1, 5, 64, 65, 1000):
        x = torch.randn(batch, columns, device="cuda").to(torch.bfloat16)
        found, exact = nn.functional.linear(x, codes).double(), int8_linear_in_double(x, words)
        assert (found - exact).abs().max() / exact.abs().max() < torch.finfo(torch.bfloat16).eps
    x, bias = torch.randn(7, columns, device="cuda"), torch.randn(rows, device="cuda")
    torch.testing.assert_close(nn.functional.linear(x, codes, bias), nn.functional.linear(x, words, bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "dtype"), [(256, torch.bfloat16), (100, torch.bfloat16), (256, torch.float16), (256, torch.float32)])
def test_e4m3_codes(rows, dtype):
    """The library's product where it takes the shape and dtype, and what stands in elsewhere: the rounding of the CPU."""
    codes = HyperQuantTensor.from_hp(torch.randn(rows, 1024), mma="fp8", packing="codes")
    on_gpu = HyperQuantTensor.from_hp(torch.zeros(rows, 1024, device="cuda"), mma="fp8", packing="codes")
    on_gpu.copy_(codes)
    for batch in (1, 40, 300):
        x, bias = torch.randn(batch, 1024).to(dtype), torch.randn(rows).to(dtype)
        found = nn.functional.linear(x.cuda(), on_gpu, bias.cuda()).cpu().double()
        exact = nn.functional.linear(x.double(), codes.dequantize(torch.float64), bias.double())
        emulated = nn.functional.linear(x, codes, bias).double()
        error, expected = (found - exact).norm() / exact.norm(), (emulated - exact).norm() / exact.norm()
        assert found.isfinite().all() and error < 1.15 * expected + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mma", ["auto", "fp8"])
def test_codes_compile_into_cuda_graphs(mma):
    torch.use_deterministic_algorithms(False)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 512)).cuda().to(torch.bfloat16)
    quantize_(model, hyperquant_weight(packing="codes", mma=mma))
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for batch in (1, 1, 1, 100, 100):
            x = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("lattice", "bps"), [("e8", 2.0), ("e8", 6.0), *((lattice, 4.0) for lattice in LATTICES)])
def test_fp8_operands(lattice, bps):
    """e4m3 of weights and activations: within a rounding of e4m3 (and of fp16, through which weights go)."""
    from hq_inductor.format.mma import E4M3_MAX, fp8_scale
    from hq_inductor.ops.fused import decode
    from hq_inductor.ops.fused_rotation import rotate

    weight = HyperQuantTensor.from_hp(torch.randn(100, 1024, device="cuda"), bps=bps, lattice=lattice)
    layout = TileLayout(lattice, weight.tile, weight.code, weight.qdata.shape[-1])
    codes, scales = ops.rice_decode(weight.qdata, lattice, weight.tile, weight.code)
    dense = ops.lattice_dequant(codes, scales, lattice, torch.float32)
    found, row_scale = decode(weight.qdata, layout, torch.float8_e4m3fn, row_scale=True)
    assert torch.equal(row_scale, torch.exp2(torch.ceil(torch.log2(scales.amax(1) * (layout.largest_value / E4M3_MAX)))))
    assert ((found.float() * row_scale[:, None] - dense).abs() <= dense.abs() / 15.9 + row_scale[:, None] * 2**-9).all()
    x = torch.randn(50, 1024, device="cuda").to(torch.bfloat16)
    rotated = hadamard_ref(x.float(), hadamard_block(layout.tile), weight.seed)
    found, x_scale = rotate(x, None, layout, weight.qdata.shape[1], weight.seed, torch.float8_e4m3fn)
    torch.testing.assert_close(x_scale, fp8_scale(rotated, layout.tile), rtol=1e-5, atol=0)
    assert ((found.float() * x_scale[:, None] - rotated).abs() <= rotated.abs() / 15.9 + x_scale[:, None] * 2**-9).all()


# rows that fill their warps and that do not, tiles of one block and of several
@pytest.mark.parametrize(
    ("features", "tile", "prologue"),
    [(4096, 512, "none"), (4096, 512, "rms_norm"), (14336 - 48, 512, "silu_mul"), (2688, 384, "layer_norm"), (5632, 1408, "rms_norm")],
)
def test_rotation_of_whole_rows(features, tile, prologue):
    """The kernel for many rows: every output and order against the transform in fp64."""
    from hq_inductor.format.codes import codes_layout
    from hq_inductor.format.mma import fp8_scale
    from hq_inductor.ops.fused_rotation import rotate, rotate_quantize
    from hq_inductor.ops.launch import MANY_COEFFICIENTS
    from hq_inductor.ops.prologue import Prologue

    layout, tiles, batch = codes_layout("e8", tile), -(-features // tile), MANY_COEFFICIENTS // features + 2
    x = torch.randn(batch, features, device="cuda").to(torch.bfloat16)
    gate = torch.randn_like(x) if prologue == "silu_mul" else None
    weight = torch.rand(features, device="cuda").to(torch.bfloat16) if "norm" in prologue else None
    before = Prologue(prologue, gate, weight, None, 1e-5)
    activations = before.apply(x).double()
    exact = hadamard_ref(nn.functional.pad(activations, (0, tiles * tile - features)), hadamard_block(tile), 3)
    # a few activations near the middle between two of bf16 may be rounded the other way
    bound = (1e-6 if prologue == "none" else 4 * torch.finfo(torch.bfloat16).eps / hadamard_block(tile) ** 0.5) * activations.abs().max()
    plain, _ = rotate(x, None, layout, tiles, 3, torch.bfloat16, before)
    assert ((plain.double() - exact).abs() <= exact.abs() * 2**-8 + bound).all()
    for few in (batch, 3):
        found, scale = rotate(x[:few], None, layout, tiles, 3, torch.float8_e4m3fn, before if few == batch else first_rows(before, few))
        torch.testing.assert_close(scale, fp8_scale(exact[:few], tile), rtol=1e-5 if prologue == "none" else 1e-3, atol=0)
        assert ((found.double() * scale[:, None] - exact[:few]).abs() <= exact[:few].abs() / 15.9 + scale[:, None] * 2**-9 + bound).all()
    q, scale = rotate(x, None, layout, tiles, 3, torch.int8, before)
    step = scale.double().t().repeat_interleave(tile, 1)
    assert ((q * step - exact).abs() <= 0.501 * step + bound).all()
    padded = -(-batch // 64) * 64
    for ring in (0, 64):
        found, found_scale, zeros = rotate_quantize(x, None, layout, tiles, 3, padded, 1000, before, ring)
        if ring:
            rows = found.view(padded // ring, -1, 2, ring, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(padded, -1)
        else:
            rows = found.view(-1, padded, 4, 2, 8).permute(1, 0, 3, 2, 4).reshape(padded, -1)
        assert torch.equal(rows[:batch], q) and torch.equal(found_scale[:, :batch], scale)
        assert (rows[batch:] == 0).all() and (found_scale[:, batch:] == 0).all() and (zeros == 0).all()


def first_rows(prologue, rows):
    return dataclasses.replace(prologue, gate=None if prologue.gate is None else prologue.gate[:rows])


@pytest.mark.parametrize("mma", MMA)
def test_mma_equals_the_cpu(mma):
    """Each number format against its emulation on the CPU: the same rounding, so the same distance from the unrounded layer."""
    weight = HyperQuantTensor.from_hp(torch.randn(256, 1024), mma=mma)
    for batch in (1, 40, 300):
        check_mma_of_batch(weight, mma, batch)


def check_mma_of_batch(weight, mma, batch):
    x, bias = torch.randn(batch, 1024).to(torch.bfloat16), torch.randn(256).to(torch.bfloat16)
    found = nn.functional.linear(x.cuda(), weight.to("cuda"), bias.cuda()).cpu().double()
    exact = nn.functional.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    emulated = nn.functional.linear(x, weight._replace(mma="int8" if mma == "auto" else mma), bias).double()
    assert found.isfinite().all()
    error, expected = (found - exact).norm() / exact.norm(), (emulated - exact).norm() / exact.norm()
    # bf16 operands of the emulated formats, and of what auto takes for large batches, round once more
    assert error < 1.15 * expected + torch.finfo(torch.bfloat16).eps


def test_no_product_waits_for_the_host():
    """Every format's product can be captured, even the first call for a layout."""
    torch.use_deterministic_algorithms(False)
    for seed, mma in enumerate(MMA):
        weight = HyperQuantTensor.from_hp(torch.randn(64, 512, device="cuda"), bps=3.75, seed=seed, mma=mma)
        for batch in (1, 48):
            x = torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16)
            expected = nn.functional.linear(x, weight)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = nn.functional.linear(x, weight)
            graph.replay()
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_the_cpu(dtype):
    weight = HyperQuantTensor.from_hp(torch.randn(100, 1024), mma="bf16")
    grad, x = torch.randn(7, 100).to(dtype), torch.randn(7, 1024).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        x_device = x.to(device).detach().requires_grad_()
        nn.functional.linear(x_device, weight.to(device)).backward(grad.to(device))
        found.append(x_device.grad.cpu().double())
    assert (found[0] - found[1]).norm() / found[0].norm() < 2 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("mma", MMA)
def test_bias_of_another_dtype(mma):
    weight = HyperQuantTensor.from_hp(torch.randn(64, 512, device="cuda"), mma=mma)
    for batch in (2, 50):
        x, bias = torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16), torch.randn(64, device="cuda")
        torch.testing.assert_close(
            nn.functional.linear(x, weight, bias), nn.functional.linear(x, weight) + bias.bfloat16(), rtol=2e-2, atol=0.1
        )


@pytest.mark.parametrize("mma", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 1, 128), (3, 130, 256), (200, 300, 1152), (129, 128, 4096)])
def test_products_of_4_bit_floats(mma, batch, rows, columns):
    """The kernel for sm_100 against the real values of its operands; before sm_100 Triton emulates mxfp4 alone."""
    if mma == "nvfp4" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("no nvfp4 tensor cores")
    quantize, rounded = (quantize_mxfp4, mxfp4_blocks) if mma == "mxfp4" else (quantize_nvfp4, nvfp4_blocks)
    x = torch.randn(batch, columns, device="cuda") * torch.exp(torch.randn(batch, 1, device="cuda"))
    weight, bias = torch.randn(rows, columns, device="cuda"), torch.randn(rows, device="cuda").bfloat16()
    exact = rounded(x).double() @ rounded(weight).double().t() + bias.double()
    found = block_scaled_matmul(quantize(x), quantize(weight), bias, torch.bfloat16)
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().amax()).all()


def test_linear_of_4_bit_floats_is_the_kernel_where_there_is_one(monkeypatch):
    """As on sm_100, with mxfp4 that Triton emulates."""
    weight = HyperQuantTensor.from_hp(torch.randn(300, 1024, device="cuda"), mma="mxfp4")
    x, bias = torch.randn(70, 1024, device="cuda").bfloat16(), torch.randn(300, device="cuda").bfloat16()
    emulated = nn.functional.linear(x, weight, bias)
    monkeypatch.setattr(linear_module, "block_scaled_products", lambda device: True)
    found = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, emulated, rtol=2**-7, atol=2**-7 * emulated.abs().max().item())


@pytest.mark.parametrize(("batch", "mma"), [(3, "int8"), (64, "int8"), (128, "int8"), (300, "int8"), (3, "fp8"), (200, "fp8")])
def test_corrupt_words_are_finite_and_repeatable(batch, mma):
    weight = HyperQuantTensor.from_hp(torch.randn(100, 2048), mma=mma).to("cuda")
    noise = torch.randint(-(2**31), 2**31, weight.qdata.shape, device="cuda").to(torch.int32)
    corrupt = weight._replace(qdata=noise)
    x = torch.randn(batch, 2048, device="cuda").to(torch.bfloat16)
    first = nn.functional.linear(x, corrupt)
    assert torch.equal(first, nn.functional.linear(x, corrupt))
    assert torch.equal(ops.rice_decode(noise, "e8", weight.tile, weight.code)[0], ops.rice_decode(noise, "e8", weight.tile, weight.code)[0])


@pytest.mark.parametrize(("bps", "floor_db"), [(4, 22.4), (3, 16.5), (2, 10.1)])
def test_gaussian_snr(bps, floor_db):
    hp = torch.randn(4096, 4096, device="cuda")
    weight = HyperQuantTensor.from_hp(hp, bps=bps)
    assert weight.bits_per_weight == bps
    assert -10 * torch.log10((weight.dequantize() - hp).square().mean() / hp.square().mean()).item() >= floor_db


@pytest.mark.parametrize(
    ("batch", "mma"), [(1, "auto"), (20, "auto"), (100, "auto"), (300, "auto"), (700, "int8"), (100, "fp8"), (300, "fp8")]
)
def test_plans_give_what_the_call_gives(batch, mma):
    """Bit for bit, on other activations and weights than those recorded; none for what ends in a product of the library's."""
    torch.use_deterministic_algorithms(False)
    replay.forget_plans()
    weights = [HyperQuantTensor.from_hp(torch.randn(192, 1024, device="cuda"), mma=mma) for _ in range(4)]
    bias = torch.randn(192, device="cuda").bfloat16()
    inputs = [torch.randn(2, batch // 2 or 1, 1024, device="cuda").bfloat16() for _ in weights]
    call = cuda_function(ops.rice_linear.default)
    for x, weight in zip(inputs, weights, strict=True):
        args = (x, weight.qdata, None, bias, weight.lattice, weight.tile, weight.code, weight.seed, mma)
        found = ops.rice_linear.no_grad(*args)
        expected = call(*args)
        assert found.shape == expected.shape and found.stride() == expected.stride() and torch.equal(found, expected)
    plans = [plan for plan in replay._plans.values() if isinstance(plan, replay.Plan)]
    assert len(plans) == (0 if mma == "fp8" and batch > 256 else 1)


def test_plans_of_siblings_with_what_surrounds_them():
    """Gate and activations that are halves of one tensor, a residual; another time another residual at other strides."""
    torch.use_deterministic_algorithms(False)
    replay.forget_plans()
    weights = [HyperQuantTensor.from_hp(torch.randn(64 * i, 512, device="cuda")) for i in (1, 2, 3)]
    call, first = cuda_function(ops.rice_linear_fused.default), weights[0]
    for i in range(6):
        both = torch.randn(5, 1024, device="cuda").bfloat16()
        x, gate = both.chunk(2, 1)
        residual = torch.randn(5, 64 * (1 + i % 2), device="cuda").bfloat16()[:, :64]
        rest = ("silu_mul", 0.0, first.lattice, first.tile)
        for args in (
            (x, [w.qdata for w in weights], None, [None] * 3, gate, None, None, None, *rest, [w.code for w in weights], first.seed, "auto"),
            (x, [first.qdata], None, [None], gate, None, None, residual, *rest, [first.code], first.seed, "auto"),
        ):
            assert torch.equal(ops.rice_linear_fused(*args), call(*args))
    assert sum(isinstance(plan, replay.Plan) for plan in replay._plans.values()) == 3


def test_plans_in_cuda_graphs():
    """A call that is recorded within a graph, one that is replayed within one, and both after the graph is gone."""
    torch.use_deterministic_algorithms(False)
    weight = HyperQuantTensor.from_hp(torch.randn(192, 1024, device="cuda"))
    x = torch.randn(3, 1024, device="cuda").bfloat16()
    nn.functional.linear(x, weight)
    expected = nn.functional.linear(x, weight)
    for warm in (False, True):
        if not warm:
            replay.forget_plans()
        graph, still = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            first = nn.functional.linear(still, weight)
            second = nn.functional.linear(still, weight)
        for factor in (1, 2, 0.5):
            still.copy_(x * factor)
            graph.replay()
            torch.testing.assert_close(first, (expected * factor).to(first.dtype), rtol=2**-7, atol=1e-6)
            assert torch.equal(first, second)
        del graph, first, second
    assert torch.equal(nn.functional.linear(x, weight), expected)


def test_model_moves_between_devices_and_compiles():
    model, x = nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 64)), torch.randn(3, 384)
    quantize_(model, hyperquant_weight(mma="bf16"))
    expected = model(x)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.cpu()(x), expected)


def test_cuda_graphs_replay_every_batch():
    """`mode="reduce-overhead"`, tables made in the warm-up included; the same numbers as eager, batch after batch."""
    torch.use_deterministic_algorithms(False)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 512)).cuda().to(torch.bfloat16)
    quantize_(model, hyperquant_weight(bps=3.25))
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for batch in (1, 1, 1, 4, 4, 4, 1, 100, 100):
            x = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)
