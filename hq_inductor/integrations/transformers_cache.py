"""A quantized KV cache for transformers 5: `model.generate(..., past_key_values=HyperQuantCache(model.config, max_cache_len=4096))`.

The first tokens (prefill) attend to each other exactly, as they come; their keys and values are coded on the way. From then on
`update` returns `StoredStates`: tensors without data that say which cache they stand for. They pass through `repeat_kv`, and
`scaled_dot_product_attention` of them is `hyperquant::kv_attention`. Any other use of them, and attention of a form that is not
recognised, decodes the whole cache, stays correct, and says why: in the log, or of compiled graphs in `hq_inductor.passes.report()`.

All shapes are static and lengths live on the device, so `generate` compiles the decoding step as with transformers' `StaticCache`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, get_layer_types_and_kwargs

from ..cache import TOKEN_BLOCK, KVConfig, QuantizedKV
from ..passes.report import PassReport, add_to_report

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


def _note(reason: str | None) -> None:
    """Say that attention reads the coded cache, or why it does not: of a compiled graph in `passes.report()`, else once in the log."""
    if torch.compiler.is_compiling():
        _count_in_report(reason)
    elif reason is not None and reason not in _logged:
        _logged.add(reason)
        _logger.warning("HyperQuantCache decodes all its tokens: %s", reason)


def _count_in_report(reason: str | None) -> int:
    if reason is None:
        add_to_report(PassReport(made=Counter({"cached_attention": 1})))
    else:
        add_to_report(PassReport(left=Counter({("cached_attention", reason): 1})))
    return 0


# what `torch.compiler.assume_constant_result` does, which would import Dynamo: it calls the function when it traces, and not again
_count_in_report._dynamo_marked_constant = True


# what can be asked of a tensor without reading it
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "requires_grad", "layout", "is_nested")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.contiguous}
_ALL = slice(None)


class StoredStates(torch.Tensor):
    """All keys, or values, that a layer of the cache holds, `[B, kv_heads * repeats, max_tokens, head_dim]`, not yet decoded.

    Attributes:
        source: the `HyperQuantLayer`.
        role: 0 for keys, 1 for values.
        queries: tokens of the update that returned this.
        repeats: query heads per head, as far as `repeat_kv` has come: 1 before.
    """

    @classmethod
    def make(cls, source: HyperQuantLayer, role: int, queries: int, shape: tuple[int, ...], like: torch.Tensor, repeats: int = 1):
        """One that stands for `source`; `like` gives dtype and device."""
        # one element, whatever the shape
        out = like.new_zeros(()).expand(shape).as_subclass(cls)
        out.source, out.role, out.queries, out.repeats = source, role, queries, repeats
        return out

    def dense(self) -> torch.Tensor:
        """The decoded states, of this shape."""
        with torch._C.DisableTorchFunctionSubclass():
            states = (self.source.states.keys, self.source.states.values)[self.role]().to(self.dtype)
            if self.dim() == 5:
                return states[:, :, None].expand(self.shape)
            return states.repeat_interleave(self.repeats, 1) if self.repeats > 1 else states

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
            return args[0] if func is torch.Tensor.contiguous else out
        repeated = _repeated(func, args, kwargs)
        if repeated is not None:
            return repeated
        _note(f"{getattr(func, '__name__', func)} reads keys or values")
        args, kwargs = torch.utils._pytree.tree_map_only(StoredStates, StoredStates.dense, (tuple(args), kwargs))
        return func(*args, **kwargs)


def _repeated(func, args, kwargs) -> StoredStates | None:
    """The result of a step of `repeat_kv`: heads opened by an index, expanded, and merged again; None for anything else."""
    if kwargs or not args or not isinstance(args[0], StoredStates):
        return None
    x, rest = args[0], args[1:]
    with torch._C.DisableTorchFunctionSubclass():
        shape = tuple(x.shape)
        if func is torch.Tensor.__getitem__:
            if len(shape) != 4 or rest[0] != (_ALL, _ALL, None, _ALL, _ALL):
                return None
            new, repeats = (*shape[:2], 1, *shape[2:]), x.repeats
        elif func is torch.Tensor.expand and len(shape) == 5:
            new = tuple(rest[0]) if len(rest) == 1 else rest
            if len(new) != 5 or (*new[:2], *new[3:]) != (*shape[:2], *shape[3:]) or shape[2] != 1:
                return None
            repeats = x.repeats * new[2]
        elif func is torch.Tensor.reshape and len(shape) == 5:
            new, repeats = tuple(rest[0]) if len(rest) == 1 else rest, x.repeats
            if new != (shape[0], shape[1] * shape[2], *shape[3:]):
                return None
        else:
            return None
        return StoredStates.make(x.source, x.role, x.queries, new, x, repeats)


def _reason(query, key, value, dropout_p: float, is_causal: bool) -> str | None:
    """Why this attention cannot read the coded cache, or None."""
    if not isinstance(key, StoredStates) or not isinstance(value, StoredStates):
        return "keys and values are not both of the cache"
    if key.source is not value.source or (key.role, value.role) != (0, 1) or key.repeats != value.repeats:
        return "keys and values are not of one layer"
    if dropout_p or is_causal:
        return f"dropout_p={dropout_p} and is_causal={is_causal}"
    if key.queries != 1:
        return f"a mask for {key.queries} tokens at once need not be causal"
    return None


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` of one new token per row with what is stored."""
    reason = _reason(query, key, value, dropout_p, is_causal)
    _note(reason)
    if reason is not None:
        key, value = (x.dense() if isinstance(x, StoredStates) else x for x in (key, value))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    states = key.source.states
    batch, heads, rows, head_dim = query.shape
    # transformers gives the query heads that share a head as rows where it runs one token eagerly
    packed = rows > 1
    if packed:
        query = query.reshape(batch, heads * rows, 1, head_dim)
        if attn_mask is not None and attn_mask.shape[1] * attn_mask.shape[2] == heads * rows:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], heads * rows, 1, attn_mask.shape[3])
    out = states.attend(query, attn_mask, scale)
    return out.reshape(batch, heads, rows, head_dim) if packed else out


