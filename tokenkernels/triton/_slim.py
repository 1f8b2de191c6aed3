"""What the two directions of slim_tokens share: layer norm, GELU, and products of float32 that keep
its precision on tensor cores.

A product of float32 is three of TF32 (hi·hi + hi·lo + lo·hi), summed over a block of at most 64 and
added to the sum in float32. Left out are lo·lo and the rounding of lo, 2⁻²² of a product each; so a
block is off by no more than the 64 truncated additions that float32 itself would cost it.
"""

import torch
import triton
import triton.language as tl

from tokenkernels.triton._math import INTERPRETED, dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
"""1 / √(2π): the normal density at 0."""

PAD = 16
"""Rows of a scratch (B, N, M) are padded to a multiple of so many, to be read aligned."""


@triton.jit
def product(a, b, acc):
    """acc + a·b in float32."""
    if INTERPRETED or a.dtype != tl.float32:
        return dot(a, b, acc)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def rounded_product(value, b, acc):
    """acc + value·b, where `value` is float32 and takes the dtype of b.

    float16 takes two of them for it: what it rounds away would show in a result of its precision.
    """
    high = narrow(value, b.dtype)
    acc = product(high, b, acc)
    if b.dtype == tl.float16:
        acc = product((value - high.to(tl.float32)).to(tl.float16), b, acc)
    return acc


@triton.jit
def tile(rows, columns, inside_rows, inside_columns):
    """A tile of a matrix, given by the addresses of its rows; 0 outside."""
    inside = inside_rows[:, None] & inside_columns[None, :]
    return tl.load(rows[:, None] + columns[None, :], inside, 0.0)


@triton.jit
def statistics(rows, here, channels, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and 1 / deviation of rows, given by their addresses.

    In one pass: sums are of distances from the mean of the first columns, so hardly anything
    cancels where a row is far from 0.
    """
    column = tl.arange(0, WIDTH)
    some = tile(rows, column, here, column < channels).to(tl.float32)
    shift = tl.sum(some, 1) / tl.minimum(channels, WIDTH)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, channels, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = column < channels
        value = tile(rows, column, here, inside).to(tl.float32)
        value = tl.where(inside[None, :], value - shift[:, None], 0.0)
        sums += value
        squares += value * value
    offset = tl.sum(sums, 1) / channels
    variance = tl.maximum(tl.sum(squares, 1) / channels - offset * offset, 0.0)
    return shift + offset, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def below(x):
    """The normal distribution function."""
    return 0.5 + 0.5 * tl.erf(x * ROOT_HALF)


@triton.jit
def slope(x):
    """The derivative of GELU."""
    return below(x) + x * ROOT_TWO_PI * tl.exp2(x * x * (-0.5 * LOG2E))


@triton.jit
def exponentials(scores, shift):
    """exp(scores − shift) down the columns; the difference first: it is exact where it matters."""
    return tl.exp2((scores - shift[None, :]) * LOG2E)


@triton.jit
def chosen(scale_ptr, scale):
    """The scale: a tensor's where there is one."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    return scale


def padded(slots: int) -> int:
    """The length of a row of scratch with one number per slot."""
    return -(-slots // PAD) * PAD


def wide(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Fresh float32 memory."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
