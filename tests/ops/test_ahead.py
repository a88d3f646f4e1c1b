"""Kernels compiled ahead: what is compiled, how often, and that nothing goes wrong where it fails."""

import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from hq_inductor import HyperQuantTensor  # noqa: E402
from hq_inductor.format.layout import TileLayout  # noqa: E402
from hq_inductor.ops import ahead, fused, linear, registry  # noqa: E402

ops = torch.ops.hyperquant
H100 = GPUTarget("cuda", 90, 32)


class Here:
    """Stands in for the workers: what is submitted runs at once, and takes effect at once."""

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


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
    for name in ("dependent_launch", "ring_products", "warpgroup_products"):
        monkeypatch.setattr(fused, name, lambda device: True)
    monkeypatch.setattr(linear, "fused_batch", lambda device: 256)
    monkeypatch.setattr(linear, "fp8_products", lambda device: True)
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 132)
    for name in ("table", "kernel_tables"):
        monkeypatch.setattr(TileLayout, name, lambda self, device: torch.empty(2, 4096, dtype=torch.int32))
    monkeypatch.setattr(ahead, "_pool", Here)
    monkeypatch.setattr(ahead, "_target", lambda: H100)
    monkeypatch.setattr(ahead, "_cache_dir", lambda: "nowhere")
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
        (64, "auto", ["rotate_quantize_kernel", "ring_linear_kernel"]),
        (512, "auto", ["rotate_kernel", "decode_kernel", "int8_matmul_kernel"]),
        (64, "fp8", ["fp8_scale_kernel", "rotate_kernel", "decode_kernel"]),
        (64, "bf16", ["rotate_kernel", "decode_kernel"]),
    ],
)
def test_compiles_what_a_call_launches(compiled, batch, mma, kernels):
    ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(batch, mma), {})
    assert [name for name, _, _ in compiled] == kernels
    for _, given, options in compiled:
        assert not any(isinstance(value, torch.Tensor) for value in given.values())
        assert options["num_warps"] in (1, 4, 8)
    if batch == 1:
        given = compiled[1][1]
        assert (given["out_ptr"], given["words_ptr"], given["partial_ptr"]) == (torch.bfloat16, torch.int32, torch.float32)
        assert (given["N"], given["COLUMNS"], given["SIBLINGS"], given["PDL"]) == (96, 8, 1, True)
    ahead.wait_for_kernels()
    # read by this process
    assert [name for name, _, _ in compiled] == 2 * kernels


def test_once_for_layers_that_are_alike(compiled):
    function = registry.cuda_function(ops.rice_linear.default)
    for _ in range(3):
        ahead.compile_kernels_of(function, arguments(1), {})
    assert len(compiled) == len(ahead._under_way) == 2
    ahead.wait_for_kernels()
    assert not ahead._under_way


def test_a_launch_waits_and_runs(compiled):
    """Real tensors launch; whatever is under way is finished before."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options, len(compiled)))

    ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(1), {})
    x = torch.zeros(1)
    ahead.launch(Kernel(), (3, 1), x, 5, SIZE=2, num_warps=4)
    assert launched == [((3, 1), (x, 5), {"SIZE": 2, "num_warps": 4}, 4)]


def test_failure_is_left_to_the_launch(compiled, monkeypatch, caplog):
    monkeypatch.setattr(fused.linear_kernel, "warmup", lambda *args, **options: 1 / 0)
    with caplog.at_level("INFO", "hq_inductor.passes"):
        ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(1), {})
        ahead.wait_for_kernels()
    assert "linear_kernel not compiled ahead: ZeroDivisionError" in caplog.text
    assert [name for name, _, _ in compiled] == 2 * ["rotate_quantize_kernel"]


def test_worker_compiles_into_the_cache_and_leaves_no_trace(tmp_path):
    """As a worker does it, for a device that is not here; then the same job is a hit."""
    from triton.runtime import driver

    pointers = (torch.bfloat16, torch.float32)
    options = (("PROLOGUE", "rms_norm"), ("ALIGNED", True), ("num_warps", 4))
    job = ahead.Job("hq_inductor.ops.kernels.activations", "row_statistics_kernel", (*pointers, 512, 512, 1e-5), (3,), options)
    hits, before, directory = [], driver._active, triton.knobs.cache.dir
    kernel = fused.row_statistics_kernel
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **given: hits.append(given["cache_hit"])
        for _ in range(2):
            # as in another process
            kernel.device_caches.clear()
            ahead.compile_job(job, H100, str(tmp_path))
    kernel.device_caches.clear()
    assert hits == [False, True] and list(tmp_path.glob("*/row_statistics_kernel.cubin"))
    assert driver._active is before and triton.knobs.cache.dir == directory


def test_no_launch_goes_another_way():
    """One that did would launch on fake tensors."""
    source = Path(fused.__file__).read_text()
    assert source.count("ahead.launch(") >= 7 and not re.search(r"kernel\w*\[", source)
