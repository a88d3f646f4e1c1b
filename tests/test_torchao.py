"""torchao's own test classes, run on our subclass."""

import pytest
import torch
from torchao.testing import utils

from hq_inductor import HyperQuantTensor


# named through the module: base classes imported by name would be collected and run on torchao's own subclass
class TestBasic(utils.TorchAOBasicTestCase):
    TENSOR_SUBCLASS = HyperQuantTensor
    FACTORY_FN = staticmethod(HyperQuantTensor.from_hp)
    kwargs = {"bps": 6.0}
    # 6 bits per weight on N(0, 1), one tile of 128 per row: 33.9 dB expected, 512 weights only
    LINEAR_MIN_SQNR = 31

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="calls .cuda() whatever the devices under test")
    def test_device1_to_device2_device1_cpu_device2_cpu(self):
        super().test_device1_to_device2_device1_cpu_device2_cpu()


class TestCompile(utils.TorchAOCompileTestCase):
    TENSOR_SUBCLASS = HyperQuantTensor
    FACTORY_FN = staticmethod(HyperQuantTensor.from_hp)
    kwargs = {"bps": 6.0}
    LINEAR_MIN_SQNR = 31
    COMPILE_MIN_SQNR = 50
