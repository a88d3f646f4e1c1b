"""What vLLM and SGLang do with a torchao weight, step by step as in their loading code, and torchao's tests of the same."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_
from torchao.testing import utils

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight

CONFIG = hyperquant_weight(bps=4)


def packed_linear(n=64, k=512, **options):
    linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    quantize_(linear, hyperquant_weight(**{"bps": 4, **options}))
    return linear


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_slice_and_copy(mode):
    """torchao's `_test_slice_and_copy_similar_to_vllm`: a rank narrows its parameter and the loaded weight, and copies."""
    with mode():
        _check_slice_and_copy()


def _check_slice_and_copy():
    linear, loaded = packed_linear(), packed_linear()
    for rank in range(2):
        target = linear.weight.data.narrow(0, 32 * rank, 32)
        before = target.qdata[0].clone()
        source = loaded.weight.narrow(0, 32 * rank, 32)
        assert not torch.equal(before, source.qdata[0])
        target.copy_(source)
        assert torch.equal(target.qdata, source.qdata)
    assert torch.equal(linear.weight.dequantize(), loaded.weight.dequantize())
    assert torch.equal(linear(torch.ones(1, 512, dtype=torch.bfloat16)), loaded(torch.ones(1, 512, dtype=torch.bfloat16)))


def test_narrow_keeps_the_rank_of_inner_tensors():
    """torchao's `_test_narrow_similar_to_vllm`."""
    weight = packed_linear(balance_columns=True).weight
    narrowed = weight.narrow(1, 0, 512)
    for name in weight.__tensor_flatten__()[0]:
        assert getattr(narrowed, name).dim() == getattr(weight, name).dim()


