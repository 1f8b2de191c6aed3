"""compact_kv: the kept positions of a key/value cache, moved together in all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import Op
from ..cases import compact_kv as cases
from ..checks import compact_kv as check
from ..checks import fail

Layers = Sequence[Sequence[Tensor]]
PerLayer = Tensor | Sequence[Tensor]

_BAD_INDEX = (
    "compact_kv: index: allowed ascending positions below the length, -1 behind the last, "
    "got others"
)


class Compacted(NamedTuple):
    """What compact_kv returns."""

    layers: list[tuple[Tensor, ...]]
    """Per layer its tensors, (B, G, M, D) each; in place these are views of the inputs."""
    lengths: Tensor | list[Tensor]
    """How many positions each index row keeps, int64, shaped as the index without its last one."""
    positions: Tensor | list[Tensor]
    """The position each slot was filled from, int64, shaped as the index; -1 behind the last."""


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

    Rows move as bytes, so every dtype works (int8 or fp8 with their scales as one more tensor of
    the tuple). Everything is checked before anything moves: after a ValueError the cache is as it
    was. No gradient.

    Args:
        layers: One tuple per layer, (key, value) or more, all of one length. Tensors are
            (B, G, T, D) in any dtype and with any strides (a last dimension that is not contiguous
            costs one copy); those of one layer share B, G and T, all layers share B.
        index: The positions to keep, int64 or int32: (M,) for all, (B, M) per sample, (B, G, M)
            per head, or a list with one such tensor per layer. Ascending, each position once, -1
            behind the last where rows keep fewer than M.
        lengths: How many positions of each row are in use, int64 or int32: (), (B,), (B, G), or a
            list with one per layer, for instance the `lengths` of an earlier call. Index values
            must lie below. None: all T.
        inplace: Moves within `layers`, whose tensors must be contiguous in the last dimension and
            not overlap; M may not exceed T. The result holds views [:, :, :M]; behind a row's
            length, and behind M, the old bytes remain. Otherwise the result is fresh, with zeros
            behind a row's length.
        order: "stable" keeps ascending order. "fill" leaves kept rows below the new length where
            they are and moves only the others into the holes, in order: half the traffic where
            half is kept, a ninth for 2304 → 2048. Attention over rotated keys does not depend on
            the order, and `positions` tells it.
        rope: (inv_freq, old_positions, new_positions): the first tensor of every layer (the keys,
            rotate-half layout, float32, float16 or bfloat16) is rotated by (new - old) · inv_freq,
            radians in float32. inv_freq is (D / 2,) floating; the positions hold one integer of 32
            bits per entry of `index`, shared or not as `index` may be. Keys whose position does
            not change move as bytes.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        Compacted(layers, lengths, positions); the last two are lists where `index` is one.

    Raises:
        ValueError: Shapes that do not fit; on the CPU also index values that are out of range, not
            ascending or twice there, lengths outside 0 … T, positions beyond 32 bits.
        TypeError: Integers that are neither int64 nor int32; with `rope`, keys of another dtype
            (float64 only with backend="reference").

    Source: the cache step of MustDrop (Liu et al. 2024, arXiv 2411.10803); re-rotated keys as in
    StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).

    Example:
        >>> import torch, tokenkernels as tk
        >>> layers = [(torch.arange(8.0).view(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))]
        >>> kept = tk.compact_kv(layers, torch.tensor([1, 3]))
        >>> kept.layers[0][0].tolist(), kept.lengths.item()
        ([[[[2.0, 3.0], [6.0, 7.0]]]], 2)
    """
    check.check(layers, index, lengths, inplace, order, rope, backend)
    tensors = [tensor for layer in layers for tensor in layer]
    per_layer, rows = len(layers[0]), _listed(index)
    rotation = (None, (), ()) if rope is None else _rotation(*rope)
    limits = () if lengths is None else _listed(lengths)
    arguments = (rows, limits, per_layer, order == "fill", *rotation)
    device = tensors[0].device.type
    if inplace:
        _check_in_place(tensors)
    tensors = [t.detach() if t.requires_grad else t for t in tensors]
    if inplace:
        counts, positions = IN_PLACE(backend, device, tensors, *arguments)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(tensors)
        moved = _first(tensors, rows)
    else:
        moved, counts, positions = OP(backend, device, tensors, *arguments)
    compacted = [tuple(moved[i : i + per_layer]) for i in range(0, len(moved), per_layer)]
    if rows is not index:
        return Compacted(compacted, counts, positions)
    shapes = [one.shape for one in rows]
    lengths = _unpacked(counts, [shape[:-1] for shape in shapes])
    return Compacted(compacted, lengths, _unpacked(positions, shapes))


def _listed(value: PerLayer) -> Sequence[Tensor]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _rotation(inv_freq: Tensor, old: PerLayer, new: PerLayer) -> tuple[Any, Any, Any]:
    return inv_freq.detach().float().contiguous(), _listed(old), _listed(new)


