"""Where a rewrite pays, for switches that are `"auto"`.

Rule.  Merging siblings always: it takes rotations and launches away and adds nothing.
       Norms, gates and residuals move into the fused kernel's launches, so where that kernel may run (`takes_fused_kernel`): on CUDA, for
       at most `FUSED_BATCH` rows of half precision with `mma="auto"`, or of any dtype with `mma="int8"`. A batch that is not known when
       compiling counts as small: larger ones then take as many kernels as Inductor's own, since the kernel that rotates does the norm or
       gate for every batch. On a CPU these steps are loops that Inductor generates and vectorizes, which the op would not.
Cost.  Measured (H200, torch 2.11, 2026-11-24, `benchmarks/README.md`): four layers of Llama-3-8B's shape and the head take 0.932 ms at
       batch 1 without the passes, 0.854 with siblings merged and 0.829 with all.
"""

from __future__ import annotations

import math

from ..ops.launch import FUSED_BATCH
from ..ops.linear import takes_fused_kernel
from .config import AUTO, PassConfig
from .linear_node import LinearNode


def why_not(name: str, linear: LinearNode, config: PassConfig) -> str | None:
    """The reason not to make a rewrite around a layer, or None."""
    switch = getattr(config, name)
    if switch is False:
        return "switched off"
    if switch is True or name == "merge_siblings":
        return None
    assert switch == AUTO
    x = linear.value("x")
    if x.device.type != "cuda":
        return f"does not pay on {x.device.type}"
    # `Size.numel()` would make a size that is not known a constant
    rows = math.prod(x.shape[:-1])
    batch = rows if isinstance(rows, int) else FUSED_BATCH
    if not takes_fused_kernel(linear.mma, x.dtype, batch):
        return f"the fused kernel does not run for mma={linear.mma!r}, {x.dtype} and {rows} rows"
    return None
