"""Generated code calls the ops without the dispatcher: here with a stand-in for their kernels, on a CPU."""

import ctypes
import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import _disable_current_modes
from torchao.quantization import quantize_

from hq_inductor import hyperquant_weight
from hq_inductor.ops import ahead, registry, replay
from hq_inductor.ops.linear import _rice_linear
from hq_inductor.passes import configured, direct_calls


def memory(address, shape, dtype):
    array = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (int(np.prod(shape)) * dtype.itemsize,))
    return torch.from_numpy(array).view(dtype).view(shape)


class Kernel:
    """One of two that make a linear layer, launched as Triton's are: the first leaves twice the activations for the second."""

    fn = SimpleNamespace(__module__=__name__, __name__="kernel")
    arg_names = ("x", "qdata", "bias", "handed", "out", "shape", "words", "rest")

    def __init__(self, first):
        self.first, self.bound, self.replayed = first, 0, 0

    def __getitem__(self, grid):
        def call(*args):
            self.bound += 1
            addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            # a device's work, which nobody sees
            with _disable_current_modes():
                self._compute(*addresses)
            return SimpleNamespace(run=self._run, function=7, packed_metadata=(1,))

        return call

    def _run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.replayed += 1
        self._compute(*args)

    def _compute(self, x, qdata, bias, handed, out, shape, words, rest):
        if self.first:
            memory(handed, shape, torch.float32).copy_(2 * memory(x, shape, torch.float32))
            return
        args = (memory(handed, shape, torch.float32) / 2, memory(qdata, words, torch.int32))
        added = None if bias is None else memory(bias, words[:1], torch.float32)
        memory(out, (*shape[:-1], words[0]), torch.float32).copy_(_rice_linear(*args, None, added, *rest))


@pytest.fixture
def kernels(monkeypatch):
    first, second = Kernel(True), Kernel(False)

    def linear(x, qdata, act_pre_scale, bias, *rest):
        assert act_pre_scale is None
        x = x if x.is_contiguous() else x.clone()
        # fake tensors are asked for their device by an operation
        handed = torch.empty(x.shape, device=x.device)
        out = x.new_empty((*x.shape[:-1], qdata.shape[0]))
        for kernel in (first, second):
            ahead.launch(kernel, (3,), x, qdata, bias, handed, out, tuple(x.shape), tuple(qdata.shape), rest)
        return out

    monkeypatch.setattr(replay, "_stream", lambda device: 11)
    monkeypatch.setattr(replay, "_allocate", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(ahead, "_settle_keys", lambda module: None)
    monkeypatch.setattr(direct_calls, "_lowers_on", lambda device: True)
    # on a CPU too
    monkeypatch.setitem(registry._CUDA, "rice_linear", linear)
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True), torch.no_grad():
        yield SimpleNamespace(first=first, second=second)
    torch._dynamo.reset()


def make_model(*widths, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n, bias=bias) for k, n in itertools.pairwise(widths)))
    quantize_(model, hyperquant_weight(bps=4))
    return model


def arguments(linear):
    return linear.qdata, None


def rest(linear):
    return linear.lattice, linear.tile, linear.code, linear.seed, linear.mma


def compiled_code(model, x, **options):
    out, (code,) = run_and_get_code(torch.compile(model, **options), x)
    return out, code


def test_generated_code_calls_without_the_dispatcher(kernels):
    model = make_model(256, 256, 256, 128)
    compiled = torch.compile(model)
    for i in range(4):
        x = torch.randn(3, 256)
        if i == 0:
            out, (code,) = run_and_get_code(compiled, x)
        else:
            out = compiled(x)
        torch.testing.assert_close(out, model(x))
        # layers of a kind share what the first of them recorded
        assert (kernels.first.bound, kernels.second.replayed) == (2, 1 + 3 * i)
    assert "= torch.ops.hyperquant" not in code
    # of three layers two are alike
    assert len(re.findall(r"^hyperquant_rice_linear_\w+ = call_site", code, re.M)) == 2
    assert len(re.findall(r"^ +hyperquant_rice_linear_\w+\(", code, re.M)) == 3
    # what the kernels hand to each other is lent again
    assert len(re.findall(r"empty_strided_cpu\(\(3072, \)", code)) == 1


