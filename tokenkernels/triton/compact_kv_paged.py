"""compact_kv_paged in Triton: compact_kv_ whose rows are found through the block table, in one
launch too.

Heads that lie one behind the other and keep the same rows move as one wide row. The plane of
programs that writes lengths and positions tells also which blocks came free.
"""

from __future__ import annotations

from torch import Tensor

from tokenkernels.triton import _fill
from tokenkernels.triton._compact_paged import compact_paged
from tokenkernels.triton._compact_table import Layout, Work, rows_like, slots_of
from tokenkernels.triton._launch import launch


def compact_kv_paged(
    pool: list[Tensor], table: Tensor, index: list[Tensor], lengths: list[Tensor],
    per_layer: int, fill: bool,
    inv_freq: Tensor | None, old_positions: list[Tensor], new_positions: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Behind the length of a row, and in the blocks that are freed, the old bytes remain."""
    counts, positions = rows_like(index)
    freed = table.new_empty(table.shape, dtype=counts.dtype)
    kinds = []
    for i, (tensor, slots) in enumerate(zip(pool, slots_of(pool, index, per_layer), strict=True)):
        layer, place = divmod(i, per_layer)
        rows = [of[0 if len(of) == 1 else layer] for of in (index, lengths)]
        alike = rows[0].ndim < 3 and rows[1].ndim < 2 and (place > 0 or inv_freq is None)
        kinds.append(kind_of(tensor, slots, table.shape[1], alike))
    layout = Layout(pool, pool, kinds, table.shape[0])
    lists = layout.add_lists(index, lengths, old_positions, new_positions)
    work = Work(layout, index, pool[0], inv_freq, fill, True)
    held_heads = len(layout.values)
    layout.values += [heads_of(one, 0) for one in lengths]
    launch(
        compact_paged, (work.programs, 1 + len(pool)),
        _fill.integers(layout.values, table.device), inv_freq, counts, positions, freed, table,
        *table.stride(), pool[0].shape[1], pool[0].shape[0], table.shape[1],
        per_layer, layout.batch, work.shares,
        len(index), work.most_rows, max(heads_of(one, 1) for one in index), lists.plans,
        len(lengths), held_heads, max(layout.values[held_heads:]),
        *lists.places,
        config=work.config, **work.constants, **lists.constants, FILL=fill,
    )  # fmt: skip
    return counts, positions, freed


def heads_of(rows: Tensor, entries: int) -> int:
    """How many rows a sequence has: one where its heads share it."""
    return rows.shape[1] if rows.ndim - entries == 2 else 1


def kind_of(x: Tensor, count: int, most_blocks: int, alike: bool) -> tuple[int, ...]:
    """Heads, tokens and count, strides of block, head and row in bytes, bytes of a row; of heads
    that are moved alike one, if they are neighbours.
    """
    _, rows, heads, channels = x.shape
    size, tokens = x.element_size(), min(most_blocks * rows, 2**31 - 1)
    strides = [s * size if n > 1 else 0 for s, n in zip(x.stride(), x.shape[:3], strict=False)]
    block, row, head = strides
    if alike and heads > 1 and head == channels * size:
        return 1, tokens, count, block, 0, row, heads * channels * size
    return heads, tokens, count if heads else 0, block, head, row, channels * size
