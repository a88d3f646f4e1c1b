"""The vLLM plugin: vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`.

Checkpoints of `HyperQuantConfig` have a quantization method of their own (`vllm_linear`). vLLM reads torchao checkpoints by itself; it must
only have seen the classes that are named in them.
"""

from __future__ import annotations

import importlib.util


def register() -> None:
    """Make vLLM know the method `hyperquant`, and torchao's readers of `config.json` and safetensors files our classes."""
    # imports register them
    from . import safetensors  # noqa: F401

    if importlib.util.find_spec("vllm") is not None:
        from . import vllm_linear  # noqa: F401
