"""Quantize a loaded transformers model with a few thousand tokens of text: the same bytes, a smaller output error.

    model = AutoModelForCausalLM.from_pretrained(path)
    batches = calibration_batches(AutoTokenizer.from_pretrained(path), "text.txt")
    quantize_calibrated(model, HyperQuantConfig(bps=3), batches)
    model.save_pretrained("packed")     # loads like any packed checkpoint

Definition.  Columns are balanced (`hq_inductor.balance_columns`), then layers are quantized in the order of execution, each with error
             feedback from the second moments of its inputs (`hq_inductor.measure_moments`).
Invariants.  The layers, their rates and the checkpoint are those of `from_pretrained(path, quantization_config=...)`.
Memory.      The float model, and moments of as many layers as fit in `moments_bytes`; the model runs once more for the next ones, which
             see the outputs of quantized layers. `from_pretrained` cannot do this: it quantizes before there is a model to run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..balance import Batch, balance_columns, run_model
from ..moments import measure_moments
from ..quantize import HyperQuantWeightConfig
from .transformers import HyperQuantConfig, HyperQuantHfQuantizer

# lines of a text file that are tokenized at once
_LINES = 64


def _texts(path: Path) -> Iterator[str]:
    """Documents of a JSON Lines file, or the lines of a text file, a few at a time."""
    with path.open(encoding="utf-8") as file:
        if path.suffix != ".jsonl":
            while lines := [line for _, line in zip(range(_LINES), file, strict=False)]:
                yield "".join(lines)
            return
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path} line {number}: must be a JSON object with a string "text", got {line[:60]!r}')
            yield text


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, tokens: int = 4096, context: int = 512
) -> list[dict[str, torch.Tensor]]:
    """The first tokens of a file as inputs of a model.

    Args:
        path: a text file in UTF-8, or a `.jsonl` file with objects that have a `"text"`.
        tokens: how many, rounded up to whole windows; better several times as many as the largest layer has columns. Measured on a 24M
            model: 4096 suffice, 512 do more harm than good.
        context: tokens of one window. A window starts with the tokenizer's first special token, if it has one.

    Returns:
        `{"input_ids": [1, context]}`, int64.

    Raises:
        ValueError: the file has fewer tokens, or a line is not what it must be. OSError: the file cannot be read.
    """
    if tokens < 1 or context < 2:
        raise ValueError(f"tokens must be at least 1 and context at least 2, got {tokens} and {context}")
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None), None)
    prefix = [] if first is None else [first]
    length = context - len(prefix)
    windows, found = -(-tokens // context), []
    for text in _texts(Path(path)):
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= windows * length:
            break
    else:
        raise ValueError(f"{path} must hold at least {windows * length} tokens, got {len(found)}; give more text or ask for fewer")
    return [{"input_ids": torch.tensor([prefix + found[i * length : (i + 1) * length]])} for i in range(windows)]


@torch.no_grad()
def quantize_calibrated(
    model: PreTrainedModel, config: HyperQuantConfig, batches: Iterable[Batch], moments_bytes: int = 4 << 30
) -> PreTrainedModel:
    """Quantize a float model in place, as `from_pretrained(path, quantization_config=config)` would, with balancing and error feedback.

    Args:
        model: as `from_pretrained` gives it without a `quantization_config`.
        config: which layers, and their rates. Its `balance_columns=True` also stores scales (16 bits per column) that no norm or linear
            before a layer can take; otherwise those columns are left as they are, and every rate is exactly `bps`.
        batches: inputs without padding, several thousand tokens together (`calibration_batches`).
        moments_bytes: memory for second moments, 4 K^2 for a layer of K columns. At least one layer is measured at a time.

    Returns:
        The model, packed.

    Raises:
        ValueError: the model is quantized, or none of its layers would be; there are no batches, or no layer is run.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"model must be a float model, got one quantized by {model.hf_quantizer.quantization_config.quant_method}")
    batches = [_to(batch, model.device) for batch in batches]
    model.eval()
    quantizer = HyperQuantHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    try:
        configs = _layer_configs(model, quantizer)
        order = _run_order(model, list(configs), batches)
        stored = any(layer.balance_columns for layer in configs.values())
        balance_columns(model, batches, lambda module, name: name in configs, store_scales=stored)
        progress = logging.tqdm(total=len(configs), desc="Quantizing")
        for part in _parts(model, order, moments_bytes):
            measure_moments(model, batches, lambda module, name, part=part: name in part)
            _quantize(model, {name: configs[name] for name in part}, progress)
        _quantize(model, {name: layer for name, layer in configs.items() if name not in order}, progress)
        _quantize_experts(model, quantizer)
        progress.close()
    except BaseException:
        quantizer.remove_quantization_config(model)
        raise
    finally:
        for module in model.modules():
            for name in ("balance_scale", "input_moments"):
                module._buffers.pop(name, None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):
        return tuple(x.to(device) for x in batch)
    return {name: x.to(device) for name, x in batch.items()}