def _first(tensors: list[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Of every tensor the slots that its index leaves."""
    room = [one.shape[-1] for one in rows]
    if len(room) == 1:
        return [tensor.narrow(2, 0, room[0]) for tensor in tensors]
    per_layer = len(tensors) // len(room)
    return [tensor.narrow(2, 0, room[i // per_layer]) for i, tensor in enumerate(tensors)]


def _unpacked(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
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


def _check_in_place(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            check.in_place(tensor.shape, tensor.stride())
        if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
            fail("compact_kv", "layers (in place)", "no leaf that requires grad", "one")
    if not torch.compiler.is_compiling():
        check.distinct([tensor.data_ptr() for tensor in tensors if tensor.numel()])


def _of_layer(rows: list[Tensor], layer: int, like: Tensor) -> Tensor:
    """(M), (B, M) or (B, G, M), of this layer or of all → (B, G, M), for `like` (B, G, T, D)."""
    one = rows[0 if len(rows) == 1 else layer].long()
    while one.ndim < 3:
        one = one.unsqueeze(-2)
    return one.expand(*like.shape[:2], -1)


def _check_ascending(rows: Tensor) -> None:
    before = torch.cat((torch.full_like(rows[..., :1], -1), rows[..., :-1]), -1)
    slot = torch.arange(rows.shape[-1], device=rows.device)
    follows = (rows > before) & ((before >= 0) | (slot == 0))
    if not (follows | (rows == -1)).all():
        raise ValueError(_BAD_INDEX)


def _check_positions(rows: Tensor) -> None:
    if (rows.long() != rows.int()).any():
        raise ValueError("compact_kv: rope: allowed positions of 32 bits, got others")


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
    for rows in index:
        _check_ascending(rows)
    for rows in [*old, *new]:
        _check_positions(rows)
    entries = [_entries(rows.long(), fill) for rows in index]
    positions = [rows.long().gather(-1, e) for rows, e in zip(index, entries, strict=True)]
    outputs = []
    for layer in range(len(tensors) // per_layer):
        cache = tensors[layer * per_layer : (layer + 1) * per_layer]
        sources = _of_layer(positions, layer, cache[0])
        tokens: Any = cache[0].shape[2]
        if lengths:
            limit = _of_layer([rows.unsqueeze(-1) for rows in lengths], layer, cache[0])
            if ((limit < 0) | (limit > tokens)).any():
                raise ValueError("compact_kv: lengths: allowed 0 … T, got others")
            tokens = limit
        if (sources >= tokens).any():
            raise ValueError(_BAD_INDEX)
        moved = [_taken(tensor, sources) for tensor in cache]
        if inv_freq is not None:
            difference = _of_layer(new, layer, cache[0]) - _of_layer(old, layer, cache[0])
            difference = difference.gather(2, _of_layer(entries, layer, cache[0]))
            moved[0] = _turned(moved[0], inv_freq, torch.where(sources >= 0, difference, 0))
        outputs += moved
    return outputs, _packed([(rows >= 0).sum(-1) for rows in index]), _packed(positions)


def _packed(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def _reference_in_place(
    tensors: list[Tensor], index: list[Tensor], lengths: list[Tensor], per_layer: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    outputs, counts, positions = _reference(tensors, index, lengths, per_layer, *rest)
    for i, (tensor, output) in enumerate(zip(tensors, outputs, strict=True)):
        valid = _of_layer(index, i // per_layer, tensor) >= 0
        tensor[:, :, : output.shape[2]][valid] = output[valid]
    return counts, positions


def _fake_rows(index: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(index) == 1:
        shapes: list[Any] = [index[0].shape[:-1], index[0].shape]
    else:
        shapes = [(sum(i.shape[:-1].numel() for i in index),), (sum(i.numel() for i in index),)]
    lengths, positions = (index[0].new_empty(shape, dtype=torch.int64) for shape in shapes)
    return lengths, positions


def _fake(
    tensors: list[Tensor], index: list[Tensor], lengths: Any, per_layer: int, *_: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = []
    for i, tensor in enumerate(tensors):
        count = index[0 if len(index) == 1 else i // per_layer].shape[-1]
        outputs.append(tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])))
    return outputs, *_fake_rows(index)


def _fake_in_place(tensors: list[Tensor], index: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_rows(index)


_ARGUMENTS = (
    "Tensor[] index, Tensor[] lengths, int per_layer, bool fill, Tensor? inv_freq, "
    "Tensor[] old_positions, Tensor[] new_positions"
)

OP = Op(
    schema=f"compact_kv(Tensor[] tensors, {_ARGUMENTS}) -> (Tensor[], Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=compact_kv,
    cases=cases.CASES,
    bad=cases.BAD,
    bad_values=cases.BAD_VALUES,
    cost=cases.cost,
    batch=("layers", "index", "lengths"),
    casts=False,
    launches=cases.launches,
)

IN_PLACE = Op(
    schema=f"compact_kv_(Tensor(a!)[] tensors, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=_reference_in_place,
    fake=_fake_in_place,
    function=compact_kv,
    cases=cases.CASES_IN_PLACE,
    bad=[*cases.BAD, *cases.BAD_IN_PLACE],
    bad_values=cases.BAD_VALUES,
    cost=cases.cost,
    batch=("layers", "index", "lengths"),
    casts=False,
    launches=cases.launches,
)