def test_stack_of_experts():
    """torchao's `_test_quantize_3d_param_similar_to_vllm`, with numbers."""
    with torch.device("meta"):
        linear = nn.Linear(256, 64)
    stack = torch.randn(6, 64, 256, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(stack)
    quantize_(linear, CONFIG)
    weight = linear.weight
    assert isinstance(weight, HyperQuantTensor) and weight.shape == (6, 64, 256) and weight.bits_per_weight == 4
    for i in (0, 5, -1):
        assert weight[i].shape == (64, 256)
        assert torch.equal(weight[i].qdata, HyperQuantTensor.from_hp(stack[i]).qdata)
    assert torch.equal(weight.dequantize()[3], weight[3].dequantize())
    # experts arrive one by one from the checkpoint
    other = HyperQuantTensor.from_hp(torch.randn(64, 256, dtype=torch.bfloat16))
    weight.data[2].copy_(other)
    assert torch.equal(linear.weight[2].dequantize(), other.dequantize())


@pytest.mark.parametrize("shape", [(64, 512), (3, 64, 512)])
@pytest.mark.parametrize("transposed", [False, True])
def test_chunk_and_cat(shape, transposed):
    """torchao's `_test_chunk_similar_to_vllm_llama4`, in every dimension."""
    weight = HyperQuantTensor.from_hp(torch.randn(shape), tile=128)
    if transposed:
        weight = weight.transpose(-1, -2)
    for dim in (-1, -2):
        pieces = weight.chunk(2, dim=dim)
        joined = torch.cat(pieces, dim=dim)
        assert [piece.shape[dim] for piece in pieces] == [weight.shape[dim] // 2] * 2
        assert joined.shape == weight.shape and torch.equal(joined.dequantize(), weight.dequantize())


def test_cat_refuses_what_does_not_fit():
    a, b = packed_linear().weight, packed_linear(bps=3).weight
    with pytest.raises(ValueError, match="agree in everything but the joined dimension"):
        torch.cat([a, b])
    one, two = (HyperQuantTensor.from_hp(torch.randn(4, 256), act_pre_scale=torch.rand(256) + 0.5) for _ in range(2))
    with pytest.raises(ValueError, match="act_pre_scale must be the same"):
        torch.cat([one, two])
    assert torch.equal(torch.cat([one, two], dim=1).dequantize(), torch.cat([one.dequantize(), two.dequantize()], dim=1))
    with pytest.raises(ValueError, match="join at multiples of tile=128"):
        torch.cat([HyperQuantTensor.from_hp(torch.randn(4, 120))] * 2, dim=1)


def test_expert_products():
    """bmm with transposed stacks (Llama 4), and their reshaping between stacks and tall matrices."""
    stack = HyperQuantTensor.from_hp(torch.randn(3, 64, 256))
    x = torch.randn(3, 5, 256)
    torch.testing.assert_close(torch.bmm(x, stack.transpose(1, 2)), torch.bmm(x, stack.dequantize().mT), rtol=1e-4, atol=1e-4)
    tall = stack.reshape(-1, 256)
    assert tall.shape == (192, 256) and torch.equal(tall.dequantize(), stack.dequantize().reshape(-1, 256))
    again = tall.unflatten(0, (3, -1))
    assert again.shape == (3, 64, 256) and torch.equal(again.qdata, stack.qdata)
    assert torch.equal(stack[1:].dequantize(), stack.dequantize()[1:])
    assert torch.equal(stack[:, 8:16].dequantize(), stack.dequantize()[:, 8:16])
    with pytest.raises(ValueError, match="weight of linear must be a matrix"):
        F.linear(x, stack)
    with pytest.raises(NotImplementedError, match="right operand of bmm"):
        torch.bmm(x, stack)
    with pytest.raises(NotImplementedError, match="last two dimensions only"):
        stack.transpose(0, 1)
    with pytest.raises(NotImplementedError, match="selects only a matrix of a stack"):
        stack.select(1, 0)
    with pytest.raises(NotImplementedError, match=r"cannot be viewed as \(3, 128, 128\)"):
        stack.reshape(3, 128, 128)


class ServedLinear(nn.Module):
    """The life of a layer in vLLM's TorchAOLinearMethod: make room, load shards into it, compute."""

    def __init__(self, sizes, k, config, serialized):
        super().__init__()
        self.config, self.serialized, self.sizes = config, serialized, sizes
        weight = nn.Parameter(torch.full((sum(sizes), k), float("nan"), dtype=torch.bfloat16), requires_grad=False)
        if serialized:
            weight = self.quantize_parameter(weight)
        weight.output_dim = 0
        self.register_parameter("weight", weight)

    def quantize_parameter(self, parameter):
        with torch.device("meta"):
            dummy = nn.Sequential(nn.Linear(parameter.shape[1], parameter.shape[0], bias=False))
        dummy[0].weight = parameter
        quantize_(dummy, self.config)
        return dummy[0].weight

    def load(self, shard, index):
        self.weight.data.narrow(0, sum(self.sizes[:index]), self.sizes[index]).copy_(shard)

    def finish(self):
        if not self.serialized:
            self.register_parameter("weight", nn.Parameter(self.quantize_parameter(self.weight), requires_grad=False))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("serialized", [False, True])
def test_merged_projections_are_loaded_into_one_parameter(serialized):
    """q, k and v of a checkpoint, float or packed, in one layer; memory that is being made room in holds anything, here NaN."""
    torch.manual_seed(0)
    sizes, k = [64, 32, 32], 512
    shards = [torch.randn(n, k, dtype=torch.bfloat16) for n in sizes]
    served = ServedLinear(sizes, k, hyperquant_weight(bps=4, check_values=not serialized), serialized)
    for index, shard in enumerate(shards):
        served.load(HyperQuantTensor.from_hp(shard) if serialized else shard, index)
    served.finish()
    assert isinstance(served.weight, nn.Parameter) and isinstance(served.weight, HyperQuantTensor)
    x = torch.randn(5, k, dtype=torch.bfloat16)
    expected = torch.cat([F.linear(x, HyperQuantTensor.from_hp(shard)) for shard in shards], dim=-1)
    with torch.inference_mode():
        torch.testing.assert_close(served(x), expected)
        torch.testing.assert_close(torch.compile(served, fullgraph=True, backend="aot_eager")(x), expected)


def test_uninitialized_memory_needs_check_values_off():
    empty = torch.full((8, 256), float("nan"))
    with pytest.raises(ValueError, match="weight must be finite"):
        HyperQuantTensor.from_hp(empty)
    assert HyperQuantTensor.from_hp(empty, check_values=False).shape == (8, 256)
    with pytest.raises(TypeError, match="check_values must be a bool, got int"):
        hyperquant_weight(check_values=1)


def test_weight_of_the_layer_is_a_parameter():
    linear = packed_linear()
    assert isinstance(linear, HyperQuantLinear) and isinstance(linear.weight, nn.Parameter)
    assert [name for name, _ in linear.named_parameters()] == ["qdata"]
    assert linear.weight.qdata.data_ptr() == linear.qdata.data_ptr()


PLUGIN = """
import json, sys
from hq_inductor.integrations.vllm import register
register()
from safetensors import safe_open
from torchao.core.config import config_from_dict
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
with safe_open(sys.argv[1], framework="pt") as file:
    tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
state, _ = unflatten_tensor_state_dict(tensors, metadata)
config = config_from_dict(json.loads(sys.argv[2]))
print(type(state["a.weight"]).__name__, tuple(state["a.weight"].shape), config.bps)
"""


def test_plugin_in_a_process_of_its_own(tmp_path):
    """A worker that has only loaded the plugin reads config and weights through torchao."""
    from torchao.core.config import config_to_dict

    from hq_inductor.integrations.safetensors import save_file

    save_file({"a.weight": packed_linear().weight}, tmp_path / "m.safetensors")
    arguments = [sys.executable, "-c", PLUGIN, str(tmp_path / "m.safetensors"), json.dumps(config_to_dict(CONFIG))]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "HyperQuantTensor (64, 512) 4", result.stderr


# torchao's own versions, which want a GPU
@pytest.mark.gpu
class TestIntegration(utils.TorchAOIntegrationTestCase):
    def test_slice_and_copy_similar_to_vllm(self):
        self._test_slice_and_copy_similar_to_vllm(CONFIG)

    def test_narrow_similar_to_vllm(self):
        self._test_narrow_similar_to_vllm(CONFIG)

    def test_quantize_3d_param_similar_to_vllm(self):
        self._test_quantize_3d_param_similar_to_vllm(CONFIG)

    def test_chunk_similar_to_vllm_llama4(self):
        weight = HyperQuantTensor.from_hp(torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16))
        for dim in (0, 1):
            self._test_chunk_similar_to_vllm_llama4(weight, dim)
