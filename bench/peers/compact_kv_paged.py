"""What people write today to compact a paged key/value cache: slots found through the block table,
rows gathered and put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Peer
from .compact_kv import hashes

Rows = tuple[Tensor, Tensor]
"""Blocks, and the rows in them."""


def _rows_of(table: Tensor, positions: Tensor, size: int) -> Rows:
    """Where positions (B, M) of the sequences are."""
    return table.long().gather(1, positions // size), positions % size


def _put(tensor: Tensor, source: Rows, target: Rows) -> None:
    """Rows of a tensor in blocks, all heads of them, to other places; by slot where blocks lie one
    behind the other, as in vLLM's slot mapping.
    """
    size = tensor.shape[1]
    if tensor.stride(0) != size * tensor.stride(1):
        tensor[target] = tensor[source]
        return
    flat = tensor.view(-1, *tensor.shape[2:])
    slots = [(block * size + row).flatten() for block, row in (source, target)]
    flat.index_copy_(0, slots[1], flat.index_select(0, slots[0]))


def _of_all(pool: Any, source: Rows, target: Rows) -> list[Tensor]:
    for layer in pool:
        for tensor in layer:
            _put(tensor, source, target)
    return [tensor for layer in pool for tensor in layer]


def gather(pool: Any, block_table: Tensor, index: Tensor, **_: Any) -> list[Tensor]:
    """All kept rows gathered, then written to the first slots."""
    size = pool[0][0].shape[1]
    slots = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    source, target = (_rows_of(block_table, rows, size) for rows in (index, slots))
    return _of_all(pool, source, target)


def fill_holes(pool: Any, block_table: Tensor, index: Tensor, order: str, **_: Any) -> list[Tensor]:
    """Kept rows beyond the new length gathered, then written into the holes below it, as
    vllm-kvcompress moves them. Every sequence keeps equally many rows.
    """
    if order != "fill":
        return NotImplemented
    (batch, count), size = index.shape, pool[0][0].shape[1]
    sequence = torch.arange(batch, device=index.device)[:, None].expand(index.shape)
    stays = index < count
    hole = torch.ones_like(stays)
    hole[sequence[stays], index[stays]] = False
    table = block_table.long()
    (at, slot), moved = hole.nonzero(as_tuple=True), index[~stays]
    source = table[at, moved // size], moved % size
    return _of_all(pool, source, (table[at, slot // size], slot % size))


def _kept(tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The rows (B, M, …) in the first slots of every sequence, as bytes."""
    index, table = kwargs["index"], kwargs["block_table"]
    slots = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    return tensor[_rows_of(table, slots, tensor.shape[1])].transpose(1, 2).contiguous()


def same_rows(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Where ours fills holes, a peer may keep ascending order: the same rows stand in another."""
    filled = kwargs["order"] == "fill"
    for g, w in zip(got, want, strict=False):
        g, w = _kept(g.to(w.dtype), kwargs), _kept(w, kwargs)
        g, w = (hashes(g), hashes(w)) if filled else (g, w)
        assert torch.equal(g, w), "other rows than the reference"


PEERS = {
    "slot mapping: index_select, index_copy_": Peer(gather, compiled=True, compare=same_rows),
    "slot mapping, holes only": Peer(fill_holes, compare=same_rows),
}
