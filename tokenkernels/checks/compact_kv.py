"""What compact_kv refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from . import ARRAY_DTYPES, DTYPES, NUMPY, dtype, fail, floating, numbers_of_numpy, rank, same_dtype

OP = "compact_kv"
INTEGERS = ("int64", "int32")
FREQUENCIES = ("float32", "float64", "float16", "bfloat16")


def check(
    layers: Any,
    index: Any,
    lengths: Any,
    inplace: Any,
    order: Any,
    rope: Any,
    backend: str | None = NUMPY,
) -> None:
    """Raises ValueError or TypeError where the arguments of compact_kv do not fit together."""
    if not isinstance(order, str) or order not in ("stable", "fill"):
        fail(OP, "order", "'stable', 'fill'", repr(order))
    if not isinstance(inplace, bool):
        fail(OP, "inplace", "a bool", repr(inplace), TypeError)
    shapes = _layers(layers, backend)
    device = getattr(layers[0][0], "device", None)
    counts = _rows("index", index, shapes, device)
    if lengths is not None:
        _rows("lengths", lengths, shapes, device, entries=False)
    if rope is not None:
        _rope(layers, shapes, counts, rope, device, backend)
    if inplace:
        for layer, shape in enumerate(shapes):
            if counts[layer if len(counts) > 1 else 0] > shape[2]:
                fail(OP, "index", f"at most T = {shape[2]} entries in place", max(counts))


def in_place(shape: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ValueError where rows could not be written in place: `strides` in elements."""
    if 0 in shape:
        return
    if shape[-1] > 1 and strides[-1] != 1:
        fail(OP, "layers", "a contiguous last dimension in place", f"strides {tuple(strides)}")
    reach = 1
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride < reach:
            fail(
                OP,
                "layers",
                "tensors that do not overlap themselves in place",
                f"strides {tuple(strides)}",
            )
        reach = stride * (size - 1) + reach


def distinct(addresses: Sequence[int]) -> None:
    """Raises ValueError where two tensors are one memory: in place it would be compacted twice.

    Address 0 is that of tensors without memory.
    """
    addresses = [address for address in addresses if address]
    if len(set(addresses)) < len(addresses):
        fail(OP, "layers", "tensors that share no memory in place", "one of them twice")


def arrays(arrays: Sequence[Any], inplace: bool) -> None:
    """Raises where NumPy arrays hold objects, or could not be written in place."""
    for array in arrays:
        numbers_of_numpy(OP, "layers", array)
        if inplace:
            flags = array.flags
            if not flags.writeable:
                fail(OP, "layers", "writeable arrays in place", "a read-only one")
            if not flags.c_contiguous:
                in_place(array.shape, [stride // array.itemsize for stride in array.strides])


def _layers(layers: Any, backend: str | None) -> list[Sequence[int]]:
    """(B, G, T, …) of every layer."""
    if not isinstance(layers, (list, tuple)) or not layers:
        fail(OP, "layers", "a list of tuples (key, value, …), at least one", type(layers).__name__)
    device: Any = None
    shapes: list[Sequence[int]] = []
    for layer in layers:
        if not isinstance(layer, (list, tuple)) or not layer:
            fail(OP, "layers", "a list of tuples (key, value, …)", f"{type(layer).__name__} in it")
        if len(layer) != len(layers[0]):
            fail(OP, "layers", f"{len(layers[0])} tensors in every layer", len(layer))
        first: tuple[int, ...] = getattr(layer[0], "shape", ())
        for tensor in layer:
            here = getattr(tensor, "device", None)
            if isinstance(here, str) is not (backend == NUMPY):
                kind = "NumPy arrays of numbers" if backend == NUMPY else "torch tensors"
                fail(OP, "layers", kind, type(tensor).__name__, TypeError)
            shape = getattr(tensor, "shape", ())
            if len(shape) != 4:
                rank(OP, "layers", tensor, 4)
            if shape != first and shape[:3] != first[:3]:
                fail(OP, "layers", f"(B, G, T) as the first of its layer {tuple(first[:3])}", shape)
            device = device or here
            if here != device:
                fail(OP, "layers", f"one device ({device})", here)
        shapes.append(first)
        if first[0] != shapes[0][0]:
            fail(OP, "layers", f"one batch size B = {shapes[0][0]}", first[0])
    return shapes


def _rows(
    name: str, value: Any, shapes: list[Sequence[int]], device: Any, *, entries: bool = True
) -> list[int]:
    """Checks integers shared by all layers or listed per layer; returns how long their rows are."""
    several = isinstance(value, (list, tuple))
    listed = value if several else (value,)
    if several and len(value) != len(shapes):
        fail(OP, name, f"one tensor, or a list of one per layer ({len(shapes)})", len(value))
    counts = []
    for layer, one in enumerate(listed):
        found = getattr(one, "dtype", None)
        if (DTYPES.get(found) or ARRAY_DTYPES.get(found)) not in INTEGERS:
            dtype(OP, name, one, INTEGERS)
        if getattr(one, "device", None) != device:
            _refuse_device(name, one, device)
        shape = one.shape
        leading = len(shape) - entries
        if not 0 <= leading <= 2:
            rank(OP, name, one, *((1, 2, 3) if entries else (0, 1, 2)))
        if leading:
            for whole in shapes[layer : layer + 1] if several or leading == 1 else shapes:
                if shape[:leading] != whole[:leading]:
                    _refuse_rows(name, shape, whole, entries)
        counts.append(shape[-1] if entries else 1)
    return counts


def _refuse_device(name: str, x: Any, device: Any) -> NoReturn:
    here = getattr(x, "device", None)
    error = ValueError if type(here) is type(device) else TypeError
    got = here if error is ValueError else type(x).__name__
    fail(OP, name, f"the device of layers ({device})", got, error)


def _refuse_rows(name: str, shape: Any, whole: Sequence[int], entries: bool) -> None:
    last = ", M" if entries else ""
    allowed = f"shape ({last[2:]}), (B{last}) or (B, G{last}) with B = {whole[0]}, G = {whole[1]}"
    fail(OP, name, allowed, f"shape {tuple(shape)}")


def _rope(
    layers: Any,
    shapes: list[Sequence[int]],
    counts: list[int],
    rope: Any,
    device: Any,
    backend: str | None,
) -> None:
    if not isinstance(rope, (list, tuple)) or len(rope) != 3:
        fail(OP, "rope", "(inv_freq, old_positions, new_positions)", type(rope).__name__)
    frequencies, *positions = rope
    dtype(OP, "rope", frequencies, FREQUENCIES)
    if getattr(frequencies, "device", None) != device:
        _refuse_device("rope", frequencies, device)
    rank(OP, "rope", frequencies, 1)
    key = layers[0][0]
    floating(OP, "layers", key, backend)
    for layer in layers:
        same_dtype(OP, "layers", layer[0], key, "the first key")
        if layer[0].shape[3] != 2 * frequencies.shape[0]:
            fail(OP, "rope", f"D / 2 = {layer[0].shape[3] / 2:g} frequencies", frequencies.shape[0])
    for rows in positions:
        found, layers_count = _rows("rope", rows, shapes, device), len(shapes)
        if found * (layers_count // len(found)) != counts * (layers_count // len(counts)):
            fail(OP, "rope", "one position per index entry", "another number")
