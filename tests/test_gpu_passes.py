"""On a CUDA device: the fused op against its layers one by one, and rewritten graphs against those that are not."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from hq_inductor import HyperQuantTensor
from hq_inductor.ops import replay
from hq_inductor.ops.prologue import GATES, LAYER_NORMS, NORMS, PROLOGUES, Prologue
from hq_inductor.passes import configured

from .passes.graphs import ALL, NONE, Compiled, DiTBlock, LlamaBlock, quantized
from .test_gpu import _poison_new_memory  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ops = torch.ops.hyperquant
FEATURES = 1000  # the last tile is padded


def cuda(*shape):
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def close(found, expected, bound=2e-2):
    """Up to roundings of activations, weights' products and results to the next bf16, int8 or, with a larger bound, e4m3."""
    assert found.shape == expected.shape and found.isfinite().all()
    assert (found.double() - expected.double()).norm() / expected.double().norm() < bound


@pytest.mark.parametrize(
    ("name", "mma"),
    [*((name, "auto") for name in PROLOGUES), *(("rms_norm_cast", mma) for mma in ("int8", "fp8", "bf16", "nvfp4")), ("silu_mul", "fp8")],
)
def test_fused_op_equals_its_layers(name, mma):
    weights = [
        HyperQuantTensor.from_hp(torch.randn(n, FEATURES, device="cuda"), bps=bps, tile=512) for n, bps in ((100, 4), (64, 4), (44, 3))
    ]
    scale = torch.rand(FEATURES, device="cuda").add_(0.5).to(torch.bfloat16)
    bias = [cuda(100), None, torch.randn(44, device="cuda")]
    first = weights[0]
    # one fp8 product is 0.037 away from the exact one; scales that differ in the last bit round most operands anew
    bound = 6e-2 if mma == "fp8" else 2e-2
    for batch in (1, 5, 40, 300):
        x, gate = cuda(batch, FEATURES) + 1, cuda(batch, 2 * FEATURES)[:, FEATURES:] if name in GATES else None
        # of a modulation as of a merged layer's output, one for all rows or for each
        rows = (batch, 2 * FEATURES) if name == "layer_norm_1p" else (2 * FEATURES,)
        gain = cuda(*rows)[..., FEATURES:] if name in NORMS else None
        shift = cuda(*rows)[..., :FEATURES] if name in LAYER_NORMS else None
        activations = Prologue(name, gate, gain, shift, 1e-5).apply(x)
        expected = [
            ops.rice_linear(activations, w.qdata, scale, b, w.lattice, w.tile, w.code, w.seed, mma)
            for w, b in zip(weights, bias, strict=True)
        ]
        around = (gate, gain, shift)
        layout = (first.lattice, first.tile, [w.code for w in weights], first.seed, mma)
        close(
            ops.rice_linear_fused(x, [w.qdata for w in weights], scale, bias, *around, None, name, 1e-5, *layout),
            torch.cat(expected, 1),
            bound,
        )
        residual = cuda(batch, 128)[:, :100]
        layout = (first.lattice, first.tile, [first.code], first.seed, mma)
        found = ops.rice_linear_fused(x, [first.qdata], scale, bias[:1], *around, residual, name, 1e-5, *layout)
        close(found, expected[0] + residual, bound)


