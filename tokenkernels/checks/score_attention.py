"""What score_attention refuses, and the plain form of its options."""

from __future__ import annotations

from typing import Any

from . import (
    NUMPY,
    choice,
    dtype,
    fail,
    floating,
    integer,
    number,
    rank,
    same_device,
    same_dtype,
    same_kind,
    shape,
)

OP = "score_attention"
MAX_POOL = 1023
REDUCTIONS = (("sum",), ("max",), ("sum", "max"))


def score_attention(
    query: Any,
    key: Any,
    scale: Any,
    query_positions: Any,
    causal: Any,
    key_lengths: Any,
    lse: Any,
    columns: Any,
    row_weights: Any,
    heads: Any,
    reduce: Any,
    pool: Any,
    backend: str | None = NUMPY,
) -> tuple[int, int, bool, bool]:
    """Raises where an argument is off; returns first and end column, and whether sum and maximum
    are wanted.
    """
    floating(OP, "query", query, backend)
    rank(OP, "query", query, 4)
    same_kind(OP, "key", key, query)
    rank(OP, "key", key, 4)
    same_dtype(OP, "key", key, query, "query")
    same_device(OP, "key", key, query, "query")
    batch, query_heads, rows, dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if min(query_heads, rows, dim) < 1:
        fail(OP, "query", "(B, H, R, D) with H, R, D at least 1", tuple(query.shape))
    if (
        key.shape[0] != batch
        or key.shape[3] != dim
        or min(key_heads, keys) < 1
        or query_heads % key_heads
    ):
        fail(
            OP,
            "key",
            f"({batch}, G, N, {dim}) with N at least 1 and {query_heads} a multiple of G",
            tuple(key.shape),
        )
    if not isinstance(causal, bool):
        fail(OP, "causal", "True, False", repr(causal), TypeError)
    if query_positions is not None:
        if not causal:
            fail(OP, "query_positions", "None without causal", "a tensor")
        _companion("query_positions", query_positions, query, ("int64", "int32"), batch, rows)
    if key_lengths is not None:
        _companion("key_lengths", key_lengths, query, ("int64", "int32"), batch)
    floats = ("float32", "float16", "bfloat16", "float64")
    if lse is not None:
        _companion("lse", lse, query, floats, batch, query_heads, rows)
    if row_weights is not None:
        _companion("row_weights", row_weights, query, floats, batch, rows)
    choice(OP, "heads", heads, "mean", "group", "none")
    first, end = (0, keys) if columns is None else _columns(columns, keys)
    integer(OP, "pool", pool, 1, MAX_POOL)
    if pool % 2 == 0:
        fail(OP, "pool", "an odd number", pool)
    if scale is not None:
        number(OP, "scale", scale)
    wanted = tuple(reduce) if isinstance(reduce, (list, tuple)) else (reduce,)
    if not all(isinstance(name, str) for name in wanted) or wanted not in REDUCTIONS:
        fail(OP, "reduce", ", ".join(map(str, REDUCTIONS)), repr(reduce)[:60])
    return first, end, "sum" in wanted, "max" in wanted


def _companion(name: str, x: Any, query: Any, dtypes: tuple[str, ...], *sizes: int) -> None:
    same_kind(OP, name, x, query)
    dtype(OP, name, x, dtypes)
    shape(OP, name, x, *sizes)
    same_device(OP, name, x, query, "query")


def _columns(columns: Any, keys: int) -> tuple[int, int]:
    if not isinstance(columns, (tuple, list)) or len(columns) != 2:
        fail(OP, "columns", "a pair (first, end)", repr(columns)[:60])
    first, end = columns
    integer(OP, "columns", end, 0, keys)
    integer(OP, "columns", first, 0, end)
    return first, end