def test_switched_off(kernels):
    model, x = make_model(256, 128), torch.randn(3, 256)
    with configured(direct_calls=False):
        out, code = compiled_code(model, x)
    torch.testing.assert_close(out, model(x))
    assert "torch.ops.hyperquant.rice_linear" in code and "call_site" not in code
    assert kernels.first.bound == 0


def test_sizes_that_vary(kernels):
    """One site for all, and a plan for each size."""
    model = make_model(256, 256, 128)
    compiled = torch.compile(model, dynamic=True)
    sizes = (3, 5, 3, 5, 7)
    for i, batch in enumerate(sizes):
        x = torch.randn(batch, 256)
        if i == 0:
            out, (code,) = run_and_get_code(compiled, x)
        else:
            out = compiled(x)
        torch.testing.assert_close(out, model(x))
        assert (kernels.first.bound, kernels.first.replayed) == ((2, 0), (4, 0), (4, 2), (4, 4), (6, 4))[i]
    assert "= torch.ops.hyperquant" not in code
    assert len(re.findall(r"^hyperquant_rice_linear_\w+ = varying_call_site\('rice_linear', \[0\]", code, re.M)) == 2
    replay.forget_plans()
    compiled(x)
    assert kernels.first.bound == 8


@pytest.mark.parametrize("together", [False, True])
def test_inputs_at_one_address(kernels, together):
    """Which of them a kernel had cannot be told: such calls are served, and recorded when they are apart."""
    linear = make_model(128, 128)[0]
    compiled = torch.compile(lambda x, bias: torch.ops.hyperquant.rice_linear.default(x, *arguments(linear), bias, *rest(linear)))
    for i in range(4):
        x, bias = torch.randn(1, 128), torch.randn(128)
        if together and i == 0:
            bias = x[0]
        torch.testing.assert_close(compiled(x, bias), torch.ops.hyperquant.rice_linear(x, *arguments(linear), bias, *rest(linear)))
    assert kernels.first.bound == (2 if together else 1)


def test_calls_that_do_more_keep_the_op(kernels):
    """Rows that lie apart are copied first."""
    model, x = make_model(256, 128), torch.randn(3, 512)[:, :256]
    out, code = compiled_code(model, x)
    torch.testing.assert_close(out, model(x))
    assert "call_site" not in code and kernels.first.bound == 0


def test_sites_are_forgotten_with_plans(kernels):
    model, x = make_model(256, 128), torch.randn(3, 256)
    compiled = torch.compile(model)
    for bound in (1, 1, 2):
        torch.testing.assert_close(compiled(x), model(x))
        assert kernels.first.bound == bound
        if kernels.first.replayed == 1:
            replay.forget_plans()


def test_more_memory_than_was_lent(kernels, monkeypatch):
    """Launches chosen anew may hand over more than generated code knew of."""
    model, x = make_model(256, 128), torch.randn(3, 256)
    plain = ahead.memory_of
    monkeypatch.setattr(direct_calls, "memory_of", lambda *args: dataclasses.replace(plain(*args), scratch=256))
    compiled = torch.compile(model)
    for i in range(3):
        torch.testing.assert_close(compiled(x), model(x))
        assert kernels.first.replayed == i


def test_unaligned_inputs_run_as_ever(kernels):
    model = make_model(256, 128)
    compiled = torch.compile(model)
    for offset in (0, 0, 1, 0):
        x = torch.randn(3 * 256 + 16)
        x = x[(-x.data_ptr() // 4) % 16 + offset :][: 3 * 256].view(3, 256)
        torch.testing.assert_close(compiled(x), model(x))
    assert (kernels.first.bound, kernels.first.replayed) == (2, 2)


def test_uninstalled_passes_leave_the_op(kernels):
    from hq_inductor.compile import install, uninstall

    uninstall()
    try:
        _, code = compiled_code(make_model(256, 128), torch.randn(3, 256))
    finally:
        install()
    assert "call_site" not in code
