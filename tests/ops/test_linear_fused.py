import functools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import hq_inductor  # noqa: F401  (registers the ops)
from hq_inductor import HyperQuantTensor
from hq_inductor.ops.prologue import GATES, LAYER_NORMS, NORMS, PROLOGUES, Prologue

ops = torch.ops.hyperquant
FEATURES = 384


@functools.cache
def siblings(rows=(6, 10, 3), bps=(4.0, 4.0, 4.0), lattice="e8"):
    torch.manual_seed(0)
    return [HyperQuantTensor.from_hp(torch.randn(n, FEATURES), bps=b, lattice=lattice, seed=3) for n, b in zip(rows, bps, strict=True)]


def prologue_inputs(name, shape, dtype):
    """gate, norm_weight, norm_bias."""
    gate = torch.randn(shape).to(dtype) if name in GATES else None
    weight = torch.rand(FEATURES).add_(0.5).to(dtype) if name in NORMS else None
    return gate, weight, torch.randn(FEATURES).to(dtype) if name in LAYER_NORMS else None


def call(x, weights, act_pre_scale=None, bias=None, around=(None, None, None), residual=None, prologue="none", mma="auto"):
    """Arguments of the op."""
    first = weights[0]
    return (
        x,
        [w.qdata for w in weights],
        act_pre_scale,
        bias or [None] * len(weights),
        *around,
        residual,
        prologue,
        1e-5,
        first.lattice,
        first.tile,
        [w.code for w in weights],
        first.seed,
        mma,
    )


def torch_prologue(name, x, gate, weight, bias):
    """What the model's own modules compute, in fp64."""
    x, gate, weight, bias = (None if t is None else t.double() for t in (x, gate, weight, bias))
    if name in NORMS:
        weight = weight + 1 if name.endswith("_1p") else weight
        normed = F.layer_norm(x, (FEATURES,), eps=1e-5) if name in LAYER_NORMS else F.rms_norm(x, (FEATURES,), eps=1e-5)
        return normed * weight + (0 if bias is None else bias)
    if name in GATES:
        return x * {"silu_mul": F.silu, "gelu_mul": F.gelu, "gelu_tanh_mul": lambda g: F.gelu(g, approximate="tanh")}[name](gate)
    return x


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prologue_is_what_torch_computes(name, dtype):
    x = (torch.randn(2, 5, FEATURES) + 3).to(dtype)
    around = prologue_inputs(name, x.shape, dtype)
    found = Prologue(name, *around, 1e-5 if name in NORMS else 0.0).apply(x)
    expected = torch_prologue(name, x, *around)
    assert found.dtype == dtype
    # "cast" and gates round twice
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=4e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", [(2, 1, FEATURES), (1, 1, FEATURES), (2, 5, FEATURES)])
def test_norm_with_a_weight_for_some_rows_each(shape):
    (weight,), x = siblings((6,), (4.0,)), torch.randn(2, 5, FEATURES)
    around = (None, torch.randn(shape), torch.randn(shape))
    activations = Prologue("layer_norm_1p", *around, 1e-5).apply(x)
    torch.testing.assert_close(activations.double(), torch_prologue("layer_norm_1p", x, *around), rtol=1e-6, atol=4e-6)
    args = call(x, [weight], around=around, prologue="layer_norm_1p")
    opcheck(ops.rice_linear_fused.default, args)
    torch.testing.assert_close(ops.rice_linear_fused(*args), F.linear(activations, weight))


