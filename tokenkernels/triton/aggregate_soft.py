"""aggregate_soft in Triton: scores of a piece of the tokens against a block of slots, their
softmax, then their sums, channels after channels.

One launch where a piece holds all tokens; else every piece leaves its sums, and a second launch
joins them. The scores of 256 tokens × 64 slots stay in registers while first the features, then
the channels stream past, so nothing is computed twice however many of them there are, and both
loops are plain matrix products with loads ahead. Where programs are few, the channels of a piece
are divided among several, which make the scores again: that changes no sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._aggregate import (
    PROGRAMS,
    Partial,
    added,
    chosen,
    divided,
    logarithm,
    products,
    ranked,
    shown,
    stride,
    strides,
    turns,
)
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
from tokenkernels.triton._math import dot, narrow, store


def _blocks(slots: int, tokens: int, features: int, channels: int) -> dict[str, int]:
    return {"SLOTS": slots, "TOKENS": tokens, "FEATURES": features, "CHANNELS": channels}


TABLE = Table(
    [
        Entry(Config(_blocks(32, 128, 64, 64), 8, 3), bytes=(2,), capability=100),
        Entry(Config(_blocks(32, 256, 64, 128), 8, 2), bytes=(2,), capability=90),
        Entry(Config(_blocks(32, 128, 64, 64), 8, 3), bytes=(2,)),
        Entry(Config(_blocks(16, 64, 16, 16), 4, 2), width=16),
        Entry(Config(_blocks(64, 64, 16, 16), 8, 2)),
    ],
    "By slots: a block's scores stay in registers while features, then channels stream past.",
)


@triton.jit
def add(
    partial_ptr, parts, value, here, slot, slot_here, total, shrink, first, last, channels, older,
    SLOTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the channel blocks from `first` to `last`: divided by the total, or with what is
    left of the sums that the first `older` slots have."""
    parts = narrow(parts, value.dtype.element_ty)
    target = partial_ptr + slot.to(tl.int64) * channels
    for block in range(first, last):
        column = block * CHANNELS + tl.arange(0, CHANNELS)
        inside = column < channels
        some = tl.load(value[:, None] + column[None, :], here[:, None] & inside[None, :], 0.0)
        sums = dot(tl.trans(some), parts, tl.zeros([CHANNELS, SLOTS], tl.float32))
        wanted = inside[:, None] & slot_here[None, :]
        address = target[None, :] + column[:, None]
        if shrink is None:
            sums = divided(sums, total)
        else:
            sums += tl.load(address, wanted & (slot < older)[None, :], 0.0) * shrink[None, :]
        store(address, sums, wanted)


