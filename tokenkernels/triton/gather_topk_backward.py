"""gather_topk_backward in Triton: one pass over the tokens writes gradient rows and zeros together.

A block of tokens finds its places in the image's index by comparing with all of it, which costs
less than a scatter behind a memset. With `fuse` a first launch notes the places, what the scores of
the dropped tokens add up to, and each token's product with the fused gradient; the second writes.
"""

from __future__ import annotations

import torch
import triton
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
from tokenkernels.triton._math import store, total, total_of

TABLE = Table(
    [
        Entry(Config({"ROWS": 32, "WIDTH": 64, "PLACES": 64}), width=64),
        Entry(Config({"ROWS": 16, "WIDTH": 128, "PLACES": 128}), width=256),
        Entry(Config({"ROWS": 8, "WIDTH": 256, "PLACES": 256})),
    ],
    "By width: 2048 numbers move at once; as many places are compared as there are columns.",
)


@triton.jit
def places(index_ptr, first, last, token, PLACES: tl.constexpr):
    """The place of each token among the chosen ones, from 1 on; 0 where it was dropped."""
    place = tl.zeros(token.shape, tl.int32)
    for start in range(first, last, PLACES):
        number = start + tl.arange(0, PLACES)
        chosen = tl.load(index_ptr + number, number < last, -1)
        same = chosen[None, :] == token[:, None]
        place += tl.sum(tl.where(same, (number - first + 1).to(tl.int32)[None, :], 0), 1)
    return place


@triton.jit
def whereabouts(offsets_ptr, index_ptr, image, token, here, prefix, extra, PLACES: tl.constexpr):
    """The first row of an image, and the row of each of its tokens behind it, −1 if dropped."""
    base = tl.load(offsets_ptr + image)
    first = base - image * extra
    last = tl.load(offsets_ptr + image + 1) - (image + 1) * extra
    place = places(index_ptr, first, last, tl.where(here, token - prefix, -2), PLACES)
    row = tl.where(token < prefix, token, prefix + place - 1)
    return base, tl.where((token < prefix) | (place > 0), row, -1)


