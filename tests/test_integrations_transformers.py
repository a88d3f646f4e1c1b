"""HyperQuant through transformers' own from_pretrained and save_pretrained, on models built here."""

import gc
import json
import math
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from safetensors import safe_open  # noqa: E402
from torchao.quantization import FqnToConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight, quantization_report  # noqa: E402
from hq_inductor.integrations.safetensors import CheckpointError, PackedCheckpoint, load_file, save_file  # noqa: E402
from hq_inductor.integrations.transformers import HyperQuantConfig  # noqa: E402

TOKENS = torch.arange(3, 19)[None]


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint in several shards."""
    directory = tmp_path_factory.mktemp("float")
    llama().save_pretrained(directory, max_shard_size="200KB")
    return directory


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """A packed checkpoint and the model it was saved from."""
    directory = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HyperQuantConfig(bps=4))
    model.save_pretrained(directory)
    return directory, model


def words(model):
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, HyperQuantLinear)}


def assert_same_words(a, b):
    a, b = words(a), words(b)
    assert a and a.keys() == b.keys()
    for name in a:
        assert a[name].__tensor_flatten__() == b[name].__tensor_flatten__()
        for part in a[name].__tensor_flatten__()[0]:
            assert torch.equal(getattr(a[name], part), getattr(b[name], part)), name


def test_quantize_on_load(source, packed):
    _, model = packed
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert len(words(model)) == 14 and type(model.lm_head) is nn.Linear
    weight = model.model.layers[1].mlp.up_proj.weight
    expected = HyperQuantTensor.from_hp(dense.model.layers[1].mlp.up_proj.weight, bps=4)
    assert torch.equal(weight.qdata, expected.qdata) and not weight.requires_grad
    assert quantization_report(model).bits_per_weight == 4
    error = (model(TOKENS).logits - dense(TOKENS).logits).norm() / dense(TOKENS).logits.norm()
    assert 0 < error < 0.2


def test_one_float_weight_at_a_time(source, monkeypatch):
    """While the shards are read, no second matrix that is going to be quantized exists in floating point."""
    seen = []
    from_hp = HyperQuantTensor.from_hp.__func__

    def counting(cls, hp_tensor, *args, **kwargs):
        alive = [o for o in gc.get_objects() if type(o) is nn.Linear and id(o) not in others and not o.weight.is_meta]
        seen.append(len([o for o in alive if o.weight.shape != (256, 128)]))
        return from_hp(cls, hp_tensor, *args, **kwargs)

    gc.collect()
    kept = [o for o in gc.get_objects() if type(o) is nn.Linear]
    others = {id(o) for o in kept}
    monkeypatch.setattr(HyperQuantTensor, "from_hp", classmethod(counting))
    AutoModelForCausalLM.from_pretrained(source, quantization_config=HyperQuantConfig(bps=2))
    assert len(seen) == 14 and max(seen) == 1


def test_save_and_load_bit_exact(packed, tmp_path):
    directory, model = packed
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert_same_words(model, again)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    # a loaded model can be saved again, in shards
    again.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_words(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_loading_does_not_quantize(packed, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("quantized while loading a packed checkpoint")

    monkeypatch.setattr(HyperQuantTensor, "from_hp", refuse)
    assert words(AutoModelForCausalLM.from_pretrained(packed[0]))


def test_size_on_disk(packed):
    directory, model = packed
    checkpoint = PackedCheckpoint(directory.glob("*.safetensors"))
    stored = sum(t.numel() * t.element_size() for name in checkpoint.packed for t in checkpoint.parts(name).values())
    covered = sum(math.prod(weight.shape) for weight in words(model).values())
    assert 8 * stored == 4 * covered
    plain = sum(t.numel() * t.element_size() for t in map(checkpoint.tensor, checkpoint.plain))
    headers = (directory / "model.safetensors").stat().st_size - stored - plain
    assert headers < 1500 * (len(checkpoint.packed) + len(checkpoint.plain))


def test_dtype_follows_from_pretrained(source):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=HyperQuantConfig(bps=3))
    assert {weight.dtype for weight in words(model).values()} == {torch.bfloat16}
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_options_reach_the_weights(source, tmp_path):
    config = HyperQuantConfig(bps=3, lattice="d4", tile=128, seed=7, balance_columns=True, modules_to_not_convert=[r".*o_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert (weight.bps, weight.lattice, weight.tile, weight.seed) == (3, "d4", 128, 7) and weight.act_pre_scale is not None
    assert not any("o_proj" in name for name in words(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_words(model, again)
    assert isinstance(again.config.quantization_config, HyperQuantConfig)
    assert again.config.quantization_config.to_dict() == config.to_dict()


def test_rates_by_layer(source, tmp_path):
    rates = FqnToConfig({"re:.*down_proj": hyperquant_weight(bps=5), "_default": hyperquant_weight(bps=3)})
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HyperQuantConfig(quant_type=rates))
    assert {weight.bps for name, weight in words(model).items() if "down_proj" in name} == {5}
    assert {weight.bps for name, weight in words(model).items() if "down_proj" not in name} == {3}
    assert model.hf_quantizer.quantized_element_size == 5 / 8
    model.save_pretrained(tmp_path)
    assert_same_words(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_head_can_be_quantized_too(source):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HyperQuantConfig(bps=4, modules_to_not_convert=[]))
    assert isinstance(model.lm_head, HyperQuantLinear)


@pytest.mark.parametrize("skip", [None, []])
def test_tied_embeddings_stay_tied(tmp_path, skip):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    config = HyperQuantConfig(bps=4, modules_to_not_convert=skip)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_base_and_task_model_share_a_checkpoint(tmp_path):
    config = BertConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "float")
    base = BertModel.from_pretrained(tmp_path / "float", quantization_config=HyperQuantConfig(bps=4))
    base.save_pretrained(tmp_path / "packed")
    task = BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert_same_words(base, task.bert)
    task.save_pretrained(tmp_path / "task")
    assert_same_words(base, BertModel.from_pretrained(tmp_path / "task"))


def test_generate_and_trace(packed):
    _, model = packed
    # the whole model is one graph; what Inductor makes of the op is tested in test_compile
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_dequantize(packed):
    model = AutoModelForCausalLM.from_pretrained(packed[0])
    expected = model(TOKENS).logits
    model = model.dequantize()
    assert not words(model) and not hasattr(model, "hf_quantizer")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_trainer_takes_a_peft_model(packed, tmp_path):
    """What TorchAoConfig is refused for: transformers asks the quantizer whether its models can be trained."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(packed[0])
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    arguments = TrainingArguments(tmp_path, max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True)
    before = {name: weight.qdata.clone() for name, weight in words(model).items()}
    Trainer(model, arguments, train_dataset=data).train()
    assert all(torch.equal(before[name], weight.qdata) for name, weight in words(model).items())
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_torchao_config(source, tmp_path):
    config = TorchAoConfig(hyperquant_weight(bps=4))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert len(words(model)) == 14
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in words(model).items():
        loaded = again.get_submodule(name).weight
        assert isinstance(loaded, HyperQuantTensor) and torch.equal(loaded.qdata, weight.qdata)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bps": 7.3}, ValueError, "bps must be a multiple of 1/8"),
        ({"bps": "4"}, TypeError, "bps must be a number, got str"),
        ({"bps": 4, "lattice": "e9"}, ValueError, "lattice must be one of"),
        ({"bps": 4, "quant_type": hyperquant_weight()}, ValueError, "quant_type must be given without bps"),
        ({"quant_type": "int4"}, ValueError, "no longer supported"),
    ],
)
def test_config_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        HyperQuantConfig(**arguments)


