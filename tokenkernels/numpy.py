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
from .checks.accumulate_codes import accumulate_codes as _check_accumulate_codes
from .checks.assign_nearest import assign_nearest as _check_assign_nearest
from .checks.assign_residual import assign_residual as _check_assign_residual
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
_METRIC = {"l2": 0, "cosine": 1, "dot": 2}
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


class Assigned(NamedTuple):
    """What assign_nearest returns; None for what was not asked for."""

    index: Array
    distance: Array | None
    codes: Array | None


def assign_nearest(
    x: Array,
    codebook: Array,
    *,
    metric: str = "l2",
    return_distance: bool = False,
    return_codes: bool = False,
) -> Assigned:
    """Finds the nearest of K codes for every token; see `tokenkernels.assign_nearest`."""
    _check_assign_nearest(x, codebook, metric, return_distance, return_codes)
    number = _METRIC[metric]
    return Assigned(*_core.assign_nearest(x, codebook, number, return_distance, return_codes))


class Residual(NamedTuple):
    """What assign_residual returns."""

    index: Array
    residual: Array


def assign_residual(x: Array, codebooks: Array) -> Residual:
    """Quantises tokens in Q rounds; see `tokenkernels.assign_residual`."""
    _check_assign_residual(x, codebooks)
    return Residual(*_core.assign_residual(x, codebooks))


class Accumulated(NamedTuple):
    """What accumulate_codes returns."""

    counts: Array
    sums: Array


def accumulate_codes(x: Array, index: Array, K: int, *, grouped: bool = False) -> Accumulated:
    """Counts and adds up the tokens of every code; see `tokenkernels.accumulate_codes`."""
    _check_accumulate_codes(x, index, K, grouped)
    return Accumulated(*_core.accumulate_codes(x, index, K, grouped))
