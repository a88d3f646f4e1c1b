import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import quantize_

from hq_inductor import HyperQuantTensor, hyperquant_weight


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def quantized_mlp(**arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 128, bias=False))
    quantize_(model, hyperquant_weight(**arguments))
    return model


# eager and compiled run the same op; only pointwise code around it differs
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lattice", ["e8", "z"])
def test_compiled_equals_eager(dtype, lattice):
    model, x = quantized_mlp(lattice=lattice).to(dtype), torch.randn(3, 5, 384).to(dtype)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_dynamic_batch_compiles_once():
    model = quantized_mlp()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 17, 64, 5):
            x = torch.randn(batch, 384)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_automatic_dynamic_batch_compiles_twice():
    model = quantized_mlp()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (8, 3, 17, 64, 5):
            compiled(torch.randn(batch, 384))
    assert counter.frame_count == 2  # the first batch statically, every other one by the same dynamic graph


def test_graph_takes_plain_tensors_and_one_op_per_layer():
    graphs = []

    def backend(gm, inputs):
        graphs.append((gm, inputs))
        return gm

    model = quantized_mlp()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 384))
    (gm, inputs) = graphs[0]
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in inputs)
    assert_expected_inline(
        "\n".join(f"{n.op} {n.target}" for n in gm.graph.nodes if n.op != "placeholder"),
        """\
call_function hyperquant.rice_linear.default
call_function <built-in function gelu>
call_function hyperquant.rice_linear.default
output output""",
    )


def test_subclass_parameter_compiles():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Scaled(256, 16)), torch.randn(3, 256)
    quantize_(model, hyperquant_weight())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_training_step_compiles_and_saves_no_dense_weight():
    model, x = quantized_mlp(), torch.randn(4, 384, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.compile(model, fullgraph=True)(x).square().sum().backward()
    compiled_grad, compiled_bias = x.grad.clone(), model[0].bias.grad.clone()
    x.grad = model[0].bias.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(compiled_grad, x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled_bias, model[0].bias.grad, rtol=1e-4, atol=1e-4)
    assert not any(t.is_floating_point() and t.numel() >= 256 * 128 for t in saved)


def test_quantizing_inside_a_compiled_function():
    hp = torch.randn(64, 512)
    compiled = torch.compile(lambda w: HyperQuantTensor.from_hp(w, bps=3), fullgraph=True)(hp)
    assert torch.equal(compiled.qdata, HyperQuantTensor.from_hp(hp, bps=3).qdata)


def test_freezing_keeps_the_words():
    """Constant folding must not turn packed weights into dense ones."""
    model, x = quantized_mlp().eval(), torch.randn(3, 384)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)


def test_export():
    model, x = quantized_mlp().eval(), torch.randn(3, 384)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(torch.randn(9, 384).copy_(x[:1])), model(x[:1].expand(9, -1)))
    assert sum(node.target is torch.ops.hyperquant.rice_linear.default for node in program.graph.nodes) == 2
