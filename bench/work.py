"""What a call of an op must at least move and do on any machine: its `cost`, and what that leaves
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenkernels._op import Op


@dataclass(frozen=True)
class Work:
    """Bytes moved and, of these, written; flops; exponentials; compares; launches on a GPU."""

    moved: float = 0
    written: float = 0
    flops: float = 0
    dtype: str = "float32"
    exponentials: float = 0
    compares: float = 0
    launches: int = 0


def of_call(op: Op, kwargs: dict[str, Any], cost: tuple[float, float], dtype: str) -> Work:
    """Of a forward call, whose `cost` is known; a search compares once for each score."""
    return Work(
        moved=cost[0],
        flops=cost[1],
        dtype=dtype,
        exponentials=exponentials(op.name, kwargs),
        compares=scores(op.name, kwargs),
        launches=launches(op, kwargs, False),
    )


def launches(op: Op, kwargs: dict[str, Any], gradient: bool) -> int:
    """As the op declares them, forward or backward; one where it does not."""
    return op.launches(kwargs)[gradient] if op.launches else 1


def exponentials(op: str, kwargs: dict[str, Any]) -> int:
    """An error function counts as one."""
    if op == "score_attention":
        images, heads, rows, _ = kwargs["query"].shape
        passes = 1 + (kwargs.get("lse") is None)
        return int(images * heads * rows * kwargs["key"].shape[2] * passes)
    if op == "aggregate_logits":
        return int(kwargs["logits"].numel())
    if op == "aggregate_soft":
        return int(kwargs["key"].shape[0] * kwargs["key"].shape[1] * kwargs["query"].shape[-2])
    if op == "slim_tokens":
        images, tokens, _ = kwargs["x"].shape
        return int(images * tokens * sum(kwargs["w2"].shape))
    return 0


def scores(op: str, kwargs: dict[str, Any]) -> int:
    """Of tokens with codes."""
    if op == "assign_nearest":
        book = kwargs["codebook"]
        return int(kwargs["x"].numel() // book.shape[-1] * book.shape[-2])
    if op == "assign_residual":
        books = kwargs["codebooks"]
        return int(kwargs["x"].numel() // books.shape[-1] * books.shape[0] * books.shape[1])
    return 0
