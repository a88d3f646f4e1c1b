"""The vLLM plugin: vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`.

vLLM reads torchao checkpoints by itself; it must only have seen the classes that are named in them.
"""

from __future__ import annotations


def register() -> None:
    """Make the config and the tensor class known to torchao's readers of `config.json` and safetensors files."""
    # the import registers them
    from . import safetensors  # noqa: F401