def rewrite_metadata(file: Path, change):
    """Apply `change` to the header of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def set_attribute(name, key, value):
    def change(metadata):
        entry = json.loads(metadata[name])
        entry["_data"][key] = value
        metadata[name] = json.dumps(entry)

    return change


NAME = "model.layers.0.mlp.up_proj.weight"


def flip_byte(file: Path, key: str):
    """Change one bit in the middle of a tensor."""
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[key]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= 4
    file.write_bytes(data)


SPOILED = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), r"model.safetensors must be a complete safetensors file, got: .*"),
    "header cut": (lambda f: f.write_bytes(f.read_bytes()[:50]), "must be a complete safetensors file"),
    "empty": (lambda f: f.write_bytes(b""), "must be a complete safetensors file"),
    "bit in words": (
        lambda f: flip_byte(f, "model.layers.0.mlp.up_proj._weight_qdata"),
        r"is damaged: the checksum of model.layers.0.mlp.up_proj._weight_qdata does not match",
    ),
    "bit in a plain tensor": (lambda f: flip_byte(f, "model.norm.weight"), "the checksum of model.norm.weight does not match"),
    "format version": (
        lambda f: rewrite_metadata(f, set_attribute(NAME, "format_version", 99)),
        r"up_proj.weight: format_version must be \d+, got 99: written by another hq_inductor",
    ),
    "attribute gone": (lambda f: rewrite_metadata(f, set_attribute(NAME, "surprise", 1)), "up_proj.weight: .*surprise"),
    "shape of the words": (
        lambda f: rewrite_metadata(f, set_attribute(NAME, "shape", [300, 128])),
        r"up_proj.weight: qdata of a weight of shape \(300, 128\) must be \[300, 1, ",
    ),
    "metadata": (lambda f: rewrite_metadata(f, lambda m: m.update({NAME: "{"})), "metadata entry .*up_proj.weight' must be JSON"),
    "lattice": (lambda f: rewrite_metadata(f, set_attribute(NAME, "lattice", "e9")), "up_proj.weight: lattice must be one of"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_spoiled_checkpoints_are_refused(packed, tmp_path, spoil):
    change, message = SPOILED[spoil]
    shutil.copytree(packed[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_file(tmp_path / "model.safetensors")


def test_blocks_of_large_tensors_have_checksums_of_their_own(tmp_path, monkeypatch):
    """Against zlib on the bytes themselves; damage in the last, short block is found."""
    monkeypatch.setattr("hq_inductor.integrations.safetensors.CHECKSUM_BYTES", 1000)
    file = tmp_path / "model.safetensors"
    tensors = {"a.large": torch.randn(501), "a.none": torch.empty(0), "a.exact": torch.arange(500, dtype=torch.int16)}
    save_file(tensors, file)
    with safe_open(file, "pt") as opened:
        stored = json.loads(opened.metadata()["hyperquant_checksums"])
    data = tensors["a.large"].numpy().tobytes()
    assert stored["a.large"] == [zlib.crc32(data[:1000]), zlib.crc32(data[1000:2000]), zlib.crc32(data[2000:])]
    assert stored["a.none"] == [0] and stored["a.exact"] == [zlib.crc32(tensors["a.exact"].numpy().tobytes())]
    assert torch.equal(load_file(file)["a.large"], tensors["a.large"])
    content = file.read_bytes()
    assert content.count(data[2000:]) == 1
    file.write_bytes(content.replace(data[2000:], data[2000:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=r"the checksum of a\.large does not match"):
        load_file(file)


def test_checkpoint_of_another_model_is_refused(packed, tmp_path):
    shutil.copytree(packed[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 384}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight: shape must be \(384, 128\) as in the model, got \(256, 128\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_shard_is_refused(packed, tmp_path):
    packed[1].save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    PackedCheckpoint(shards).check()
    gone = next(shard for shard in shards if any("up_proj" in key for key in PackedCheckpoint([shard]).keys))
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        PackedCheckpoint([shard for shard in shards if shard != gone]).check()


def test_file_round_trip_without_transformers(tmp_path):
    model = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64)).to(torch.bfloat16)
    weight = HyperQuantTensor.from_hp(model[0].weight, bps=3.5, act_pre_scale=torch.rand(256) + 0.5)
    state = {**model.state_dict(), "0.weight": weight}
    save_file(state, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"0._weight_qdata", "0._weight_act_pre_scale", "0.bias", "1.weight", "1.bias"}
    loaded = load_file(tmp_path / "m.safetensors", {name: p.shape for name, p in model.named_parameters()})
    assert loaded["0.weight"].__tensor_flatten__() == weight.__tensor_flatten__()
    assert torch.equal(loaded["0.weight"].qdata, weight.qdata) and torch.equal(loaded["1.weight"], state["1.weight"])
    model.load_state_dict(loaded, assign=True)
    assert torch.equal(model[0].weight.dequantize(), weight.dequantize())
    with pytest.raises(CheckpointError, match=r"0.weight: shape must be \(64, 512\) as in the model, got \(64, 256\)"):
        load_file(tmp_path / "m.safetensors", {"0.weight": torch.Size((64, 512))})
    with pytest.raises(ValueError, match="must have a dot"):
        save_file({"weight": weight}, tmp_path / "m.safetensors")


def test_torchao_reads_our_files(tmp_path):
    """The layout is torchao's: its own reader needs nothing from us but the class."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    weight = HyperQuantTensor.from_hp(torch.randn(16, 256))
    save_file({"a.weight": weight, "a.bias": torch.ones(16)}, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    state, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert not rest and torch.equal(state["a.weight"].qdata, weight.qdata)


def mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2))


