import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hq_inductor.compile import HyperQuantGraphPass
from hq_inductor.ops.launch import FUSED_BATCH
from hq_inductor.passes import PassConfig, configured
from hq_inductor.passes import compile_ahead as compile_ahead_module
from hq_inductor.passes.linear_node import LinearNode
from hq_inductor.passes.pipeline import rewrite
from hq_inductor.passes.policy import why_not

NAMES = ("fuse_norm", "fuse_gate", "fuse_residual")


def linear(*leading, device="cuda", dtype=torch.bfloat16, mma="auto"):
    """A layer that reads activations `[*leading, 128]`; None is a size that is not known."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        sizes = [mode.shape_env.create_unbacked_symint() if size is None else size for size in leading]
        value = torch.empty((*sizes, 128), dtype=dtype, device=device)
    node = fx.Graph().placeholder("x")
    node.meta["val"] = value
    return LinearNode(node, node, (node,), None, (None,), "e8", 128, (32,), 0, mma)


@pytest.mark.parametrize("name", NAMES)
def test_auto_is_where_the_fused_kernel_runs(name):
    auto = PassConfig()
    assert why_not(name, linear(1, 1), auto) is None
    assert why_not(name, linear(2, FUSED_BATCH // 2), auto) is None
    assert why_not(name, linear(None, 1), auto) is None  # may be small
    assert why_not(name, linear(1, dtype=torch.float32, mma="int8"), auto) is None
    assert "4096 rows" in why_not(name, linear(1, 4096), auto)
    assert "float32" in why_not(name, linear(1, dtype=torch.float32), auto)
    assert "mma='fp8'" in why_not(name, linear(1, mma="fp8"), auto)
    assert why_not(name, linear(1, device="cpu"), auto) == "does not pay on cpu"


@pytest.mark.parametrize("name", (*NAMES, "merge_siblings"))
def test_switches(name):
    for layer in (linear(1), linear(1, 4096), linear(1, device="cpu")):
        assert why_not(name, layer, PassConfig(**{name: True})) is None
        assert why_not(name, layer, PassConfig(**{name: False})) == "switched off"


def test_merging_always_pays():
    assert all(why_not("merge_siblings", layer, PassConfig()) is None for layer in (linear(1), linear(1, 4096), linear(1, device="cpu")))


def cuda_graph(rows, norm):
    """A gated MLP with a norm before it, as Inductor decomposes it for CUDA, traced without a device."""
    linear = torch.ops.hyperquant.rice_linear

    def forward(x, weight, gate, up, down):
        if norm == "rms":
            wide = x.float()
            h = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        else:
            h = F.layer_norm(x, (128,), weight, weight)
        gated = F.silu(linear(h, gate, None, None, "e8", 128, 32, 0)) * linear(h, up, None, None, "e8", 128, 32, 0)
        return x + linear(gated, down, None, None, "e8", 128, 32, 0)

    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((rows, 128), (128,)))
        words = [torch.empty(n, tiles, 16, dtype=torch.int32, device="cuda") for n, tiles in ((256, 1), (256, 1), (128, 2))]
        return make_fx(forward, decomposition_table=select_decomp_table())(x, weight, *words)


@pytest.mark.parametrize(("rows", "small"), [(1, True), (FUSED_BATCH, True), (FUSED_BATCH + 1, False)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_default_rewrites_of_a_cuda_graph(rows, small, norm):
    assert rewrite(cuda_graph(rows, norm)).made == dict.fromkeys(["merge_siblings", *(NAMES if small else ())], 1)


def test_kernels_of_rewritten_layers_are_compiled_ahead(monkeypatch):
    calls = []
    monkeypatch.setattr(compile_ahead_module, "compile_kernels_of", lambda function, args, kwargs: calls.append((function.__name__, args)))
    run = HyperQuantGraphPass(None)
    with configured(compile_ahead=False):
        run(cuda_graph(1, "rms"))
    assert not calls
    run(cuda_graph(1, "rms"))
    assert [(name, len(args[1]), args[8]) for name, args in calls] == [
        ("_rice_linear_fused_cuda", 2, "rms_norm_cast"),
        ("_rice_linear_fused_cuda", 1, "silu_mul"),
    ]


def test_nothing_is_compiled_ahead_for_a_size_that_is_not_known(caplog):
    graph, layer = fx.Graph(), linear(None)
    x, qdata = graph.placeholder("x"), graph.placeholder("qdata")
    node = graph.call_function(torch.ops.hyperquant.rice_linear.default, (x, qdata, None, None, "e8", 128, 32, 0))
    x.meta["val"] = node.meta["val"] = layer.value("x")
    with x.meta["val"].fake_mode:
        qdata.meta["val"] = torch.empty(128, 1, 16, dtype=torch.int32, device="cuda")
    with caplog.at_level("INFO", "hq_inductor.passes"):
        assert compile_ahead_module.compile_ahead(graph) == 1
    assert "not compiled ahead" in caplog.text
