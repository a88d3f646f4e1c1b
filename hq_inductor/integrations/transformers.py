"""HyperQuant as a quantization method of transformers 5: `from_pretrained(path, quantization_config=HyperQuantConfig(bps=4))`.

Weights are quantized one by one while the checkpoint is read, so the float model never exists. `save_pretrained` writes the words
(`hq_inductor.integrations.safetensors`), and `from_pretrained` of that directory loads them as they are and checks the files.
Import this module before loading a packed checkpoint; transformers only warns about methods it does not know.

`TorchAoConfig(hyperquant_weight(bps=4))` of transformers works too (import this module first). What is different here: the files are
checked, PEFT and the Trainer accept the model, it can be saved again after loading, and linear layers become `HyperQuantLinear`.

Note: tied weights and the output head stay in floating point unless `modules_to_not_convert=[]`; embeddings always do. Experts stored as
one 3-D parameter are quantized if their rows are outputs (`is_transposed` false in transformers), and then run one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig, config_from_dict
from torchao.quantization import FqnToConfig, quantize_
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.integrations.torchao import TorchAoQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import TorchAoConfig

from ..module import HyperQuantLinear
from ..quantize import HyperQuantWeightConfig
from ..tensor import HyperQuantTensor
from .safetensors import PackedCheckpoint, flatten_state_dict, part_key

METHOD = "hyperquant"


@register_quantization_config(METHOD)
class HyperQuantConfig(TorchAoConfig):
    """The `quantization_config` of `from_pretrained`.

    Args:
        bps: bits per weight, scales included.
        modules_to_not_convert: names of modules to keep, or regular expressions for them (`r".*o_proj"`); None keeps tied weights and
            the output head.
        quant_type: a torchao config in place of `bps` and `options`, for instance `FqnToConfig` with rates by layer.
        options: the other arguments of `hyperquant_weight`: `lattice`, `tile`, `seed`, ...

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        bps: float | None = None,
        *,
        modules_to_not_convert: list[str] | None = None,
        quant_type: AOBaseConfig | None = None,
        **options: Any,
    ):
        if quant_type is None:
            quant_type = HyperQuantWeightConfig(bps=4.0 if bps is None else bps, **options)
        elif bps is not None or options:
            raise ValueError(f"quant_type must be given without bps and {sorted(options)}: it holds all of them")
        super().__init__(quant_type, modules_to_not_convert=modules_to_not_convert)
        self.quant_method = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        quant_type = config_from_dict(config_dict["quant_type"]["default"])
        config = cls(quant_type=quant_type, modules_to_not_convert=config_dict.get("modules_to_not_convert"))
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def largest_bps(self) -> float:
        """The largest rate of any layer, for memory estimates."""
        configs = self.quant_type.fqn_to_config.values() if isinstance(self.quant_type, FqnToConfig) else [self.quant_type]
        rates = [config.bps if config.packing == "rice" else 8.0 for config in configs if isinstance(config, HyperQuantWeightConfig)]
        return max(rates, default=32.0)


class HyperQuantDeserialize(ConversionOps):
    """Inner tensors of one packed weight to a `HyperQuantTensor` parameter."""

    def __init__(self, hf_quantizer: HyperQuantHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo) -> HyperQuantDeserialize:
        # transformers copies the operation for every parameter; the open files are shared
        return self

    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, full_layer_name=None, **kwargs):
        checkpoint = self.hf_quantizer.checkpoint
        name = self.hf_quantizer.stored_names[full_layer_name]
        # source patterns are the ends of stored keys: `_weight_qdata`
        parameter = name.rpartition(".")[2]
        parts = {part: input_dict[f"_{parameter}_{part}"][0] for part in checkpoint.packed[name]["_tensor_data_names"]}
        module, _ = get_module_from_name(model, full_layer_name)
        module._is_hf_initialized = True
        return {full_layer_name: nn.Parameter(checkpoint.weight(name, parts), requires_grad=False)}


class HyperQuantQuantize(TorchAoQuantize):
    """Quantize a parameter as it is read: a linear layer's as torchao does it, a stack of experts in place."""

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        module, name = get_module_from_name(model, full_layer_name)
        config = self.hf_quantizer.quantization_config.quant_type
        if not _is_experts(module, name) or isinstance(config, FqnToConfig):
            return super().convert(input_dict, model=model, full_layer_name=full_layer_name, missing_keys=missing_keys, **kwargs)
        (value,) = input_dict.values()
        module._parameters[name] = nn.Parameter(value[0] if isinstance(value, list) else value, requires_grad=False)
        quantize_(module, FqnToConfig({name: config}), filter_fn=None)
        module._parameters[name]._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