def test_rms_norm_cast_is_llamas():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling.LlamaRMSNorm(FEATURES, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.rand(FEATURES).add_(0.5).to(torch.bfloat16)
    x = torch.randn(64, FEATURES).to(torch.bfloat16)
    assert torch.equal(Prologue("rms_norm_cast", weight=norm.weight, eps=1e-5).apply(x), norm(x))
    assert not torch.equal(Prologue("rms_norm", weight=norm.weight, eps=1e-5).apply(x), norm(x))


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("bps", [(4.0, 4.0, 4.0), (4.0, 3.0, 5.5)])
@pytest.mark.parametrize("mma", ["auto", "int8"])
def test_equals_the_layers_one_by_one(name, bps, mma):
    weights, x = siblings(bps=bps), torch.randn(2, 5, FEATURES)
    around = prologue_inputs(name, x.shape, x.dtype)
    scale = torch.rand(FEATURES).add_(0.5).to(torch.bfloat16)
    bias = [torch.randn(6), None, torch.randn(3)]
    found = ops.rice_linear_fused(*call(x, weights, scale, bias, around, prologue=name, mma=mma))
    before = torch_prologue(name, x, *around).float()
    parts = [ops.rice_linear(before, w.qdata, scale, b, w.lattice, w.tile, w.code, w.seed, mma) for w, b in zip(weights, bias, strict=True)]
    expected = torch.cat(parts, -1)
    # an fp32 difference in activations may round a few of them to the next int8 value
    steps = {"auto": 2e-6, "int8": 1 / 127 / 4}[mma]
    assert found.shape == (2, 5, 19)
    assert (found - expected).abs().max() <= steps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_residual_is_added_before_the_rounding(dtype):
    (weight,), x = siblings((6,), (4.0,)), torch.randn(3, 5, FEATURES).to(dtype)
    bias, residual = torch.randn(6).to(dtype), (100 * torch.randn(3, 5, 6)).to(dtype)
    found = ops.rice_linear_fused(*call(x, [weight], bias=[bias], residual=residual))
    expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double() + residual.double()
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    # the weight itself is only known to fp32
    assert found.dtype == dtype and error.max() <= torch.finfo(dtype).eps / 2 + 1e-5


def test_single_weight_equals_rice_linear():
    for lattice in ("e8", "a2"):
        (weight,), x = siblings((6,), (4.0,), lattice), torch.randn(5, FEATURES)
        expected = ops.rice_linear(x, weight.qdata, None, None, lattice, weight.tile, weight.code, weight.seed)
        assert torch.equal(ops.rice_linear_fused(*call(x, [weight])), expected)


@pytest.mark.parametrize(("name", "dtype"), [("none", torch.float32), ("layer_norm", torch.bfloat16), ("silu_mul", torch.float32)])
def test_opcheck(name, dtype):
    weights, x = siblings(), torch.randn(3, 5, FEATURES, dtype=dtype)
    around, bias = prologue_inputs(name, x.shape, dtype), [torch.randn(6), None, torch.randn(3)]
    opcheck(ops.rice_linear_fused.default, call(x, weights, None, bias, around, prologue=name))
    opcheck(ops.rice_linear_fused.default, call(x.transpose(0, 1), weights[:1], None, None, (None,) * 3, torch.randn(5, 3, 6, dtype=dtype)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(code=a["code"][:1]), ValueError, "one item per weight, got 3, 3 and 1"),
        (lambda a: a.update(prologue="norm"), ValueError, "prologue must be one of 'none', .*, got 'norm'"),
        (lambda a: a.update(prologue="silu_mul"), ValueError, "gate must be given"),
        (lambda a: a.update(gate=a["x"]), ValueError, "gate must be given .*, got prologue 'none'"),
        (lambda a: a.update(prologue="silu_mul", gate=a["x"][:1]), ValueError, "gate must have the shape of x"),
        (lambda a: a.update(prologue="silu_mul", gate=a["x"].half()), TypeError, "gate must have the dtype of x"),
        (lambda a: a.update(norm_weight=torch.ones(FEATURES)), ValueError, "norm_weight must be None unless"),
        (lambda a: a.update(prologue="rms_norm", norm_bias=torch.ones(FEATURES)), ValueError, "norm_bias must be None unless"),
        (lambda a: a.update(prologue="rms_norm", norm_weight=torch.ones(3)), ValueError, "norm_weight must have shape"),
        (lambda a: a.update(prologue="rms_norm", norm_weight=torch.ones(3, FEATURES)), ValueError, "norm_weight must have shape"),
        (lambda a: a.update(prologue="rms_norm", norm_weight=torch.ones(1, 2, FEATURES)), ValueError, "norm_weight must have shape"),
        (
            lambda a: a.update(prologue="layer_norm", norm_weight=torch.ones(2, FEATURES), norm_bias=torch.ones(FEATURES)),
            ValueError,
            "norm_bias must have the shape of norm_weight",
        ),
        (lambda a: a.update(residual=torch.ones(2, 19)), ValueError, "residual must be None for more than one weight"),
        (lambda a: a.update(bias=[torch.ones(5), None, None]), ValueError, r"bias must have shape \(6,\)"),
        (lambda a: a.update(lattice="e9"), ValueError, "lattice must be one of"),
        (lambda a: a.update(mma="int4"), ValueError, "mma must be one of"),
    ],
)
def test_refuses(change, error, message):
    names = [argument.name for argument in ops.rice_linear_fused.default._schema.arguments]
    arguments = dict(zip(names, call(torch.randn(2, FEATURES), siblings()), strict=True))
    ops.rice_linear_fused(**arguments)
    change(arguments)
    for device in ("cpu", "meta"):  # meta: the fake kernel, at trace time
        moved = {k: _to(v, device) for k, v in arguments.items()}
        with pytest.raises(error, match=message):
            ops.rice_linear_fused(**moved)


def _to(value, device):
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def test_refuses_a_residual_that_does_not_fit():
    (weight,), x = siblings((6,), (4.0,)), torch.randn(2, FEATURES)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 6\), got \(6,\)"):
        ops.rice_linear_fused(*call(x, [weight], residual=torch.ones(6)))
    with pytest.raises(TypeError, match=r"residual must have the dtype of x, torch.float32, got torch.float16"):
        ops.rice_linear_fused(*call(x, [weight], residual=torch.ones(2, 6).half()))
