"""Puts a few integers of the host into memory of the GPU by a kernel: no copy, so a CUDA graph can
capture it.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import Config, Kernel, launch

PER_LAUNCH = 16
_BIAS = 1 << 40
"""Added on the way, so that every integer has 64 bits and no other compilation is needed."""


@Kernel
def fill(
    out_ptr, first, count,
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Stores up to 16 integers from `first` on."""
    values = (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15)
    for place in tl.static_range(16):
        tl.store(out_ptr + first + place, values[place] - BIAS, first + place < count)


def integers(values: list[int], device: torch.device) -> Tensor:
    """An int64 tensor of these values, 16 a launch."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    for first in range(0, len(values), PER_LAUNCH):
        part = [v + _BIAS for v in values[first : first + PER_LAUNCH]]
        part += [_BIAS] * (PER_LAUNCH - len(part))
        launch(fill, (1,), out, first, len(values), *part, config=Config({}, warps=1), BIAS=_BIAS)
    return out


def launches(count: int) -> int:
    """How many `integers` takes."""
    return -(-count // PER_LAUNCH)
