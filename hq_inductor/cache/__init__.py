"""A KV cache of entropy-coded slots, whatever the framework: `QuantizedKV` for a layer, `PagedKV` in pages, or two functions of tensors."""

from .config import KVConfig
from .functional import kv_attention, kv_encode, kv_encode_pair
from .page_table import PageTable
from .paged_kv import PagedKV
from .quantized_kv import TOKEN_BLOCK, QuantizedKV

__all__ = ["TOKEN_BLOCK", "KVConfig", "PageTable", "PagedKV", "QuantizedKV", "kv_attention", "kv_encode", "kv_encode_pair"]
