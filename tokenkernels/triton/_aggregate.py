"""What the soft aggregations share: the scores of a tile, the softmax carried over tiles, and the
launch that joins what was summed apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import (
    Config,
    Entry,
    Kernel,
    Table,
    blocks,
    capability,
    is_aligned,
    launch,
)
from tokenkernels.triton._math import dot, store

LOG2E = tl.constexpr(1.4426950408889634)

PROGRAMS = 132
"""How many programs keep a large GPU busy; only what changes no bit is cut by it."""

SCRATCH = 32 << 20
"""Bytes: images whose partial sums exceed it (beyond 16 of them each) are taken in turns."""

JOIN = Table(
    [Entry(Config({"SPLITS": 16, "ROWS": 4, "TOKENS": 32, "WIDTH": 128}, warps=8))],
    "Four rows of a result per program: many small programs, for there is little to add.",
)


@triton.jit
def shown(mask_ptr, offset, token_stride, token, here):
    """Which of the tokens that are `here` the mask lets through."""
    if mask_ptr is not None:
        address = mask_ptr + offset + token.to(tl.int64) * token_stride
        here = here & (tl.load(address, here, 0) != 0)
    return here


@triton.jit
def added(bias_ptr, offset, token_stride, token, here):
    """The bias of each token."""
    bias = tl.zeros(token.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offset + token.to(tl.int64) * token_stride, here, 0.0)
    return bias


@triton.jit
def chosen(scale_ptr, scale):
    """The scale: a tensor's where there is one."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    return scale


