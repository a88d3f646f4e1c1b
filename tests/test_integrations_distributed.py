"""Tensor parallelism and FSDP2 on gloo processes; the checks themselves are in distributed_checks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchao.testing import utils

from hq_inductor import hyperquant_weight

from . import distributed_checks as checks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

TENSOR_PARALLEL = (
    "check_tensor_parallel_of_packed_layers",
    "check_styles_leave_float_layers_to_torch",
    "check_quantizing_sharded_weights",
    "check_torchao_tensor_parallel_test_case",
)
FSDP2 = (
    "check_fsdp2_of_packed_layers",
    "check_fsdp2_of_subclass_parameters",
    "check_fsdp2_mixed_precision",
    "check_fsdp2_state_dict",
)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, FSDP2 + TENSOR_PARALLEL), (4, TENSOR_PARALLEL + ("check_uneven_shards_are_refused",))],
    ids=["2 processes", "4 processes"],
)
def test_distributed(tmp_path, ranks, names):
    assert {name for name in vars(checks) if name.startswith("check_")} == {*TENSOR_PARALLEL, *FSDP2, "check_uneven_shards_are_refused"}
    mp.spawn(checks.run, (ranks, str(tmp_path / "store"), names), nprocs=ranks)


# torchao's own test as it is; it wants two or more GPUs
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestTensorParallel(utils.TorchAOTensorParallelTestCase):
    QUANT_METHOD_FN = staticmethod(hyperquant_weight)
    QUANT_METHOD_KWARGS = {"bps": 4, "tile": 256}
