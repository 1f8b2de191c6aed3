"""Fused kernels for models that drown in redundant tokens: merge, score, gather, aggregate,
quantise, compact.

Every function takes torch tensors and runs on the best backend of their device;
`tokenkernels.numpy` has the same functions for NumPy arrays. `python -m tokenkernels doctor` says
what is there and why not.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "accumulate_codes": "accumulate_codes",
    "aggregate_logits": "aggregate_logits",
    "aggregate_soft": "aggregate_soft",
    "assign_nearest": "assign_nearest",
    "assign_residual": "assign_residual",
    "compact_kv": "compact_kv",
    "compact_kv_paged": "compact_kv_paged",
    "gather_topk": "gather_topk",
    "merge_adjacent": "merge_adjacent",
    "merge_runs": "merge_runs",
    "score_attention": "score_attention",
    "slim_tokens": "slim_tokens",
}
"""Public function → its file in tokenkernels/ops."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenkernels' has no attribute {name!r}")
    function = getattr(importlib.import_module(f".ops.{_HOME[name]}", __name__), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
