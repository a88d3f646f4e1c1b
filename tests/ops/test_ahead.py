"""Kernels compiled ahead: what is compiled, how often, and that nothing goes wrong where it fails."""

import importlib
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

import hq_inductor.compile  # noqa: E402
from hq_inductor import HyperQuantTensor  # noqa: E402
from hq_inductor.format.kv import kv_layout  # noqa: E402
from hq_inductor.format.layout import TileLayout  # noqa: E402
from hq_inductor.ops import ahead, fused, fused_kv, fused_rotation, launch, launch_table, registry  # noqa: E402
from hq_inductor.passes.compile_ahead import _call, compile_ahead  # noqa: E402

from ..passes.graphs import without_codegen  # noqa: E402

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
def compiled(monkeypatch, tmp_path):
    """(kernel, arguments by name, options) of all that is compiled for a make-believe H100."""
    found = []

    def warm_up(kernel, *args, grid, **options):
        bound = kernel.signature.bind(*args, **{name: value for name, value in options.items() if name in kernel.signature.parameters})
        found.append((kernel.__name__, dict(bound.arguments), {name: v for name, v in options.items() if name not in bound.arguments}))
        return SimpleNamespace(hash=kernel.__name__)

    for kernel in (*vars(fused).values(), *vars(fused_kv).values(), *vars(fused_rotation).values()):
        if hasattr(kernel, "warmup"):
            monkeypatch.setattr(kernel, "warmup", lambda *args, kernel=kernel, **options: warm_up(kernel, *args, **options))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    remembered = [function for module in (launch, launch_table) for function in vars(module).values() if hasattr(function, "cache_clear")]
    for function in remembered:
        function.cache_clear()
    for name in ("table", "kernel_tables"):
        monkeypatch.setattr(TileLayout, name, lambda self, device: torch.empty(2, 4096, dtype=torch.int32))
    monkeypatch.setattr(ahead, "_pool", Here)
    monkeypatch.setattr(ahead, "_target", lambda: H100)
    monkeypatch.setattr(ahead, "_cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(ahead, "_seen", set())
    yield found
    for function in remembered:
        function.cache_clear()


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
        (100, "auto", ["rotate_quantize_kernel", "ring_linear_kernel"]),
        (512, "auto", ["rotate_quantize_kernel", "decode_kernel", "ring_matmul_kernel"]),
        (4096, "int8", ["rotate_row_kernel", "decode_kernel", "ring_matmul_kernel"]),
        (64, "fp8", ["rotate_row_kernel", "ring_linear_kernel"]),
        (300, "fp8", ["rotate_row_kernel", "decode_kernel"]),
        (64, "bf16", ["rotate_kernel", "decode_kernel"]),
    ],
)
def test_compiles_what_a_call_launches(compiled, batch, mma, kernels):
    ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(batch, mma), {})
    assert [name for name, _, _ in compiled] == kernels
    for _, given, options in compiled:
        assert not any(isinstance(value, torch.Tensor) for value in given.values())
        assert options["num_warps"] in (1, 2, 4, 8)
    if batch == 1:
        given = compiled[1][1]
        assert (given["out_ptr"], given["words_ptr"], given["act_scale_ptr"]) == (torch.bfloat16, torch.int32, torch.float32)
        assert (given["N"], given["COLUMNS"], given["SIBLINGS"], given["PDL"]) == (96, 8, 1, True)
    ahead.wait_for_kernels()
    # read by this process
    assert [name for name, _, _ in compiled] == 2 * kernels


LAYOUT = kv_layout(128, 4.0).tile


def cached(query, k, v, k_words, v_words, k_exact, v_exact, length):
    """Store a token in a cache and attend to all."""
    ops.kv_store_pair(k_words, v_words, k, v, length, "e8", 128, LAYOUT.code, LAYOUT.code, 1)
    stored = (k_words, v_words, k_exact, v_exact, length)
    return ops.kv_attention(query, *stored, None, None, 0.1, 4, 64, 0, "e8", 128, LAYOUT.code, LAYOUT.code)