class HyperQuantLayer(CacheLayerMixin):
    """One layer of a `HyperQuantCache`; `states` is its `QuantizedKV`, made at the first update."""

    is_compileable = True
    is_croppable = True

    def __init__(self, config: KVConfig, max_cache_len: int, layer: int, sliding_window: int = 0, is_sliding: bool = False) -> None:
        super().__init__()
        self.config, self.max_cache_len, self.layer = config, max_cache_len, layer
        self.sliding_window, self.is_sliding = sliding_window, is_sliding
        self.states: QuantizedKV | None = None
        self.fresh = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise ValueError(f"keys and values must have one head_dim, got {head_dim} and {value_states.shape[-1]}")
        self.batch_size, self.dtype, self.device = batch, key_states.dtype, key_states.device
        self.states = QuantizedKV(
            self.config,
            batch,
            kv_heads,
            head_dim,
            self.max_cache_len,
            layer=self.layer,
            sliding_window=self.sliding_window,
            dtype=self.dtype,
            device=self.device,
        )
        if not torch.compiler.is_compiling():
            for tensor in (*self.states.tensors().values(), self.states.k_rotation, self.states.v_rotation):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens `[B, kv_heads, S, head_dim]`; returns them if the layer was empty, else what stands for all that is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.states.store(key_states, value_states)
        if self.fresh:
            self.fresh = False
            return key_states, value_states
        batch, kv_heads, queries, head_dim = key_states.shape
        shape = (batch, kv_heads, self.max_cache_len, head_dim)
        keys, values = (StoredStates.make(self, role, queries, shape, key_states) for role in (0, 1))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.fresh else self.max_cache_len), 0

    def get_seq_length(self) -> torch.Tensor | int:
        return self.states.length[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        if self.is_initialized:
            self.states.reset()
        self.fresh = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0, got {tokens_to_remove}")
        if self.is_initialized:
            self.states.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self.states.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.states.select_batch(torch.arange(self.batch_size, device=indices.device)[indices])
            self.batch_size = self.states.k_words.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("a HyperQuantCache does not offload layers")

    prefetch = offload


class ExactLayer(StaticLayer):
    """transformers' static layer, which can also be cropped, and at first returns the tokens it is given as `HyperQuantLayer` does."""

    is_croppable = True

    def __init__(self, max_cache_len: int, is_sliding: bool) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.is_sliding, self.fresh = is_sliding, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        stored = super().update(key_states, value_states, *args, **kwargs)
        if not self.fresh:
            return stored
        self.fresh = False
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.fresh else self.max_cache_len), 0

    def reset(self) -> None:
        super().reset()
        self.fresh = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0, got {tokens_to_remove}")
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove)


class HyperQuantCache(Cache):
    """A static KV cache at a few bits per value.

    Args:
        config: the model's.
        max_cache_len: tokens that fit, rounded up to a multiple of 16.
        bps: bits per value of keys and values, everything in the slots included; `k_bps` and `v_bps` set one of them.
        rotation, window, sinks, lattice, effort, dither, seed: see `hq_inductor.cache.KVConfig`.
        exact_layers: indices of layers that are not quantized; negative ones count from the last.

    Raises:
        ValueError, TypeError: an argument is out of range, or a layer is neither full, sliding-window nor chunked attention.

    Note: layers with a sliding window keep older tokens too, and only look at those in it.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        bps: float = 4.0,
        *,
        k_bps: float | None = None,
        v_bps: float | None = None,
        exact_layers: Iterable[int] = (),
        **options,
    ) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be an integer of at least 1, got {max_cache_len!r}")
        self.kv_config = KVConfig(bps if k_bps is None else k_bps, bps if v_bps is None else v_bps, **options)
        tokens = -(-max_cache_len // TOKEN_BLOCK) * TOKEN_BLOCK
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        if isinstance(arguments, dict):
            # before transformers 5.20, one for all layers
            arguments = [arguments] * len(types)
        exact = set(exact_layers)
        if not all(-len(types) <= index < len(types) for index in exact):
            raise ValueError(f"exact_layers must be indices of {len(types)} layers, got {sorted(exact)}")
        exact = {index % len(types) for index in exact}
        layers = []
        for index, (kind, own) in enumerate(zip(types, arguments, strict=True)):
            if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
                raise ValueError(f"layers must be full_attention, sliding_attention or chunked_attention, layer {index} is {kind}")
            sliding = kind != "full_attention"
            if index in exact:
                layer = ExactLayer(tokens, sliding)
            else:
                window = own["sliding_window"] if kind == "sliding_attention" else 0
                layer = HyperQuantLayer(self.kv_config, tokens, index, window, sliding)
            layers.append(layer)
        super().__init__(layers=layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers, exact tokens included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, HyperQuantLayer):
                total += layer.states.size_bytes if layer.is_initialized else 0
            elif layer.is_initialized:
                total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return total