@Kernel
def scatter(
    grad_ptrs, out_ptrs, widths, grad_strides, index_ptr, offsets_ptr,
    tokens, prefix, programs,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Every row of the gradient to its token, zeros to the others."""
    program = tl.program_id(0)
    image = (program // programs).to(tl.int64)
    token = (program % programs) * ROWS + tl.arange(0, ROWS)
    here = token < prefix + tokens
    base, row = whereabouts(offsets_ptr, index_ptr, image, token, here, prefix, prefix, PLACES)
    for t in tl.static_range(len(grad_ptrs)):
        source = grad_ptrs[t] + (base + row) * grad_strides[t]
        target = out_ptrs[t] + (image * (prefix + tokens) + token) * widths[t]
        for first in range(0, widths[t], WIDTH):
            column = first + tl.arange(0, WIDTH)
            inside = (column < widths[t])[None, :]
            mask = (here & (row >= 0))[:, None] & inside
            value = tl.load(source[:, None] + column[None, :], mask, 0.0)
            tl.store(target[:, None] + column[None, :], value, here[:, None] & inside)


@Kernel
def weigh(
    grad_ptrs, x_ptrs, widths, grad_strides, image_strides, row_strides,
    index_ptr, offsets_ptr, scores_ptr, rows_ptr, shares_ptr, sums_ptr,
    tokens, prefix, programs, scores_stride, score_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens: their rows, the products of dropped ones with the fused gradient, and
    the sums of their weights and of weight times product.
    """
    program = tl.program_id(0)
    image = (program // programs).to(tl.int64)
    token = prefix + (program % programs) * ROWS + tl.arange(0, ROWS)
    here = token < prefix + tokens
    _, row = whereabouts(offsets_ptr, index_ptr, image, token, here, prefix, prefix + 1, PLACES)
    dropped = here & (row < 0)
    fused = tl.load(offsets_ptr + image + 1) - 1
    products = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in tl.static_range(len(grad_ptrs)):
        source = x_ptrs[t] + image * image_strides[t] + token.to(tl.int64) * row_strides[t]
        for first in range(0, widths[t], WIDTH):
            column = first + tl.arange(0, WIDTH)
            inside = column < widths[t]
            g = tl.load(grad_ptrs[t] + fused * grad_strides[t] + column, inside, 0.0)
            mask = dropped[:, None] & inside[None, :]
            x = tl.load(source[:, None] + column[None, :], mask, 0.0)
            product = x.to(tl.float32) * g.to(tl.float32)[None, :]
            products += tl.where(mask, product, 0.0)
    share = total(products)
    number = token - prefix
    score = scores_ptr + image * scores_stride + number.to(tl.int64) * score_stride
    weight = tl.load(score, dropped, 0.0).to(tl.float32)
    at = image * tokens + number
    tl.store(rows_ptr + at, row.to(tl.int32), here)
    tl.store(shares_ptr + at, share, here)
    tl.store(sums_ptr + 2 * program, total_of(weight))
    tl.store(sums_ptr + 2 * program + 1, total_of(weight * share))


@Kernel
def spread(
    grad_ptrs, out_ptrs, widths, grad_strides,
    offsets_ptr, scores_ptr, rows_ptr, shares_ptr, sums_ptr, scores_grad_ptr,
    tokens, prefix, programs, parts, scores_stride, score_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Gradient rows to chosen tokens, their part of the fused one's to the others, and the
    gradient of the scores.
    """
    program = tl.program_id(0)
    image = (program // programs).to(tl.int64)
    token = (program % programs) * ROWS + tl.arange(0, ROWS)
    here = token < prefix + tokens
    divisor, mean = 1.0, 0.0
    if MEAN:
        weights, products = 0.0, 0.0
        for first in range(0, parts, PLACES):
            part = first + tl.arange(0, PLACES)
            at = sums_ptr + 2 * (image * parts + part)
            weights += tl.sum(tl.load(at, part < parts, 0.0), 0)
            products += tl.sum(tl.load(at + 1, part < parts, 0.0), 0)
        divisor = tl.where(weights != 0, weights, 1.0)
        mean = tl.where(weights != 0, products / divisor, 0.0)
    number = token - prefix
    scored = here & (number >= 0)
    row = tl.load(rows_ptr + image * tokens + number, scored, 0)
    row = tl.where(number < 0, token, row)
    dropped = scored & (row < 0)
    score = scores_ptr + image * scores_stride + number.to(tl.int64) * score_stride
    weight = tl.load(score, dropped, 0.0).to(tl.float32)
    share = tl.load(shares_ptr + image * tokens + number, dropped, 0.0)
    change = tl.where(dropped, (share - mean) / divisor, 0.0)
    tl.store(scores_grad_ptr + image * tokens + number, change, scored)
    fused = tl.load(offsets_ptr + image + 1) - 1
    source_row = tl.where(row < 0, fused, tl.load(offsets_ptr + image) + row)
    factor = tl.where(dropped, weight / divisor, 1.0)
    for t in tl.static_range(len(grad_ptrs)):
        source = grad_ptrs[t] + source_row * grad_strides[t]
        target = out_ptrs[t] + (image * (prefix + tokens) + token) * widths[t]
        for first in range(0, widths[t], WIDTH):
            column = first + tl.arange(0, WIDTH)
            mask = here[:, None] & (column < widths[t])[None, :]
            value = tl.load(source[:, None] + column[None, :], mask, 0.0).to(tl.float32)
            store(target[:, None] + column[None, :], factor[:, None] * value, mask)


def gather_topk_backward(
    gradients: list[Tensor], index: Tensor, offsets: Tensor, tensors: list[Tensor],
    scores: Tensor, prefix: int, fuse: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the floating tensors, and of the scores where a token was fused."""
    (images, tokens), device = scores.shape, scores.device
    shapes = [(images, prefix + tokens, *g.shape[index.ndim :]) for g in gradients]
    outputs = [g.new_empty(s) for g, s in zip(gradients, shapes, strict=True)]
    scores_grad = torch.empty(
        (images, tokens) if fuse else (0, 0), dtype=torch.float32, device=device
    )
    if not gradients or images == 0:
        return outputs, scores_grad
    widths = tuple(out[0, 0].numel() if out.ndim == 3 else 1 for out in outputs)
    rows = [aligned(g.reshape(-1, w)) for g, w in zip(gradients, widths, strict=True)]
    strides = tuple(g.stride(0) for g in rows)
    index = index.contiguous()
    config = TABLE.choose(gradients[0].element_size(), max(widths), capability(device))
    programs = blocks(prefix + tokens, config.blocks["ROWS"])
    regular = all(is_aligned(w) for w in widths)
    if not fuse:
        launch(
            scatter, (images * programs,),
            tuple(rows), tuple(outputs), widths, strides, index, offsets,
            tokens, prefix, programs, config=config, aligned=regular,
        )  # fmt: skip
        return outputs, scores_grad
    parts = blocks(tokens, config.blocks["ROWS"])
    token_rows = torch.empty((images, tokens), dtype=torch.int32, device=device)
    shares = torch.empty((images, tokens), dtype=torch.float32, device=device)
    sums = torch.empty((images, parts, 2), dtype=torch.float32, device=device)
    kept = [aligned(x if x.ndim == 3 else x.unsqueeze(-1)) for x in tensors]
    launch(
        weigh, (images * parts,),
        tuple(rows), tuple(kept), widths, strides,
        tuple(x.stride(0) for x in kept), tuple(x.stride(1) for x in kept),
        index, offsets, scores, token_rows, shares, sums,
        tokens, prefix, parts, *scores.stride(), config=config, aligned=regular,
    )  # fmt: skip
    launch(
        spread, (images * programs,),
        tuple(rows), tuple(outputs), widths, strides,
        offsets, scores, token_rows, shares, sums, scores_grad,
        tokens, prefix, programs, parts, *scores.stride(),
        config=config, aligned=regular, MEAN=fuse == "mean",
    )  # fmt: skip
    return outputs, scores_grad
