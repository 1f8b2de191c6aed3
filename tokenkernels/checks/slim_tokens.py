"""What slim_tokens refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, fail, floating, number, rank, same_device, same_dtype, same_kind, shape

OP = "slim_tokens"
NAMES = ("norm_weight", "norm_bias", "w1", "b1", "w2")


def slim_tokens(
    tensors: tuple[Any, ...], scale: Any, eps: Any, backend: str | None = NUMPY
) -> None:
    """Raises where x, norm_weight, norm_bias, w1, b1, w2 (`tensors`), scale or eps are off."""
    x, *weights = tensors
    floating(OP, "x", x, backend)
    rank(OP, "x", x, 3)
    for name, weight in (("w1", weights[2]), ("w2", weights[4])):
        same_kind(OP, name, weight, x)
        rank(OP, name, weight, 2)
    channels, hidden, slots = x.shape[2], weights[2].shape[0], weights[4].shape[0]
    if x.shape[1] < 1 or channels < 1:
        fail(OP, "x", "at least one token and one channel", f"shape {tuple(x.shape)}")
    if hidden < 1 or slots < 1:
        fail(
            OP,
            "w1, w2",
            "at least one row",
            f"shapes {tuple(weights[2].shape)}, {tuple(weights[4].shape)}",
        )
    sizes = ((channels,), (channels,), (hidden, channels), (hidden,), (slots, hidden))
    dtype, device = x.dtype, x.device
    for name, weight, size in zip(NAMES, weights, sizes, strict=True):
        if (
            getattr(weight, "dtype", None) != dtype
            or weight.shape != size
            or weight.device != device
        ):
            same_dtype(OP, name, weight, x, "x")
            shape(OP, name, weight, *size)
            same_device(OP, name, weight, x, "x")
    if hasattr(scale, "ndim"):
        floating(OP, "scale", scale, backend)
        rank(OP, "scale", scale, 0)
        same_device(OP, "scale", scale, x, "x")
    elif not isinstance(scale, float):
        number(OP, "scale", scale)
    if not isinstance(eps, float):
        number(OP, "eps", eps)
    if not eps > 0:
        fail(OP, "eps", "a number above 0", eps)
