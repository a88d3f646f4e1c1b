"""Beside other people's passes, caches and models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.codegen import common
from torch._inductor.custom_graph_pass import CustomGraphModulePass, CustomGraphPass
from torch._inductor.utils import fresh_inductor_cache

from hq_inductor import compile as hq_compile
from hq_inductor import passes

from .graphs import ALL, NONE, Compiled, LlamaNorm, assert_same, quantized


class Siblings(nn.Module):
    """Little to generate code for."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaNorm(128)
        self.a, self.b = nn.Linear(128, 16), nn.Linear(128, 16)

    def forward(self, x):
        h = self.norm(x)
        return self.a(h) + self.b(h).sin()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return quantized(Siblings())


@pytest.fixture(autouse=True)
def _installed():
    registry = hq_compile._registry()
    before = dict(registry)
    torch._dynamo.reset()
    hq_compile.install()
    passes.reset_report()
    yield
    registry.clear()
    registry.update(before)
    torch._dynamo.reset()


X = torch.randn(3, 128)


def run(model, **arguments):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, **arguments)(X)


def uncached():
    return torch.compiler.config.patch(force_disable_caches=True)


class Recorder(CustomGraphPass):
    """A user's pass: counts what it sees, or doubles every sine."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen += [str(node.target) for node in graph.nodes if node.op == "call_function"]
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
            node.target = torch.ops.aten.cos.default

    def uuid(self):
        return "recorder"


@pytest.mark.parametrize(
    ("name", "through_options"),
    [("post_grad_custom_post_pass", True), ("post_grad_custom_post_pass", False), ("joint_custom_post_pass", True)],
)
def test_a_users_pass_runs_too(model, name, through_options):
    recorder = Recorder()
    with uncached():
        if through_options:
            out = run(model, options={name: recorder})
        else:
            with torch._inductor.config.patch({name: recorder}):
                out = run(model)
    h = model.norm(X)
    assert_same(out, model.a(h) + model.b(h).cos())
    assert "hyperquant.rice_linear.default" in recorder.seen
    assert passes.report().made["merge_siblings"] == 1


class Previous(CustomGraphModulePass):
    def __init__(self, identity):
        self.identity, self.calls = identity, 0

    def __call__(self, gm):
        self.calls += 1

    def uuid(self):
        return self.identity


def test_a_backend_pass_of_another_library_is_chained_and_restored(model):
    hq_compile.uninstall()
    previous = Previous("other")
    registry = hq_compile._registry()
    registry["cpu"] = previous
    hq_compile.install()
    hq_compile.install()
    assert hq_compile.installed() and registry["cpu"].previous is previous
    with uncached():
        run(model)
    assert previous.calls == 1 and passes.report().made["merge_siblings"] == 1
    assert registry["cpu"].uuid()[1] == "other"
    previous.identity = None  # asks for no caching
    assert registry["cpu"].uuid() is None
    hq_compile.uninstall()
    assert registry["cpu"] is previous and registry["cuda"] is None and not hq_compile.installed()


def test_uninstalled(model):
    hq_compile.uninstall()
    with uncached():
        out = run(model)
    assert passes.report().graphs == 0
    with uncached():
        assert_same(run(model, backend="hq_inductor"), out)
    assert passes.report().made["merge_siblings"] == 1
    assert not hq_compile.installed()


def test_backend_takes_mode_and_options(model):
    recorder = Recorder()
    with uncached():
        run(model, backend="hq_inductor", options={"post_grad_custom_pre_pass": recorder})
        run(model, backend="hq_inductor", mode="default")
    assert recorder.seen and passes.report().made["merge_siblings"] == 2


def hits_and_misses(model):
    """(found in Inductor's caches, compiled) of one more compilation."""
    counters.clear()
    run(model)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return hits > 0, counters["inductor"]["fxgraph_cache_miss"] > 0


def test_caches(model):
    with fresh_inductor_cache():
        assert hits_and_misses(model) == (False, True)
        assert hits_and_misses(model) == (True, False)
        assert passes.report().graphs == 1
        with passes.configured(merge_siblings=False):
            assert hits_and_misses(model) == (False, True)
            assert passes.report().left["merge_siblings", "switched off"] == 1
        assert hits_and_misses(model) == (True, False)


def test_uuid_changes_with_the_configuration():
    first = common.custom_backend_passes["cpu"].uuid()
    assert first == common.custom_backend_passes["cpu"].uuid()
    for switches in ({"fuse_norm": True}, {"fuse_gate": False}, {"merge_siblings": False}):
        with passes.configured(**switches):
            assert common.custom_backend_passes["cpu"].uuid() != first


def test_models_without_quantized_layers():
    """The same graph and the same code, from the same cache."""
    plain = nn.Sequential(LlamaNorm(128), nn.Linear(128, 16))
    graphs = []

    def after(gm):
        before = str(gm.graph)
        assert not rewrite(gm).graphs
        graphs.append((before, str(gm.graph)))

    rewrite = hq_compile.rewrite
    with pytest.MonkeyPatch.context() as patch, fresh_inductor_cache():
        patch.setattr(hq_compile, "rewrite", after)
        assert hits_and_misses(plain) == (False, True)
        assert hits_and_misses(plain) == (True, False)
    assert len(graphs) == 1 and graphs[0][0] == graphs[0][1]
    assert passes.report() == passes.PassReport()


@pytest.mark.parametrize("grad", [False, True])
def test_layers_that_stay_single_are_called_without_autograd(model, grad):
    codes, rewrite = [], hq_compile.rewrite

    def recorded(gm):
        report = rewrite(gm)
        codes.append(gm.code)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hq_compile, "rewrite", recorded)
        compiled = Compiled(model, X, grad=grad, **NONE)
    name = "rice_linear.default" if grad else "rice_linear.no_grad"
    # `Compiled` runs the rewrites of the forward graph twice
    assert all(code.count(name) == code.count("rice_linear.") == 2 for code in codes[:2]) and len(codes) >= 2
    assert_same(compiled.out, model(X))


def test_training_graphs_stay(model):
    compiled = Compiled(model, X, grad=True, **ALL)
    assert compiled.before == compiled.after
    assert compiled.report.left["merge_siblings", "a graph with gradients: run it under torch.no_grad()"] == 1
    compiled.out.sum().backward()
    assert all(before == after for before, after in compiled.graphs)
    grad = model.a.bias.grad.clone()
    model.zero_grad()
    model(X).sum().backward()
    torch.testing.assert_close(grad, model.a.bias.grad)
    model.zero_grad()
    assert_same(compiled.out, Compiled(model, X, **NONE).out)


def test_the_first_traced_layer_installs_the_passes():
    """And nothing before does: neither the import, nor quantizing, nor a call without compiling, nor a meta tensor."""
    program = """
import sys
import torch
from torch import nn
from torchao.quantization import quantize_
import hq_inductor
from hq_inductor import hyperquant_weight, passes

model = nn.Sequential(nn.Linear(128, 16)).eval()
quantize_(model, hyperquant_weight(4))
x = torch.randn(2, 128)
with torch.no_grad():
    model(x)
    model.to("meta")(x.to("meta"))
    assert "torch._inductor.codegen.common" not in sys.modules
    model = nn.Sequential(nn.Linear(128, 16)).eval()
    quantize_(model, hyperquant_weight(4))
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(model)(x)
assert passes.report().graphs == 1, passes.report()
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=root, check=True, capture_output=True, text=True)
