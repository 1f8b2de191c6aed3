"""compact_kv: the kept positions of a key/value cache, moved together in all layers at once, in place if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import Case, Make, Op
from ..checks import compact_kv as check

Layers = Sequence[Sequence[Tensor]]
PerLayer = Tensor | Sequence[Tensor]


class Compacted(NamedTuple):
    """What compact_kv returns."""

    layers: list[tuple[Tensor, ...]]
    """Per layer its tensors, (B, G, M, D) each; in place these are views of the inputs."""
    lengths: Tensor | list[Tensor]
    """How many positions each row of the index keeps, int64, shaped as the index without its last dimension."""
    positions: Tensor | list[Tensor]
    """The position that each slot was filled from, int64, shaped as the index; -1 behind the last."""


def compact_kv(
    layers: Layers,
    index: PerLayer,
    *,
    lengths: PerLayer | None = None,
    inplace: bool = False,
    order: str = "stable",
    rope: tuple[Tensor, PerLayer, PerLayer] | None = None,
    backend: str | None = None,
) -> Compacted:
    """Moves the kept positions of a key/value cache together, all layers in one launch.

    Rows move as bytes, so every dtype works (int8 or fp8 with their scales as one more tensor of the tuple). Everything is checked before
    anything moves: after a ValueError the cache is as it was.

    Args:
        layers: One tuple per layer, (key, value) or more, all of one length. Tensors are (B, G, T, D) in any dtype and with any strides
            (a last dimension that is not contiguous costs one copy); those of a layer share B, G and T, layers share B.
        index: The positions to keep, int64 or int32: (M,) for all, (B, M) per sample, (B, G, M) per head, or a list with one such tensor
            per layer. Ascending, each position once, -1 behind the last where rows keep fewer than M.
        lengths: How many positions of each row are in use, int64 or int32: (), (B,), (B, G), or a list with one per layer, for instance
            the `lengths` of an earlier call. Index values must lie below. None: all T.
        inplace: Moves within `layers`, whose tensors must be contiguous in the last dimension and not overlap; M may not exceed T. The
            result holds views [:, :, :M]; behind a row's length, and behind M, the old bytes remain. Otherwise the result is fresh, with
            zeros behind a row's length.
        order: "stable" keeps ascending order. "fill" leaves every kept row below the new length where it is and moves only the others
            into the holes, in order: up to half the traffic or less. Attention over rotated keys does not depend on order, and
            `positions` tells it.
        rope: (inv_freq, old_positions, new_positions): the first tensor of every layer (the keys, in rotate-half layout, float32, float16
            or bfloat16, D even) is rotated by (new - old) · inv_freq, radians in float32. inv_freq is (D / 2,) floating; the positions
            hold one integer of 32 bits per entry of `index`, in any of its shapes. Keys whose position stays move as bytes.
        backend: "native", "triton", "reference", or None for the best one there.

    Returns:
        Compacted(layers, lengths, positions); the last two are lists where `index` is one.

    Raises:
        ValueError: Shapes that do not fit; on the CPU also index values that are out of range, not ascending or twice there, lengths
            outside 0 … T, positions beyond 32 bits.
        TypeError: Integers that are not int64 or int32; with `rope`, keys of another dtype (float64 only with backend="reference").

    Source: the cache step of MustDrop (Liu et al. 2024, arXiv 2411.10803, §3.3); key re-rotation as in SinkCache (Xiao et al. 2023).

    Example:
        >>> import torch, tokenkernels as tk
        >>> layers = [(torch.arange(8.0).view(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)) for _ in range(2)]
        >>> kept = tk.compact_kv(layers, torch.tensor([1, 3]))
        >>> kept.layers[0][0].tolist(), kept.lengths.item()
        ([[[[2.0, 3.0], [6.0, 7.0]]]], 2)
    """
    check.check(layers, index, lengths, inplace, order, rope, backend)
    tensors = [tensor for layer in layers for tensor in layer]
    rows = _listed(index)
    inv_freq, old, new = rope or (None, (), ())
    if inv_freq is not None:
        inv_freq = inv_freq.float().contiguous()
    arguments = (rows, _listed(lengths), len(layers[0]), order == "fill", inv_freq, _listed(old), _listed(new))
    device = tensors[0].device.type
    if inplace:
        _check_in_place(tensors)
        counts, positions = OP_COMPACT_KV_(backend, device, tensors, *arguments)
        per_layer = len(layers[0])
        moved = [_head(tensor, rows[0 if len(rows) == 1 else i // per_layer].shape[-1]) for i, tensor in enumerate(tensors)]
    else:
        moved, counts, positions = OP_COMPACT_KV(backend, device, tensors, *arguments)
    results = iter(moved)
    compacted = [tuple(next(results) for _ in layer) for layer in layers]
    if isinstance(index, Tensor):
        return Compacted(compacted, counts, positions)
    return Compacted(compacted, _unpacked(counts, [i.shape[:-1] for i in rows]), _unpacked(positions, [i.shape for i in rows]))


def _listed(value: PerLayer | None) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _head(tensor: Tensor, count: int) -> Tensor:
    return tensor.narrow(2, 0, count)


def _unpacked(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The op packs the rows of several index tensors; of one it returns them in their own shape."""
    if len(shapes) == 1:
        return [packed]
    return [part.view(shape) for part, shape in zip(packed.split([s.numel() for s in shapes]), shapes, strict=True)]


