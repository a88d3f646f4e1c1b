"""`torch.ops.hyperquant`: check, allocate, launch. Importing this package registers the ops.

| op                 | from -> to                                                  |
| `hadamard`         | activations or weights -> randomized Hadamard transform     |
| `lattice_quantize` | coefficients -> lattice codes and scales at a constant rate |
| `rice_encode`      | codes and scales -> words                                   |
| `rice_decode`      | words -> codes and scales                                   |
| `lattice_dequant`  | codes and scales -> floats                                  |
| `rice_linear`      | activations, words -> the whole quantized linear layer      |
| `rice_linear_fused`| the same with its siblings, a norm or a gate before and a residual after |
| `codes_linear`     | activations, codes or e4m3 -> a linear layer that decodes nothing |
| `kv_store`         | rotated keys or values -> slots of a cache, in place        |
| `kv_store_pair`    | keys and values at once                                     |
| `kv_load`          | slots -> rotated keys or values                             |
| `kv_attention`     | rotated queries, a cache -> attention                       |

A tile's layout travels as `(lattice, tile, code)`; the number of words is the last dimension of `qdata`.
"""

from . import attention, codes_linear, decode, encode, hadamard, kv, linear, linear_fused

__all__ = ["attention", "codes_linear", "decode", "encode", "hadamard", "kv", "linear", "linear_fused"]
