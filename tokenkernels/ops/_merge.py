"""What both merges share: the size-weighted mean of the tokens of every output row, and the gradient of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._op import Case, Make, Op


def average(x: Tensor, size: Tensor | None, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Output rows as size-weighted means: x (B, L, C), size (B, L) or None, row (B, L) in 0 … rows−1 → (rows, C), float32 (rows,)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[:2], dtype=wide) if size is None else size.to(wide)
    total = weight.new_zeros(rows).index_add(0, row.flatten(), weight.flatten())
    share = _share(weight, total[row])
    tokens = x.new_zeros((rows, x.shape[2]), dtype=wide)
    tokens = tokens.index_add(0, row.flatten(), (share.unsqueeze(2) * x.to(wide)).flatten(0, 1))
    return tokens.to(x.dtype), total.float()


def gradient(run: Any, ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of x, given that of the output tokens; `remember` saved what it takes."""
    index, size, merged_size = ctx.saved_tensors
    return run(BACKWARD, grad, index, size, merged_size)


def remember(ctx: Any, size: Tensor | None, output: tuple[Tensor, ...]) -> None:
    """Saves what `gradient` needs; sizes and indices get no gradient."""
    _, merged_size, index, offsets = output
    ctx.mark_non_differentiable(merged_size, index, offsets)
    ctx.save_for_backward(index, size, merged_size)


def _share(size: Tensor, total: Tensor) -> Tensor:
    """The part that a token has in its row; a token alone is all of it, whatever its size."""
    return torch.where(size == total, 1, size / total)


def _at(rows: Tensor, index: Tensor, packed: bool) -> Tensor:
    """Rows of the whole batch if packed, else of each image."""
    if packed:
        return rows[index]
    return torch.stack([image[place] for image, place in zip(rows, index, strict=True)]) if len(rows) else rows[:, :0]


def _backward_reference(grad: Tensor, index: Tensor, size: Tensor | None, merged_size: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    packed = grad.ndim == 2
    total = _at(merged_size, index, packed).to(wide)
    weight = torch.ones_like(total) if size is None else size.to(wide)
    share = _share(weight, total).reshape(*index.shape, 1)
    rows = _at(grad, index, packed).reshape(*index.shape, grad.shape[-1])
    return (share * rows.to(wide)).to(grad.dtype)


def _backward_fake(grad: Tensor, index: Tensor, size: Tensor | None, merged_size: Tensor) -> Tensor:
    return grad.new_empty((*index.shape, grad.shape[-1]))


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
        index = torch.arange(64 * 196, device=t.device).div(2, rounding_mode="floor").reshape(64, 196)
        grad = t.randn(64 * 98, 768)
        return {"grad": grad, "index": index, "size": None, "merged_size": torch.full((64 * 98,), 2.0, device=t.device)}

    return make


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    grad, index = kwargs["grad"], kwargs["index"]
    written = index.numel() * grad.shape[-1]
    return (grad.numel() + written) * grad.element_size() + index.numel() * 8, written


BACKWARD = Op(
    schema="merge_backward(Tensor grad, Tensor index, Tensor? size, Tensor merged_size) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=[
        Case("packed", _case(True, False, 19)),
        Case("packed-size", _case(True, True, 70)),
        Case("dense", _case(False, False, 8)),
        Case("dense-size", _case(False, True, 33)),
        Case("64x196x768 pairs", _bench(True), ("bench",)),
    ],
    cost=_cost,
)
