"""The gradients of the soft aggregations that lie by token: to values, keys or logits, bias, scale.

One launch for both ops, without atomics: a program owns a block of tokens, makes its weights again
(or reads them), and from them writes whole rows of every gradient. Where one block holds all
slots, weights and slopes stay in registers while channels and features stream past, so nothing is
computed twice. Beyond, rows of float32 gather the sums of all blocks; for halves the weights are
made again for every block of columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._aggregate import (
    PROGRAMS,
    added,
    chosen,
    exponentials,
    products,
    shown,
    stride,
    strides,
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


def _blocks(tokens: int, slots: int, width: int) -> dict[str, int]:
    return {"TOKENS": tokens, "SLOTS": slots, "WIDTH": width}


TABLE = Table(
    [
        Entry(Config(_blocks(64, 64, 64), 8, 2, 168), width=64, bytes=(2,), capability=100),
        Entry(Config(_blocks(64, 64, 64), 8, 2), width=64, bytes=(2,)),
        Entry(Config(_blocks(32, 128, 32), 8, 2), width=128, bytes=(2,)),
        Entry(Config(_blocks(16, 256, 32), 8, 2), bytes=(2,)),
        Entry(Config(_blocks(32, 64, 16), 8, 2)),
    ],
    "By slots: the gradients of all slots of a block of tokens stay in registers.",
)


@triton.jit
def held(values, dtype: tl.constexpr):
    """`values` in `dtype`, and what they were divided by to keep within the range of a half."""
    unit = 1.0
    if dtype == tl.float16:
        unit = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0) * (1.0 / 16384), 1e-30)
        values = values / unit
    return narrow(values, dtype), unit


@triton.jit
def weighed(
    query, source, weights, bias, lse, factor, slot, slot_here, here, visible, features,
    RAW: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores before the scale (where RAW or needed) and weights, (TOKENS, SLOTS).

    `source` are the rows of keys; without `query`, of logits.
    """
    raw = tl.zeros([TOKENS, SLOTS], tl.float32)
    if query is None:
        inside = visible[:, None] & slot_here[None, :]
        raw = tl.load(source[:, None] + slot[None, :], inside, float("-inf")).to(tl.float32)
    elif RAW or weights is None:
        raw = products(source, visible, query, slot_here, features, TOKENS, SLOTS, WIDTH)
    if weights is None:
        scores = tl.where(visible[:, None], raw * factor + bias[:, None], float("-inf"))
        result = exponentials(scores, tl.where(lse == float("-inf"), 0.0, lse))
    else:
        inside = here[:, None] & slot_here[None, :]
        result = tl.load(weights[:, None] + slot[None, :], inside, 0.0)
    return raw, result