@triton.jit
def products(
    left, left_here, right, right_here, length,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """⟨left, right⟩ of rows of `length`, given by their addresses: (LEFT, RIGHT) in float32."""
    sums = tl.zeros([LEFT, RIGHT], tl.float32)
    for first in range(0, length, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = (column < length)[None, :]
        a = tl.load(left[:, None] + column[None, :], left_here[:, None] & inside, 0.0)
        b = tl.load(right[:, None] + column[None, :], right_here[:, None] & inside, 0.0)
        sums = dot(a, tl.trans(b), sums)
    return sums


@triton.jit
def exponentials(scores, shift):
    """exp(scores − shift) down the columns; the difference first: it is exact where it matters."""
    return tl.exp2((scores - shift[None, :]) * LOG2E)


@triton.jit
def ranked(scores, highest, total):
    """The softmax one tile further: exponentials, what older sums shrink by, the new maximum and
    the new total.
    """
    top = tl.maximum(highest, tl.max(scores, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    parts = exponentials(scores, shift)
    shrink = tl.exp2((highest - shift) * LOG2E)
    return parts, shrink, top, total * shrink + tl.sum(parts, 0)


@triton.jit
def divided(sums, total):
    """Sums down the columns by their totals, rounded once; 0 for a slot that no token reaches."""
    none = (total == 0.0)[None, :]
    return tl.where(none, 0.0, tl.math.div_rn(sums, tl.where(none, 1.0, total[None, :])))


@triton.jit
def logarithm(highest, total):
    """The logarithm of a sum of exponentials; −inf for none."""
    return tl.where(total == 0.0, float("-inf"), highest + tl.log(total))


@triton.jit
def joined(highest_ptr, total_ptr, slot, here, slots, splits, SPLITS: tl.constexpr):
    """What the maxima of all splits are lowered by, the maximum and the total of some slots."""
    highest = tl.full(slot.shape, float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & here[None, :]
        offset = split[:, None] * slots + slot[None, :]
        highest = tl.maximum(
            highest, tl.max(tl.load(highest_ptr + offset, inside, float("-inf")), 0)
        )
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros(slot.shape, tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & here[None, :]
        offset = split[:, None] * slots + slot[None, :]
        some = tl.load(highest_ptr + offset, inside, float("-inf"))
        total += tl.sum(exponentials(some, shift) * tl.load(total_ptr + offset, inside, 0.0), 0)
    return shift, highest, total


@triton.jit
def normalise(
    program, weights_ptr, highest_ptr, total_ptr, splits, slots, tokens, weights_stride,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The scores of some tokens of one image become their weights."""
    per_image = tl.cdiv(tokens, TOKENS)
    image = (program // per_image).to(tl.int64)
    token = (program % per_image) * TOKENS + tl.arange(0, TOKENS)
    weights_ptr += (image * tokens + token)[:, None] * weights_stride
    offset = image * splits * slots
    for first in range(0, slots, WIDTH):
        slot = first + tl.arange(0, WIDTH)
        here = slot < slots
        shift, _, total = joined(
            highest_ptr + offset, total_ptr + offset, slot, here, slots, splits, SPLITS
        )
        inside = (token < tokens)[:, None] & here[None, :]
        scores = tl.load(weights_ptr + slot[None, :], inside, float("-inf"))
        weights = divided(exponentials(scores, shift), total)
        tl.store(weights_ptr + slot[None, :], weights, inside)


@Kernel
def join(
    partial_ptr, highest_ptr, total_ptr, out_ptr, lse_ptr, weights_ptr,
    normalising, splits, slots, tokens, channels_stride, weights_stride,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A few slots and channels of one image: the sums of all splits, each shrunk to the common
    maximum, added and divided by the total. The first programs turn scores into weights instead.
    """
    program = tl.program_id(0)
    if program < normalising:
        if weights_ptr is not None:
            normalise(
                program, weights_ptr, highest_ptr, total_ptr, splits, slots, tokens,
                weights_stride, SPLITS, TOKENS, WIDTH,
            )  # fmt: skip
    else:
        program -= normalising
        across = tl.maximum(tl.cdiv(channels_stride, WIDTH), 1)
        down = tl.cdiv(slots, ROWS)
        image = (program // (across * down)).to(tl.int64)
        slot = program // across % down * ROWS + tl.arange(0, ROWS)
        column = program % across * WIDTH + tl.arange(0, WIDTH)
        here = slot < slots
        inside = (column < channels_stride)[:, None] & here[None, :]
        row = image * splits * slots + slot
        shift, highest, total = joined(
            highest_ptr + image * splits * slots, total_ptr + image * splits * slots,
            slot, here, slots, splits, SPLITS,
        )  # fmt: skip
        sums = tl.zeros([WIDTH, ROWS], tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            rows = split[:, None] * slots + row[None, :]
            known = (split < splits)[:, None] & here[None, :]
            factor = exponentials(tl.load(highest_ptr + rows, known, float("-inf")), shift)
            address = rows[:, None, :] * channels_stride + column[None, :, None]
            part = tl.load(partial_ptr + address, known[:, None, :] & inside[None, :, :], 0.0)
            sums += tl.sum(factor[:, None, :] * part, 0)
        target = (image * slots + slot)[None, :] * channels_stride + column[:, None]
        store(out_ptr + target, divided(sums, total), inside)
        first = slot < tl.where(program % across == 0, slots, 0)
        tl.store(lse_ptr + image * slots + slot, logarithm(highest, total), first)


class Partial:
    """Sums of some images over each split, and the softmax they stand in: fresh memory."""

    def __init__(self, images: int, splits: int, slots: int, channels: int, like: Tensor) -> None:
        shape = (images, splits, slots)
        self.images, self.splits = images, splits
        self.memory = tuple(
            torch.empty(s, dtype=torch.float32, device=like.device)
            for s in ((*shape, channels), shape, shape)
        )

    def join(self, tokens: int, out: Tensor, lse: Tensor, weights: Tensor | None) -> None:
        """Launches what makes results of them."""
        slots, channels = out.shape[1:]
        config = JOIN.choose(out.element_size(), channels, capability(out.device))
        block = config.blocks
        normalising = 0 if weights is None else self.images * blocks(tokens, block["TOKENS"])
        across = max(1, blocks(channels, block["WIDTH"]))
        joining = self.images * blocks(slots, block["ROWS"]) * across
        launch(
            join, (normalising + joining,),
            *self.memory, out, lse, weights,
            normalising, self.splits, slots, tokens, channels, slots,
            config=config, aligned=is_aligned(channels),
        )  # fmt: skip


def turns(images: int, splits: int, slots: int, channels: int) -> int:
    """How many images are taken at once: all, unless partial sums of more than 16 splits fill
    SCRATCH.
    """
    if splits <= 16:
        return max(1, images)
    return max(1, min(images, SCRATCH // (4 * splits * slots * max(1, channels))))


def stride(x: Tensor, dim: int) -> int:
    """The stride of a dimension, 0 where it leads nowhere."""
    return x.stride(dim) if x.shape[dim] > 1 else 0


def strides(x: Tensor | None) -> tuple[int, int]:
    """Those of (images, tokens), read in place whatever they are."""
    return (0, 0) if x is None else (stride(x, 0), stride(x, 1))
