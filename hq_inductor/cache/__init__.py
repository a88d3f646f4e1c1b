"""A KV cache of entropy-coded slots, whatever the framework: `QuantizedKV` for a layer, or two functions of plain tensors."""

from .config import KVConfig
from .functional import kv_attention, kv_encode, kv_encode_pair
from .quantized_kv import TOKEN_BLOCK, QuantizedKV

__all__ = ["TOKEN_BLOCK", "KVConfig", "QuantizedKV", "kv_attention", "kv_encode", "kv_encode_pair"]
