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
from .checks.aggregate_logits import aggregate_logits as _check_aggregate_logits
from .checks.aggregate_soft import aggregate_soft as _check_aggregate_soft
from .checks.gather_topk import gather_topk as _check_gather_topk
from .checks.slim_tokens import slim_tokens as _check_slim_tokens

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


def aggregate_soft(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float = 1.0,
    bias: Array | None = None,
    mask: Array | None = None,
    return_weights: bool = False,
) -> Array | tuple[Array, Array]:
    """Gathers N tokens into M slots by a softmax over the tokens; see `tokenkernels.aggregate_soft`."""
    _check_aggregate_soft(query, key, value, scale, bias, mask, return_weights)
    if bias is not None:
        bias = bias.astype(np.float32, copy=False)
    tokens, weights = _core.aggregate_soft(
        query, key, value, bias, mask, float(scale), return_weights
    )
    if not return_weights:
        return tokens  # type: ignore[no-any-return]
    return tokens, weights.swapaxes(1, 2).astype(tokens.dtype, copy=False)


def aggregate_logits(logits: Array, value: Array, *, mask: Array | None = None) -> Array:
    """Gathers N tokens into M slots by given logits; see `tokenkernels.aggregate_logits`."""
    _check_aggregate_logits(logits, value, mask)
    return _core.aggregate_logits(logits, value, mask)  # type: ignore[no-any-return]


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


def slim_tokens(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    w1: Array,
    b1: Array,
    w2: Array,
    scale: Array | float = 1.0,
    *,
    eps: float = 1e-5,
) -> Array:
    """Replaces N tokens by M weighted means of them; see `tokenkernels.slim_tokens`."""
    _check_slim_tokens((x, norm_weight, norm_bias, w1, b1, w2), scale, eps)
    return _core.slim_tokens(x, norm_weight, norm_bias, w1, b1, w2, float(scale), eps)
