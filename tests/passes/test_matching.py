"""What a rewrite must not match, and what it must leave correct."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from hq_inductor import passes

from .graphs import ALL, Compiled, LlamaNorm, assert_same, quantized, without_codegen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(inputs=128, outputs=64, **arguments):
    return quantized(nn.Linear(inputs, outputs), **arguments)


class Around(nn.Module):
    """Layers and norms as attributes, and a function of them and the inputs."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def check(function, *inputs, switches=ALL, **modules):
    """Compile with and without the passes, compare, and give back the report."""
    model = Around(function, **modules)
    compiled = Compiled(model, *inputs, **switches)
    expected = model(*inputs)
    for found, right in zip(*((value if isinstance(value, tuple) else (value,)) for value in (compiled.out, expected)), strict=True):
        assert_same(found, right)
    return compiled.report


X = torch.randn(2, 3, 128)


def pair(**arguments):
    """Two layers, the second with other arguments."""
    return {"a": linear(), "b": linear(**arguments)}


def both(m, x):
    return m.a(x).sin(), m.b(x).cos()


def test_siblings_of_two_rates_and_without_bias_share_an_op():
    a, b = linear(), quantized(nn.Linear(128, 32, bias=False), bps=3)
    assert check(both, X, a=a, b=b).made == {"merge_siblings": 1}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"seed": 1}, "seed differs"),
        ({"lattice": "d4"}, "lattice differs"),
        ({"mma": "int8"}, "mma differs"),
        ({"balance_columns": True}, "act_pre_scale differs"),
    ],
)
def test_siblings_that_are_none(arguments, reason):
    report = check(both, X, **pair(**arguments))
    assert not report.made and report.left == {("merge_siblings", reason): 1}


def test_layers_of_other_activations_are_no_siblings():
    assert not check(lambda m, x: (m.a(x), m.b(x + 1)), X, **pair()).made


def test_a_sibling_whose_bias_comes_later_is_left_out():
    def late_bias(m, x):
        a = m.a(x).sin()
        return torch.ops.hyperquant.rice_linear(x, m.b.qdata, None, a.sum((0, 1)), "e8", m.b.tile, m.b.code, m.b.seed) + a

    report = check(late_bias, X, **pair())
    assert "merge_siblings" not in report.made
    assert report.left["merge_siblings", "a weight or bias is computed after the first sibling"] == 1


def test_five_siblings_make_two_ops():
    layers = {name: linear(outputs=16) for name in "abcde"}
    report = check(lambda m, x: sum(getattr(m, name)(x).sin() for name in "abcde"), X, **layers)
    assert report.made["merge_siblings"] == 1  # four of them


def test_siblings_that_are_outputs_share_no_memory():
    """Also where strides would not give it away: one row."""
    for x in (X, X[:1, :1]):
        compiled = Compiled(Around(lambda m, x: (m.a(x), m.b(x).unflatten(-1, (2, 32)))[:2], **pair()), x, **ALL)
        assert compiled.report.made == {"merge_siblings": 1}
        a, b = compiled.out
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
        assert a.untyped_storage().nbytes() == a.numel() * 4 and a.is_contiguous() and b.is_contiguous()


def test_lora_beside_a_norm():
    """The branch reads the normed activations too, so the norm stays; the branch's result is the layer's residual."""
    lora = {"down": nn.Linear(128, 4, bias=False), "up": nn.Linear(4, 64, bias=False)}

    def forward(m, x):
        h = m.norm(x)
        return m.a(h) + 2 * m.up(m.down(h)), m.b(h).sin()

    report = check(forward, X, norm=LlamaNorm(128), **pair(), **lora, switches={**ALL, "merge_siblings": False})
    assert report.made == {"fuse_residual": 1} and report.left["fuse_norm", "other nodes read it"] == 2
    assert check(forward, X, norm=LlamaNorm(128), **pair(), **lora).made == {"merge_siblings": 1}


