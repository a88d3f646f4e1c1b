"""Tensor parallelism and FSDP2 on gloo processes; the checks themselves are in distributed_checks."""

import inspect
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed._tensor.common_dtensor import with_comms
from torchao.testing import utils

from hq_inductor import hyperquant_weight

from . import distributed_checks as checks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

TENSOR_PARALLEL = (
    "check_tensor_parallel_of_packed_layers",
    "check_styles_leave_float_layers_to_torch",
    "check_quantizing_sharded_weights",
)
TORCHAO = ("check_torchao_tensor_parallel_test_case",)
FSDP2 = (
    "check_fsdp2_of_packed_layers",
    "check_fsdp2_of_subclass_parameters",
    "check_fsdp2_mixed_precision",
    "check_fsdp2_state_dict",
)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, FSDP2 + TENSOR_PARALLEL + TORCHAO), (4, TENSOR_PARALLEL + ("check_uneven_shards_are_refused",))],
    ids=["2 processes", "4 processes"],
)
def test_distributed(tmp_path, ranks, names):
    assert {name for name in vars(checks) if name.startswith("check_")} == {
        *TENSOR_PARALLEL,
        *TORCHAO,
        *FSDP2,
        "check_uneven_shards_are_refused",
    }
    mp.spawn(checks.run, (ranks, str(tmp_path / "store"), names), nprocs=ranks)


def on_cpu(test):
    """The body of a test, below its check for a GPU, with the CPU wherever its code says "cuda"."""

    def replaced(constant):
        if isinstance(constant, types.CodeType):
            return constant.replace(co_consts=tuple(map(replaced, constant.co_consts)))
        return constant.replace("cuda", "cpu") if isinstance(constant, str) else constant

    body = inspect.unwrap(test)
    return types.FunctionType(replaced(body.__code__), body.__globals__, body.__name__, body.__defaults__, body.__closure__)


class TensorParallel:
    """What both versions of torchao's test have in common."""

    QUANT_METHOD_FN = staticmethod(hyperquant_weight)
    QUANT_METHOD_KWARGS = {"bps": 4, "tile": 256}

    def run_test(self, *args):
        def assign(mesh, value):
            assert value == mesh.device_type

        # torchao's test assigns the mesh the device type that it has; newer torch has made it read-only
        with mock.patch.object(DeviceMesh, "device_type", property(DeviceMesh.device_type.fget, assign)):
            super().run_test(*args)


class TestTensorParallelOnCpu(TensorParallel, utils.TorchAOTensorParallelTestCase):
    """torchao's own test with another device and backend; as it is, it wants two GPUs."""

    world_size, device_type, backend = 2, "cpu", "gloo"

    def check(self, dtype):
        # ranks share the one device
        with mock.patch("torch.cuda.device_count", return_value=1):
            on_cpu(utils.TorchAOTensorParallelTestCase.test_tp_float32)(self, dtype)

    test_tp_float32 = with_comms(lambda self: self.check(torch.float32))
    test_tp_float16 = with_comms(lambda self: self.check(torch.float16))
    test_tp_bfloat16 = with_comms(lambda self: self.check(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestTensorParallel(TensorParallel, utils.TorchAOTensorParallelTestCase):
    pass
