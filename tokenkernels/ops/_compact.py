"""What both compactions of a key/value cache share: where kept rows go, and how keys turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Layers = Sequence[Sequence[Tensor]]
PerLayer = Tensor | Sequence[Tensor]

_BAD_INDEX = "index: allowed ascending positions below the length, -1 behind the last, got others"


def listed(value: PerLayer) -> Sequence[Tensor]:
    return value if isinstance(value, (list, tuple)) else (value,)


def rotation(inv_freq: Tensor, old: PerLayer, new: PerLayer) -> tuple[Any, Any, Any]:
    return inv_freq.detach().float().contiguous(), listed(old), listed(new)


def unpacked(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The op packs the rows of several index tensors; of one it returns them in their own shape."""
    first = shapes[0]
    if len(shapes) == 1:
        return [packed]
    if all(shape == first for shape in shapes):
        return list(packed.view(len(shapes), *first).unbind())
    parts = packed.split_with_sizes([shape.numel() for shape in shapes])
    return [
        part if len(shape) == 1 else part.view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def of_layer(rows: list[Tensor], layer: int, batch: int, heads: int) -> Tensor:
    """(M), (B, M) or (B, G, M), of this layer or of all → (B, G, M)."""
    one = rows[0 if len(rows) == 1 else layer].long()
    while one.ndim < 3:
        one = one.unsqueeze(-2)
    return one.expand(batch, heads, -1)


def _check_ascending(op: str, rows: Tensor) -> None:
    before = torch.cat((torch.full_like(rows[..., :1], -1), rows[..., :-1]), -1)
    slot = torch.arange(rows.shape[-1], device=rows.device)
    follows = (rows > before) & ((before >= 0) | (slot == 0))
    if not (follows | (rows == -1)).all():
        raise ValueError(f"{op}: {_BAD_INDEX}")


def _check_positions(op: str, rows: Tensor) -> None:
    if (rows.long() != rows.int()).any():
        raise ValueError(f"{op}: rope: allowed positions of 32 bits, got others")


def _entries(kept: Tensor, fill: bool) -> Tensor:
    """For each slot the entry of `kept` (..., M) that fills it."""
    entry = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    if not fill or entry.numel() == 0:
        return entry
    stays = (kept >= 0) & (kept < (kept >= 0).sum(-1, keepdim=True))
    last = kept.shape[-1] - 1
    taken = torch.zeros_like(kept).scatter_add(-1, kept.clamp(0, last), stays.long()) > 0
    holes = torch.where(taken, last + 1, entry).sort(-1).values
    rank = (entry - stays.sum(-1, keepdim=True)).clamp(min=0)
    return torch.where(stays, kept, holes.gather(-1, rank)).argsort(-1)


def _taken(tensor: Tensor, positions: Tensor) -> Tensor:
    """The rows of (B, G, T, D) at positions (B, G, M), whatever the dtype; zeros at -1."""
    batch, heads, tokens, channels = tensor.shape
    if tokens == 0:
        return tensor.new_zeros((*positions.shape, channels))
    b = torch.arange(batch, device=tensor.device)[:, None, None]
    g = torch.arange(heads, device=tensor.device)[:, None]
    rows = tensor[b, g, positions.clamp(min=0)]
    rows[positions < 0] = 0
    return rows


def _turned(key: Tensor, inv_freq: Tensor, difference: Tensor) -> Tensor:
    """Rotates keys (B, G, M, D) by difference (B, G, M) · inv_freq (D / 2), float32 radians."""
    wide = key if key.dtype == torch.float64 else key.float()
    angle = (difference.float()[..., None] * inv_freq.float()).to(wide.dtype)
    x, y = wide.chunk(2, -1)
    turned = torch.cat((x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()), -1)
    return torch.where(difference[..., None] == 0, key, turned.to(key.dtype))


class Kept:
    """What an index keeps: how many rows, from where each slot is filled, how far keys turn."""

    def __init__(
        self,
        op: str,
        index: list[Tensor],
        fill: bool,
        inv_freq: Tensor | None,
        old: list[Tensor],
        new: list[Tensor],
    ) -> None:
        for rows in index:
            _check_ascending(op, rows)
        for rows in [*old, *new]:
            _check_positions(op, rows)
        self.op, self.inv_freq, self.old, self.new = op, inv_freq, old, new
        self.entries = [_entries(rows.long(), fill) for rows in index]
        self.lengths = [(rows >= 0).sum(-1) for rows in index]
        self.positions = [
            rows.long().gather(-1, e) for rows, e in zip(index, self.entries, strict=True)
        ]

    def turns(self, layer: int, batch: int, heads: int) -> Tensor:
        """new - old position of what fills each slot, (B, G, M); 0 where nothing does."""
        sources = of_layer(self.positions, layer, batch, heads)
        if self.inv_freq is None:
            return torch.zeros_like(sources)
        by = of_layer(self.new, layer, batch, heads) - of_layer(self.old, layer, batch, heads)
        by = by.gather(2, of_layer(self.entries, layer, batch, heads))
        return torch.where(sources >= 0, by, 0)

    def of(self, tensors: list[Tensor], lengths: list[Tensor], per_layer: int) -> list[Tensor]:
        """The kept rows of tensors (B, G, T, D), of which `lengths` are in use."""
        outputs = []
        for layer in range(len(tensors) // per_layer):
            cache = tensors[layer * per_layer : (layer + 1) * per_layer]
            size = cache[0].shape[:2]
            sources = of_layer(self.positions, layer, *size)
            tokens: Any = cache[0].shape[2]
            if lengths:
                limit = of_layer([rows.unsqueeze(-1) for rows in lengths], layer, *size)
                if ((limit < 0) | (limit > tokens)).any():
                    raise ValueError(f"{self.op}: lengths: allowed 0 … T, got others")
                tokens = limit
            if (sources >= tokens).any():
                raise ValueError(f"{self.op}: {_BAD_INDEX}")
            moved = [_taken(tensor, sources) for tensor in cache]
            if self.inv_freq is not None:
                moved[0] = _turned(moved[0], self.inv_freq, self.turns(layer, *size))
            outputs += moved
        return outputs

    def packed(self) -> tuple[Tensor, Tensor]:
        """Lengths and positions, of several index tensors one behind the other."""
        return _packed(self.lengths), _packed(self.positions)


def _packed(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def fake_rows(index: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lengths and positions without values."""
    if len(index) == 1:
        shapes: list[Any] = [index[0].shape[:-1], index[0].shape]
    else:
        shapes = [(sum(i.shape[:-1].numel() for i in index),), (sum(i.numel() for i in index),)]
    lengths, positions = (index[0].new_empty(shape, dtype=torch.int64) for shape in shapes)
    return lengths, positions


ARGUMENTS = (
    "Tensor[] index, Tensor[] lengths, int per_layer, bool fill, Tensor? inv_freq, "
    "Tensor[] old_positions, Tensor[] new_positions"
)
