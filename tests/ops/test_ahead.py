"""Kernels compiled ahead: what is compiled, how often, and that nothing goes wrong where it fails."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from hq_inductor import HyperQuantTensor
from hq_inductor.format.layout import TileLayout
from hq_inductor.ops import ahead, fused, linear, registry

ops = torch.ops.hyperquant


@pytest.fixture
def compiled(monkeypatch):
    """(kernel, arguments by name, options) of all that is compiled for a make-believe H100."""
    found = []

    def warm_up(kernel, *args, grid, **options):
        bound = kernel.signature.bind(*args, **{name: value for name, value in options.items() if name in kernel.signature.parameters})
        found.append((kernel.__name__, dict(bound.arguments), {name: v for name, v in options.items() if name not in bound.arguments}))

    for kernel in vars(fused).values():
        if hasattr(kernel, "warmup"):
            monkeypatch.setattr(kernel, "warmup", lambda *args, kernel=kernel, **options: warm_up(kernel, *args, **options))
    for name in ("dependent_launch", "warpgroup_products"):
        monkeypatch.setattr(fused, name, lambda device: True)
    monkeypatch.setattr(linear, "fp8_products", lambda device: True)
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 132)
    for name in ("table", "kernel_tables"):
        monkeypatch.setattr(TileLayout, name, lambda self, device: torch.empty(2, 4096, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ahead, "_seen", set())
    return found


def on_cuda(tensor):
    """A tensor of which only the description is used."""
    with ahead.FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def arguments(batch, mma="auto"):
    weight = HyperQuantTensor.from_hp(torch.randn(96, 512), mma=mma, effort=0)
    x = on_cuda(torch.empty(batch, 512, dtype=torch.bfloat16))
    return x, on_cuda(weight.qdata), None, None, weight.lattice, weight.tile, weight.code, weight.seed, mma


@pytest.mark.parametrize(
    ("batch", "mma", "kernels"),
    [
        (1, "auto", ["rotate_quantize_kernel", "linear_kernel"]),
        (64, "auto", ["rotate_kernel", "decode_kernel", "int8_matmul_kernel"]),
        (64, "fp8", ["fp8_scale_kernel", "rotate_kernel", "decode_kernel"]),
        (64, "bf16", ["rotate_kernel", "decode_kernel"]),
    ],
)
def test_compiles_what_a_call_launches(compiled, batch, mma, kernels):
    ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(batch, mma), {})
    ahead.wait_for_kernels()
    assert [name for name, _, _ in compiled] == kernels
    for _, given, options in compiled:
        assert not any(isinstance(value, torch.Tensor) for value in given.values())
        assert options["num_warps"] in (1, 4, 8)
    if batch == 1:
        given = compiled[1][1]
        assert (given["out_ptr"], given["words_ptr"], given["partial_ptr"]) == (torch.bfloat16, torch.int32, torch.float32)
        assert (given["N"], given["COLUMNS"], given["SIBLINGS"], given["PDL"]) == (96, 8, 1, True)


def test_once_for_calls_that_are_alike(compiled):
    function = registry.cuda_function(ops.rice_linear.default)
    for _ in range(3):
        ahead.compile_kernels_of(function, arguments(1), {})
    ahead.wait_for_kernels()
    assert len(compiled) == 2 and not ahead._under_way


def test_a_launch_waits_and_runs(compiled):
    """Real tensors launch; whatever is under way is finished before."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options, len(compiled)))

    ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(1), {})
    x = torch.zeros(1)
    ahead.launch(Kernel(), (3, 1), x, 5, SIZE=2, num_warps=4)
    assert launched == [((3, 1), (x, 5), {"SIZE": 2, "num_warps": 4}, 2)]


def test_failure_is_left_to_the_launch(compiled, monkeypatch, caplog):
    monkeypatch.setattr(fused.linear_kernel, "warmup", lambda *args, **options: 1 / 0)
    with caplog.at_level("INFO", "hq_inductor.passes"):
        ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(1), {})
        ahead.wait_for_kernels()
    assert "not compiled ahead: division by zero" in caplog.text
