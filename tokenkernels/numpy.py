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
from .checks import compact_kv_paged as _check_compact_kv_paged
from .checks.accumulate_codes import accumulate_codes as _check_accumulate_codes
from .checks.aggregate_logits import aggregate_logits as _check_aggregate_logits
from .checks.aggregate_soft import aggregate_soft as _check_aggregate_soft
from .checks.assign_nearest import assign_nearest as _check_assign_nearest
from .checks.assign_residual import assign_residual as _check_assign_residual
from .checks.gather_topk import gather_topk as _check_gather_topk
from .checks.gather_topk import is_dense
from .checks.merge_adjacent import merge_adjacent as _check_merge_adjacent
from .checks.merge_runs import merge_runs as _check_merge_runs
from .checks.score_attention import score_attention as _check_score_attention
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
        checks.ARRAY_DTYPES[np.dtype(_name)] = _name
    elif ml_dtypes is not None and hasattr(ml_dtypes, _name):
        checks.ARRAY_DTYPES[np.dtype(getattr(ml_dtypes, _name))] = _name
checks.ARRAY_DTYPES[np.dtype(bool)] = "bool"

Array = np.ndarray
_METRIC = {"l2": 0, "cosine": 1, "dot": 2}
_FUSE = {None: 0, "sum": 1, "mean": 2}
_HEADS = {"mean": 0, "group": 1, "none": 2}


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
    """Gathers N tokens into M slots by a softmax over the tokens; see
    `tokenkernels.aggregate_soft`.
    """
    _check_aggregate_soft(query, key, value, scale, bias, mask, return_weights)
    if bias is not None:
        bias = bias.astype(np.float32, copy=False)
    tokens, weights = _core.aggregate_soft(
        query, key, value, bias, mask, float(scale), return_weights
    )
    if not return_weights:
        return tokens
    return tokens, weights.swapaxes(1, 2).astype(tokens.dtype, copy=False)


def aggregate_logits(logits: Array, value: Array, *, mask: Array | None = None) -> Array:
    """Gathers N tokens into M slots by given logits; see `tokenkernels.aggregate_logits`."""
    _check_aggregate_logits(logits, value, mask)
    return _core.aggregate_logits(logits, value, mask)


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
    if not one and (isinstance(x, str) or not isinstance(x, Sequence)):
        checks.fail(
            "gather_topk", "x", "an array, or a sequence of them", type(x).__name__, TypeError
        )
    arrays = (x,) if one else tuple(x)
    for array in arrays:
        checks.numbers_of_numpy("gather_topk", "x", array)
    budgets = _check_gather_topk(arrays, scores, k, keep, prefix, order, threshold, fuse)
    dense = is_dense(k)
    rows = budgets[0] if dense else 0
    if dense:
        budgets = budgets * scores.shape[0]
    bar = 0.0 if threshold is None else threshold
    tokens, index, offsets = _core.gather_topk(
        arrays, scores, keep, budgets, rows, threshold is not None, bar, dense, prefix,
        order == "score", _FUSE[fuse],
    )  # fmt: skip
    return Selected(tokens[0] if one else tuple(tokens), index, offsets)


class Assigned(NamedTuple):
    """What assign_nearest returns; None for what was not asked for."""

    index: Array  # type: ignore[assignment]
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

    index: Array  # type: ignore[assignment]
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


def score_attention(
    query: Array,
    key: Array,
    *,
    scale: float | None = None,
    query_positions: Array | None = None,
    causal: bool = False,
    key_lengths: Array | None = None,
    lse: Array | None = None,
    columns: tuple[int, int] | None = None,
    row_weights: Array | None = None,
    heads: str = "mean",
    reduce: str | Sequence[str] = ("sum",),
    pool: int = 1,
) -> Array | tuple[Array, Array]:
    """Scores every key by the attention it receives; see `tokenkernels.score_attention`."""
    first, end, total, top = _check_score_attention(
        query,
        key,
        scale,
        query_positions,
        causal,
        key_lengths,
        lse,
        columns,
        row_weights,
        heads,
        reduce,
        pool,
    )
    outputs = _core.score_attention(
        query,
        key,
        query.shape[3] ** -0.5 if scale is None else scale,
        causal,
        _plain(query_positions, np.int64),
        _plain(key_lengths, np.int64),
        _plain(lse, np.float32),
        _plain(row_weights, np.float32),
        first,
        end,
        _HEADS[heads],
        total,
        top,
        pool,
    )
    return (outputs[0], outputs[1]) if total and top else outputs


