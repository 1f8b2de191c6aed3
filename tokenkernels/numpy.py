"""The same functions on NumPy arrays; imports no torch.

Arguments, results, checks and rounding are those of `tokenkernels.<function>`, whose documentation
holds here too. float32 and float16; bfloat16 where `ml_dtypes` is installed. The calls release the
GIL and use a few threads of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .checks import compact_kv as _check_compact_kv
from .checks.gather_topk import gather_topk as _check_gather_topk

try:
    from . import _numpy as _core
except ImportError as error:
    raise ImportError(
        "tokenkernels.numpy needs the native build, which is not here "
        "(no C++ compiler at installation, or TOKENKERNELS_NATIVE=OFF)"
    ) from error

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None  # type: ignore[assignment]

for _name in checks.NAMES:
    if hasattr(np, _name) and _name != "bool":
        checks.DTYPES[np.dtype(_name)] = _name
    elif ml_dtypes is not None and hasattr(ml_dtypes, _name):
        checks.DTYPES[np.dtype(getattr(ml_dtypes, _name))] = _name
checks.DTYPES[np.dtype(bool)] = "bool"

Array = np.ndarray
_FUSE = {None: 0, "sum": 1, "mean": 2}


class Selected(NamedTuple):
    """What gather_topk returns."""

    tokens: Any
    index: Array  # type: ignore[assignment]
    offsets: Array


def gather_topk(
    x: Array | Sequence[Array],
    scores: Array,
    k: int | Sequence[int] | Array | None = None,
    *,
    keep: Array | None = None,
    prefix: int = 0,
    order: str = "index",
    threshold: float | None = None,
    fuse: str | None = None,
) -> Selected:
    """Gathers the k highest-scored tokens of every image; see `tokenkernels.gather_topk`."""
    one = isinstance(x, np.ndarray)
    arrays = (x,) if one else tuple(x)
    budgets = _check_gather_topk(arrays, scores, k, keep, prefix, order, threshold, fuse)
    dense = isinstance(k, int)
    if dense:
        budgets = budgets * scores.shape[0]
    bar = 0.0 if threshold is None else threshold
    tokens, index, offsets = _core.gather_topk(
        arrays, scores, keep, budgets, k if dense else 0, threshold is not None, bar, dense, prefix,
        order == "score", _FUSE[fuse],
    )  # fmt: skip
    return Selected(tokens[0] if one else tuple(tokens), index, offsets)


class Compacted(NamedTuple):
    """What compact_kv returns."""

    layers: list[tuple[Array, ...]]
    lengths: Any
    positions: Any


def compact_kv(
    layers: Sequence[Sequence[Array]],
    index: Array | Sequence[Array],
    *,
    lengths: Array | Sequence[Array] | None = None,
    inplace: bool = False,
    order: str = "stable",
    rope: tuple[Array, Any, Any] | None = None,
) -> Compacted:
    """Moves the kept positions of a key/value cache together; see `tokenkernels.compact_kv`."""
    _check_compact_kv.check(layers, index, lengths, inplace, order, rope)
    arrays = [array for layer in layers for array in layer]
    _check_compact_kv.arrays(arrays, inplace)
    rows, per_layer = _listed(index), len(layers[0])
    inv_freq, old, new = rope or (None, (), ())
    if inv_freq is not None:
        inv_freq = np.ascontiguousarray(inv_freq, np.float32)
    moved, counts, positions = _core.compact_kv(
        arrays, rows, _listed(lengths), per_layer, order == "fill", inplace, inv_freq, _listed(old), _listed(new)
    )  # fmt: skip
    if inplace:
        of_layer = [rows[0 if len(rows) == 1 else i // per_layer] for i in range(len(arrays))]
        moved = [array[:, :, : one.shape[-1]] for array, one in zip(arrays, of_layer, strict=True)]
    results = iter(moved)
    compacted = [tuple(next(results) for _ in layer) for layer in layers]
    if isinstance(index, (list, tuple)):
        return Compacted(compacted, counts, positions)
    return Compacted(compacted, counts[0], positions[0])


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
