"""`packing="codes"`: the same weights as words, through everything that a weight goes through."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torchao.quantization import quantize_

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight, quantization_report
from hq_inductor.compile import HyperQuantGraphPass
from hq_inductor.format.codes import coefficients
from hq_inductor.format.hadamard import hadamard_block, hadamard_ref
from hq_inductor.format.layout import LATTICES
from hq_inductor.passes import compile_ahead

from .passes.graphs import Compiled

ops = torch.ops.hyperquant


def pair(shape=(24, 512), lattice="e8", mma="auto", **arguments):
    """A weight in words and in codes."""
    hp = torch.randn(shape)
    arguments = {"lattice": lattice, "mma": mma, "effort": 0, **arguments}
    return HyperQuantTensor.from_hp(hp, **arguments), HyperQuantTensor.from_hp(hp, packing="codes", **arguments)


@pytest.mark.parametrize("bps", [2, 4, 6])
@pytest.mark.parametrize("lattice", LATTICES)
def test_the_same_weights(lattice, bps):
    words, codes = pair((10, 500), lattice, bps=bps, act_pre_scale=torch.rand(500) + 0.5)
    assert (words.packing, codes.packing) == ("rice", "codes")
    assert codes.qdata.dtype == torch.int8 and torch.equal(codes.dequantize(), words.dequantize())
    there, back = words.repack("codes"), codes.repack("rice")
    assert torch.equal(there.qdata, codes.qdata) and torch.equal(there.scale, codes.scale)
    assert torch.equal(back.qdata, words.qdata) and back.scale is None
    assert torch.equal(there.repack("rice").qdata, words.qdata)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mma", ["auto", "int8", "bf16"])
@pytest.mark.parametrize("lattice", ["e8", "a2"])
def test_the_same_products(lattice, mma, dtype):
    words, codes = pair((24, 500), lattice, mma, act_pre_scale=torch.rand(500) + 0.5)
    x, bias = torch.randn(2, 3, 500).to(dtype), torch.randn(24).to(dtype)
    assert torch.equal(F.linear(x, codes, bias), F.linear(x, words, bias))
    assert torch.equal(F.linear(x[:0], codes), F.linear(x[:0], words))


@pytest.mark.parametrize("lattice", LATTICES)
def test_e4m3(lattice):
    words, codes = pair((24, 1024), lattice, "fp8", tile=512)
    assert codes.qdata.dtype == torch.uint8 and codes.scale.shape == (24, 1)
    # nearest of 3 bits of mantissa, and of the steps below the least exponent
    exact = hadamard_ref(words.dequantize(torch.float64), hadamard_block(512), 0)
    found = coefficients(codes.qdata, codes.scale, lattice, torch.float64)
    row_scale = codes.scale.view(torch.float32).double()
    assert ((found - exact).abs() <= exact.abs() / 16 + row_scale * 2**-10 + 1e-6).all()
    assert (found / row_scale).abs().amax() <= 448 and (found / row_scale).abs().amax() > 64
    x = torch.randn(50, 1024)
    unrounded = x.double() @ codes.dequantize(torch.float64).t()
    # activations are all that the product rounds, about as well as weights
    error = (F.linear(x, codes) - unrounded).norm() / unrounded.norm()
    assert 0.01 < error < 0.04
    assert torch.equal(words.repack("codes").qdata, codes.qdata)
    assert torch.equal(words._replace(mma="auto").repack("codes").repack("codes", mma="fp8").qdata, codes.qdata)
    with pytest.raises(ValueError, match="e4m3 has no lattice codes"):
        codes.repack("rice")


def test_rate():
    """Not `bps`: a byte per weight and the scales."""
    words, codes = pair((64, 1024), bps=3, tile=256)
    assert (words.bits_per_weight, codes.bits_per_weight) == (3, 8 + 32 / 256)
    assert words.repack("codes", mma="fp8").bits_per_weight == 8 + 32 / 1024
    assert "packing='codes'" in repr(codes) and "bytes=66560" in repr(codes)


@pytest.mark.parametrize("mma", ["auto", "fp8"])
def test_slices_stacks_and_joins(mma):
    _, codes = pair((20, 1024), mma=mma, tile=256, act_pre_scale=torch.rand(1024) + 0.5)
    dense = codes.dequantize()
    assert torch.equal(codes[3:11].dequantize(), dense[3:11])
    assert torch.equal(codes[:, 256:768].dequantize(), dense[:, 256:768])
    assert torch.equal(codes.t()[256:512].dequantize(), dense.t()[256:512])
    assert torch.equal(torch.cat([codes[:8], codes[8:]]).dequantize(), dense)
    assert torch.equal(torch.cat([codes[:, :256], codes[:, 256:]], 1).dequantize(), dense)
    assert torch.equal(codes.view(4, 5, 1024)[1].dequantize(), dense[5:10])
    assert torch.equal(codes.view(4, 5, 1024).repack("codes").dequantize(), dense.view(4, 5, 1024))
    other = codes.clone()
    other.narrow(0, 4, 8).copy_(codes.narrow(0, 8, 8))
    assert torch.equal(other.dequantize()[4:12], dense[8:16])
    assert torch.equal(codes.to(torch.bfloat16).qdata, codes.qdata) and codes.to("meta").scale.is_meta
    assert codes.new_zeros((4, 1024)).scale.shape == codes[:4].scale.shape
    with pytest.raises(ValueError, match="agree in everything"):
        torch.cat([codes, pair((20, 1024), tile=256)[0]])
    if mma == "fp8":
        with pytest.raises(ValueError, match="scales of their rows agree"):
            torch.cat([codes[:8, :256], codes[8:16, 256:]], 1)


def mlp(mma="auto", **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).eval()
    quantize_(model, hyperquant_weight(**{"packing": "codes", "mma": mma, "effort": 0, **arguments}))
    return model


@pytest.mark.parametrize("mma", ["auto", "fp8"])
def test_models(mma, tmp_path):
    from hq_inductor.integrations.safetensors import load_file, save_file

    model, x = mlp(mma), torch.randn(3, 384)
    expected = model(x)
    assert isinstance(model[0], HyperQuantLinear) and model[0].weight.packing == "codes"
    report = quantization_report(model)
    assert report.size_bytes == sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "bias" not in n)
    assert ("as e4m3" if mma == "fp8" else "as int8 codes") in str(report) and 8 < report.bits_per_weight < 8.2
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for state in (torch.load(file, weights_only=True), load_file(tmp_path / "model.safetensors")):
        for assign in (False, True):
            fresh = mlp(mma, seed=0)
            with torch.no_grad():
                fresh[0].qdata.zero_()
            fresh.load_state_dict(state, assign=assign)
            assert torch.equal(fresh(x), expected)
    words = mlp(mma, packing="rice")
    with pytest.raises(RuntimeError, match="packing must be rice, got codes"):
        words.load_state_dict(state)
    for layer in (words[0], words[2]):
        layer.weight = layer.weight.repack("codes")
    assert torch.equal(words(x), expected)
    before = model[0].qdata.clone(), model[0].scale.clone()
    half = model.half()[0]
    assert half.weight.dtype == torch.float16 and torch.equal(half.qdata, before[0]) and torch.equal(half.scale, before[1])


def test_kernels_are_compiled_ahead_though_nothing_is_rewritten(monkeypatch):
    calls = []
    monkeypatch.setattr(
        compile_ahead, "compile_kernels_of", lambda function, args, kwargs: calls.append((function.__name__, args[0].shape))
    )
    with FakeTensorMode():
        x, weight = torch.empty(3, 384, device="cuda"), torch.empty(8, 1, 384, dtype=torch.int8, device="cuda")
        scale = torch.empty(8, 1, dtype=torch.int32, device="cuda")
        gm = make_fx(lambda x, w, s: ops.codes_linear(x, w, s, None, None, "e8", 0))(x, weight, scale)
    HyperQuantGraphPass(None)(gm)
    assert calls == [("_codes_linear_cuda", (3, 384))]


def test_codes_are_not_loaded_over_e4m3():
    model = mlp("fp8")
    with pytest.raises(RuntimeError, match=r"qdata must be torch\.uint8, got torch\.int8"):
        model.load_state_dict(mlp("auto").state_dict())


def test_one_graph_for_every_batch_which_the_passes_leave_alone():
    model = mlp()
    compiled = Compiled(model, torch.randn(2, 384), dynamic=True)
    assert compiled.before == compiled.after and compiled.report.graphs == 0
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for batch in (3, 65):
            x = torch.randn(batch, 384)
            torch.testing.assert_close(compiled.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mma", ["auto", "fp8"])
def test_gathered_shards(mma):
    """What FSDP2 asks for: rows of every part, and the whole weight of what it gathered."""
    _, codes = pair((8, 1024), mma=mma, tile=256, act_pre_scale=torch.rand(1024) + 0.5)
    shards = [codes[:4].fsdp_pre_all_gather(None)[0], codes[4:].fsdp_pre_all_gather(None)[0]]
    gathered = tuple(torch.cat(parts) for parts in zip(*shards, strict=True))
    whole, kept = codes[:4].fsdp_post_all_gather(gathered, None, torch.bfloat16)
    assert torch.equal(whole.dequantize(torch.float32), codes.dequantize()) and len(kept) == 2


def test_export():
    model, x = mlp(), torch.randn(9, 384)
    program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), model(x))
    assert sum(node.target is ops.codes_linear.default for node in program.graph.nodes) == 2


@pytest.mark.parametrize("mma", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(mma, dtype):
    _, codes = pair((6, 512), mma=mma, tile=256, act_pre_scale=torch.rand(512) + 0.5)
    x, bias = torch.randn(3, 5, 512, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype, requires_grad=True)
    stored = (codes.qdata, codes.scale, codes.act_pre_scale)
    opcheck(ops.codes_linear.default, (x, *stored, bias, "e8", 3, mma))
    opcheck(ops.codes_linear.default, (x.detach().transpose(0, 1).requires_grad_(), *stored, None, "e8", 3, mma))
    opcheck(ops.codes_linear_backward.default, (torch.randn(3, 5, 6, dtype=dtype), *stored, "e8", 3, 512))


def test_gradients_equal_those_of_words():
    words, codes = pair((6, 500))
    found = []
    for weight in (words, codes):
        x, bias = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.zeros(6, requires_grad=True)
        F.linear(x, weight, bias).square().sum().backward()
        found.append((x.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_any_bytes_give_numbers():
    _, codes = pair()
    noise = torch.randint(-128, 128, codes.qdata.shape).to(torch.int8)
    assert F.linear(torch.randn(2, 512), codes._replace(qdata=noise)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qdata": torch.zeros(6, 2, 256)}, TypeError, "qdata must be int8"),
        ({"qdata": torch.zeros(6, 512, dtype=torch.int8)}, ValueError, "qdata must be"),
        ({"qdata": torch.zeros(6, 4, 100, dtype=torch.int8), "scale": torch.zeros(6, 4, dtype=torch.int32)}, ValueError, "tile must be"),
        ({"scale": torch.zeros(6, 2)}, TypeError, "scale must be int32"),
        ({"scale": torch.zeros(6, 1, dtype=torch.int32)}, ValueError, r"scale must have shape \(6, 2\)"),
        ({"act_pre_scale": torch.zeros(3)}, ValueError, "act_pre_scale must have shape"),
        ({"x": torch.zeros(2, 600)}, ValueError, "x must have between 257 and 512 features"),
        ({"x": torch.zeros(2, 512, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"lattice": "e9"}, ValueError, "lattice must be one of"),
        ({"mma": "nvfp4"}, ValueError, "mma must be one of 'auto', 'int8', 'fp8', 'bf16'"),
        ({"mma": "fp8"}, ValueError, 'mma must be "fp8" for e4m3'),
    ],
)
def test_the_op_refuses(change, error, message):
    given = {"x": torch.zeros(2, 512), "qdata": torch.zeros(6, 2, 256, dtype=torch.int8), "scale": torch.zeros(6, 2, dtype=torch.int32)}
    given |= {"act_pre_scale": None, "bias": None, "lattice": "e8", "seed": 0, "mma": "auto"}
    ops.codes_linear(**given)
    for device in ("cpu", "meta"):  # meta: the fake kernel, at trace time
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**given, **change}.items()}
        with pytest.raises(error, match=message):
            ops.codes_linear(**moved)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="packing must be one of 'rice', 'codes', got 'int8'"):
        hyperquant_weight(packing="int8")
    with pytest.raises(ValueError, match=r"mma must be one of .* with packing=\"codes\", got 'mxfp4'"):
        HyperQuantTensor.from_hp(torch.randn(4, 512), packing="codes", mma="mxfp4")
    with pytest.raises(ValueError, match="packing must be one of"):
        pair()[0].repack("dense")
