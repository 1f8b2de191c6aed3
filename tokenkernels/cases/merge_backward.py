"""The inputs that the gradient of both merges is tried on, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch

from .._case import Case, Make


def _case(packed: bool, sized: bool, channels: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        index = torch.arange(21, device=t.device).div(3, rounding_mode="floor").repeat(2, 1)
        size = t.rand(2, 21, dtype=torch.float32) + 0.5 if sized else None
        ones = torch.ones(2, 21, device=t.device) if size is None else size
        merged_size = ones.reshape(2, 7, 3).sum(2)
        grad = t.randn(2, 7, channels)
        if packed:
            index[1] += 7
            grad, merged_size = grad.flatten(0, 1), merged_size.flatten()
        return {"grad": grad, "index": index, "size": size, "merged_size": merged_size}

    return make


def _bench(packed: bool) -> Any:
    def make(t: Make) -> dict[str, Any]:
        index = (
            torch.arange(64 * 196, device=t.device).div(2, rounding_mode="floor").reshape(64, 196)
        )
        grad = t.randn(64 * 98, 768)
        return {
            "grad": grad,
            "index": index,
            "size": None,
            "merged_size": torch.full((64 * 98,), 2.0, device=t.device),
        }

    return make


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    grad, index = kwargs["grad"], kwargs["index"]
    written = index.numel() * grad.shape[-1]
    return (grad.numel() + written) * grad.element_size() + index.numel() * 8, written


CASES = [
    Case("packed", _case(True, False, 19)),
    Case("packed-size", _case(True, True, 70)),
    Case("dense", _case(False, False, 8)),
    Case("dense-size", _case(False, True, 33)),
    Case("64x196x768 pairs", _bench(True), ("bench",)),
]
