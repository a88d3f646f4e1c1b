"""Packed state dicts in safetensors files.

Storage.     torchao's layout: the inner tensors of `a.weight` are `a._weight_qdata` and so on, its attributes are JSON in the file's
             metadata under `a.weight`. So `torchao.prototype.safetensors` and TorchAoConfig of transformers read these files, once this
             module has been imported. The entry `hyperquant_checksums` holds CRC-32s per tensor, one for every 16 MiB, which they ignore.
Invariants.  `PackedCheckpoint.check` reads every byte before anything is loaded: a file that is cut short or damaged, of another format
             version, or of other shapes than the model's is refused while the model is still untouched. `from_pretrained` reads the
             bytes while the model is being made, and hands out none if one is wrong.
Cost.        Words are stored as they are: `bits_per_weight` on disk, plus about 300 bytes of JSON per weight.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as safetensors_save_file
from torchao.prototype.safetensors import safetensors_utils

from ..format.layout import FORMAT_VERSION
from ..tensor import HyperQuantTensor, check_layout

CHECKSUMS = "hyperquant_checksums"
# so that threads share the work on a large embedding; 4 ms each
CHECKSUM_BYTES = 1 << 24
_TENSOR_NAMES = "tensor_names"
_CLASS = HyperQuantTensor.__name__

# torchao keeps no public registry for tensor subclasses of others
safetensors_utils.ALLOWED_CLASSES[_CLASS] = HyperQuantTensor
if _CLASS not in safetensors_utils.ALLOWED_TENSORS_SUBCLASSES:
    safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(_CLASS)


class CheckpointError(ValueError):
    """A packed checkpoint that cannot be loaded: damaged, of another format version, or for another model."""


def part_key(name: str, part: str) -> str:
    """Key of the inner tensor `part` of the weight `name`: `("a.weight", "qdata")` is stored as `a._weight_qdata`."""
    module, _, parameter = name.rpartition(".")
    if not module:
        raise ValueError(f"name of a packed weight must have a dot (module.parameter), got {name!r}")
    return f"{module}._{parameter}_{part}"


def _blocks(tensor: torch.Tensor) -> list[memoryview]:
    data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return [data[begin : begin + CHECKSUM_BYTES] for begin in range(0, max(1, len(data)), CHECKSUM_BYTES)]


def checksums(tensor: torch.Tensor) -> list[int]:
    """CRC-32 of each `CHECKSUM_BYTES` of a tensor, the last of what is left."""
    return [zlib.crc32(block) for block in _blocks(tensor)]


def flatten_state_dict(
    state_dict: Mapping[str, torch.Tensor], checksum_plain: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split a state dict into plain tensors and metadata for a safetensors file; nothing is copied.

    Args:
        state_dict: names to tensors; `HyperQuantTensor`s are split up, the others stay as they are.
        checksum_plain: whether plain tensors get a checksum too; not for a caller that changes them before writing.

    Returns:
        Tensors by stored key, and string metadata. `PackedCheckpoint` and `load_file` read what they make.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, HyperQuantTensor):
            metadata[name] = json.dumps(tensor, cls=safetensors_utils.TensorSubclassAttributeJSONEncoder)
            for part in tensor.__tensor_flatten__()[0]:
                key = part_key(name, part)
                tensors[key] = getattr(tensor, part).detach()
                found[key] = checksums(tensors[key])
        else:
            metadata[name] = json.dumps({"_type": "Tensor"})
            tensors[name] = tensor.detach()
            if checksum_plain and not tensor.is_meta:
                found[name] = checksums(tensors[name])
    metadata[_TENSOR_NAMES] = json.dumps(list(state_dict))
    metadata[CHECKSUMS] = json.dumps(found)
    return tensors, metadata


class PackedCheckpoint:
    """The tensors of one or more safetensors files, read lazily.

    Args:
        paths: files of one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short, or its metadata cannot be read.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self._files: dict[str, tuple[Path, safe_open]] = {}
        self.metadata: dict[str, str] = {}
        for path in map(Path, paths):
            try:
                file = safe_open(path, framework="pt")
                keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} must be a complete safetensors file, got: {error}") from error
            self._files.update((key, (path, file)) for key in keys)
            self.metadata.update(file.metadata() or {})
        names = self._json(_TENSOR_NAMES, [])
        entries = {name: self._json(name, {}) for name in names}
        self.packed: dict[str, dict] = {name: entry for name, entry in entries.items() if entry.get("_type") == _CLASS}
        self._checksums: dict[str, list[int]] = self._json(CHECKSUMS, {})

    def _json(self, key: str, default):
        if key not in self.metadata:
            return default
        try:
            return json.loads(self.metadata[key])
        except json.JSONDecodeError as error:
            raise CheckpointError(f"metadata entry {key!r} must be JSON, got: {error}") from error

    @property
    def keys(self) -> list[str]:
        """Stored keys, inner tensors of packed weights included."""
        return list(self._files)

    @property
    def plain(self) -> list[str]:
        """Keys of tensors that are stored as they are."""
        inner = {part_key(name, part) for name, entry in self.packed.items() for part in entry["_tensor_data_names"]}
        return [key for key in self._files if key not in inner]

    def tensor(self, key: str) -> torch.Tensor:
        """The plain tensor stored under a key."""
        if key not in self._files:
            raise CheckpointError(f"tensor {key!r} is missing from the checkpoint")
        return self._files[key][1].get_tensor(key)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Inner tensors of a packed weight."""
        return {part: self.tensor(part_key(name, part)) for part in self.packed[name]["_tensor_data_names"]}

    def weight(self, name: str, parts: Mapping[str, torch.Tensor] | None = None) -> HyperQuantTensor:
        """The packed weight `name`, of `parts` or else of the stored tensors.

        Raises:
            CheckpointError: another format version, attributes that are not those of the format, or words of another shape than they say.
        """
        entry = self.packed[name]
        version = entry["_data"].get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{name}: format_version must be {FORMAT_VERSION}, got {version}: written by another hq_inductor")
        tensors = dict(self.parts(name) if parts is None else parts)
        try:
            weight = safetensors_utils.object_from_dict({**entry, "_data": {**entry["_data"], **tensors}})
            check_layout(weight)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{name}: {error}") from error
        return weight

    def check(self, shapes: Mapping[str, torch.Size] | None = None) -> None:
        """Read everything once and raise `CheckpointError` at the first thing that is wrong.

        Args:
            shapes: shapes that the model expects, by the names of the checkpoint; names that are not there are not compared.
        """
        self.begin_check(shapes)()

    def begin_check(self, shapes: Mapping[str, torch.Size] | None = None) -> Callable[[], None]:
        """Check attributes and shapes as `check` does, and begin to read the bytes in the background.

        Returns:
            A function that waits until all are read, and raises `CheckpointError` for the first tensor that is damaged.
        """
        shapes = shapes or {}
        for name in self.packed:
            weight = self.weight(name)
            if name in shapes and tuple(shapes[name]) != tuple(weight.shape):
                raise CheckpointError(f"{name}: shape must be {tuple(shapes[name])} as in the model, got {tuple(weight.shape)}")
        keys = [key for key in self._checksums if key in self._files]
        blocks = ((key, index, block) for key in keys for index, block in enumerate(_blocks(self.tensor(key))))
        found: dict[str, dict[int, int]] = {key: {} for key in keys}
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    item = next(blocks, None)
                if item is None:
                    return
                key, index, block = item
                # zlib releases the interpreter lock
                found[key][index] = zlib.crc32(block)

        threads = min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads)
        running = [pool.submit(work) for _ in range(threads)]
        pool.shutdown(wait=False)

        def finish() -> None:
            for future in running:
                future.result()
            for key in keys:
                if [found[key][index] for index in sorted(found[key])] != self._checksums[key]:
                    raise CheckpointError(f"{self._files[key][0]} is damaged: the checksum of {key} does not match")

        return finish


def save_file(state_dict: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write a state dict with packed weights to one safetensors file."""
    tensors, metadata = flatten_state_dict(state_dict)
    safetensors_save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)


def load_file(path: str | Path, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, torch.Tensor]:
    """Read a state dict written by `save_file`, for `model.load_state_dict(..., assign=True)`.

    Args:
        path: the file.
        shapes: shapes by name that the weights must have, for instance `{n: p.shape for n, p in model.named_parameters()}`.

    Raises:
        CheckpointError: the file is damaged, of another format version, or for other shapes.
    """
    checkpoint = PackedCheckpoint([path])
    checkpoint.check(shapes)
    packed = {name: checkpoint.weight(name) for name in checkpoint.packed}
    return {**{key: checkpoint.tensor(key) for key in checkpoint.plain}, **packed}
