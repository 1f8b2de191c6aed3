"""merge_backward in Triton: every token gets its share of its row's gradient, in one launch."""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import (
    Config,
    Entry,
    Kernel,
    Table,
    aligned,
    blocks,
    capability,
    is_aligned,
    launch,
)
from tokenkernels.triton._math import store

TABLE = Table(
    [
        Entry(Config({"ROWS": 8, "WIDTH": 128}), width=128),
        Entry(Config({"ROWS": 4, "WIDTH": 256}), width=1024),
        Entry(Config({"ROWS": 2, "WIDTH": 512})),
    ],
    "1024 numbers, 8 per thread: pure traffic, so small blocks and many programs.",
)


@Kernel
def spread(
    grad_ptr, index_ptr, size_ptr, total_ptr, out_ptr,
    tokens, rows, channels, image_stride, grad_stride, image_size_stride, size_stride, total_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one image: index → share of the row's size, times the row's gradient."""
    per_image = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    image = (program // per_image).to(tl.int64)
    token = (program % per_image) * ROWS + tl.arange(0, ROWS)
    here = token < tokens
    row = tl.load(index_ptr + image * tokens + token, here, 0)
    known = here & (row >= 0) & (row < rows)
    total = tl.load(total_ptr + image * total_stride + row, known, 1.0)
    share = 1.0 / total
    if size_ptr is not None:
        size = tl.load(
            size_ptr + image * image_size_stride + token.to(tl.int64) * size_stride, here, 1.0
        )
        share = size / total
        share = tl.where(size == total, 1.0, share)
    source = grad_ptr + image * image_stride + row * grad_stride
    target = out_ptr + (image * tokens + token) * channels
    for first in range(0, channels, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = (column < channels)[None, :]
        value = tl.load(source[:, None] + column[None, :], known[:, None] & inside, 0.0)
        value = share[:, None] * value.to(tl.float32)
        store(target[:, None] + column[None, :], value, here[:, None] & inside)


def merge_backward(grad: Tensor, index: Tensor, size: Tensor | None, merged_size: Tensor) -> Tensor:
    """Packed or dense rows; an index out of range is not followed, its token gets zeros."""
    (images, tokens), channels = index.shape, grad.shape[-1]
    out = torch.empty((images, tokens, channels), dtype=grad.dtype, device=grad.device)
    packed = grad.ndim == 2
    grad, index, merged_size = aligned(grad), index.contiguous(), merged_size.contiguous()
    config = TABLE.choose(grad.element_size(), channels, capability(grad.device))
    launch(
        spread, (images * blocks(tokens, config.blocks["ROWS"]),),
        grad, index, size, merged_size, out,
        tokens, grad.shape[-2], channels,
        0 if packed else grad.stride(0), grad.stride(-2),
        *((0, 0) if size is None else size.stride()),
        0 if packed else merged_size.stride(0),
        config=config, aligned=is_aligned(channels),
    )  # fmt: skip
    return out
