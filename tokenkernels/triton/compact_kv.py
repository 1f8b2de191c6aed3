"""compact_kv in Triton: all layers in one launch, which finds its tensors in a table.

The table is filled by a launch for every 256 integers, that is for up to 80 tensors of one shape.
A program takes up to 8 tiles of 16 KB of one tensor and head: it reads the index, finds where kept
rows come from (with "fill" by binary search in the index, so nothing is planned ahead), and moves
them in vectors of 16 bytes, as words, or turned in float32. The first plane of the grid writes
lengths and positions.
"""

from __future__ import annotations

from torch import Tensor

from tokenkernels.triton._compact_table import run


def compact_kv(
    tensors: list[Tensor], index: list[Tensor], lengths: list[Tensor], per_layer: int, fill: bool,
    inv_freq: Tensor | None, old_positions: list[Tensor], new_positions: list[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Fresh tensors, with zeros behind the length of a row."""
    outputs = []
    for i, tensor in enumerate(tensors):
        count = index[0 if len(index) == 1 else i // per_layer].shape[-1]
        outputs.append(tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])))
    readable = [t if t.shape[3] < 2 or t.stride(3) == 1 else t.contiguous() for t in tensors]
    counts, positions = run(
        readable, outputs, index, lengths, per_layer, fill, inv_freq, old_positions, new_positions,
        False,
    )  # fmt: skip
    return outputs, counts, positions