def cache(device):
    states = [torch.zeros(1, heads, 1, 128, dtype=torch.bfloat16, device=device) for heads in (8, 2, 2)]
    packed = [torch.zeros(1, 2, 512, LAYOUT.words, dtype=torch.int32, device=device) for _ in range(2)]
    exact = [torch.zeros(1, 2, 68, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return (*states, *packed, *exact, torch.ones(1, dtype=torch.int64, device=device))


def test_caches(compiled, monkeypatch):
    monkeypatch.setattr(fused_kv, "_symbol_bits", lambda layout, device: torch.empty(16))
    for name in ("lengths", "codewords"):
        monkeypatch.setattr(TileLayout, name, lambda self, device: torch.empty(16, dtype=torch.int32))
    with ahead.FakeTensorMode(), torch.no_grad():
        graph = make_fx(cached)(*cache("cuda")).graph
    assert compile_ahead(graph) == 2
    ahead._under_way.clear()
    assert [name for name, _, _ in compiled] == ["encode_kernel", "attention_kernel", "combine_kernel"]


def test_ops_that_write_are_seen_as_inductor_has_them(monkeypatch):
    """Functionalized: what they write to is in a list of its own."""
    calls = []
    monkeypatch.setattr(hq_inductor.compile, "compile_ahead", lambda graph: calls.extend(map(_call, graph.nodes)))
    torch._dynamo.reset()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(cached, fullgraph=True, backend=without_codegen)(*cache("cpu"))
    found = {op: given for op, given in calls if op is not None}
    assert set(found) == {ops.kv_store_pair.default, ops.kv_attention.default}
    store = found[ops.kv_store_pair.default]
    shapes = {name: tuple(value.meta["val"].shape) for name, value in store.items() if isinstance(value, fx.Node)}
    words, states = (1, 2, 512, LAYOUT.words), (1, 2, 1, 128)
    assert shapes == {"k_words": words, "v_words": words, "k": states, "v": states, "position": (1,)} and store["effort"] == 1


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
        fn = fused.linear_kernel.fn

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
    hits, keys, before, directory = [], [], driver._active, triton.knobs.cache.dir
    kernel = fused_rotation.row_statistics_kernel
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **given: hits.append(given["cache_hit"])
        for _ in range(2):
            # as in another process
            kernel.device_caches.clear()
            keys.append(ahead.compile_job(job, H100, str(tmp_path)))
    kernel.device_caches.clear()
    assert keys[0] == keys[1] != ""
    assert hits == [False, True] and list(tmp_path.glob("*/row_statistics_kernel.cubin"))
    assert driver._active is before and triton.knobs.cache.dir == directory


def test_the_assembler_of_workers_counts_whatever_was_asked_before(tmp_path, monkeypatch):
    """Inductor asks for the version of Triton's own when it generates code: kernels compiled in workers would not be found after that."""
    from torch._inductor.runtime import compile_tasks
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.compiler.compiler import make_backend

    brought = tmp_path / "ptxas"
    brought.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.9\n")
    brought.chmod(0o755)
    monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", lambda: monkeypatch.setenv("TRITON_PTXAS_PATH", str(brought)))
    # Triton 3.9 has another one for what comes after
    a100 = GPUTarget("cuda", 80, 32)
    get_ptxas_version.cache_clear()
    ahead._take_assembler_of_workers.cache_clear()
    try:
        assert "99.9" not in make_backend(a100).hash()
        ahead._take_assembler_of_workers()
        assert "99.9" in make_backend(a100).hash()
    finally:
        get_ptxas_version.cache_clear()
        ahead._take_assembler_of_workers.cache_clear()


def test_a_kernel_that_is_compiled_twice_is_reported(compiled, monkeypatch, caplog):
    monkeypatch.setattr(ahead, "compile_job", lambda *job: "another key")
    with caplog.at_level("INFO", "hq_inductor.passes"):
        ahead.compile_kernels_of(registry.cuda_function(ops.rice_linear.default), arguments(1), {})
        ahead.wait_for_kernels()
    assert "linear_kernel was compiled twice: a worker's key is another key" in caplog.text


def test_every_worker_is_prepared(monkeypatch):
    """Those that have waited longest get the kernels."""
    from torch._inductor import async_compile

    submitted = []
    pool = SimpleNamespace(submit=lambda *job: submitted.append(job))
    monkeypatch.setattr(async_compile.AsyncCompile, "process_pool", lambda: pool)
    monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", lambda: submitted.append("answer"))
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 3)
    ahead.prepare_workers()
    assert submitted == ["answer", *3 * [(importlib.import_module, "hq_inductor.ops.fused")]]


@pytest.mark.parametrize(("module", "launches"), [(fused, 4), (fused_rotation, 5), (fused_kv, 3)])
def test_no_launch_goes_another_way(module, launches):
    """One that did would launch on fake tensors."""
    source = Path(module.__file__).read_text()
    assert source.count("ahead.launch(") == launches and not re.search(r"kernel\w*\[", source)


def test_cache_keys_do_not_depend_on_which_comes_first():
    """Of a process that asks for the kernel's first, and one that asks for a callee's."""
    program = "from hq_inductor.ops import ahead; from hq_inductor.ops.kernels import activations as a; {}; "
    program += "ahead._settle_keys(a.__name__); print(a.rotate_quantize_kernel.cache_key)"
    keys = [
        subprocess.run([sys.executable, "-c", program.format(first)], capture_output=True, text=True, check=True).stdout
        for first in ("pass", "a.row_statistics.cache_key")
    ]
    assert keys[0] == keys[1] != ""
