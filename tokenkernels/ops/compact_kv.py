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
    per_layer, rows = len(layers[0]), listed(index)
    turns = (None, (), ()) if rope is None else rotation(*rope)
    limits = () if lengths is None else listed(lengths)
    arguments = (rows, limits, per_layer, order == "fill", *turns)
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
    lengths = unpacked(counts, [shape[:-1] for shape in shapes])
    return Compacted(compacted, lengths, unpacked(positions, shapes))


def _first(tensors: list[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Of every tensor the slots that its index leaves."""
    room = [one.shape[-1] for one in rows]
    if len(room) == 1:
        return [tensor.narrow(2, 0, room[0]) for tensor in tensors]
    per_layer = len(tensors) // len(room)
    return [tensor.narrow(2, 0, room[i // per_layer]) for i, tensor in enumerate(tensors)]


def _check_in_place(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            check.in_place(tensor.shape, tensor.stride())
        if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
            fail("compact_kv", "layers (in place)", "no leaf that requires grad", "one")
    if not torch.compiler.is_compiling():
        check.distinct([tensor.data_ptr() for tensor in tensors if tensor.numel()])


def _reference(
    tensors: list[Tensor],
    index: list[Tensor],
    lengths: list[Tensor],
    per_layer: int,
    fill: bool,
    *rope: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    kept = Kept("compact_kv", index, fill, *rope)
    return kept.of(tensors, lengths, per_layer), *kept.packed()


def _reference_in_place(
    tensors: list[Tensor], index: list[Tensor], lengths: list[Tensor], per_layer: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    outputs, counts, positions = _reference(tensors, index, lengths, per_layer, *rest)
    for i, (tensor, output) in enumerate(zip(tensors, outputs, strict=True)):
        valid = of_layer(index, i // per_layer, *tensor.shape[:2]) >= 0
        tensor[:, :, : output.shape[2]][valid] = output[valid]
    return counts, positions


def _fake(
    tensors: list[Tensor], index: list[Tensor], lengths: Any, per_layer: int, *_: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = []
    for i, tensor in enumerate(tensors):
        count = index[0 if len(index) == 1 else i // per_layer].shape[-1]
        outputs.append(tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])))
    return outputs, *fake_rows(index)


def _fake_in_place(tensors: list[Tensor], index: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return fake_rows(index)


OP = Op(
    schema=f"compact_kv(Tensor[] tensors, {ARGUMENTS}) -> (Tensor[], Tensor, Tensor)",
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
    schema=f"compact_kv_(Tensor(a!)[] tensors, {ARGUMENTS}) -> (Tensor, Tensor)",
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
