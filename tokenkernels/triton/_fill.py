"""Puts integers of the host into memory of the GPU by a kernel: no copy, so a CUDA graph can
capture it.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import Config, Kernel, launch

FEW, MANY = 16, 256
"""Integers of one launch; 256 take half of the 4 KB that arguments may."""
ONE_WARP = Config({}, warps=1, reason="Every thread stores the same few numbers.")
_BIAS = 1 << 40
"""Added on the way, so that every integer has 64 bits; they arrive doubled and odd, so that none
is a multiple of 16. So no other compilation is needed for other values.
"""


@Kernel
def fill(out_ptr, first, count, values, BIAS: tl.constexpr):
    """Stores as many integers from `first` on."""
    for place in tl.static_range(len(values)):
        value = (values[place] - BIAS) >> 1
        tl.store(out_ptr + first + place, value, first + place < count)


def integers(values: list[int], device: torch.device) -> Tensor:
    """An int64 tensor of these values, up to 256 a launch."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    size = FEW if len(values) <= FEW else MANY
    for first in range(0, len(values), size):
        part = values[first : first + size]
        part = part + [0] * (size - len(part))
        odd = tuple(2 * v + 1 + _BIAS for v in part)
        launch(fill, (1,), out, first, len(values), odd, config=ONE_WARP, BIAS=_BIAS)
    return out
