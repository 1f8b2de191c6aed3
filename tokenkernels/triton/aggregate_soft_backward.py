"""aggregate_soft_backward in Triton: what lies by token in one launch, the gradient of the queries
by slot in a second, sums of both apart in a third.

The second makes the slopes of a piece of tokens × a block of slots again, keeps them in registers
and multiplies them with the keys, block after block; several pieces, of several images where the
queries are shared, add up in a program's own rows of scratch. The third adds the rows of all
programs, and what the first left of the scale, in a fixed order: no atomics.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._aggregate import PROGRAMS, SCRATCH, added, chosen, shown
from tokenkernels.triton._aggregate_backward import Inputs, at, held
from tokenkernels.triton._launch import (
    Config,
    Entry,
    Kernel,
    Table,
    blocks,
    is_aligned,
    launch,
)
from tokenkernels.triton._math import dot, store

TABLE = Table(
    [
        Entry(Config({"TOKENS": 128, "SLOTS": 32, "WIDTH": 64}, 8, 2), bytes=(2,)),
        Entry(Config({"TOKENS": 64, "SLOTS": 32, "WIDTH": 16}, 4, 2)),
    ],
    "32 slots' sums stay in registers while tokens stream past, 128 at a time for wgmma.",
)
TOTAL = Table(
    [Entry(Config({"GROUPS": 16, "WIDTH": 256}))],
    "16 groups are read ahead; 256 columns are a full line for each warp.",
)


@Kernel
def by_slot(
    grad_ptr, query_ptr, source_ptr, value_ptr, bias_ptr, mask_ptr, scale_ptr,
    out_ptr, lse_ptr, weights_ptr,
    scale, tokens, features_stride, channels_stride, slots_stride,
    grad_image_stride, grad_stride, query_image_stride, query_stride,
    source_image_stride, source_stride, value_image_stride, value_stride,
    bias_image_stride, bias_stride, mask_image_stride, mask_stride,
    out_image_stride, out_stride,
    partial_ptr, groups, items, span, pieces, length, ranges, each,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some pieces of tokens for a block of slots and a range of features: Σ slope · key."""
    program = tl.program_id(0)
    down = tl.cdiv(slots_stride, SLOTS)
    part = program % ranges
    first_slot = program // ranges % down * SLOTS
    group = program // (ranges * down)
    slot = first_slot + tl.arange(0, SLOTS)
    target = partial_ptr + (group.to(tl.int64) * slots_stride + slot) * features_stride
    factor = chosen(scale_ptr, scale)
    begin = group % groups * span
    for item in range(begin, tl.minimum(begin + span, items)):
        image = (group // groups + item // pieces).to(tl.int64)
        start = item % pieces * length
        token = start + tl.arange(0, TOKENS)
        here = token < tl.minimum(start + length, tokens)
        visible = shown(mask_ptr, image * mask_image_stride, mask_stride, token, here)
        source = source_ptr + image * source_image_stride + token.to(tl.int64) * source_stride
        _raw, _parted, slopes = at(
            first_slot, query_ptr + image * query_image_stride, query_stride,
            grad_ptr + image * grad_image_stride, grad_stride,
            out_ptr + image * out_image_stride, out_stride, lse_ptr + image * slots_stride,
            source, value_ptr + image * value_image_stride + token.to(tl.int64) * value_stride,
            None if weights_ptr is None else weights_ptr + (image * tokens + token) * slots_stride,
            added(bias_ptr, image * bias_image_stride, bias_stride, token, here),
            factor, here, visible, True, slots_stride, features_stride, channels_stride,
            False, True, TOKENS, SLOTS, WIDTH,
        )  # fmt: skip
        slopes, unit = held(slopes, source_ptr.dtype.element_ty)
        older = tl.where(item > begin, slots_stride, 0)
        for block in range(
            part * each, tl.minimum(part * each + each, tl.cdiv(features_stride, WIDTH))
        ):
            column = block * WIDTH + tl.arange(0, WIDTH)
            inside = column < features_stride
            key = tl.load(
                source[:, None] + column[None, :], visible[:, None] & inside[None, :], 0.0
            )
            sums = dot(tl.trans(key), slopes, tl.zeros([WIDTH, SLOTS], tl.float32)) * unit
            address = target[None, :] + column[:, None]
            sums += tl.load(address, inside[:, None] & (slot < older)[None, :], 0.0)
            tl.store(address, sums, inside[:, None] & (slot < slots_stride)[None, :])
        tl.debug_barrier()  # the next piece reads what other threads wrote


@Kernel
def total(
    partial_ptr, scales_ptr, scale_ptr, query_grad_ptr, scale_grad_ptr,
    scale, groups, scales, width_stride,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over groups of rows of `width`, times the scale; the first program adds up the scale's
    own gradient.
    """
    program = tl.program_id(0)
    if scale_grad_ptr is not None:
        if program == 0:
            sums = tl.zeros([WIDTH], tl.float32)
            for first in range(0, scales, WIDTH):
                number = first + tl.arange(0, WIDTH)
                sums += tl.load(scales_ptr + number, number < scales, 0.0)
            tl.store(scale_grad_ptr, tl.sum(sums, 0))
        program -= 1
    if query_grad_ptr is not None:  # noqa: SIM102
        if program >= 0:
            across = tl.cdiv(width_stride, WIDTH)
            owner = (program // across).to(tl.int64)
            column = (program % across) * WIDTH + tl.arange(0, WIDTH)
            inside = column < width_stride
            sums = tl.zeros([WIDTH], tl.float32)
            for first in range(0, groups, GROUPS):
                group = first + tl.arange(0, GROUPS)
                row = partial_ptr + (owner * groups + group)[:, None] * width_stride
                known = (group < groups)[:, None] & inside[None, :]
                sums += tl.sum(tl.load(row + column[None, :], known, 0.0), 0)
            target = query_grad_ptr + owner * width_stride + column
            store(target, sums * chosen(scale_ptr, scale), inside)


def grouped(inputs: Inputs, shared: bool, block: int) -> tuple[int, int, int, int, int]:
    """Owners of a gradient, groups of each, its items (pieces of tokens), those of a group, and the
    pieces of an image.
    """
    pieces = max(1, blocks(inputs.tokens, block))
    owners, items = (1, inputs.images * pieces) if shared else (inputs.images, pieces)
    room = SCRATCH // (4 * max(1, inputs.slots * inputs.features))
    most = min(256, max(1, room)) if shared else 16
    span = max(1, blocks(items, most))
    return owners, blocks(items, span), items, span, pieces


def aggregate_soft_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    tokens: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and scale; empty where not needed."""
    wide = torch.float32

    def fresh(shape: tuple[int, ...] | torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=value.device)

    query_grad = fresh(query.shape, need_query, query.dtype)
    key_grad = fresh(key.shape, need_key, key.dtype)
    value_grad = fresh(value.shape, need_value, value.dtype)
    bias_grad = fresh(key.shape[:2], bias is not None, wide)
    scale_grad = fresh((), need_scale, wide)
    inputs = Inputs(
        gradient, query, key, value, bias, mask, scale_tensor, scale, tokens, lse, weights
    )
    scales = fresh((inputs.blocks_of_tokens()[1],), need_scale, wide)
    inputs.by_token(
        key_grad if need_key else None,
        value_grad if need_value else None,
        bias_grad if bias is not None else None,
        scales if need_scale else None,
    )
    groups, partial = 0, fresh((), False, wide)
    if need_query:
        groups, partial = _by_slot(inputs, query.ndim == 2)
    width = inputs.slots * inputs.features
    config = TOTAL.choose(value.element_size(), width, inputs.capability)
    owners = query_grad.numel() // max(1, width)
    launch(
        total, (int(need_scale) + owners * blocks(width, config.blocks["WIDTH"]),),
        partial, scales, inputs.scale_tensor,
        query_grad if need_query else None, scale_grad if need_scale else None,
        scale, groups, scales.numel(), width,
        config=config, aligned=is_aligned(width),
    )  # fmt: skip
    return query_grad, key_grad, value_grad, bias_grad, scale_grad


def _by_slot(inputs: Inputs, shared: bool) -> tuple[int, Tensor]:
    """Launches the kernel of that name: groups, and their sums."""
    config = TABLE.choose(inputs.value.element_size(), inputs.slots, inputs.capability)
    block = config.blocks
    owners, groups, items, span, pieces = grouped(inputs, shared, block["TOKENS"])
    partial = torch.empty(
        (owners * groups, inputs.slots, inputs.features),
        dtype=torch.float32, device=inputs.value.device,
    )  # fmt: skip
    programs = owners * groups * blocks(inputs.slots, block["SLOTS"])
    across = blocks(inputs.features, block["WIDTH"])
    each = max(1, blocks(across, max(1, PROGRAMS // max(1, programs))))
    ranges = max(1, blocks(across, each))
    launch(
        by_slot, (programs * ranges,),
        *inputs.arguments(), partial,
        groups, items, span, pieces, blocks(inputs.tokens, pieces), ranges, each,
        config=config, aligned=inputs.aligned,
    )  # fmt: skip
    return groups, partial