def _is_experts(module: nn.Module, name: str) -> bool:
    """Whether a parameter holds the matrices of all experts as `[E, out, in]`, the way F.linear wants them."""
    parameter = module._parameters.get(name)
    # transformers sets the attribute on modules whose experts run through its experts interface
    return getattr(module, "is_transposed", None) is False and parameter is not None and parameter.dim() == 3


@register_quantizer(METHOD)
class HyperQuantHfQuantizer(TorchAoHfQuantizer):
    """Quantizes while loading, or checks and loads packed weights."""

    checkpoint: PackedCheckpoint
    stored_names: dict[str, str]

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.largest_bps / 8

    @property
    def is_trainable(self) -> bool:
        # gradients flow to activations, which is what adapters need
        return True

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        if not super().param_needs_quantization(model, param_name, **kwargs):
            by_layer = isinstance(self.quantization_config.quant_type, FqnToConfig)
            return not by_layer and _is_experts(module, name) and should_convert_module(param_name, self.modules_to_not_convert)
        # a pattern of FqnToConfig that matches a block also matches its biases, norms and embeddings
        return (isinstance(module, nn.Linear) and name == "weight") or _is_experts(module, name)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        # the files are opened below: opening them there would come before the errors that say what is wrong
        super()._process_model_before_weight_loading(model, checkpoint_files=None, **kwargs)
        if any(
            _is_experts(*get_module_from_name(model, n)) and self.param_needs_quantization(model, n) for n, _ in model.named_parameters()
        ):
            # one expert after the other: the fused kernels want dense stacks
            model.set_experts_implementation("eager")
        if not self.pre_quantized:
            return
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(f"a packed checkpoint must consist of safetensors files, got {checkpoint_files}")
        self.checkpoint = PackedCheckpoint(checkpoint_files)
        parameters = dict(model.named_parameters())
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        expected = {}
        self.stored_names = {}
        for stored in self.checkpoint.packed:
            # old names, and a checkpoint of `Model` for `ModelForTask` or the other way round
            name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, parameters)
            if name in parameters:
                self.stored_names[name] = stored
                expected[stored] = parameters[name].shape
        self._finish_check = self.checkpoint.begin_check(expected)
        names: dict[str, set[str]] = {}
        for name, entry in self.checkpoint.packed.items():
            parameter = name.rpartition(".")[2]
            keys = {part_key(name, part).rpartition(".")[2] for part in entry["_tensor_data_names"]}
            names.setdefault(parameter, set()).update(keys)
        self._serialized_names = {parameter: sorted(keys) for parameter, keys in names.items()}

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return self._serialized_names if self.pre_quantized else {}

    def get_quantize_ops(self) -> ConversionOps:
        return HyperQuantQuantize(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": HyperQuantDeserialize}

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self._finish_check()
        for module in model.modules():
            if type(module) is nn.Linear and isinstance(module.weight, HyperQuantTensor):
                HyperQuantLinear.from_linear(module, module.weight)
        # save_pretrained reverts the conversions made while loading, and ours have nothing to revert: words are written as they are
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _deserializes(c)]
        # closes the files
        self.__dict__.pop("checkpoint", None)
        self.__dict__.pop("_finish_check", None)
        return model

    def get_state_dict_and_metadata(self, model):
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(model, add_legacy=False)
        # conversions change plain tensors after this
        unchanged = not any(isinstance(conversion, WeightConverter) for conversion in conversions)
        return flatten_state_dict(_with_stored_names(model), checksum_plain=unchanged)

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, HyperQuantLinear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta").train(module.training)
                linear.weight = nn.Parameter(module.weight.dequantize(dtype))
                linear.bias = module.bias
                model.set_submodule(name, linear)
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, HyperQuantTensor):
                    module._parameters[key] = nn.Parameter(parameter.dequantize(dtype))
        return model


def _with_stored_names(model) -> dict[str, torch.Tensor]:
    """The state dict, packed weights under the names that transformers will give to their inner tensors while saving."""
    state_dict = model.state_dict()
    markers = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, HyperQuantTensor):
            part = tensor.__tensor_flatten__()[0][0]
            markers[part_key(name, part)] = (torch.empty(0), name, part)
    reverted = revert_weight_conversion(model, {key: marker for key, (marker, _, _) in markers.items()})
    stored_keys = {id(marker): key for key, marker in reverted.items()}
    new_names = {}
    for marker, name, part in markers.values():
        module, _, key = stored_keys[id(marker)].rpartition(".")
        new_names[name] = f"{module}.{key.removeprefix('_').removesuffix('_' + part)}"
    return {new_names.get(name, name): tensor for name, tensor in state_dict.items()}


def _deserializes(conversion) -> bool:
    return any(isinstance(operation, HyperQuantDeserialize) for operation in getattr(conversion, "operations", ()))