def rms(x, dim=-1, eps=1e-6, power=2):
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps)


NO_NORMS = {
    "over tokens": lambda m, x: m.a(rms(x, dim=1)),
    "over tokens and features": lambda m, x: m.a(rms(x, dim=(1, 2))),
    "a fourth power": lambda m, x: m.a(rms(x, power=4)),
    "of something else": lambda m, x: m.a(x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6)),
    "no epsilon": lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "divided": lambda m, x: m.a(x / torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "sample variance": lambda m, x: m.a((x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)),
    "a gain of each token": lambda m, x: m.a(rms(x) * x[..., :1]),
    "a shift after RMS": lambda m, x: m.a(rms(x) + m.a.bias[0]),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm(name):
    assert not check(NO_NORMS[name], X, a=linear()).made


def test_norms_with_a_computed_weight_stay():
    report = check(lambda m, x: m.a(rms(x) * (2 + m.norm.weight)), X, a=linear(), norm=LlamaNorm(128))
    assert not report.made and report.left == {("fuse_norm", "its weight or bias is computed"): 1}


SCALE, SHIFT = torch.randn(2, 1, 128), torch.randn(2, 1, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(None), slice(1)])
def test_modulated_norms(rows, dtype):
    """One modulation for each sequence, or for all; also with the norm in fp32 and the rest in bf16, and where sizes vary."""
    x, scale, shift = (t.to(dtype) for t in (X, SCALE[rows], SHIFT[rows]))

    def forward(m, x, scale, shift):
        wide = F.layer_norm(x.float(), (128,)) * (1 + scale.float()) + shift.float()
        return m.a(F.layer_norm(x, (128,)) * (scale + 1) + shift) + m.b(wide.to(x.dtype)).sin() + m.c(shift + rms(x) * (1 + scale)).cos()

    model = Around(forward, **{name: linear().to(dtype) for name in "abc"})
    compiled = Compiled(model, x, scale, shift, dynamic=True, **ALL)
    assert compiled.report.made["fuse_norm"] == 2 and compiled.after.count("layer_norm_1p") == 2
    assert_same(compiled.out, model(x, scale, shift))


NO_MODULATIONS = {
    "for each place of a sequence": lambda m, x, scale, shift: m.a(F.layer_norm(x, (128,)) * (1 + x[:1]) + x[:1]),
    "of two shapes": lambda m, x, scale, shift: m.a(F.layer_norm(x, (128,)) * (1 + scale) + shift[:1]),
    "two more": lambda m, x, scale, shift: m.a(F.layer_norm(x, (128,)) * (2 + scale[0, 0]) + shift[0, 0]),
    "less": lambda m, x, scale, shift: m.a(F.layer_norm(x, (128,)) * (1 - scale) - shift),
}


@pytest.mark.parametrize("name", NO_MODULATIONS)
def test_what_is_no_modulation(name):
    assert not check(NO_MODULATIONS[name], X, SCALE, SHIFT, a=linear()).made


def test_norms_that_are_outputs_stay():
    def forward(m, x):
        h = m.norm(x)
        return m.a(h), h

    assert not check(forward, X, a=linear(), norm=nn.LayerNorm(128)).made


GATE, UP = torch.randn(2, 3, 128), torch.randn(2, 3, 128)
NO_GATES = {
    "broadcast gate": (lambda m, g, u: m.a(F.silu(g[..., :1]) * u), (GATE, UP)),
    "no product": (lambda m, g, u: m.a(F.silu(g) + u), (GATE, UP)),
    "scaled sigmoid": (lambda m, g, u: m.a(g * torch.sigmoid(1.702 * g) * u), (GATE, UP)),
    "sigmoid of the other": (lambda m, g, u: m.a(g / (1 + torch.exp(-u)) * u), (GATE, UP)),
    "relu": (lambda m, g, u: m.a(F.relu(g) * u), (GATE, UP)),
}


