"""vLLM itself, where it is installed: its torchao classes load packed shards, and its engine generates what transformers generates."""

import importlib.util
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
# looked up, not imported: importing vLLM changes settings of the whole process
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")

from torchao.quantization import FqnToConfig  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig  # noqa: E402

from hq_inductor import hyperquant_weight  # noqa: E402
from hq_inductor.integrations.transformers import HyperQuantConfig  # noqa: E402

PROMPT, NEW_TOKENS = list(range(10, 26)), 12

LAYERS = """
import json, sys
import torch
import torch.nn.functional as F
from hq_inductor.integrations.vllm import register
register()
from vllm.platforms import current_platform
if not current_platform.device_type:
    sys.exit("no device")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.torchao import TorchAOConfig, TorchAOLinearMethod
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

directory = sys.argv[1]
stored = json.load(open(f"{directory}/config.json"))["quantization_config"]
config = TorchAOConfig.from_config(stored)
assert config.is_checkpoint_torchao_serialized
with set_current_vllm_config(VllmConfig()), torch.inference_mode():
    parallel_state.init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
    parallel_state.initialize_model_parallel(1)
    layers = {
        "qkv": QKVParallelLinear(256, 64, 4, 2, bias=False, quant_config=config, prefix="qkv"),
        "gate_up": MergedColumnParallelLinear(256, [512, 512], bias=False, quant_config=config, prefix="gate_up"),
        "down": RowParallelLinear(512, 256, bias=False, quant_config=config, prefix="down"),
    }
    place = {"q": ("qkv", "q"), "k": ("qkv", "k"), "v": ("qkv", "v"), "gate": ("gate_up", 0), "up": ("gate_up", 1), "down": ("down", None)}
    loaded = {}
    for name, weight in safetensors_weights_iterator([f"{directory}/model.safetensors"], False, "torchao"):
        projection = name.split(".")[-2].removesuffix("_proj")
        if projection in place:
            layer, shard = place[projection]
            parameter = layers[layer].weight
            parameter.weight_loader(parameter, weight, *([] if shard is None else [shard]))
            loaded.setdefault(layer, []).append((list(place).index(projection), weight))
    for name, layer in layers.items():
        assert isinstance(layer.quant_method, TorchAOLinearMethod)
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(5, layer.weight.shape[1])
        expected = torch.cat([F.linear(x, weight) for _, weight in sorted(loaded[name], key=lambda pair: pair[0])], -1)
        assert torch.equal(layer(x)[0], expected), name
print("loaded", sorted(loaded), type(layers["qkv"].weight).__name__)
"""

REFUSALS = """
import json, sys
import torch
from torch import nn
from torchao.quantization import FqnToConfig
from hq_inductor import hyperquant_weight
from hq_inductor.integrations.vllm import register
register()
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from hq_inductor.integrations.vllm_linear import HyperQuantLinearMethod, HyperQuantVllmConfig

assert get_quantization_config("hyperquant") is HyperQuantVllmConfig
layer = ReplicatedLinear.__new__(ReplicatedLinear)
nn.Module.__init__(layer)
layer.input_size = 512

def refused(function, message):
    try:
        function()
    except (ValueError, NotImplementedError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

config = HyperQuantVllmConfig.from_config(json.load(open(f"{sys.argv[1]}/config.json"))["quantization_config"])
refused(lambda: config.get_quant_method(layer, "model.layers.0.mlp.down_proj"), "are read from files")
config.maybe_update_config(sys.argv[1])
assert sorted({stored.bps for stored in config.layers.values()}) == [4, 5]
config.packed_modules_mapping = {"mixed": ["up_proj", "down_proj"], "kept": ["o_proj"]}
refused(lambda: config.get_quant_method(layer, "model.layers.0.mlp.mixed"), "must be stored alike to be merged")
assert not isinstance(config.get_quant_method(layer, "model.layers.0.self_attn.kept"), HyperQuantLinearMethod)

method = config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
refused(lambda: method.create_weights(layer, 256, [64], 512, 64, torch.float32), "must divide among ranks in tiles of 512")
method.create_weights(layer, 512, [64], 512, 64, torch.float32)
scale = layer._weight_act_pre_scale
scale.weight_loader(scale, torch.full((512,), 2.0))
refused(lambda: scale.weight_loader(scale, torch.ones(512)), "act_pre_scale must be the same")
print("refused")
"""

ENGINE = f"""
import os, sys
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from hq_inductor.integrations.vllm import register
register()
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    if not current_platform.device_type:
        sys.exit("no device")
    engine = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True)
    sampling = SamplingParams(max_tokens={NEW_TOKENS}, temperature=0, detokenize=False)
    print("tokens", *engine.generate([{{"prompt_token_ids": {PROMPT}}}], sampling)[0].outputs[0].token_ids)
"""


# what vLLM quantizes empty memory for, and what it makes room for as for any integers, by layer and with column scales
CONFIGS = {
    "torchao": TorchAoConfig(hyperquant_weight(bps=4, check_values=False)),
    "hyperquant": HyperQuantConfig(
        quant_type=FqnToConfig({"re:.*down_proj": hyperquant_weight(bps=5, balance_columns=True), "re:.*_proj": hyperquant_weight(bps=4)}),
        modules_to_not_convert=[".*o_proj", "lm_head"],
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """A directory for vLLM and what transformers generates from it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    floating, packed = (tmp_path_factory.mktemp(name) for name in ("float", "packed"))
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(floating)
    model = AutoModelForCausalLM.from_pretrained(floating, quantization_config=CONFIGS[request.param])
    model.save_pretrained(packed)
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return packed, tokens[0, len(PROMPT) :].tolist()


def run(script, *arguments):
    result = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    if result.stderr.endswith("no device\n"):
        pytest.skip("this build of vLLM has no device here")
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("checkpoint", ["torchao"], indirect=True)
def test_layers(checkpoint, tmp_path):
    """vLLM's reader of safetensors files, its weight loaders and its linear layers, with one rank."""
    script = tmp_path / "layers.py"
    script.write_text(LAYERS)
    assert "loaded ['down', 'gate_up', 'qkv'] HyperQuantTensor" in run(script, checkpoint[0])


def test_engine(checkpoint, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    out = run(script, checkpoint[0])
    (line,) = [line for line in out.splitlines() if line.startswith("tokens")]
    assert [int(token) for token in line.split()[1:]] == checkpoint[1]


@pytest.mark.parametrize("checkpoint", ["hyperquant"], indirect=True)
def test_refusals(checkpoint, tmp_path):
    script = tmp_path / "refusals.py"
    script.write_text(REFUSALS)
    assert "refused" in run(script, checkpoint[0])
