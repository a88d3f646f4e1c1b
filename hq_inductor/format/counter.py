"""Counter-based random numbers: a hash of integers, the same on every device and torch version, nothing stored.

Definition.  `mix(a, b)` is the finalizer of MurmurHash3 of `a * 0x9E3779B1 + b * 0x85EBCA77 + 0x165667B1` modulo 2^32, as for the signs of
             `hq_inductor.format.hadamard`. Several counters are folded in from the left: `mix(mix(seed, a), b)`.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def mix(a, b):
    """A 32-bit hash of two integers, or elementwise of int64 tensors that broadcast."""
    h = ((a & _MASK) * 0x9E3779B1 + (b & _MASK) * 0x85EBCA77 + 0x165667B1) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def uniform(*counters) -> torch.Tensor:
    """fp64 in [0, 1) with 32 random bits: a hash of integers and int64 tensors that broadcast, at least one a tensor."""
    h = counters[0]
    for counter in counters[1:]:
        h = mix(h, counter)
    return h.to(torch.float64) / 2**32
