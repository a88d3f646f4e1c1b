"""Plans: the same results as without, and none where a call does more than launch."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hq_inductor.format.on_device import on_device
from hq_inductor.ops import ahead, replay


def array(address, count):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


class Kernel:
    """`z = x * FACTOR + y` on a CPU, launched as Triton's are: from Python with tensors, compiled with addresses."""

    arg_names = ("x", "y", "z", "count", "FACTOR")
    fn = SimpleNamespace(__module__=__name__)

    def __init__(self):
        self.bound, self.replayed = 0, 0

    def __getitem__(self, grid):
        def call(x, y, z, count, FACTOR):
            self.bound += 1
            self._compute(x.data_ptr(), y.data_ptr(), z.data_ptr(), count, FACTOR)
            return SimpleNamespace(run=self._run, function=7, packed_metadata=(1,))

        return call

    def _run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (x, y, z, stream, function, metadata) == (3, 1, 1, 11, 7, (1,))
        # as Triton's launcher insists
        assert [type(arg) for arg in args[:4]] == [int] * 4
        self.replayed += 1
        self._compute(*args)

    def _compute(self, x, y, z, count, FACTOR):
        array(z, count)[:] = array(x, count) * FACTOR + array(y, count)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(replay, "_stream", lambda device: 11)
    monkeypatch.setattr(replay, "_allocate", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(replay, "_plans", {})
    # no modules of kernels here
    monkeypatch.setattr(ahead, "_settle_keys", lambda module: None)
    return Kernel()


def random(*shape):
    """At 64 bytes, whatever the allocator does."""
    memory = torch.randn(int(np.prod(shape)) + 16)
    return memory[(-memory.data_ptr() // 4) % 16 :][: int(np.prod(shape))].view(shape)


def launch(kernel, x, y, z, factor):
    ahead.launch(kernel, (3,), x, y, z, z.numel(), FACTOR=factor)


def twice_x_plus_y(kernel):
    def function(x, y):
        out = torch.empty(x.numel())
        launch(kernel, x, y, out, 2)
        return out

    return replay.replayed(function)


def test_results_are_those_of_the_call(kernel):
    """Several allocations, one used from its middle on, a constant, a list of tensors, None; other inputs each time."""
    table = torch.arange(8.0)

    def function(x, others, nothing, factor):
        both = torch.empty(16)
        low, high = both.split(8)
        launch(kernel, x.reshape(-1), others[0], low, factor)
        launch(kernel, low, on_device(("replay test",), lambda: table, torch.device("cpu")), high, 3)
        out = x.new_empty(8)
        launch(kernel, high, others[1], out, 1)
        return out.view(2, 4)

    call = replay.replayed(function)
    for i in range(3):
        x, a, b = random(2, 4), random(8), random(8)
        out = call(x, [a, b], None, 2)
        torch.testing.assert_close(out, (((x.view(-1) * 2 + a) * 3 + table) + b).view(2, 4))
        assert (kernel.bound, kernel.replayed) == (3, 3 * i)


def test_constants_keep_their_types(kernel):
    def function(x, y):
        first, out = torch.empty(1), torch.empty(1)
        launch(kernel, x, y, first, 1.0)
        launch(kernel, first, y, out, 1)
        return out

    call = replay.replayed(function)
    for _ in range(3):
        x, y = random(1), random(1)
        torch.testing.assert_close(call(x, y), x + 2 * y)
    assert kernel.replayed == 4


class Launcher:
    """As Triton's: Python around a compiled function, which takes the kernel's arguments each, or all as one."""

    def __init__(self, nested, varies=False):
        self.nested, self.calls, self.varies = nested, 0, varies
        self.launched = []
        self.launch = lambda *args: self.launched.append(args)

    def __call__(self, x, y, z, stream, function, metadata, *args):
        self.calls += 1
        extra = object() if self.varies else None
        args = (metadata, extra, ("int", "float"), args) if self.nested else (metadata, extra, *args)
        self.launch(x, y, z, stream, function, *args)


@pytest.mark.parametrize("nested", [False, True])
def test_launchers_are_asked_what_they_call(kernel, nested):
    """Once, for all launches to come; what they put in or pack stays as it was."""
    x, out = random(8), random(8)
    noted = replay._Recorder([x])
    noted.allocated.append(out)
    launcher = Launcher(nested)
    compiled = SimpleNamespace(run=launcher, function=7, packed_metadata=(1,))
    noted.launched(compiled, (5,), [x, 1.0, out, 1])
    plan = replay._plan(noted, torch.device("cpu"), 1, out)
    assert not launcher.launched
    asked = launcher.calls
    plan.launch([160, 320], 0)
    launcher(5, 1, 1, 11, 7, (1,), None, None, None, 160, 1.0, 320, 1)
    assert launcher.launched[0] == launcher.launched[1] and launcher.calls == asked + 1
    assert repr(launcher.launched[0]) == repr(launcher.launched[1])


def test_launchers_that_look_at_their_arguments_are_called(kernel):
    x, out = random(8), random(8)
    noted = replay._Recorder([x])
    noted.allocated.append(out)
    launched = []

    class Curious(Launcher):
        def __call__(self, *args):
            assert all(isinstance(arg, int) for arg in args[-2:])
            launched.append(args)

    noted.launched(SimpleNamespace(run=Curious(False), function=7, packed_metadata=(1,)), (5,), [x, out])
    plan = replay._plan(noted, torch.device("cpu"), 1, out)
    plan.launch([160, 320], 0)
    assert [args[-2:] for args in launched] == [(160, 320)]


def test_launchers_that_give_something_else_each_time_are_called(kernel):
    x, out = random(8), random(8)
    noted = replay._Recorder([x])
    noted.allocated.append(out)
    launcher = Launcher(False, varies=True)
    noted.launched(SimpleNamespace(run=launcher, function=7, packed_metadata=(1,)), (5,), [x, out])
    plan = replay._plan(noted, torch.device("cpu"), 1, out)
    asked = launcher.calls
    plan.launch([160, 320], 0)
    assert launcher.calls == asked + 1 and launcher.launched[0][-2:] == (160, 320)


def test_kinds_are_told_apart(kernel):
    def function(x, y, factor):
        out = torch.empty(x.numel())
        launch(kernel, x, y, out, factor)
        return out

    call = replay.replayed(function)
    for count, factor in [(8, 2), (8, 3), (4, 2), (8, 2), (4, 2), (8, 3)]:
        x, y = random(count), random(count)
        torch.testing.assert_close(call(x, y, factor), x * factor + y)
    assert (kernel.bound, kernel.replayed) == (3, 3)


def test_a_tensor_on_another_device_is_of_another_kind():
    """A plan has addresses only: a bias that was left on the CPU must come to the call, which says so."""
    x = random(8)

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    keys = []
    for other in (x, x.as_subclass(Elsewhere)):
        key = []
        replay._kind((x, other, [other]), key, [], [])
        keys.append(key)
    assert keys[0] != keys[1]


def more_operations(kernel, x, y):
    out = torch.empty(8)
    launch(kernel, x, y, out, 1)
    return out.mul_(2)


def copied_input(kernel, x, y):
    out = torch.empty(8)
    launch(kernel, x + 0, y, out, 2)
    out = out - y
    return out


UNKNOWN = torch.zeros(8)


def unknown_memory(kernel, x, y):
    out = torch.empty(8)
    launch(kernel, x, UNKNOWN, out, 2)
    launch(kernel, out, y, out, 1)
    return out


def inside_of_an_input(kernel, x, y):
    out = torch.empty(8)
    launch(kernel, x, y, out, 2)
    launch(kernel, out[:4], y[4:], out[:4], 1)
    return out


def returns_a_part(kernel, x, y):
    out = torch.empty(16)
    launch(kernel, x, y, out[:8], 2)
    return out[:8]


def returns_an_input(kernel, x, y):
    launch(kernel, x, y, torch.empty(8), 2)
    return x


@pytest.mark.parametrize(
    "function",
    [more_operations, copied_input, unknown_memory, inside_of_an_input, returns_a_part, returns_an_input],
    ids=lambda f: f.__name__,
)
def test_calls_that_do_more_run_as_ever(kernel, function):
    call = replay.replayed(lambda x, y: function(kernel, x, y))
    for _ in range(2 * replay.MOST_FAILURES):
        x, y = random(8), random(8)
        torch.testing.assert_close(call(x, y), function(kernel, x, y))
    assert not kernel.replayed
    assert list(replay._plans.values()) == [replay.MOST_FAILURES]


def test_inputs_at_one_address_are_not_recorded_but_served(kernel):
    call = twice_x_plus_y(kernel)
    x, y = random(8), random(8)
    torch.testing.assert_close(call(x, x), 3 * x)
    torch.testing.assert_close(call(x, y), 2 * x + y)
    assert kernel.replayed == 0
    torch.testing.assert_close(call(y, y), 3 * y)
    torch.testing.assert_close(call(y, x), 2 * y + x)
    assert kernel.replayed == 2


def test_calls_that_return_nothing(kernel):
    """They write to an input; another one is empty, and so is part of the scratch."""

    def function(x, y, empty, target):
        half = torch.empty(8)
        launch(kernel, x, y, half, 2)
        launch(kernel, half, y, target, 1)
        assert empty.numel() == 0 and torch.empty(0).data_ptr() == 0

    call = replay.replayed(function)
    for i in range(3):
        x, y, target = random(8), random(8), random(8)
        assert call(x, y, torch.empty(0), target) is None
        torch.testing.assert_close(target, 2 * x + 2 * y)
        assert kernel.replayed == 2 * i


def test_unaligned_inputs_run_as_ever(kernel):
    call = twice_x_plus_y(kernel)
    y = random(8)
    call(random(8), y)
    x = random(12)[1:9]
    torch.testing.assert_close(call(x, y), 2 * x + y)
    assert kernel.replayed == 0


def test_observed_launches_run_as_ever(kernel):
    knobs = pytest.importorskip("triton").knobs

    call = twice_x_plus_y(kernel)
    with knobs.runtime.scope():
        knobs.runtime.launch_enter_hook = lambda metadata: None
        call(random(8), random(8))
        call(random(8), random(8))
    assert (kernel.bound, kernel.replayed) == (2, 0)
    call(random(8), random(8))
    call(random(8), random(8))
    assert (kernel.bound, kernel.replayed) == (3, 1)


def test_errors_pass_and_leave_no_plan(kernel):
    def function(x, y):
        if x.numel() != y.numel():
            raise ValueError("x must be as long as y")
        out = torch.empty(8)
        launch(kernel, x, y, out, 2)
        return out

    call = replay.replayed(function)
    with pytest.raises(ValueError, match="x must be"):
        call(random(8), random(4))
    assert replay.recorder() is None and not replay._plans
    call(random(8), random(8))
    assert kernel.bound == 1


def test_plans_are_bounded_and_forgotten(kernel, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", 4)

    call = twice_x_plus_y(kernel)
    for count in range(4, 20):
        call(random(count), random(count))
        assert len(replay._plans) <= 4
    call(random(19), random(19))
    assert kernel.replayed == 1
    replay.forget_plans()
    call(random(19), random(19))
    assert kernel.replayed == 1
