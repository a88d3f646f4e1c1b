"""Quantizing with text: the same layers and rates as without it, a smaller output error on other text."""

import argparse
import copy
import inspect
import json

import pytest
import torch
from torchao.quantization import FqnToConfig

transformers = pytest.importorskip("transformers", minversion="5")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from hq_inductor import HyperQuantLinear, cli, hyperquant_weight, quantization_report  # noqa: E402
from hq_inductor.integrations.transformers import HyperQuantConfig  # noqa: E402
from hq_inductor.integrations.transformers_calibration import calibration_batches, quantize_calibrated  # noqa: E402

TEXT = inspect.getsource(argparse)
SIZES = {"vocab_size": 257, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    """Random weights; embeddings are correlated, as those of trained models are."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)).eval()
    mix = torch.randn(128, 128) / torch.arange(1, 129)[:, None]
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data @ mix
    return model


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<s>": 256} | {c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """A float checkpoint with a tokenizer, and a text."""
    directory = tmp_path_factory.mktemp("float")
    llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "text.txt").write_text(TEXT)
    return directory


@pytest.fixture(scope="module")
def batches(source, tokenizer):
    return calibration_batches(tokenizer, source / "text.txt", 4608, 512)


def words(model):
    return {name: module.qdata for name, module in model.named_modules() if isinstance(module, HyperQuantLinear)}


def output_error(model, exact, batch):
    with torch.inference_mode():
        expected = exact(**batch).logits
        return ((model(**batch).logits - expected).norm() / expected.norm()).item()


def test_batches(source, tokenizer, tmp_path):
    batches = calibration_batches(tokenizer, source / "text.txt", 1000, 64)
    assert len(batches) == 16 and all(batch["input_ids"].shape == (1, 64) for batch in batches)
    assert all(batch["input_ids"][0, 0] == tokenizer.bos_token_id for batch in batches)
    text = tokenizer.decode(torch.cat([batch["input_ids"][0, 1:] for batch in batches]))
    assert text == TEXT[: 16 * 63]
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines(keepends=True)))
    for one, other in zip(batches, calibration_batches(tokenizer, lines, 1000, 64), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_batches_refuse(tokenizer, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("word " * 100)
    with pytest.raises(ValueError, match=r"short.txt must hold at least 1008 tokens, got 500"):
        calibration_batches(tokenizer, text, 1000, 64)
    with pytest.raises(ValueError, match="tokens must be at least 1 and context at least 2, got 0 and 64"):
        calibration_batches(tokenizer, text, 0, 64)
    lines = tmp_path / "text.jsonl"
    for bad in ("plain", '{"content": "a"}', '{"text": 3}', "[]"):
        lines.write_text('{"text": "a"}\n' + bad + "\n")
        with pytest.raises(ValueError, match=r'text.jsonl line 2: must be a JSON object with a string "text", got'):
            calibration_batches(tokenizer, lines, 1000, 64)


def test_error_on_other_text_falls_at_the_same_rate(source, batches, tmp_path):
    exact = llama()
    config = HyperQuantConfig(bps=3)
    plain = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model = quantize_calibrated(copy.deepcopy(exact), config, batches[:-1])
    assert words(model).keys() == words(plain).keys() and not isinstance(model.lm_head, HyperQuantLinear)
    assert {name: w.shape for name, w in words(model).items()} == {name: w.shape for name, w in words(plain).items()}
    assert quantization_report(model).bits_per_weight == 3
    assert output_error(model, exact, batches[-1]) < 0.5 * output_error(plain, exact, batches[-1])
    # an ordinary packed checkpoint
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batches[-1]).logits, model(**batches[-1]).logits)
    assert not any("input_moments" in name or "balance_scale" in name for module in model.modules() for name in module._buffers)


def test_in_parts_of_limited_memory(batches):
    """Layers one at a time see what quantized layers before them give; the first ones see the same as all at once."""
    together, alone = (quantize_calibrated(llama(), HyperQuantConfig(bps=3), batches[:4], size) for size in (4 << 30, 1))
    first, last = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(words(together)[first], words(alone)[first]) and not torch.equal(words(together)[last], words(alone)[last])
    exact = llama()
    errors = [output_error(model, exact, batches[-1]) for model in (together, alone)]
    assert 0.8 < errors[1] / errors[0] < 1.25


def test_rates_by_layer(batches):
    rates = {"re:.*down_proj": hyperquant_weight(bps=5), "model.layers.0.mlp.up_proj": None, "re:.*_proj": hyperquant_weight(bps=3)}
    model = quantize_calibrated(llama(), HyperQuantConfig(quant_type=FqnToConfig(rates)), batches[:2])
    found = {w.name: w.bits_per_weight for w in quantization_report(model).quantized}
    assert len(found) == 13 and {rate for name, rate in found.items() if "down_proj" in name} == {5}
    assert {rate for name, rate in found.items() if "down_proj" not in name} == {3}
    assert "model.layers.0.mlp.up_proj.weight" not in found


def test_scales_that_cannot_be_folded_are_stored_if_wanted(batches):
    """What an encoder's norm writes is also added to what comes after: its gain cannot take the scales of the layers that read it."""
    sizes = {**SIZES, "num_hidden_layers": 1, "hidden_size": 128, "max_position_embeddings": 512}
    for stored, bits in ((False, 3), (True, 3 + 16 / 128)):
        torch.manual_seed(0)
        model = BertModel(BertConfig(**sizes))
        quantize_calibrated(model, HyperQuantConfig(bps=3, balance_columns=stored, effort=0), batches[:1])
        query = model.encoder.layer[0].attention.self.query
        assert (query.act_pre_scale is not None) is stored and query.weight.bits_per_weight == bits


def test_experts_are_rounded(batches):
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    exact = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    model = quantize_calibrated(copy.deepcopy(exact), HyperQuantConfig(bps=4), batches[:2])
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.bits_per_weight == experts.gate_up_proj.bits_per_weight == 4 and len(words(model)) >= 4
    assert 0 < output_error(model, exact, batches[-1]) < 0.3


def test_refuses_and_leaves_the_model_alone(batches):
    model = llama()
    expected = model(**batches[0]).logits
    config = HyperQuantConfig(bps=3, modules_to_not_convert=[".*"])
    with pytest.raises(ValueError, match="no linear layer of LlamaForCausalLM would be quantized"):
        quantize_calibrated(model, config, batches[:1])
    with pytest.raises(ValueError, match="batches must hold at least one input, got none"):
        quantize_calibrated(model, HyperQuantConfig(bps=3), [])
    assert torch.equal(model(**batches[0]).logits, expected) and not model.is_quantized
    quantize_calibrated(model, HyperQuantConfig(bps=3, effort=0), batches[:1])
    with pytest.raises(ValueError, match="model must be a float model, got one quantized by hyperquant"):
        quantize_calibrated(model, HyperQuantConfig(bps=3), batches[:1])


def test_command_line(source, tmp_path, capsys):
    text, target = source / "text.txt", tmp_path / "packed"
    transformers.utils.logging.enable_progress_bar()  # examples, which other tests run in this process, switch it off
    arguments = ["quantize", str(source), str(target), "--bps", "3", "--calibrate", str(text), "--calibrate-tokens", "1024", "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "Quantizing: 100%" in captured.err
    assert report["total"]["bits_per_weight"] == 3 and report["total"]["snr_db"] is None
    used = report["calibration"]
    assert (used["text"], used["tokens"], used["held_out_tokens"]) == ("text.txt", 1024, 512) and 5 < used["output_snr_db"] < 40
    assert len(words(AutoModelForCausalLM.from_pretrained(target))) == 14
    assert cli.main(["inspect", str(target)]) == 0
    assert (
        f"calibrated on 1,024 tokens of text.txt, SNR of the output on the next 512: {used['output_snr_db']:.2f} dB"
        in capsys.readouterr().out
    )
    assert cli.main(["inspect", str(target), "--reference", str(source)]) == 1
    assert "--reference must not be given" in capsys.readouterr().err
    assert cli.main([*arguments[:2], str(tmp_path / "other"), *arguments[3:-2], "1000000"]) == 1
    assert "must hold at least" in capsys.readouterr().err
