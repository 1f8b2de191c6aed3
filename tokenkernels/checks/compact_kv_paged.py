"""What compact_kv_paged refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import NUMPY, dtype, fail, rank
from . import compact_kv as dense

OP, WHOLE = "compact_kv_paged", "pool"


def check(
    pool: Any,
    block_table: Any,
    index: Any,
    lengths: Any,
    order: Any,
    rope: Any,
    backend: str | None = NUMPY,
) -> None:
    """Raises ValueError or TypeError where the arguments of compact_kv_paged do not fit
    together.
    """
    if not isinstance(order, str) or order not in ("stable", "fill"):
        fail(OP, "order", "'stable', 'fill'", repr(order))
    blocks = dense.shapes_of(pool, backend, OP, WHOLE, "(num_blocks, block_size, G)")
    for shape in blocks:
        if shape[:2] != blocks[0][:2]:
            allowed = f"(num_blocks, block_size) = {tuple(blocks[0][:2])} in every layer"
            fail(OP, WHOLE, allowed, tuple(shape[:2]))
    if blocks[0][1] == 0:
        fail(OP, WHOLE, "blocks of at least one row", "block_size 0")
    device = getattr(pool[0][0], "device", None)
    dtype(OP, "block_table", block_table, dense.INTEGERS)
    dense.same_device("block_table", block_table, device, OP, WHOLE)
    rank(OP, "block_table", block_table, 2)
    shapes = _as_caches(blocks, block_table.shape)
    counts = dense.rows("index", index, shapes, device, op=OP, whole=WHOLE)
    dense.rows("lengths", lengths, shapes, device, entries=False, op=OP, whole=WHOLE)
    if rope is not None:
        dense.turns(pool, shapes, counts, rope, device, backend, OP, WHOLE)
    if max(counts) > shapes[0][2]:
        fail(OP, "index", f"at most max_blocks · block_size = {shapes[0][2]} entries", max(counts))


def _as_caches(blocks: list[Sequence[int]], table: Sequence[int]) -> list[Sequence[int]]:
    """(B, G, T, D) of every layer, were its blocks laid out by the table."""
    batch, most = table
    return [(batch, heads, most * size, width) for _, size, heads, width in blocks]


def in_place(shape: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ValueError where rows could not be written in place: `strides` in elements."""
    dense.in_place(shape, strides, OP, WHOLE)


def distinct(addresses: Sequence[int]) -> None:
    """Raises ValueError where two tensors are one memory."""
    dense.distinct(addresses, OP, WHOLE)


def arrays(arrays: Sequence[Any], addresses: Callable[[Any], list[int]]) -> None:
    """Raises where NumPy arrays hold objects, or could not be written in place."""
    dense.arrays(arrays, True, OP, WHOLE)
    distinct(addresses(arrays))
