"""compact_kv_ in Triton: compact_kv within the cache, in one launch too.

"stable": a program owns columns of one tensor and head, 64 bytes at least, and walks its tiles
upwards: it loads a tile, waits until all its threads have, and stores the one before. "fill": rows
beyond the length move into holes below it, which no other row is read from, so programs share them.
"""

from __future__ import annotations

from torch import Tensor

from tokenkernels.triton._compact_table import run


def compact_kv_(
    tensors: list[Tensor], index: list[Tensor], lengths: list[Tensor], per_layer: int, fill: bool,
    inv_freq: Tensor | None, old_positions: list[Tensor], new_positions: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Behind the length of a row its old bytes remain."""
    return run(
        tensors, tensors, index, lengths, per_layer, fill, inv_freq, old_positions, new_positions,
        True,
    )  # fmt: skip
