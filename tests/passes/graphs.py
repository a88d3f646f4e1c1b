"""What the tests of the passes compile, and how they look at the graph."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torchao.quantization import quantize_

import hq_inductor.compile
from hq_inductor import hyperquant_weight, passes
from hq_inductor.passes.linear_node import LinearNode

ALL = {"merge_siblings": True, "fuse_norm": True, "fuse_gate": True, "fuse_residual": True}
NONE = dict.fromkeys(ALL, False)
_SHOWN = ("mean", "var_mean", "rsqrt", "exp", "sigmoid", "erf", "tanh", "add", "mul", "mm", "addmm", "bmm", "split_with_sizes")


def summary(graph: fx.Graph) -> str:
    """One line per quantized layer, in order, then how many of the operations that rewrites deal with are left."""
    lines = []
    for linear in LinearNode.all_of(graph):
        extras = [linear.prologue] * (linear.prologue != "none") + ["residual"] * (linear.residual is not None)
        lines.append(" ".join(["linear", "+".join(map(str, linear.rows)), *extras]))
    counts = Counter(
        node.target._schema.name.removeprefix("aten::") for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    )
    # names of the same thing in different versions of torch
    lines.append(", ".join(f"{name} {counts[name]}" for name in _SHOWN if counts[name]))
    return "\n".join(lines)


class Compiled:
    """A model compiled anew with given switches.

    Args:
        codegen: whether Inductor generates code; otherwise its post-grad graph runs as it is, which compiles in a tenth of the time.

    Attributes:
        out: what it returned. before, after: `summary` of the graph. report: the report of this compilation.
    """

    def __init__(
        self, model: nn.Module, *inputs: torch.Tensor, grad: bool = False, dynamic: bool | None = None, codegen: bool = False, **switches
    ):
        torch._dynamo.reset()
        passes.reset_report()
        rewrite, self.graphs = hq_inductor.compile.rewrite, []

        def recorded(gm):
            before = summary(gm.graph)
            rewrite(gm)
            self.report = passes.report()
            assert not rewrite(gm).made, "a second run must find nothing to do"
            check_values(gm.graph)
            self.graphs.append((before, summary(gm.graph)))

        with (
            pytest.MonkeyPatch.context() as patch,
            passes.configured(**switches),
            torch.set_grad_enabled(grad),
            torch.compiler.config.patch(force_disable_caches=True),
        ):
            patch.setattr(hq_inductor.compile, "rewrite", recorded)
            self.model = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="inductor" if codegen else without_codegen)
            self.out = self.model(*inputs)
        self.before, self.after = self.graphs[0]


def without_codegen(gm: fx.GraphModule, inputs: list):
    """Inductor up to its post-grad graph, which is interpreted."""

    def inner(gm, inputs, **kwargs):
        with V.set_fake_mode(detect_fake_mode(inputs)):
            compile_fx.view_to_reshape(gm)
            post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))
        return gm

    return compile_fx.compile_fx(gm, inputs, inner_compile=inner)


def check_values(graph: fx.Graph) -> None:
    """Every fake tensor is what its operation gives for its arguments' fake tensors."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            with value.fake_mode:
                found = node.target(*args, **kwargs)
            assert (found.dtype, str(found.shape)) == (value.dtype, str(value.shape)), node
            if "hyperquant" in str(node.target) or node.target is torch.ops.aten.permute.default:
                assert str(found.stride()) == str(value.stride()), node


class LlamaNorm(nn.Module):
    """As in Hugging Face's Llama: rounded before it is multiplied."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


def attend(q, k, v, heads):
    q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).flatten(2)


class LlamaBlock(nn.Module):
    def __init__(self, norm=LlamaNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(128), norm(128)
        self.q, self.k, self.v = nn.Linear(128, 128, bias=False), nn.Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)
        self.o = nn.Linear(128, 128, bias=False)
        self.gate, self.up, self.down = nn.Linear(128, 256, bias=False), nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.o(attend(self.q(h), self.k(h), self.v(h), 4))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class BertBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128) for _ in range(4))
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.norm1, self.norm2 = nn.LayerNorm(128), nn.LayerNorm(128)

    def forward(self, x):
        x = self.norm1(x + self.o(attend(self.q(x), self.k(x), self.v(x), 4)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class DiTBlock(nn.Module):
    """Self-attention and MLP modulated by a time step, cross attention to a text."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(128, elementwise_affine=False) for _ in range(3))
        self.modulation = nn.Linear(128, 6 * 128)
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(128, 128) for _ in range(4))
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x, text, time):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.o(attend(self.q(h), self.k(h), self.v(h), 4))
        x = x + self.cross_o(attend(self.cross_q(self.norm3(x)), self.cross_k(text), self.cross_v(text), 4))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


def quantized(model: nn.Module, dtype: torch.dtype = torch.float32, **arguments) -> nn.Module:
    model = model.to(dtype).eval()
    quantize_(model, hyperquant_weight(**{"bps": 4, "effort": 0, **arguments}))
    return model


@functools.cache
def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantized Llama block, shared by tests that do not change it."""
    torch.manual_seed(0)
    return quantized(LlamaBlock(), dtype)


# one rounding of a layer's output more or less, and what the next layers make of it
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    bound = TOLERANCE[expected.dtype] * expected.abs().max()
    assert (found - expected).abs().max() <= bound
