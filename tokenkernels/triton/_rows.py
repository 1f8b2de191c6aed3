"""Rows of several tensors as plain integers, so that any dtype moves alike and exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import aligned, is_aligned

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True)
class Rows:
    """(B, L, C) tensors of one call as a kernel takes them."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]
    image_strides: tuple[int, ...]
    row_strides: tuple[int, ...]
    aligned: bool


def rows_of(tensors: list[Tensor]) -> Rows:
    """Views as integers of the same size; (B, L) counts as (B, L, 1)."""
    views = [as_words(aligned(t if t.ndim == 3 else t.unsqueeze(-1))) for t in tensors]
    return Rows(
        tuple(views),
        tuple(v.shape[2] for v in views),
        tuple(v.stride(0) for v in views),
        tuple(v.stride(1) for v in views),
        all(is_aligned(v.shape[2]) for v in views),
    )


def as_words(x: Tensor) -> Tensor:
    """The same bytes as integers; elements of 16 bytes as two of 8."""
    if x.element_size() == 16:
        return torch.view_as_real(x).flatten(-2).view(torch.int64)
    return x.view(WORDS[x.element_size()])


@triton.jit
def move(
    sources, targets, widths, image_strides, row_strides,
    image, token, row, here, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows `token` of an image to rows `row` of the outputs, where `here` says so."""
    for t in tl.static_range(len(sources)):
        source = sources[t] + image * image_strides[t] + token * row_strides[t]
        target = targets[t] + row * widths[t]
        for first in range(0, widths[t], WIDTH):
            column = first + tl.arange(0, WIDTH)
            mask = here[:, None] & (column < widths[t])[None, :]
            value = tl.load(source[:, None] + column[None, :], mask, 0)
            tl.store(target[:, None] + column[None, :], value, mask)
