import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import hq_inductor  # noqa: F401  (registers the ops)
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import LATTICES
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rates import start_rms, weight_layout
from hq_inductor.format.rice import decode_tiles, encode_tiles
from hq_inductor.ops.linear import call_linear

ops = torch.ops.hyperquant


def packed(rows=6, columns=512, bps=4.0, lattice="e8", tile=256):
    """(qdata, codes, scale, layout) of a random matrix of rotated coefficients."""
    layout = weight_layout(columns, bps, lattice, tile)
    t = layout.tile
    codes, scale = ops.lattice_quantize(torch.randn(rows, columns), lattice, tile, t.code, t.words, layout.start_rms)
    return ops.rice_encode(codes, scale, lattice, tile, t.code, t.words), codes, scale, t


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 4.0])
def test_opcheck_codec(lattice, bps):
    qdata, codes, scale, t = packed(lattice=lattice, bps=bps)
    x = torch.randn(6, 512)
    opcheck(ops.lattice_quantize.default, (x, lattice, 256, t.code, t.words, start_rms(bps, lattice)))
    opcheck(ops.rice_encode.default, (codes, scale, lattice, 256, t.code, t.words))
    opcheck(ops.rice_decode.default, (qdata, lattice, 256, t.code))
    opcheck(ops.lattice_dequant.default, (codes, scale, lattice, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck_hadamard(dtype, inverse):
    opcheck(ops.hadamard.default, (torch.randn(3, 256, dtype=dtype, requires_grad=True), 128, 5, inverse))
    opcheck(ops.hadamard.default, (torch.randn(256, 128, dtype=dtype).t().requires_grad_(), 128, 5, inverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_linear(dtype, bias, scaled):
    qdata, _, _, t = packed()
    x = torch.randn(3, 5, 512, dtype=dtype, requires_grad=True)
    b = torch.randn(6, dtype=dtype, requires_grad=True) if bias else None
    s = torch.rand(512).to(torch.bfloat16) if scaled else None
    layout = ("e8", 256, t.code, 3)
    opcheck(ops.rice_linear.default, (x, qdata, s, b, *layout))
    opcheck(ops.rice_linear.default, (x.detach().transpose(0, 1).requires_grad_(), qdata, s, b, *layout))
    opcheck(ops.rice_linear.no_grad, (x.detach(), qdata, s, None if b is None else b.detach(), *layout))
    opcheck(ops.rice_linear_backward.default, (torch.randn(3, 5, 6, dtype=dtype), qdata, s, *layout, 512))


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2.0, 2.75, 4.0, 6.0])
@pytest.mark.parametrize("tile", [128, 1408])
def test_rice_decode_equals_the_specification(lattice, bps, tile):
    """Also in blocks, and on corrupt words."""
    layout = weight_layout(tile, bps, lattice, tile).tile
    codes, scale = quantize_tiles(torch.randn(40, tile), layout, start_rms(bps, lattice))
    words = encode_tiles(codes, scale, layout)
    words[20:] ^= torch.where(torch.rand(20, layout.words) < 0.05, 1 << torch.randint(0, 31, (20, layout.words)), 0).to(torch.int32)
    expected, expected_scale = decode_tiles(words, layout)
    found, found_scale = ops.rice_decode(words[:, None], lattice, tile, layout.code)
    assert torch.equal(found, expected)
    assert torch.equal(found_scale[:, 0], expected_scale)
    assert torch.equal(found[:20], codes[:20])


def test_rice_decode_all_corrupt_is_finite():
    words = torch.randint(-(2**31), 2**31, (64, 2, 64)).to(torch.int32)
    codes, scale = ops.rice_decode(words, "e8", 512, 32)
    assert ops.lattice_dequant(codes, scale, "e8", torch.float32).isfinite().all()


@pytest.mark.parametrize("lattice", LATTICES)
def test_lattice_dequant(lattice):
    _, codes, scale, _ = packed(lattice=lattice)
    expected = embed(codes, lattice, torch.float64) * scale.double().repeat_interleave(256, 1)
    torch.testing.assert_close(ops.lattice_dequant(codes, scale, lattice, torch.float32), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("features", [512, 500, 257])
@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rice_linear_is_a_linear_layer_of_the_dequantized_weight(features, lattice, dtype):
    qdata, codes, scale, t = packed(rows=33, lattice=lattice)
    s = torch.rand(features).add_(0.5).to(torch.bfloat16)
    rotated = embed(codes, lattice, torch.float64) * scale.double().repeat_interleave(256, 1)
    weight = hadamard_ref(rotated, hadamard_block(256), 7, inverse=True)[:, :features] * s.double()
    x = torch.randn(4, 3, features).to(dtype)
    bias = torch.randn(33).to(dtype)
    found = ops.rice_linear(x, qdata, s, bias, lattice, 256, t.code, 7)
    expected = x.double() @ weight.t() + bias.double()
    assert found.dtype == dtype and found.shape == (4, 3, 33)
    # accumulated in fp32 (fp64): one rounding to the output dtype, and sqrt(K) roundings of the sum
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < torch.finfo(dtype).eps + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@pytest.mark.parametrize("shape", [(512,), (1, 512), (0, 512), (2, 0, 512), (2, 3, 4, 512)])
def test_rice_linear_leading_dimensions(shape):
    qdata, _, _, t = packed()
    out = ops.rice_linear(torch.randn(shape), qdata, None, None, "e8", 256, t.code, 0)
    assert out.shape == (*shape[:-1], 6)


def test_rice_linear_gradients():
    qdata, _, _, t = packed()
    x = torch.randn(3, 500, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    s = torch.rand(500).add_(0.5).to(torch.bfloat16)
    assert torch.autograd.gradcheck(lambda x, b: ops.rice_linear(x, qdata, s, b, "e8", 256, t.code, 1), (x, bias))
    assert torch.autograd.gradcheck(lambda x: ops.hadamard(x, 128, 1), torch.randn(2, 256, dtype=torch.float64, requires_grad=True))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_call_linear_leaves_autograd_out_only_where_there_is_none():
    qdata, _, _, t = packed()
    x = torch.randn(2, 512, requires_grad=True)
    arguments = (qdata, None, None, "e8", 256, t.code, 3, "auto")
    with Calls() as with_grad:
        out = call_linear(x, *arguments)
    with torch.no_grad(), Calls() as without:
        same = call_linear(x, *arguments)
    assert with_grad.seen == [ops.rice_linear.default] and without.seen == [ops.rice_linear.no_grad]
    assert out.requires_grad and torch.equal(out, same)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: ops.rice_decode(q.float(), "e8", 256, 32), TypeError, "qdata must be int32"),
        (lambda q: ops.rice_decode(q[0], "e8", 256, 32), ValueError, "qdata must be .*, got shape"),
        (lambda q: ops.rice_decode(q, "e9", 256, 32), ValueError, "lattice must be one of e8, d4, a2, z, got 'e9'"),
        (lambda q: ops.rice_decode(q, "e8", 100, 32), ValueError, "tile must be a multiple of 128"),
        (lambda q: ops.rice_decode(q[:, :, :12], "e8", 256, 32), ValueError, "words=12 is too few"),
        (lambda q: ops.rice_linear(torch.randn(2, 256), q, None, None, "e8", 256, 32, 0), ValueError, "x must have between 257 and 512"),
        (
            lambda q: ops.rice_linear(torch.ones(2, 512, dtype=torch.int32), q, None, None, "e8", 256, 32, 0),
            TypeError,
            "x must be floating",
        ),
        (lambda q: ops.rice_linear(torch.randn(2, 512), q, torch.ones(3), None, "e8", 256, 32, 0), ValueError, "act_pre_scale must have"),
        (lambda q: ops.hadamard(torch.randn(2, 100), 64), ValueError, "multiple of block=64, got 100"),
        (lambda q: ops.hadamard(torch.randn(2, 96), 96), ValueError, "power of two, got 96"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_ops_refuse(call, error, message, fake):
    qdata, *_ = packed()
    if fake:  # a wrong shape must fail while tracing, not at run time
        with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=message):
            call(mode.from_tensor(qdata))
    else:
        with pytest.raises(error, match=message):
            call(qdata)