def _plain(x: Array | None, dtype: Any) -> Array | None:
    return None if x is None else np.ascontiguousarray(x, dtype)


class Merged(NamedTuple):
    """What merge_adjacent and merge_runs return."""

    tokens: Array
    size: Array
    index: Array  # type: ignore[assignment]
    offsets: Array


def merge_adjacent(
    x: Array,
    grid: Sequence[int],
    window: Sequence[int],
    *,
    threshold: float | None = None,
    num_windows: int | Sequence[int] | Array | None = None,
    size: Array | None = None,
    prefix: int = 0,
    order: str = "raster",
    batch: str = "ragged",
) -> Merged:
    """Merges the windows of a grid whose tokens are alike; see `tokenkernels.merge_adjacent`."""
    counts = _check_merge_adjacent(
        x, grid, window, threshold, num_windows, size, prefix, order, batch
    )
    dense = batch == "uniform" or (num_windows is not None and not hasattr(num_windows, "__len__"))
    bar = 0.0 if threshold is None else threshold
    by_similarity = order == "similarity"
    return Merged(
        *_core.merge_adjacent(
            x,
            _three(grid),
            _three(window),
            counts is None,
            bar,
            counts or [0],
            dense,
            size,
            prefix,
            by_similarity,
        )
    )


def _three(extents: Sequence[int]) -> list[int]:
    """Any grid as that of a video: an image (H, W) is (H, 1, W), a sequence (N) is (N, 1, 1)."""
    return [
        extents[0],
        extents[1] if len(extents) == 3 else 1,
        extents[-1] if len(extents) > 1 else 1,
    ]


def merge_runs(
    x: Array,
    threshold: float,
    *,
    max_run: int = 8,
    size: Array | None = None,
    prefix: int = 0,
    padded: bool = False,
) -> Merged:
    """Merges every run of alike neighbours; see `tokenkernels.merge_runs`."""
    _check_merge_runs(x, threshold, max_run, size, prefix, padded)
    return Merged(*_core.merge_runs(x, threshold, max_run, size, prefix, padded))


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
    per_layer, rows = len(layers[0]), _listed(index)
    rotation = (None, (), ()) if rope is None else _rotation(*rope)
    limits = () if lengths is None else _listed(lengths)
    if inplace:
        _check_compact_kv.distinct(_core.addresses(arrays))
    moved, counts, positions = _core.compact_kv(
        arrays, rows, limits, per_layer, order == "fill", inplace, *rotation
    )
    if inplace:
        of_layer = [rows[0 if len(rows) == 1 else i // per_layer] for i in range(len(arrays))]
        moved = [array[:, :, : one.shape[-1]] for array, one in zip(arrays, of_layer, strict=True)]
    compacted = [tuple(moved[i : i + per_layer]) for i in range(0, len(moved), per_layer)]
    if rows is index:
        return Compacted(compacted, counts, positions)
    return Compacted(compacted, counts[0], positions[0])


class CompactedPages(NamedTuple):
    """What compact_kv_paged returns."""

    pool: list[tuple[Array, ...]]
    lengths: Any
    positions: Any
    freed: Array


def compact_kv_paged(
    pool: Sequence[Sequence[Array]],
    block_table: Array,
    index: Array | Sequence[Array],
    lengths: Array | Sequence[Array],
    *,
    order: str = "stable",
    rope: tuple[Array, Any, Any] | None = None,
) -> CompactedPages:
    """Moves kept positions to each sequence's front blocks; see `tokenkernels.compact_kv_paged`."""
    _check_compact_kv_paged.check(pool, block_table, index, lengths, order, rope)
    arrays = [array for layer in pool for array in layer]
    _check_compact_kv_paged.arrays(arrays, _core.addresses)
    rotation = (None, (), ()) if rope is None else _rotation(*rope)
    rows, limits, per_layer = _listed(index), _listed(lengths), len(pool[0])
    counts, positions, freed = _core.compact_kv_paged(
        arrays, block_table, rows, limits, per_layer, order == "fill", *rotation
    )
    same = [tuple(layer) for layer in pool]
    if rows is index:
        return CompactedPages(same, counts, positions, freed)
    return CompactedPages(same, counts[0], positions[0], freed)


def _listed(value: Array | Sequence[Array]) -> Sequence[Array]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _rotation(inv_freq: Array, old: Any, new: Any) -> tuple[Array, Any, Any]:
    return np.ascontiguousarray(inv_freq, np.float32), _listed(old), _listed(new)