@triton.jit
def means(grad, out, slot_here, channels, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """⟨out, gradient⟩ of each slot."""
    sums = tl.zeros([SLOTS], tl.float32)
    for first in range(0, channels, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = slot_here[:, None] & (column < channels)[None, :]
        g = tl.load(grad[:, None] + column[None, :], inside, 0.0).to(tl.float32)
        o = tl.load(out[:, None] + column[None, :], inside, 0.0).to(tl.float32)
        sums += tl.sum(g * o, 1)
    return sums


@triton.jit
def at(
    first, query_ptr, query_stride, grad_ptr, grad_stride, out_ptr, out_stride, lse_ptr,
    source, value, weights, bias, factor, here, visible, sloping, slots, features, channels,
    RAW: tl.constexpr, SLOPES: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores, weights and, where `sloping`, slopes of some tokens and the slots from `first`: the
    gradients of their scores, weight × (⟨value, gradient⟩ − ⟨out, gradient⟩).
    """
    slot = first + tl.arange(0, SLOTS)
    slot_here = slot < slots
    row = slot.to(tl.int64)
    lse = tl.load(lse_ptr + slot, slot_here, 0.0)
    grad = grad_ptr + row * grad_stride
    mean = tl.zeros([SLOTS], tl.float32)
    if SLOPES:  # noqa: SIM102
        if sloping:
            out = out_ptr + row * out_stride
            mean = means(grad, out, slot_here, channels, SLOTS, WIDTH)
    raw, result = weighed(
        None if query_ptr is None else query_ptr + row * query_stride,
        source, weights, bias, lse, factor, slot, slot_here, here, visible, features,
        RAW, TOKENS, SLOTS, WIDTH,
    )  # fmt: skip
    slopes = result
    if SLOPES:  # noqa: SIM102
        if sloping:
            sums = products(value, visible, grad, slot_here, channels, TOKENS, SLOTS, WIDTH)
            slopes = tl.where(visible[:, None], result * (sums - mean[None, :]), 0.0)
    return raw, result, slopes


@triton.jit
def spread(
    left, unit, right_ptr, right_stride, first, column, slots, length,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """left · right · unit for some columns of the slots from `first` on: (TOKENS, WIDTH)."""
    slot = first + tl.arange(0, SLOTS)
    inside = (slot < slots)[:, None] & (column < length)[None, :]
    row = right_ptr + slot.to(tl.int64)[:, None] * right_stride
    some = tl.load(row + column[None, :], inside, 0.0)
    return dot(left, some, tl.zeros([TOKENS, WIDTH], tl.float32)) * unit


@triton.jit
def write(
    left, factor, right_ptr, right_stride, first, target, token, tokens, slots, length,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a gradient from the slots from `first` on, onto those from the slots before."""
    left, unit = held(left, right_ptr.dtype.element_ty)
    for start in range(0, length, WIDTH):
        column = start + tl.arange(0, WIDTH)
        sums = spread(
            left, unit * factor, right_ptr, right_stride, first, column, slots, length,
            TOKENS, SLOTS, WIDTH,
        )  # fmt: skip
        inside = (column < length)[None, :]
        address = target[:, None] + column[None, :]
        if target.dtype.element_ty == tl.float32:
            older = token < tl.where(first > 0, tokens, 0)
            sums += tl.load(address, older[:, None] & inside, 0.0)
        store(address, sums, (token < tokens)[:, None] & inside)


@Kernel
def by_token(
    grad_ptr, query_ptr, source_ptr, value_ptr, bias_ptr, mask_ptr, scale_ptr,
    out_ptr, lse_ptr, weights_ptr,
    scale, tokens, features_stride, channels_stride, slots_stride,
    grad_image_stride, grad_stride, query_image_stride, query_stride,
    source_image_stride, source_stride, value_image_stride, value_stride,
    bias_image_stride, bias_stride, mask_image_stride, mask_stride,
    out_image_stride, out_stride,
    source_grad_ptr, value_grad_ptr, bias_grad_ptr, scale_grad_ptr, parts,
    ONE: tl.constexpr, RAW: tl.constexpr, SLOPES: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one image. Of two parts the first makes the gradient of the values, the
    second the others; a single one makes all. ONE: gradients need no second pass, as a block holds
    all slots, or rows of float32 keep the sums over blocks.
    """
    program = tl.program_id(0)
    valuing, sloping = program % parts == 0, program % parts == parts - 1
    tile = program // parts
    image = (tile // tl.cdiv(tokens, TOKENS)).to(tl.int64)
    token = tile % tl.cdiv(tokens, TOKENS) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    visible = shown(mask_ptr, image * mask_image_stride, mask_stride, token, here)
    bias = added(bias_ptr, image * bias_image_stride, bias_stride, token, here)
    factor = chosen(scale_ptr, scale)
    row = image * tokens + token
    source = source_ptr + image * source_image_stride + token.to(tl.int64) * source_stride
    value = value_ptr + image * value_image_stride + token.to(tl.int64) * value_stride
    weights = None if weights_ptr is None else weights_ptr + row * slots_stride
    query = None if query_ptr is None else query_ptr + image * query_image_stride
    grad, out = grad_ptr + image * grad_image_stride, out_ptr + image * out_image_stride
    lse = lse_ptr + image * slots_stride
    bias_sum = tl.zeros([TOKENS], tl.float32)
    scale_sum = tl.zeros([TOKENS], tl.float32)
    for first in range(0, tl.maximum(slots_stride, 1), SLOTS):
        raw, parted, slopes = at(
            first, query, query_stride, grad, grad_stride, out, out_stride, lse,
            source, value, weights, bias, factor, here, visible, sloping,
            slots_stride, features_stride, channels_stride,
            RAW, SLOPES, TOKENS, SLOTS, WIDTH,
        )  # fmt: skip
        if SLOPES:
            bias_sum += tl.sum(slopes, 1)
        if RAW:
            scale_sum += tl.sum(slopes * raw, 1)
        if ONE and value_grad_ptr is not None:  # noqa: SIM102
            if valuing:
                write(
                    parted, 1.0, grad, grad_stride, first, value_grad_ptr + row * channels_stride,
                    token, tokens, slots_stride, channels_stride, TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
        if source_grad_ptr is not None and query_ptr is None:  # noqa: SIM102
            if sloping:
                slot = first + tl.arange(0, SLOTS)
                target = source_grad_ptr + row[:, None] * slots_stride + slot[None, :]
                store(target, slopes, here[:, None] & (slot < slots_stride)[None, :])
        if ONE and source_grad_ptr is not None and query_ptr is not None:  # noqa: SIM102
            if sloping:
                write(
                    slopes, factor, query, query_stride, first,
                    source_grad_ptr + row * features_stride, token, tokens,
                    slots_stride, features_stride, TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
        if ONE:
            tl.debug_barrier()  # the next slots read what other threads wrote
    if bias_grad_ptr is not None:
        tl.store(bias_grad_ptr + row, bias_sum, token < tl.where(sloping, tokens, 0))
    if scale_grad_ptr is not None:  # noqa: SIM102
        if sloping:
            tl.store(scale_grad_ptr + tile, tl.sum(scale_sum, 0))
    if not ONE and value_grad_ptr is not None:
        for start in range(0, tl.where(valuing, channels_stride, 0), WIDTH):
            column = start + tl.arange(0, WIDTH)
            sums = tl.zeros([TOKENS, WIDTH], tl.float32)
            for first in range(0, slots_stride, SLOTS):
                raw, parted, slopes = at(
                    first, query, query_stride, grad, grad_stride, out, out_stride, lse,
                    source, value, weights, bias, factor, here, visible, sloping,
                    slots_stride, features_stride, channels_stride,
                    False, False, TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
                left, unit = held(parted, grad_ptr.dtype.element_ty)
                sums += spread(
                    left, unit, grad, grad_stride, first, column, slots_stride, channels_stride,
                    TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
            target = value_grad_ptr + row[:, None] * channels_stride + column[None, :]
            store(target, sums, here[:, None] & (column < channels_stride)[None, :])
    if not ONE and source_grad_ptr is not None and query_ptr is not None:
        for start in range(0, tl.where(sloping, features_stride, 0), WIDTH):
            column = start + tl.arange(0, WIDTH)
            sums = tl.zeros([TOKENS, WIDTH], tl.float32)
            for first in range(0, slots_stride, SLOTS):
                raw, parted, slopes = at(
                    first, query, query_stride, grad, grad_stride, out, out_stride, lse,
                    source, value, weights, bias, factor, here, visible, sloping,
                    slots_stride, features_stride, channels_stride,
                    False, True, TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
                left, unit = held(slopes, grad_ptr.dtype.element_ty)
                sums += spread(
                    left, unit * factor, query, query_stride, first, column, slots_stride,
                    features_stride, TOKENS, SLOTS, WIDTH,
                )  # fmt: skip
            target = source_grad_ptr + row[:, None] * features_stride + column[None, :]
            store(target, sums, here[:, None] & (column < features_stride)[None, :])


@dataclass
class Inputs:
    """What a backward reads; `source` are the keys, or without `query` the logits."""

    grad: Tensor
    query: Tensor | None
    source: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scale_tensor: Tensor | None
    scale: float
    out: Tensor
    lse: Tensor
    weights: Tensor | None

    def __post_init__(self) -> None:
        self.grad, self.source, self.value = map(aligned, (self.grad, self.source, self.value))
        self.query = None if self.query is None else aligned(self.query)
        self.out, self.lse = aligned(self.out), self.lse.contiguous()
        self.weights = None if self.weights is None else self.weights.contiguous()
        (self.images, self.tokens), self.slots = self.value.shape[:2], self.lse.shape[1]
        self.channels, self.features = self.value.shape[2], self.source.shape[2]
        wide = self.features if self.query is not None else 0
        self.aligned = is_aligned(self.channels) and is_aligned(wide)
        self.capability = capability(self.value.device)

    def arguments(self) -> list[Any]:
        """As the kernels take them, from the first on."""
        query = (0, 0)
        if self.query is not None:
            query = (stride(self.query, 0) * (self.query.ndim == 3), stride(self.query, -2))
        return [
            *(self.grad, self.query, self.source, self.value, self.bias, self.mask),
            *(self.scale_tensor, self.out, self.lse, self.weights, self.scale),
            *(self.tokens, self.features, self.channels, self.slots),
            *(*strides(self.grad), *query, *strides(self.source), *strides(self.value)),
            *(*strides(self.bias), *strides(self.mask), *strides(self.out)),
        ]

    def blocks_of_tokens(self) -> tuple[Config, int]:
        """How `by_token` is scheduled, and how many blocks there are."""
        config = TABLE.choose(self.value.element_size(), self.slots, self.capability)
        return config, self.images * blocks(self.tokens, config.blocks["TOKENS"])

    def by_token(
        self,
        source_grad: Tensor | None,
        value_grad: Tensor | None,
        bias_grad: Tensor | None,
        scale_grads: Tensor | None,
    ) -> None:
        """Launches the kernel of that name; two parts where blocks are few."""
        config, programs = self.blocks_of_tokens()
        slopes = any(t is not None for t in (source_grad, bias_grad, scale_grads))
        parts = 2 if slopes and value_grad is not None and programs < PROGRAMS else 1
        launch(
            by_token, (programs * parts if slopes or value_grad is not None else 0,),
            *self.arguments(), source_grad, value_grad, bias_grad, scale_grads, parts,
            config=config, aligned=self.aligned,
            ONE=self.slots <= config.blocks["SLOTS"] or self.value.dtype == torch.float32,
            RAW=scale_grads is not None, SLOPES=slopes,
        )  # fmt: skip