@pytest.mark.parametrize("name", NO_GATES)
def test_what_is_no_gate(name):
    function, inputs = NO_GATES[name]
    assert not check(function, *inputs, a=linear()).made


@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda g: F.gelu(g, approximate="tanh"), lambda g: g * torch.sigmoid(g)])
@pytest.mark.parametrize("swapped", [False, True])
def test_gates(activation, swapped):
    def forward(m, g, u):
        return m.a(u * activation(g) if swapped else activation(g) * u)

    assert check(forward, GATE, UP, a=linear()).made == {"fuse_gate": 1}


def test_gate_and_up_of_one_layer():
    """As where a model keeps both in one weight: chunks of its output."""

    def forward(m, x):
        gate, up = m.both(x).chunk(2, -1)
        return m.a(F.silu(gate) * up)

    assert check(forward, X, a=linear(), both=linear(outputs=256)).made == {"fuse_gate": 1}


def test_a_gated_activation_with_other_readers_stays():
    def forward(m, g, u):
        h = F.silu(g) * u
        return m.a(h), h

    report = check(forward, GATE, UP, a=linear())
    assert not report.made and report.left == {("fuse_gate", "other nodes read it"): 1}


RESIDUAL = torch.randn(2, 3, 64)
NO_RESIDUALS = {
    "broadcast": lambda m, x, r: m.a(x) + r[:, :1],
    "scaled": lambda m, x, r: torch.add(m.a(x), r, alpha=2),
    "itself": lambda m, x, r: (lambda y: y + y)(m.a(x)),
    "a number": lambda m, x, r: m.a(x) + 1.0,
    "wider": lambda m, x, r: m.a(x) + r.double().sin(),
    "read twice": lambda m, x, r: (lambda y: (y + r, y.sin()))(m.a(x)),
}


@pytest.mark.parametrize("name", NO_RESIDUALS)
def test_what_is_no_residual(name):
    assert not check(NO_RESIDUALS[name], X, RESIDUAL, a=linear()).made


def test_a_layer_that_is_added_to_another():
    report = check(lambda m, x, r: r + m.a(x) + m.b(x + 1), X, RESIDUAL, **pair())
    assert report.made == {"fuse_residual": 2}


def test_arithmetic_with_sizes():
    """Operands that are no tensors."""

    def forward(m, x):
        size = x.shape[0]
        return m.a(F.silu(x) * size) + size, m.a(rms(x) * size + size), m.a(x + size) * size

    model = Around(forward, a=linear())
    compiled = Compiled(model, X, dynamic=True, **ALL)
    assert not compiled.report.made
    for found, right in zip(compiled.out, model(X), strict=True):
        assert_same(found, right)


def test_nodes_of_other_passes_that_say_nothing_about_their_values():
    class Negate(CustomGraphPass):
        def __call__(self, graph):
            (layer,) = graph.find_nodes(op="call_function", target=torch.ops.hyperquant.rice_linear.default)
            with graph.inserting_before(layer):
                layer.update_arg(0, graph.call_function(torch.ops.aten.neg.default, (layer.args[0],)))

        def uuid(self):
            return "negate"

    model = Around(lambda m, x: m.a(F.silu(x) * x) + x[..., :64], a=linear())
    with passes.configured(**ALL), torch._inductor.config.patch(post_grad_custom_post_pass=Negate()), torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(model, backend=without_codegen)(X)
    assert_same(found, model.a(-F.silu(X) * X) + X[..., :64])


def test_configure():
    before = passes.configure(fuse_norm=True)
    try:
        assert passes.current_config() == dataclasses.replace(before, fuse_norm=True)
    finally:
        passes.configure(**dataclasses.asdict(before))
    assert passes.current_config() == before
    with pytest.raises(TypeError, match=r"switches must be among merge_siblings, .*, got fuse_bias"):
        passes.configure(fuse_bias=True)
    with pytest.raises(ValueError, match="fuse_norm must be True, False or 'auto', got 1"):
        passes.configure(fuse_norm=1)
