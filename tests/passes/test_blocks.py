"""256hole blocks: the graph before and after, and the numbers."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._inductor.utils import run_and_get_code

from hq_inductor import passes

from .graphs import ALL, NONE, BertBlock, Compiled, DiTBlock, LlamaBlock, assert_same, llama, quantized


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_llama_block():
    compiled = Compiled(llama(), torch.randn(2, 3, 128), **ALL)
    assert_expected_inline(
        compiled.before,
        """\
linear 128
linear 64
linear 64
linear 128
linear 256
linear 256
linear 128
mean 2, rsqrt 2, exp 1, add 5, mul 5""",
    )
    assert_expected_inline(
        compiled.after,
        """\
linear 128+64+64 rms_norm
linear 128 residual
linear 256+256 rms_norm
linear 128 silu_mul residual
split_with_sizes 2""",
    )
    assert compiled.report.made == {"merge_siblings": 2, "fuse_norm": 2, "fuse_gate": 1, "fuse_residual": 2}


def test_bert_block():
    model, x = quantized(BertBlock()), torch.randn(2, 3, 128)
    compiled = Compiled(model, x, **ALL)
    assert_same(compiled.out, model(x))
    assert_expected_inline(
        compiled.before,
        """\
linear 128
linear 128
linear 128
linear 128
linear 256
linear 128
var_mean 2, rsqrt 2, erf 1, add 7, mul 7""",
    )
    assert_expected_inline(
        compiled.after,
        """\
linear 128+128+128
linear 128 residual
linear 256
linear 128 residual
var_mean 2, rsqrt 2, erf 1, add 5, mul 7, split_with_sizes 1""",
    )
    assert_expected_inline(
        str(compiled.report),
        """\
graphs with HyperQuant layers: 1
fuse_residual: 2
merge_siblings: 1
fuse_norm left out, other nodes read it: 1""",
    )


def test_dit_block():
    model, inputs = quantized(DiTBlock()), (torch.randn(2, 6, 128), torch.randn(2, 4, 128), torch.randn(2, 128))
    compiled = Compiled(model, *inputs, **ALL)
    assert_same(compiled.out, model(*inputs))
    assert_expected_inline(
        compiled.before,
        """\
linear 768
linear 128
linear 128
linear 128
linear 128
linear 128
linear 128
linear 128
linear 128
linear 256
linear 128
var_mean 3, rsqrt 3, exp 1, tanh 1, add 13, mul 13""",
    )
    assert_expected_inline(
        compiled.after,
        """\
linear 768
linear 128+128+128 layer_norm_1p
linear 128
linear 128 layer_norm
linear 128+128
linear 128 residual
linear 256 layer_norm_1p
linear 128
exp 1, tanh 1, add 5, mul 8, split_with_sizes 2""",
    )
    assert_expected_inline(
        str(compiled.report),
        """\
graphs with HyperQuant layers: 1
fuse_norm: 3
fuse_residual: 1
merge_siblings: 2
fuse_residual left out, other nodes read the layer's output: 1""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_change(dtype):
    """One rewrite by itself, and all, against the graph without any."""
    x = torch.randn(2, 3, 128).to(dtype)
    plain = Compiled(llama(dtype), x, **NONE)
    assert not plain.report.made and plain.before == plain.after
    for name in ("merge_siblings", "fuse_norm", "fuse_gate", "fuse_residual", "all"):
        # a norm feeds one op only where siblings are merged
        switches = ALL if name == "all" else {**NONE, name: True, **({"merge_siblings": True} if name == "fuse_norm" else {})}
        rewritten = Compiled(llama(dtype), x, **switches)
        assert set(rewritten.report.made) == {name for name, value in switches.items() if value}
        assert_same(rewritten.out, plain.out)


def test_one_graph_for_decode_and_prefill():
    model = llama()
    compiled = Compiled(model, torch.randn(2, 3, 128), dynamic=True, codegen=True, **ALL)
    assert compiled.report.made == {"merge_siblings": 2, "fuse_norm": 2, "fuse_gate": 1, "fuse_residual": 2}
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 5), (9, 4), (3, 70)):
            x = torch.randn(*shape, 128)
            assert_same(compiled.model(x), model(x))


def test_nothing_is_left_between_the_layers():
    """Generated code has no kernel of its own, and no view is copied: four ops and attention."""
    x = torch.randn(2, 3, 128).to(torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True), passes.configured(**ALL):
        _, (code, *_) = run_and_get_code(torch.compile(llama(torch.bfloat16), fullgraph=True), x)
    assert "cpp_fused" not in code and code.count("torch.ops.hyperquant.rice_linear_fused.default(") == 4


@pytest.mark.parametrize("norm", [lambda n: nn.RMSNorm(n, eps=1e-6), nn.LayerNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False)])
def test_norms_of_torch(norm):
    model, x = quantized(LlamaBlock(norm), torch.bfloat16), torch.randn(2, 3, 128).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.normal_(module.bias)
    compiled = Compiled(model, x, **ALL)
    assert compiled.report.made["fuse_norm"] == 2 and "mean" not in compiled.after
    assert_same(compiled.out, Compiled(model, x, **NONE).out)


@pytest.mark.parametrize(("name", "norm", "dtype"), [("Llama", "rms_norm", torch.float32), ("Gemma", "rms_norm_1p", torch.bfloat16)])
def test_hugging_face_models(name, norm, dtype):
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    model, tokens = getattr(transformers, f"{name}Model")(config), torch.randint(64, (2, 5))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            nn.init.normal_(parameter, std=0.5)
    model = quantized(model, dtype)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens, use_cache=False).last_hidden_state

    compiled = Compiled(Hidden(), tokens, **ALL)
    assert compiled.report.made == {"merge_siblings": 4, "fuse_norm": 4, "fuse_gate": 2, "fuse_residual": 4}
    assert compiled.after.count(f" {norm}\n") == 4
    assert_same(compiled.out, Compiled(Hidden(), tokens, **NONE).out)
