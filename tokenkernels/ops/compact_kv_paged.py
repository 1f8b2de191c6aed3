"""compact_kv_paged: the kept rows of a paged key/value cache, moved to the front of each sequence's
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import Op
from ..cases import compact_kv_paged as cases
from ..checks import compact_kv_paged as check
from ..checks import fail
from ._compact import (
    ARGUMENTS,
    Kept,
    Layers,
    PerLayer,
    fake_rows,
    listed,
    of_layer,
    rotation,
    unpacked,
)

_BAD_BLOCKS = (
    "compact_kv_paged: block_table: allowed blocks of the pool where rows are, those written once, "
    "got others"
)


class CompactedPages(NamedTuple):
    """What compact_kv_paged returns."""

    pool: list[tuple[Tensor, ...]]
    """The tensors given, whose blocks now hold the kept rows."""
    lengths: Tensor | list[Tensor]
    """How many positions each index row keeps, int64, shaped as the index without its last one."""
    positions: Tensor | list[Tensor]
    """The position each slot was filled from, int64, shaped as the index; -1 behind the last."""
    freed: Tensor
    """(B, max_blocks), int64: the blocks that a sequence no longer needs in any layer, in the order
    of its table; -1 behind the last."""


def compact_kv_paged(
    pool: Layers,
    block_table: Tensor,
    index: PerLayer,
    lengths: PerLayer,
    *,
    order: str = "stable",
    rope: tuple[Tensor, PerLayer, PerLayer] | None = None,
    backend: str | None = None,
) -> CompactedPages:
    """Moves the kept positions of a paged key/value cache to the front of each sequence's blocks.

    Position t of sequence b is row t % block_size of block block_table[b, t // block_size]. All
    layers are compacted in place, in one launch, and what blocks came free is told without a
    synchronisation. Rows move as bytes, so every dtype works (int8 or fp8 with their scales as one
    more tensor of the tuple). On the CPU everything is checked before anything moves. No gradient.

    Args:
        pool: One tuple per layer, (key, value) or more, all of one length. Tensors are
            (num_blocks, block_size, G, D) in any dtype and with any strides but a contiguous last
            dimension, and must not overlap: a cache whose heads come first is passed transposed,
            `kv_cache.unbind(0)` where keys and values share a tensor. All share num_blocks and
            block_size, those of one layer G.
        block_table: (B, max_blocks), int64 or int32: the blocks of each sequence, in all layers.
            What stands behind those that hold rows is never read. A block that is written (one with
            a slot that receives another row, or a key turned) must be one sequence's alone; others
            may be shared, as a common prefix is. `index` tells the first of them to stay: it begins
            with 0, 1, 2, … up to the end of the prefix, and with `rope` keeps its positions.
        index: The positions to keep, int64 or int32: (M,) for all, (B, M) per sequence, (B, G, M)
            per head, or a list with one such tensor per layer. Ascending, each position once, -1
            behind the last where rows keep fewer than M.
        lengths: How many positions of each sequence are in use, int64 or int32: (B,), or in the
            forms that `lengths` of an earlier call has: (), (B, G), a list with one per layer.
            Index values must lie below.
        order: "stable" keeps ascending order. "fill" leaves kept rows below the new length where
            they are and moves only the others into the holes, in order: half the traffic where
            half is kept, a ninth for 2304 → 2048. Attention over rotated keys does not depend on
            the order, and `positions` tells it.
        rope: (inv_freq, old_positions, new_positions) as in `compact_kv`: the first tensor of every
            layer is rotated by (new - old) · inv_freq.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        CompactedPages(pool, lengths, positions, freed); lengths and positions are lists where
        `index` is one. A sequence keeps its first ceil(length / block_size) blocks, by the longest
        of its heads and layers; the rest of those it had are `freed`, (freed >= 0).sum(-1) of them.
        In the blocks that stay, old bytes remain behind the length; in those freed, everywhere.

    Raises:
        ValueError: Shapes that do not fit; on the CPU also index values that are out of range, not
            ascending or twice there, lengths outside 0 … max_blocks · block_size, blocks in use
            that the pool does not have, blocks written that stand in the table twice, positions
            beyond 32 bits. On a GPU, where nobody looks, an index value or a block that is out of
            range is skipped; of a block written that stands in the table twice it is undefined
            which rows it then holds.
        TypeError: Integers that are neither int64 nor int32; with `rope`, keys of another dtype
            (float64 only with backend="reference").

    Source: paged caches as in vLLM (Kwon et al. 2023, arXiv 2309.06180); evicted from as in
    KV-Compress (Rehg 2024, arXiv 2410.00161).

    Example:
        >>> import torch, tokenkernels as tk
        >>> keys, values = torch.randn(2, 64, 16, 8, 128).unbind(0)  # 64 blocks of 16 rows
        >>> table = torch.tensor([[7, 3, 9], [1, 8, -1]])
        >>> lengths, kept = torch.tensor([40, 20]), torch.arange(0, 20, 2)
        >>> done = tk.compact_kv_paged([(keys, values)], table, kept, lengths)
        >>> done.lengths.item(), done.freed.tolist()
        (10, [[3, 9, -1], [8, -1, -1]])
    """
    check.check(pool, block_table, index, lengths, order, rope, backend)
    tensors = [tensor for layer in pool for tensor in layer]
    per_layer, rows = len(pool[0]), listed(index)
    turns = (None, (), ()) if rope is None else rotation(*rope)
    _check_in_place(tensors)
    written = [t.detach() if t.requires_grad else t for t in tensors]
    counts, positions, freed = OP(
        backend, tensors[0].device.type, written, block_table,
        rows, listed(lengths), per_layer, order == "fill", *turns,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(written)
    same = [tuple(layer) for layer in pool]
    if rows is not index:
        return CompactedPages(same, counts, positions, freed)
    shapes = [one.shape for one in rows]
    counts = unpacked(counts, [shape[:-1] for shape in shapes])
    return CompactedPages(same, counts, unpacked(positions, shapes), freed)


def _check_in_place(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            check.in_place(tensor.shape, tensor.stride())
        if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
            fail("compact_kv_paged", "pool", "no leaf that requires grad", "one")
    if not torch.compiler.is_compiling():
        check.distinct([tensor.data_ptr() for tensor in tensors if tensor.numel()])


def _blocks(lengths: Sequence[Tensor], batch: int, size: int) -> Tensor:
    """(B): the blocks that the longest of all layers and heads takes."""
    longest = torch.zeros(batch, dtype=torch.int64, device=lengths[0].device)
    for rows in lengths:
        if rows.ndim == 2:
            rows = rows.amax(1) if rows.shape[1] else longest
        longest = torch.maximum(longest, rows.long())
    return (longest + size - 1) // size


def _laid_out(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, T) of a tensor in blocks as (B, G, T, D)."""
    count, size = tensor.shape[:2]
    if count == 0:
        return tensor.new_zeros((*rows.shape, *tensor.shape[2:])).transpose(1, 2)
    return tensor[rows // size, rows % size].transpose(1, 2)


def _written(kept: Kept, layer: int, heads: int, like: Tensor, size: int) -> Tensor:
    """like (B, max_blocks): the blocks in which this layer writes."""
    batch = len(like)
    sources = of_layer(kept.positions, layer, batch, heads)
    moves = (sources >= 0) & (sources != torch.arange(sources.shape[-1], device=like.device))
    moves |= (sources >= 0) & (kept.turns(layer, batch, heads) != 0)
    sequence, slot = moves.any(1).nonzero(as_tuple=True)
    written = torch.zeros_like(like, dtype=torch.bool)
    written[sequence, slot // size] = True
    return written


def _reference(
    pool: list[Tensor],
    table: Tensor,
    index: list[Tensor],
    lengths: list[Tensor],
    per_layer: int,
    fill: bool,
    *rope: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    count, size = pool[0].shape[:2]
    batch, most = table.shape
    place = torch.arange(most, device=table.device)
    used = _blocks(lengths, batch, size).clamp(max=most)[:, None]
    ids = torch.where(place < used, table.long(), 0)
    good = (ids >= 0) & (ids < count)
    ids = torch.where(good, ids, 0)
    rows = (ids[..., None] * size + torch.arange(size, device=table.device)).flatten(1)
    caches = [_laid_out(tensor, rows) for tensor in pool]
    kept = Kept("compact_kv_paged", index, fill, *rope)
    outputs = kept.of(caches, lengths, per_layer)
    owners = torch.zeros(count, dtype=torch.int64, device=table.device)
    owners.index_add_(0, ids[place < used], torch.ones_like(ids[place < used]))
    for i in range(0, len(pool), per_layer):
        written = _written(kept, i // per_layer, pool[i].shape[2], ids, size)
        good &= ~written | (owners[ids] == 1)
    if not good.all():
        raise ValueError(_BAD_BLOCKS)
    for i, (tensor, output) in enumerate(zip(pool, outputs, strict=True)):
        valid = of_layer(index, i // per_layer, *output.shape[:2]) >= 0
        sequence, head, slot = valid.nonzero(as_tuple=True)
        row = rows[sequence, slot]
        tensor[row // size, row % size, head] = output[valid]
    first = place + _blocks(kept.lengths, batch, size)[:, None]
    freed = table.long().gather(1, first.clamp(max=most - 1))
    return *kept.packed(), torch.where(first < used, freed, -1)


def _fake(
    pool: list[Tensor], table: Tensor, index: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_rows(index), table.new_empty(table.shape, dtype=torch.int64)


OP = Op(
    schema=f"compact_kv_paged(Tensor(a!)[] pool, Tensor block_table, {ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=compact_kv_paged,
    cases=cases.CASES,
    bad=cases.BAD,
    bad_values=cases.BAD_VALUES,
    cost=cases.cost,
    casts=False,
    launches=cases.launches,
)
