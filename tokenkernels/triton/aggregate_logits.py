"""aggregate_logits in Triton: a program streams tokens past a block of slots × channels, logits as
they lie, with the softmax carried along.

One launch; where there are many tokens they are split, every split leaves its sums, and a second
launch joins them. Exponentials are made again for every block of channels: they cost less than the
exchange of them would. Tiles of 64 tokens × (64 slots, 128 channels) are 24 KB, of which several
are under way; the sums are 64 registers of each thread.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._aggregate import (
    Partial,
    divided,
    logarithm,
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

TABLE = Table(
    [
        Entry(Config({"SLOTS": 64, "TOKENS": 64, "CHANNELS": 128}, 8, 3), bytes=(2,)),
        Entry(Config({"SLOTS": 32, "TOKENS": 32, "CHANNELS": 64}, 4, 2)),
    ],
    "64 slots share every value that is loaded; float32 operands in registers need halved blocks.",
)


@Kernel
def gather(
    logits_ptr, value_ptr, mask_ptr, out_ptr, highest_ptr, total_ptr, lse_ptr,
    tokens, splits, span, slots_stride, channels_stride,
    logits_image_stride, logits_stride, value_image_stride, value_stride,
    mask_image_stride, mask_stride,
    WHOLE: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A split of the tokens of one image for a block of slots and one of channels.

    WHOLE: there is one split, and results are written; else its sums and softmax.
    """
    program = tl.program_id(0)
    across = tl.maximum(tl.cdiv(channels_stride, CHANNELS), 1)
    down = tl.cdiv(slots_stride, SLOTS)
    part = program % across
    column = part * CHANNELS + tl.arange(0, CHANNELS)
    slot = program // across % down * SLOTS + tl.arange(0, SLOTS)
    split = program // (across * down) % splits
    image = (program // (across * down * splits)).to(tl.int64)
    slot_here, inside = slot < slots_stride, column < channels_stride
    logits_ptr += image * logits_image_stride
    value_ptr += image * value_image_stride
    highest = tl.full([SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    sums = tl.zeros([CHANNELS, SLOTS], tl.float32)
    end = tl.minimum((split + 1) * span, tokens)
    for start in range(split * span, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = token < end
        visible = shown(mask_ptr, image * mask_image_stride, mask_stride, token, here)
        row = token.to(tl.int64)[:, None]
        scores = tl.load(
            logits_ptr + row * logits_stride + slot[None, :],
            visible[:, None] & slot_here[None, :], float("-inf"),
        )  # fmt: skip
        value = tl.load(
            value_ptr + row * value_stride + column[None, :],
            visible[:, None] & inside[None, :],
            0.0,
        )
        parts, shrink, highest, total = ranked(scores.to(tl.float32), highest, total)
        parts = narrow(parts, value_ptr.dtype.element_ty)
        sums = dot(tl.trans(value), parts, sums * shrink[None, :])
    row = (image * splits + split) * slots_stride + slot
    if WHOLE:
        sums = divided(sums, total)
    target = row[None, :] * channels_stride + column[:, None]
    store(out_ptr + target, sums, inside[:, None] & slot_here[None, :])
    wanted = slot < tl.where(part == 0, slots_stride, 0)
    if WHOLE:
        tl.store(lse_ptr + row, logarithm(highest, total), wanted)
    else:
        tl.store(highest_ptr + row, highest, wanted)
        tl.store(total_ptr + row, total, wanted)


def splits_of(tokens: int, slots: int, channels: int, block: dict[str, int]) -> int:
    """In how many splits the tokens of an image are summed apart: pieces of 512 that keep a GPU
    busy with one image.
    """
    if tokens < 1024:
        return 1
    programs = blocks(slots, block["SLOTS"]) * blocks(channels, block["CHANNELS"])
    return max(1, min(blocks(tokens, 512), 128 // max(1, programs), 64))


def aggregate_logits(logits: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens, and the logarithm of each slot's total."""
    (images, tokens, slots), channels = logits.shape, value.shape[2]
    out = torch.empty((images, slots, channels), dtype=value.dtype, device=value.device)
    lse = torch.empty((images, slots), dtype=torch.float32, device=value.device)
    logits, value = aligned(logits), aligned(value)
    config = TABLE.choose(value.element_size(), slots, capability(value.device))
    splits = splits_of(tokens, slots, channels, config.blocks)
    step = turns(images, splits, slots, channels)
    for first in range(0, images, step):
        some = slice(first, first + step)
        masked = None if mask is None else mask[some]
        _gather(logits[some], value[some], masked, out[some], lse[some], splits, config)
    return out, lse


def _gather(
    logits: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    splits: int, config: Config,
) -> None:  # fmt: skip
    """The launches for some images."""
    (images, tokens, slots), channels = logits.shape, value.shape[2]
    block = config.blocks
    across = max(1, blocks(channels, block["CHANNELS"]))
    partial = None if splits == 1 else Partial(images, splits, slots, channels, out)
    launch(
        gather, (images * splits * blocks(slots, block["SLOTS"]) * across,),
        logits, value, mask, *((out, None, None) if partial is None else partial.memory), lse,
        tokens, splits, blocks(tokens, splits), slots, channels,
        stride(logits, 0), stride(logits, 1), stride(value, 0), stride(value, 1), *strides(mask),
        config=config, aligned=is_aligned(channels), WHOLE=partial is None,
    )  # fmt: skip
    if partial is not None:
        partial.join(tokens, out, lse, None)
