"""Orthogonal rotations of head vectors, one per layer and role.

Definition.  Rotated vectors are `x @ R`; `R` is `[head_dim, head_dim]`, orthogonal, a pure function of (kind, head_dim, seed, layer, role):

             | haar     | uniform over the orthogonal group: Q of a Gaussian matrix with the signs of R's diagonal ("qjl" in the paper) |
             | hadamard | random signs, then a Hadamard transform of blocks of the largest power of two that divides head_dim           |
             | none     | the identity                                                                                                  |

             Scores are unchanged if queries are rotated as keys are; what attention sums in V's rotated basis is rotated back once.
             Heads of a layer share a rotation, so queries need one product.
Why.         Rotated coordinates are close to Gaussian whatever the outlier channels of K are. A new rotation per layer and role keeps
             quantization errors of different layers from pointing the same way.
Invariants.  The same on every device: made on the CPU in fp64 from integer hashes.
Source.      HyperQuant, arXiv 2606.23406; Mezzadri, How to generate random matrices from the classical compact groups, 2007 (signs).
"""

from __future__ import annotations

import math

import torch

from .counter import mix, uniform
from .hadamard import hadamard_ref
from .on_device import on_device

ROTATIONS = ("haar", "hadamard", "none")
ROLES = ("k", "v")


def check_rotation(rotation: str) -> None:
    """Raise `ValueError` unless `rotation` is one of `ROTATIONS`."""
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}, got {rotation!r}")


def role_seed(seed: int, layer: int, role: str) -> int:
    """One integer below 2^31 for (seed, layer, role)."""
    if role not in ROLES:
        raise ValueError(f"role must be 'k' or 'v', got {role!r}")
    return mix(seed, 2 * layer + ROLES.index(role)) >> 1


def _haar(head_dim: int, seed: int) -> torch.Tensor:
    index = torch.arange(head_dim * head_dim)
    u, angle = uniform(seed, 0, index), uniform(seed, 1, index)
    # Box and Muller
    gaussian = (-2 * torch.log(1 - u)).sqrt() * torch.cos(2 * math.pi * angle)
    q, r = torch.linalg.qr(gaussian.view(head_dim, head_dim))
    return q * torch.sign(torch.diagonal(r))


def _make(rotation: str, head_dim: int, seed: int) -> torch.Tensor:
    identity = torch.eye(head_dim, dtype=torch.float64)
    if rotation == "haar":
        return _haar(head_dim, seed)
    return hadamard_ref(identity, head_dim & -head_dim, seed) if rotation == "hadamard" else identity


def rotation_matrix(
    rotation: str,
    head_dim: int,
    seed: int = 0,
    layer: int = 0,
    role: str = "k",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """R of `x @ R`, made once per device and dtype; not to be written to.

    Args:
        rotation: one of `"haar"`, `"hadamard"`, `"none"`.
        head_dim: values per head.
        seed, layer: any integers.
        role: `"k"` or `"v"`.

    Returns:
        `[head_dim, head_dim]`, orthogonal up to the rounding of `dtype`.

    Raises:
        ValueError: `rotation` or `role` is none of these.
    """
    check_rotation(rotation)
    own = role_seed(seed, layer, role)
    return on_device(("rotation", rotation, head_dim, own, dtype), lambda: _make(rotation, head_dim, own).to(dtype), torch.device(device))