def _layer_configs(model: PreTrainedModel, quantizer: HyperQuantHfQuantizer) -> dict[str, HyperQuantWeightConfig]:
    """What to quantize each linear layer with."""
    quant_type = quantizer.quantization_config.quant_type
    found = {
        name: _config_of(quant_type, f"{name}.weight")
        for name, module in model.named_modules()
        if type(module) is nn.Linear and quantizer.param_needs_quantization(model, f"{name}.weight")
    }
    found = {name: layer for name, layer in found.items() if layer is not None}
    if not found:
        raise ValueError(f"no linear layer of {type(model).__name__} would be quantized")
    for name, layer in found.items():
        if not isinstance(layer, HyperQuantWeightConfig):
            raise ValueError(f"{name}: the config must be a HyperQuantWeightConfig, got {type(layer).__name__}")
    return found


def _config_of(quant_type: AOBaseConfig, parameter: str) -> AOBaseConfig | None:
    """The config of one parameter: exact names, the parameter's before its module's, then patterns in their order, then the default."""
    if not isinstance(quant_type, FqnToConfig):
        return quant_type
    table, names = quant_type.fqn_to_config, (parameter, parameter.rpartition(".")[0])
    keys = [key for key in names if key in table]
    keys += [key for key in table if key.startswith("re:") and any(re.fullmatch(key[3:], fqn) for fqn in names)]
    return table.get(keys[0] if keys else "_default")


def _run_order(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> list[str]:
    """The layers that run, in their order."""
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: order.setdefault(name)) for name in names
    ]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _parts(model: nn.Module, order: Sequence[str], moments_bytes: int) -> Iterator[list[str]]:
    """Consecutive layers whose moments fit in `moments_bytes`, at least one at a time."""
    part: list[str] = []
    size = 0
    for name in order:
        more = 4 * model.get_submodule(name).in_features ** 2
        if part and size + more > moments_bytes:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    if part:
        yield part


def _quantize(model: nn.Module, configs: dict[str, HyperQuantWeightConfig], progress) -> None:
    for name, config in configs.items():
        # scales of the weights alone would come on top of those that were folded
        quantize_(model, dataclasses.replace(config, balance_columns=False), filter_fn=lambda module, fqn, name=name: fqn == name)
        progress.update()


def _quantize_experts(model: PreTrainedModel, quantizer: HyperQuantHfQuantizer) -> None:
    """Experts in one parameter, by rounding alone: each sees few of the tokens."""
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 3 and quantizer.param_needs_quantization(model, name):
            module, _, key = name.rpartition(".")
            config = dataclasses.replace(_config_of(quantizer.quantization_config.quant_type, name), balance_columns=False)
            quantize_(model.get_submodule(module), FqnToConfig({key: config}), filter_fn=None)
