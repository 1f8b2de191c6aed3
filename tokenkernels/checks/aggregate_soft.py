"""What aggregate_soft refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, dtype, fail, flag, floating, number, rank, same_device, same_dtype, shape

OP = "aggregate_soft"


def aggregate_soft(
    query: Any,
    key: Any,
    value: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    return_weights: Any,
    backend: str | None = NUMPY,
) -> None:
    """Raises where an argument is off."""
    floating(OP, "query", query, backend)
    floating(OP, "key", key, backend)
    floating(OP, "value", value, backend)
    rank(OP, "query", query, 2, 3)
    rank(OP, "key", key, 3)
    rank(OP, "value", value, 3)
    same_dtype(OP, "key", key, query, "query")
    same_dtype(OP, "value", value, query, "query")
    batch, tokens, features = key.shape
    if query.ndim == 2:
        shape(OP, "query", query, None, features)
    else:
        shape(OP, "query", query, batch, None, features)
    shape(OP, "value", value, batch, tokens, None)
    same_device(OP, "key", key, query, "query")
    same_device(OP, "value", value, query, "query")
    if isinstance(scale, (int, float)) or not hasattr(scale, "ndim"):
        number(OP, "scale", scale)
    else:
        floating(OP, "scale", scale, backend)
        if scale.ndim:
            fail(OP, "scale", "a number or a tensor of 0 dimensions", f"shape {tuple(scale.shape)}")
        same_device(OP, "scale", scale, query, "query")
    if bias is not None:
        floating(OP, "bias", bias, backend)
        shape(OP, "bias", bias, batch, tokens)
        same_device(OP, "bias", bias, query, "query")
    if mask is not None:
        dtype(OP, "mask", mask, ("bool",))
        shape(OP, "mask", mask, batch, tokens)
        same_device(OP, "mask", mask, query, "query")
    flag(OP, "return_weights", return_weights)