def _check_in_place(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            check.in_place(tensor.shape, tensor.stride())
    if not torch.compiler.is_compiling():
        check.distinct([tensor.data_ptr() for tensor in tensors if tensor.numel()])


def _per_head(rows: Tensor, batch: int, heads: int) -> Tensor:
    """(M), (B, M) or (B, G, M) → (B, G, M) int64."""
    while rows.ndim < 3:
        rows = rows.unsqueeze(-2)
    return rows.long().expand(batch, heads, -1)


def _entries(row: list[int], fill: bool) -> list[int]:
    """For each slot of one row the index entry that fills it, -1 behind the last."""
    kept = [position for position in row if position >= 0]
    entries = list(range(len(kept)))
    if fill:
        stays = {position: entry for entry, position in enumerate(kept) if position < len(kept)}
        moves = iter([entry for entry, position in enumerate(kept) if position >= len(kept)])
        entries = [stays[slot] if slot in stays else next(moves) for slot in range(len(kept))]
    return entries + [-1] * (len(row) - len(kept))


def _check_values(index: Tensor, limit: Tensor, tokens: int) -> None:
    """`index` (B, G, M), `limit` (B, G, 1): raises ValueError as the native op does."""
    if ((limit < 0) | (limit > tokens)).any():
        raise ValueError("compact_kv: lengths: allowed 0 … T, got others")
    before = torch.cat((index.new_full((*index.shape[:2], 1), -1), index[..., :-1]), 2)
    rising = (index > before) & ((before >= 0) | (before == -1) & (torch.arange(index.shape[2], device=index.device) == 0))
    if not ((index == -1) | rising & (index >= 0) & (index < limit)).all():
        raise ValueError("compact_kv: index: allowed ascending positions below the length, -1 behind the last, got others")


def _turned(key: Tensor, inv_freq: Tensor, difference: Tensor) -> Tensor:
    """Rotates keys (B, G, M, D) by difference (B, G, M) · inv_freq (D / 2); the angle is taken in float32."""
    wide = key if key.dtype == torch.float64 else key.float()
    angle = (difference.float()[..., None] * inv_freq.float()).to(wide.dtype)
    first, second = wide.chunk(2, -1)
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    return torch.where(difference[..., None] == 0, key, turned.to(key.dtype))


def _taken(tensor: Tensor, positions: Tensor) -> Tensor:
    """The rows of (B, G, T, D) at positions (B, G, M), whatever the dtype; zeros at -1."""
    batch, heads, tokens, _ = tensor.shape
    if tokens == 0:
        return tensor.new_zeros((*positions.shape, tensor.shape[3]))
    b = torch.arange(batch, device=tensor.device)[:, None, None]
    g = torch.arange(heads, device=tensor.device)[:, None]
    rows = tensor[b, g, positions.clamp(min=0)]
    return torch.where(positions[..., None] >= 0, rows, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def _reference(
    tensors: list[Tensor],
    index: list[Tensor],
    lengths: list[Tensor],
    per_layer: int,
    fill: bool,
    inv_freq: Tensor | None,
    old: list[Tensor],
    new: list[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    entries = []
    for rows in index:
        table = [_entries(row, fill) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
        entries.append(torch.tensor(table, dtype=torch.int64, device=rows.device).view(rows.shape))
    for row in [*old, *new] if inv_freq is not None else []:
        if (row.long() != row.int()).any():
            raise ValueError("compact_kv: rope: allowed positions of 32 bits, got others")
    outputs = []
    for layer in range(len(tensors) // per_layer):
        batch, heads, tokens, _ = tensors[layer * per_layer].shape

        def here(rows: list[Tensor], layer: int = layer, batch: int = batch, heads: int = heads) -> Tensor:
            return _per_head(rows[0 if len(rows) == 1 else layer], batch, heads)

        limit = here([rows.unsqueeze(-1) for rows in lengths]) if lengths else torch.full_like(here(index)[..., :1], tokens)
        _check_values(here(index), limit, tokens)
        entry = here(entries)
        positions = torch.where(entry >= 0, here(index).gather(2, entry.clamp(min=0)), -1)
        outputs += [_taken(tensor, positions) for tensor in tensors[layer * per_layer : (layer + 1) * per_layer]]
        if inv_freq is not None:
            difference = (here(new) - here(old)).gather(2, entry.clamp(min=0))
            outputs[-per_layer] = _turned(outputs[-per_layer], inv_freq, torch.where(entry >= 0, difference, 0))
    kept = [torch.where(e >= 0, rows.long().gather(-1, e.clamp(min=0)), -1) for rows, e in zip(index, entries, strict=True)]
    return outputs, _packed([(e >= 0).sum(-1) for e in entries]), _packed(kept)


def _packed(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def _reference_in_place(tensors: list[Tensor], index: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    outputs, lengths, positions = _reference(tensors, index, *rest)
    per_layer = len(tensors) // len(index) if len(index) > 1 else len(tensors)
    for i, (tensor, output) in enumerate(zip(tensors, outputs, strict=True)):
        valid = _per_head(index[i // per_layer], *tensor.shape[:2])[..., None] >= 0
        head = tensor[:, :, : output.shape[2]]
        head.copy_(torch.where(valid, output, head))
    return lengths, positions


def _fake_rows(index: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(index) == 1:
        shapes: list[Any] = [index[0].shape[:-1], index[0].shape]
    else:
        shapes = [(sum(i.shape[:-1].numel() for i in index),), (sum(i.numel() for i in index),)]
    lengths, positions = (index[0].new_empty(shape, dtype=torch.int64) for shape in shapes)
    return lengths, positions


def _fake(tensors: list[Tensor], index: list[Tensor], lengths: Any, per_layer: int, *_: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = []
    for i, tensor in enumerate(tensors):
        count = index[0 if len(index) == 1 else i // per_layer].shape[-1]
        outputs.append(tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])))
    return outputs, *_fake_rows(index)


def _fake_in_place(tensors: list[Tensor], index: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_rows(index)
