"""slim_tokens in Triton: what each tile of tokens gives to the softmax, then the weighted sums.

The first launch takes a tile of one image from layer norm to logits without leaving the chip (only
`projected` is written where it is kept) and writes their exponentials, below the tile's own
maximum, in the dtype of x: as the second launch multiplies them. That one joins the tiles' maxima
and totals and sums tokens. A program has all slots up to 128, so nothing is computed twice, and two
blocks of hidden channels, so that the usual 192 (128 + 64) take one pass over the tokens.
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
    aligned,
    blocks,
    capability,
    is_aligned,
    launch,
)
from tokenkernels.triton._math import store
from tokenkernels.triton._slim import (
    LOG2E,
    below,
    chosen,
    exponentials,
    padded,
    product,
    rounded_product,
    statistics,
    tile,
    wide,
)

SCRATCH = 32 << 20
"""Bytes: images whose exponentials exceed it, and the output, are taken in turns."""


def _blocks(tokens: int, hidden: int, more: int, channels: int) -> dict[str, int]:
    return {"TOKENS": tokens, "HIDDEN": hidden, "MORE": more, "CHANNELS": channels}


WEIGH = Table(
    [
        Entry(Config(_blocks(64, 128, 64, 64), 8, 3), width=192, bytes=(2,), capability=90),
        Entry(Config(_blocks(64, 128, 128, 64), 8, 3), width=256, bytes=(2,), capability=90),
        Entry(Config(_blocks(64, 64, 32, 32), 8, 3), bytes=(2,), capability=90),
        Entry(Config(_blocks(32, 128, 64, 32), 8, 3), width=192, bytes=(2,)),
        Entry(Config(_blocks(32, 64, 64, 32), 8, 3), bytes=(2,)),
        Entry(Config(_blocks(64, 32, 32, 16), 8, 2), capability=90),
        Entry(Config(_blocks(32, 64, 32, 16), 8, 2)),
    ],
    "By hidden channels: a tile's hidden row stays in registers from projection to logits.",
    [
        Config(_blocks(64, 128, 64, 64), 4, 3),
        Config(_blocks(128, 128, 64, 32), 16, 3),
        Config(_blocks(128, 128, 64, 64), 8, 3),
    ],
)

GATHER = Table(
    [
        Entry(Config({"SLOTS": 64, "CHANNELS": 128}, 8, 2), bytes=(2,)),
        Entry(Config({"SLOTS": 32, "CHANNELS": 64}, 4, 2)),
    ],
    "64 slots share every token that is loaded; float32 operands need halved blocks.",
)


@triton.jit
def project(
    rows, here, mean, rstd, gamma_ptr, beta_ptr, w1, known, more_w1, more_known, channels,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, MORE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """LN(x)·w1ᵀ for two blocks of rows of w1, given by their addresses."""
    acc = tl.zeros([TOKENS, HIDDEN], tl.float32)
    more = tl.zeros([TOKENS, MORE], tl.float32)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        inside = column < channels
        gamma = tl.load(gamma_ptr + column, inside, 0.0).to(tl.float32)
        beta = tl.load(beta_ptr + column, inside, 0.0).to(tl.float32)
        value = tile(rows, column, here, inside).to(tl.float32)
        normal = (value - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        acc = rounded_product(normal, tl.trans(tile(w1, column, known, inside)), acc)
        more = rounded_product(normal, tl.trans(tile(more_w1, column, more_known, inside)), more)
    return acc, more


@triton.jit
def scored(
    logits, projected, b1_ptr, w2, slot_here, projected_rows, keeping, hidden, known,
):  # fmt: skip
    """The logits with what one block of hidden channels gives to them."""
    projected += tl.load(b1_ptr + hidden, known, 0.0).to(tl.float32)[None, :]
    if projected_rows is not None:
        mask = keeping[:, None] & known[None, :]
        tl.store(projected_rows[:, None] + hidden[None, :], projected, mask)
    weights = tile(w2, hidden, slot_here, known)
    return rounded_product(projected * below(projected), tl.trans(weights), logits)


@triton.jit
def advanced(
    logits, first, rows, here, mean, rstd, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2, slot_here,
    projected_rows, keeping, channels, hidden, w1_stride,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, MORE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The logits with what two blocks of hidden channels give to them."""
    some = first + tl.arange(0, HIDDEN)
    others = first + HIDDEN + tl.arange(0, MORE)
    known, more_known = some < hidden, others < hidden
    acc, more = project(
        rows, here, mean, rstd, gamma_ptr, beta_ptr,
        w1_ptr + some.to(tl.int64) * w1_stride, known,
        w1_ptr + others.to(tl.int64) * w1_stride, more_known,
        channels, TOKENS, HIDDEN, MORE, CHANNELS,
    )  # fmt: skip
    logits = scored(logits, acc, b1_ptr, w2, slot_here, projected_rows, keeping, some, known)
    return scored(logits, more, b1_ptr, w2, slot_here, projected_rows, keeping, others, more_known)


