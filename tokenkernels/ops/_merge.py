"""What both merges share: the size-weighted mean of each output row, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._op import Op
from ..cases import merge_backward as cases


def average(x: Tensor, size: Tensor | None, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Output rows as size-weighted means.

    x (B, L, C), size (B, L) or None, row (B, L) in 0 … rows−1 → (rows, C), float32 (rows,).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[:2], dtype=wide) if size is None else size.to(wide)
    total = weight.new_zeros(rows).index_add(0, row.flatten(), weight.flatten())
    members = torch.zeros_like(total).index_add(0, row.flatten(), torch.ones_like(weight).flatten())
    share = torch.where(members[row] == 1, 1, weight / total[row])
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
    return (
        torch.stack([image[place] for image, place in zip(rows, index, strict=True)])
        if len(rows)
        else rows[:, :0]
    )


def _backward_reference(
    grad: Tensor, index: Tensor, size: Tensor | None, merged_size: Tensor
) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    packed = grad.ndim == 2
    total = _at(merged_size, index, packed).to(wide)
    weight = torch.ones_like(total) if size is None else size.to(wide)
    share = _share(weight, total).reshape(*index.shape, 1)
    rows = _at(grad, index, packed).reshape(*index.shape, grad.shape[-1])
    return (share * rows.to(wide)).to(grad.dtype)


def _backward_fake(grad: Tensor, index: Tensor, size: Tensor | None, merged_size: Tensor) -> Tensor:
    return grad.new_empty((*index.shape, grad.shape[-1]))


BACKWARD = Op(
    schema="merge_backward(Tensor grad, Tensor index, Tensor? size, Tensor merged_size) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=cases.CASES,
    cost=cases.cost,
    launches=lambda kwargs: (1, 0),
)