def kernels(model, x) -> int:
    """Kernels that one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(x)
        torch.cuda.synchronize()
    kinds = [event.device_type for event in profile.events() if "Memcpy" not in event.name and "Memset" not in event.name]
    return kinds.count(torch.autograd.DeviceType.CUDA)


def test_rewritten_llama_block():
    """By default, everything is rewritten for one token: fewer kernels, the same numbers."""
    torch.use_deterministic_algorithms(False)
    model = quantized(LlamaBlock(), torch.bfloat16).cuda()
    x = cuda(1, 1, 128)
    rewritten = Compiled(model, x, codegen=True)
    assert rewritten.report.made == {"merge_siblings": 2, "fuse_norm": 2, "fuse_gate": 1, "fuse_residual": 2}
    # counted at once: the next compilation of the same module takes the place of this one
    with torch.no_grad():
        count = kernels(rewritten.model, x)
        plain = Compiled(model, x, codegen=True, **NONE)
        with configured(**NONE):
            assert count < kernels(plain.model, x)
    close(rewritten.out, plain.out)


def test_rewritten_dit_block():
    """Modulated norms in the kernels that rotate, for a few tokens and for many."""
    torch.use_deterministic_algorithms(False)
    model = quantized(DiTBlock(), torch.bfloat16).cuda()
    for tokens in (6, 300):
        inputs = cuda(2, tokens, 128), cuda(2, 4, 128), cuda(2, 128)
        rewritten = Compiled(model, *inputs, codegen=True, **ALL)
        assert rewritten.report.made["fuse_norm"] == 3 and rewritten.after.count("layer_norm_1p") == 2
        close(rewritten.out, Compiled(model, *inputs, codegen=True, **NONE).out, 4e-2)


def test_one_graph_for_decode_and_prefill():
    torch.use_deterministic_algorithms(False)
    model = quantized(LlamaBlock(), torch.bfloat16).cuda()
    compiled = Compiled(model, cuda(2, 3, 128), codegen=True, dynamic=True, **ALL)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 5), (9, 4), (3, 170)):
            x = cuda(*shape, 128)
            close(compiled.model(x), model(x))


@pytest.mark.parametrize(("batch", "mma"), [(1, "auto"), (300, "auto"), (48, "fp8"), (48, "bf16")])
def test_what_is_compiled_ahead_is_what_is_launched(batch, mma):
    """Workers compile all; this process finds it on disk, and has nothing left to compile at the launch."""
    import triton

    from hq_inductor.ops import ahead, fused
    from hq_inductor.ops.registry import cuda_function

    def compiled():
        kernels = [kernel for kernel in vars(fused).values() if hasattr(kernel, "device_caches")]
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    # a seed of its own: nothing else has compiled the kernels that rotate
    weight = HyperQuantTensor.from_hp(torch.randn(64, 512, device="cuda"), bps=2.625, seed=1000 + batch, mma=mma)
    args = (cuda(batch, 512), weight.qdata, None, None, weight.lattice, weight.tile, weight.code, weight.seed, mma)
    before, hits = compiled(), []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **given: hits.append(given["cache_hit"])
        ahead.compile_kernels_of(cuda_function(ops.rice_linear.default), args, {})
        assert ahead._under_way and compiled() == before
        ahead.wait_for_kernels()
        ready = compiled()
        ops.rice_linear(*args)
    assert compiled() == ready > before and hits and all(hits)


@pytest.mark.parametrize("rows", [(1,), (40,), (300,), (5, 40, 200, 300)], ids=str)
def test_generated_code_launches_by_itself(rows):
    """Every layer from the plan of its call site, where sizes vary from one of each size: bit for bit what dispatched calls give."""
    torch.use_deterministic_algorithms(False)
    replay.forget_plans()
    model = quantized(LlamaBlock(), torch.bfloat16).cuda()
    inputs = [cuda(1, n, 128) for n in rows for _ in range(3)]
    outs, before = {}, set(replay._sites)
    # else reductions are split as what is faster at the moment, and sums differ in the last bit
    chosen = torch._inductor.config.patch(deterministic=True)
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True), chosen:
        for direct in (False, True):
            with configured(direct_calls=direct):
                compiled = torch.compile(model, fullgraph=True, dynamic=len(rows) > 1)
                _, (code,) = run_and_get_code(compiled, inputs[0])
            # comments name the ops too
            calls = re.findall(r"^ +\w+ = torch\.ops\.hyperquant\.", code, re.M)
            assert bool(calls) != direct and ("call_site(" in code) == direct
            outs[direct] = [compiled(x) for x in inputs]
            torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(outs[False], outs[True], strict=True))
    sites = set(replay._sites) - before
    assert sites
    for site in sites:
        if isinstance(site, replay.CallSite):
            assert isinstance(site.plan, replay.Plan)
            continue
        # a key starts with the shape of the activations
        assert {key[0][1] for key in site.plans} == set(rows)
        # beyond the fused kernel's rows a residual is added by an operation of torch's: no plan then, but the same numbers
        assert all(isinstance(plan, replay.Plan) for key, plan in site.plans.items() if key[0][1] <= 256)