@Kernel
def gather(
    query_ptr, key_ptr, value_ptr, bias_ptr, mask_ptr, scale_ptr,
    out_ptr, highest_ptr, total_ptr, lse_ptr, weights_ptr,
    slots, tokens, scale, splits, span, ranges, each, features_stride, channels_stride,
    query_image_stride, query_stride, key_image_stride, key_stride,
    value_image_stride, value_stride, bias_image_stride, bias_stride,
    mask_image_stride, mask_stride, weights_stride,
    WHOLE: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A split of the tokens of one image for a block of slots and a range of channels.

    WHOLE: one piece holds all tokens, and results are written; else scores go to the weights,
    sums and their softmax to scratch.
    """
    program = tl.program_id(0)
    down = tl.cdiv(slots, SLOTS)
    part = program % ranges
    slot = program // ranges % down * SLOTS + tl.arange(0, SLOTS)
    split = program // (ranges * down) % splits
    image = (program // (ranges * down * splits)).to(tl.int64)
    slot_here = slot < slots
    writing = tl.where(part == 0, slots, 0)
    query = query_ptr + image * query_image_stride + slot.to(tl.int64) * query_stride
    factor = chosen(scale_ptr, scale)
    row = (image * splits + split) * slots
    first = part * each
    last = tl.minimum(first + each, tl.cdiv(channels_stride, CHANNELS))
    highest = tl.full([SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    end = tl.minimum((split + 1) * span, tokens)
    for start in range(split * span, tl.maximum(end, 1) if WHOLE else end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = token < end
        visible = shown(mask_ptr, image * mask_image_stride, mask_stride, token, here)
        key = key_ptr + image * key_image_stride + token.to(tl.int64) * key_stride
        scores = products(
            key, visible, query, slot_here, features_stride, TOKENS, SLOTS, FEATURES
        )  # fmt: skip
        bias = added(bias_ptr, image * bias_image_stride, bias_stride, token, here)
        scores = tl.where(visible[:, None], scores * factor + bias[:, None], float("-inf"))
        parts, shrink, highest, total = ranked(scores, highest, total)
        if weights_ptr is not None:
            kept = divided(parts, total) if WHOLE else scores
            target = weights_ptr + (image * tokens + token)[:, None] * weights_stride
            wanted = here[:, None] & (slot < writing)[None, :]
            tl.store(target + slot[None, :], kept, wanted)
        value = value_ptr + image * value_image_stride + token.to(tl.int64) * value_stride
        add(
            out_ptr + row * channels_stride, parts, value, visible, slot, slot_here, total,
            None if WHOLE else shrink, first, last, channels_stride,
            tl.where(start > split * span, slots, 0), SLOTS, CHANNELS,
        )  # fmt: skip
        if not WHOLE:
            tl.debug_barrier()  # the next piece reads what other threads wrote
    wanted = slot < writing
    if WHOLE:
        tl.store(lse_ptr + row + slot, logarithm(highest, total), wanted)
    else:
        tl.store(highest_ptr + row + slot, highest, wanted)
        tl.store(total_ptr + row + slot, total, wanted)


def splits_of(tokens: int, block: int, slots: int, channels: int) -> tuple[int, int]:
    """In how many splits the tokens of an image are summed apart, and how long each is."""
    pieces = max(1, blocks(tokens, block))
    most = max(16, min(64, (8 << 20) // (4 * max(1, slots * channels))))
    each = blocks(pieces, most)
    span = each * block if each > 1 else blocks(tokens, pieces)
    return max(1, blocks(tokens, max(1, span))), span


def aggregate_soft(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    keep_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the logarithm of each slot's total, the weights where they are kept."""
    (images, tokens, _), channels = key.shape, value.shape[2]
    slots = query.shape[-2]
    out, lse, weights = (
        torch.empty(shape, dtype=dtype, device=value.device)
        for shape, dtype in (
            ((images, slots, channels), value.dtype),
            ((images, slots), torch.float32),
            ((images, tokens, slots) if keep_weights else (0,), torch.float32),
        )
    )
    query, key, value = aligned(query), aligned(key), aligned(value)
    config = TABLE.choose(key.element_size(), slots, capability(key.device))
    splits, span = splits_of(tokens, config.blocks["TOKENS"], slots, channels)
    step = turns(images, splits, slots, channels)
    for first in range(0, images, step):
        some = slice(first, first + step)
        _gather(
            query[some] if query.ndim == 3 else query, key[some], value[some],
            None if bias is None else bias[some], None if mask is None else mask[some],
            scale_tensor, scale, out[some], lse[some], weights[some] if keep_weights else None,
            splits, span, config,
        )  # fmt: skip
    return out, lse, weights


def _gather(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
    scale_tensor: Tensor | None, scale: float, out: Tensor, lse: Tensor, weights: Tensor | None,
    splits: int, span: int, config: Config,
) -> None:  # fmt: skip
    """The launches for some images."""
    (images, tokens, features), channels = key.shape, value.shape[2]
    slots, block = query.shape[-2], config.blocks
    programs = images * splits * blocks(slots, block["SLOTS"])
    across = blocks(channels, block["CHANNELS"])
    each = max(1, blocks(across, max(1, PROGRAMS // max(1, programs))))
    ranges = max(1, blocks(across, each))
    whole = splits == 1
    partial = None if whole else Partial(images, splits, slots, channels, out)
    launch(
        gather, (programs * ranges,),
        query, key, value, bias, mask, scale_tensor,
        *((out, None, None) if partial is None else partial.memory), lse, weights,
        slots, tokens, scale, splits, span, ranges, each, features, channels,
        stride(query, 0) if query.ndim == 3 else 0, stride(query, -2),
        stride(key, 0), stride(key, 1), stride(value, 0), stride(value, 1),
        *strides(bias), *strides(mask), slots,
        config=config, aligned=is_aligned(features) and is_aligned(channels), WHOLE=whole,
    )  # fmt: skip
    if partial is not None:
        partial.join(tokens, out, lse, weights)