@pytest.mark.parametrize("by_layer", [False, True])
def test_experts_in_one_parameter(tmp_path, by_layer):
    mixtral().save_pretrained(tmp_path / "float")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "float", experts_implementation="eager")
    config = HyperQuantConfig(bps=4)
    if by_layer:
        rates = {r"re:.*experts\.(gate_up|down)_proj": hyperquant_weight(bps=4), "_default": hyperquant_weight(bps=4)}
        config = HyperQuantConfig(quant_type=FqnToConfig(rates))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        packed, original = getattr(experts, name), getattr(dense.model.layers[0].mlp.experts, name)
        assert isinstance(packed, HyperQuantTensor) and packed.shape == original.shape and not packed.requires_grad
        assert packed.bits_per_weight == 4
        assert torch.equal(packed[2].dequantize(), HyperQuantTensor.from_hp(original[2], bps=4).dequantize())
    report = {w.name: w for w in quantization_report(model).weights}
    assert report["model.layers.0.mlp.experts.gate_up_proj"].bits_per_weight == 4
    expected = dense(TOKENS).logits
    assert 0 < (model(TOKENS).logits - expected).norm() / expected.norm() < 0.3
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.model.layers[0].mlp.experts.down_proj.qdata, experts.down_proj.qdata)
    found = again(TOKENS).logits
    assert torch.equal(found, model(TOKENS).logits)
    again = again.dequantize()
    assert type(again.model.layers[0].mlp.experts.down_proj) is nn.Parameter
    torch.testing.assert_close(again(TOKENS).logits, found, rtol=1e-4, atol=1e-5)


def test_experts_can_be_kept(tmp_path):
    mixtral().save_pretrained(tmp_path)
    config = HyperQuantConfig(bps=4, modules_to_not_convert=[r".*experts", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(model.model.layers[0].mlp.experts.down_proj) is nn.Parameter and words(model)
    # kept experts keep their kernels, too
    assert model.config._experts_implementation != "eager"
