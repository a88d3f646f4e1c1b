"""Small constant tensors, made once per device."""

from __future__ import annotations

import threading

import torch

_ON_DEVICE: dict[tuple, torch.Tensor] = {}


def on_device(key: tuple, make, device: torch.device) -> torch.Tensor:
    """`make()` on a device, made once per key and kept for the life of the process.

    Made in a thread of its own: the first call may come from a CUDA graph's warm-up, whose memory pool belongs to its thread and is
    reused after it, or from a tracer, whose fake tensors do. A table from there would be overwritten, or none at all.
    """
    key = (*key, device)
    if key not in _ON_DEVICE:

        def build() -> None:
            _ON_DEVICE[key] = make().to(device)

        worker = threading.Thread(target=build)
        worker.start()
        worker.join()
    return _ON_DEVICE[key]


def is_kept(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of these."""
    return any(kept is tensor for kept in _ON_DEVICE.values())