@Kernel
def weigh(
    x_ptr, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2_ptr, scale_ptr,
    parts_ptr, highest_ptr, total_ptr, projected_ptr,
    tokens, slots, scale, eps, channels_stride, hidden_stride, image_stride, row_stride,
    w1_stride, w2_stride, parts_stride,
    WHOLE: tl.constexpr, SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, MORE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Exponentials of a tile of tokens of one image, and for each slot their maximum and total."""
    program = tl.program_id(0)
    down, tiles = tl.cdiv(slots, SLOTS), tl.cdiv(tokens, TOKENS)
    block = program % down
    tile_index = program // down
    image = (tile_index // tiles).to(tl.int64)
    token = tile_index % tiles * TOKENS + tl.arange(0, TOKENS)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    here, slot_here = token < tokens, slot < slots
    rows = x_ptr + image * image_stride + token.to(tl.int64) * row_stride
    mean, rstd = statistics(rows, here, channels_stride, eps, TOKENS, CHANNELS)
    projected_rows = None
    if projected_ptr is not None:
        projected_rows = projected_ptr + (image * tokens + token) * hidden_stride
    keeping = token < tl.where(block == 0, tokens, 0)
    w2 = w2_ptr + slot.to(tl.int64) * w2_stride
    logits = tl.zeros([TOKENS, SLOTS], tl.float32)
    for first in range(0, 1 if WHOLE else hidden_stride, HIDDEN + MORE):
        logits = advanced(
            logits, first, rows, here, mean, rstd, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2,
            slot_here, projected_rows, keeping, channels_stride, hidden_stride, w1_stride,
            TOKENS, HIDDEN, MORE, CHANNELS,
        )  # fmt: skip
    logits = tl.where(here[:, None], logits * chosen(scale_ptr, scale), float("-inf"))
    highest = tl.max(logits, 0)
    parts = exponentials(logits, tl.where(highest == float("-inf"), 0.0, highest))
    mask = here[:, None] & (slot < parts_stride)[None, :]
    target = parts_ptr + (image * tokens + token)[:, None] * parts_stride
    store(target + slot[None, :], parts, mask)
    place = tile_index.to(tl.int64) * slots + slot
    tl.store(highest_ptr + place, highest, slot_here)
    tl.store(total_ptr + place, tl.sum(parts, 0), slot_here)


@Kernel
def gather(
    parts_ptr, highest_ptr, total_ptr, x_ptr, out_ptr, lse_ptr,
    tokens, slots, channels_stride, image_stride, row_stride, parts_stride,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some slots and channels of one image: the tiles' sums, shrunk to the common maximum."""
    program = tl.program_id(0)
    across, down = tl.cdiv(channels_stride, CHANNELS), tl.cdiv(slots, SLOTS)
    part = program % across
    column = part * CHANNELS + tl.arange(0, CHANNELS)
    slot = program // across % down * SLOTS + tl.arange(0, SLOTS)
    image = (program // (across * down)).to(tl.int64)
    slot_here, inside = slot < slots, column < channels_stride
    tiles = tl.cdiv(tokens, TOKENS)
    place = image * tiles * slots + slot
    highest = tl.full([SLOTS], float("-inf"), tl.float32)
    for index in range(tiles):
        some = tl.load(highest_ptr + place + index * slots, slot_here, 0.0)
        highest = tl.maximum(highest, some)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([SLOTS], tl.float32)
    sums = tl.zeros([SLOTS, CHANNELS], tl.float32)
    for index in range(tiles):
        token = index * TOKENS + tl.arange(0, TOKENS)
        here = token < tokens
        parts = tile(
            parts_ptr + (image * tokens + token) * parts_stride, slot, here, slot < parts_stride
        )
        rows = x_ptr + image * image_stride + token.to(tl.int64) * row_stride
        value = tile(rows, column, here, inside)
        some = tl.load(highest_ptr + place + index * slots, slot_here, 0.0)
        factor = tl.exp2((some - shift) * LOG2E)
        total += factor * tl.load(total_ptr + place + index * slots, slot_here, 1.0)
        fresh = product(tl.trans(parts), value, tl.zeros([SLOTS, CHANNELS], tl.float32))
        sums += fresh * factor[:, None]
    row = image * slots + slot
    target = out_ptr + row[:, None] * channels_stride + column[None, :]
    store(target, sums / total[:, None], slot_here[:, None] & inside[None, :])
    tl.store(lse_ptr + row, highest + tl.log(total), slot < tl.where(part == 0, slots, 0))


def slim_tokens(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the logarithm of each slot's total, the projection where it is kept."""
    (images, tokens, channels), (slots, hidden) = x.shape, w2.shape
    out = torch.empty((images, slots, channels), dtype=x.dtype, device=x.device)
    lse = wide(x, images, slots)
    projected = wide(x, images, tokens, hidden) if keep else wide(x, 0)
    x, w1, w2 = aligned(x), aligned(w1), aligned(w2)
    gamma, beta, b1 = aligned(norm_weight), aligned(norm_bias), aligned(b1)
    each = tokens * padded(slots) * x.element_size()
    step = max(1, max(SCRATCH, out.numel() * out.element_size()) // each)
    for first in range(0, images, step):
        some = slice(first, first + step)
        _slim(
            x[some], gamma, beta, w1, b1, w2, scale_tensor, scale, eps,
            out[some], lse[some], projected[some] if keep else None,
        )  # fmt: skip
    return out, lse, projected


def _slim(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    scale_tensor: Tensor | None, scale: float, eps: float,
    out: Tensor, lse: Tensor, projected: Tensor | None,
) -> None:  # fmt: skip
    """The launches for some images."""
    (images, tokens, channels), (slots, hidden) = x.shape, w2.shape
    device, size = capability(x.device), x.element_size()
    config = WEIGH.choose(size, hidden, device)
    most = 128 if size == 2 and hidden <= 256 else 64
    slot_block = min(most, max(32, 1 << (slots - 1).bit_length()))
    tiles = blocks(tokens, config.blocks["TOKENS"])
    width = padded(slots)
    parts = torch.empty((images, tokens, width), dtype=x.dtype, device=x.device)
    highest, total = wide(x, images, tiles, slots), wide(x, images, tiles, slots)
    whole = is_aligned(channels) and is_aligned(hidden)
    launch(
        weigh, (images * tiles * blocks(slots, slot_block),),
        x, gamma, beta, w1, b1, w2, scale_tensor, parts, highest, total, projected,
        tokens, slots, scale, eps, channels, hidden, x.stride(0), x.stride(1),
        w1.stride(0), w2.stride(0), width,
        config=config, aligned=whole,
        SLOTS=slot_block, WHOLE=hidden <= config.blocks["HIDDEN"] + config.blocks["MORE"],
    )  # fmt: skip
    join = GATHER.choose(size, channels, device)
    programs = blocks(slots, join.blocks["SLOTS"]) * blocks(channels, join.blocks["CHANNELS"])
    launch(
        gather, (images * programs,),
        parts, highest, total, x, out, lse,
        tokens, slots, channels, x.stride(0), x.stride(1), width,
        config=join, aligned=whole, TOKENS=config.blocks["TOKENS"],
    )  # fmt: skip
