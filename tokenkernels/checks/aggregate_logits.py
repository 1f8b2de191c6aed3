"""What aggregate_logits refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, dtype, floating, rank, same_device, same_dtype, shape

OP = "aggregate_logits"


def aggregate_logits(logits: Any, value: Any, mask: Any, backend: str | None = NUMPY) -> None:
    """Raises where an argument is off."""
    floating(OP, "logits", logits, backend)
    floating(OP, "value", value, backend)
    rank(OP, "logits", logits, 3)
    same_dtype(OP, "value", value, logits, "logits")
    batch, tokens, _ = logits.shape
    shape(OP, "value", value, batch, tokens, None)
    same_device(OP, "value", value, logits, "logits")
    if mask is not None:
        dtype(OP, "mask", mask, ("bool",))
        shape(OP, "mask", mask, batch, tokens)
        same_device(OP, "mask", mask, logits, "logits")
