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
    shapes = shapes_of(layers, backend)
    for shape in shapes:
        if shape[0] != shapes[0][0]:
            fail(OP, "layers", f"one batch size B = {shapes[0][0]}", shape[0])
    device = getattr(layers[0][0], "device", None)
    counts = rows("index", index, shapes, device)
    if lengths is not None:
        rows("lengths", lengths, shapes, device, entries=False)
    if rope is not None:
        turns(layers, shapes, counts, rope, device, backend)
    if inplace:
        for layer, shape in enumerate(shapes):
            if counts[layer if len(counts) > 1 else 0] > shape[2]:
                fail(OP, "index", f"at most T = {shape[2]} entries in place", max(counts))


def in_place(
    shape: Sequence[int], strides: Sequence[int], op: str = OP, name: str = "layers"
) -> None:
    """Raises ValueError where rows could not be written in place: `strides` in elements."""
    if 0 in shape:
        return
    if shape[-1] > 1 and strides[-1] != 1:
        fail(op, name, "a contiguous last dimension in place", f"strides {tuple(strides)}")
    reach = 1
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride < reach:
            got = f"strides {tuple(strides)}"
            fail(op, name, "tensors that do not overlap themselves in place", got)
        reach = stride * (size - 1) + reach


def distinct(addresses: Sequence[int], op: str = OP, name: str = "layers") -> None:
    """Raises ValueError where two tensors are one memory: in place it would be compacted twice.

    Address 0 is that of tensors without memory.
    """
    addresses = [address for address in addresses if address]
    if len(set(addresses)) < len(addresses):
        fail(op, name, "tensors that share no memory in place", "one of them twice")


def arrays(arrays: Sequence[Any], inplace: bool, op: str = OP, name: str = "layers") -> None:
    """Raises where NumPy arrays hold objects, or could not be written in place."""
    for array in arrays:
        numbers_of_numpy(op, name, array)
        if inplace:
            flags = array.flags
            if not flags.writeable:
                fail(op, name, "writeable arrays in place", "a read-only one")
            if not flags.c_contiguous:
                strides = [stride // array.itemsize for stride in array.strides]
                in_place(array.shape, strides, op, name)


def shapes_of(
    layers: Any,
    backend: str | None,
    op: str = OP,
    name: str = "layers",
    dims: str = "(B, G, T)",
) -> list[Sequence[int]]:
    """The shape of every layer's first tensor; the others agree in the first three dimensions."""
    if not isinstance(layers, (list, tuple)) or not layers:
        fail(op, name, "a list of tuples (key, value, …), at least one", type(layers).__name__)
    device: Any = None
    shapes: list[Sequence[int]] = []
    for layer in layers:
        if not isinstance(layer, (list, tuple)) or not layer:
            fail(op, name, "a list of tuples (key, value, …)", f"{type(layer).__name__} in it")
        if len(layer) != len(layers[0]):
            fail(op, name, f"{len(layers[0])} tensors in every layer", len(layer))
        first: tuple[int, ...] = getattr(layer[0], "shape", ())
        for tensor in layer:
            here = getattr(tensor, "device", None)
            if isinstance(here, str) is not (backend == NUMPY):
                kind = "NumPy arrays of numbers" if backend == NUMPY else "torch tensors"
                fail(op, name, kind, type(tensor).__name__, TypeError)
            shape = getattr(tensor, "shape", ())
            if len(shape) != 4:
                rank(op, name, tensor, 4)
            if shape != first and shape[:3] != first[:3]:
                fail(op, name, f"{dims} as the first of its layer {tuple(first[:3])}", shape)
            device = device or here
            if here != device:
                fail(op, name, f"one device ({device})", here)
        shapes.append(first)
    return shapes


def rows(
    name: str,
    value: Any,
    shapes: list[Sequence[int]],
    device: Any,
    *,
    entries: bool = True,
    op: str = OP,
    whole: str = "layers",
) -> list[int]:
    """Checks integers shared by all layers or listed per layer; returns how long their rows are."""
    several = isinstance(value, (list, tuple))
    listed = value if several else (value,)
    if several and len(value) != len(shapes):
        fail(op, name, f"one tensor, or a list of one per layer ({len(shapes)})", len(value))
    counts = []
    for layer, one in enumerate(listed):
        found = getattr(one, "dtype", None)
        if (DTYPES.get(found) or ARRAY_DTYPES.get(found)) not in INTEGERS:
            dtype(op, name, one, INTEGERS)
        if getattr(one, "device", None) != device:
            _refuse_device(op, name, one, device, whole)
        shape = one.shape
        leading = len(shape) - entries
        if not 0 <= leading <= 2:
            rank(op, name, one, *((1, 2, 3) if entries else (0, 1, 2)))
        if leading:
            for expected in shapes[layer : layer + 1] if several or leading == 1 else shapes:
                if shape[:leading] != expected[:leading]:
                    _refuse_rows(op, name, shape, expected, entries)
        counts.append(shape[-1] if entries else 1)
    return counts


def same_device(name: str, x: Any, device: Any, op: str, whole: str) -> None:
    """x lives where `whole` does."""
    if getattr(x, "device", None) != device:
        _refuse_device(op, name, x, device, whole)


def _refuse_device(op: str, name: str, x: Any, device: Any, whole: str) -> NoReturn:
    here = getattr(x, "device", None)
    error = ValueError if type(here) is type(device) else TypeError
    got = here if error is ValueError else type(x).__name__
    fail(op, name, f"the device of {whole} ({device})", got, error)


def _refuse_rows(op: str, name: str, shape: Any, expected: Sequence[int], entries: bool) -> None:
    last = ", M" if entries else ""
    allowed = (
        f"shape ({last[2:]}), (B{last}) or (B, G{last}) with B = {expected[0]}, G = {expected[1]}"
    )
    fail(op, name, allowed, f"shape {tuple(shape)}")


def turns(
    layers: Any,
    shapes: list[Sequence[int]],
    counts: list[int],
    rope: Any,
    device: Any,
    backend: str | None,
    op: str = OP,
    name: str = "layers",
) -> None:
    if not isinstance(rope, (list, tuple)) or len(rope) != 3:
        fail(op, "rope", "(inv_freq, old_positions, new_positions)", type(rope).__name__)
    frequencies, *positions = rope
    dtype(op, "rope", frequencies, FREQUENCIES)
    same_device("rope", frequencies, device, op, name)
    rank(op, "rope", frequencies, 1)
    key = layers[0][0]
    floating(op, name, key, backend)
    for layer in layers:
        same_dtype(op, name, layer[0], key, "the first key")
        if layer[0].shape[3] != 2 * frequencies.shape[0]:
            fail(op, "rope", f"D / 2 = {layer[0].shape[3] / 2:g} frequencies", frequencies.shape[0])
    for one in positions:
        found, layers_count = rows("rope", one, shapes, device, op=op, whole=name), len(shapes)
        if found * (layers_count // len(found)) != counts * (layers_count // len(counts)):
            fail(op, "rope", "one position per index entry", "another number")
