"""The command line, in a process of its own where the process matters."""

import json
import re
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("tqdm")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from hq_inductor import cli, quantization_report  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"old")
    return directory


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out") / "packed"
    assert cli.main(["quantize", str(source), str(directory), "--bps", "4", "--rate", ".*down_proj=5"]) == 0
    return directory


def output(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def failure(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_quantize(packed):
    assert (packed / "tokenizer.json").is_file() and not (packed / "pytorch_model.bin").exists()
    model = AutoModelForCausalLM.from_pretrained(packed)
    rates = {w.name: w.bits_per_weight for w in quantization_report(model).quantized}
    assert len(rates) == 7 and {name: rate for name, rate in rates.items() if rate != 4} == {"model.layers.0.mlp.down_proj.weight": 5}


def test_inspect(packed, source, capsys):
    text = output(capsys, "inspect", packed)
    assert "7 packed weights, 2,359,296 values, 1,245,184 bytes = 4.2222 bits/weight, SNR 23." in text
    assert "e8 at 5 bps, tile 512" in text
    report = json.loads(output(capsys, "inspect", packed, "--json"))
    assert report == json.loads((packed / cli.REPORT_FILE).read_text())
    compared = json.loads(output(capsys, "inspect", packed, "--reference", source, "--json"))
    assert compared == report
    for row in report["weights"]:
        assert abs(row["snr_db"] - (28.48 if row["bps"] == 5 else 22.44)) < 0.3
    assert report["total"]["size_bytes"] == sum(row["size_bytes"] for row in report["weights"])


def test_inspect_file_without_a_report(packed, tmp_path, capsys):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((packed / "model.safetensors").read_bytes())
    total = json.loads(output(capsys, "inspect", copy, "--json"))["total"]
    assert total["weights"] == 7 and total["snr_db"] is None
    copy.write_bytes(copy.read_bytes()[:-1])
    assert "must be a complete safetensors file" in failure(capsys, "inspect", copy)


def test_bench(capsys):
    arguments = ["bench", "--shape", "64x256", "--batch", "1", "--batch", "3", "--bps", "2", "4", "--seconds", "0.01", "--device", "cpu"]
    report = json.loads(output(capsys, *arguments, "--json"))
    assert [(row["N"], row["K"], row["M"], row["bps"]) for row in report["rows"]] == [(64, 256, m, b) for b in (2, 4) for m in (1, 3)]
    assert all(row["hyperquant_us"] > 0 and row["dense_us"] > 0 and row["relative_error"] < 1e-5 for row in report["rows"])
    assert "hyperquant_us  dense_us  speedup" in output(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{source}", "{tmp}/out", "--bps", "7.3"], "bps must be a multiple of 1/8"),
        (["quantize", "{tmp}", "{tmp}/out"], "IN must be a directory saved by transformers"),
        (["quantize", "{source}", "{source}"], "OUT must not exist or be empty"),
        (["quantize", "{source}", "{tmp}/out", "--rate", "down"], "--rate must be PATTERN=BPS, got 'down'"),
        (["quantize", "{source}", "{tmp}/out", "--keep", ".*"], "no layer of .* was quantized"),
        (["inspect", "{tmp}"], "must be a safetensors file or a directory with some"),
        (["bench", "--bps", "9"], "bps must be a multiple of 1/8"),
    ],
)
def test_refuses(source, tmp_path, capsys, arguments, message):
    error = failure(capsys, *(argument.format(source=source, tmp=tmp_path) for argument in arguments))
    assert re.search(message, error), error


def test_process():
    """Standard output is JSON and nothing else; progress goes to standard error."""
    arguments = ["bench", "--json", "--shape", "8x128", "--batch", "1", "--seconds", "0.01"]
    result = subprocess.run([sys.executable, "-m", "hq_inductor.cli", *arguments], capture_output=True, text=True)
    assert result.returncode == 0 and len(json.loads(result.stdout)["rows"]) == 1 and "timing: 100%" in result.stderr


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--shape", "8by128"])
    assert stop.value.code == 2 and "must be NxK, got '8by128'" in capsys.readouterr().err
