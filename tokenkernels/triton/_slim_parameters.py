"""The kernels of slim_tokens_backward that concern its weights."""

import triton
import triton.language as tl

from tokenkernels.triton._launch import Kernel
from tokenkernels.triton._math import narrow, store
from tokenkernels.triton._slim import product, tile


@Kernel
def fold(
    w1_ptr, b1_ptr, gamma_ptr, beta_ptr, folded_ptr,
    hidden, channels_stride, w1_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """w1·γ and w1·β + b1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < hidden
    scaled = tl.zeros([ROWS, WIDTH], tl.float32)
    shifted = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, channels_stride, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = column < channels_stride
        w1 = tile(w1_ptr + row.to(tl.int64) * w1_stride, column, here, inside).to(tl.float32)
        scaled += w1 * tl.load(gamma_ptr + column, inside, 0.0).to(tl.float32)[None, :]
        shifted += w1 * tl.load(beta_ptr + column, inside, 0.0).to(tl.float32)[None, :]
    b1 = tl.load(b1_ptr + row, here, 0.0).to(tl.float32)
    tl.store(folded_ptr + row, tl.sum(scaled, 1), here)
    tl.store(folded_ptr + hidden + row, tl.sum(shifted, 1) + b1, here)


@triton.jit
def collect_tokens(
    projected_ptr, x_ptr, statistics_ptr, products_ptr, totals_ptr, part, begin, end, tokens, rows,
    channels, hidden, image_stride, row_stride,
    ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Σ dU·x̂ᵀ and Σ dU over some tokens, for a block of hidden channels and one of channels."""
    across = tl.cdiv(channels, RIGHT)
    left = part // across * LEFT + tl.arange(0, LEFT)
    right = part % across * RIGHT + tl.arange(0, RIGHT)
    known, inside = left < hidden, right < channels
    sums = tl.zeros([LEFT, RIGHT], tl.float32)
    totals = tl.zeros([ROWS, LEFT], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        here = row < end
        change = tile(projected_ptr + row * hidden, left, here, known)
        x = x_ptr + row // tokens * image_stride + row % tokens * row_stride
        mean = tl.load(statistics_ptr + row, here, 0.0)
        rstd = tl.load(statistics_ptr + rows + row, here, 0.0)
        value = tile(x, right, here, inside)
        standard = (value.to(tl.float32) - mean[:, None]) * rstd[:, None]
        sums = product(tl.trans(change), narrow(standard, value.dtype), sums)
        totals += change.to(tl.float32)
    mask = known[:, None] & inside[None, :]
    tl.store(products_ptr + left[:, None] * channels + right[None, :], sums, mask)
    tl.store(totals_ptr + left, tl.sum(totals, 0), left < tl.where(part % across == 0, hidden, 0))


@triton.jit
def collect_hidden(
    logits_ptr, hidden_ptr, out_ptr, part, begin, end, slots, hidden, width,
    ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of w2 from some tokens."""
    across = tl.cdiv(hidden, RIGHT)
    left = part // across * LEFT + tl.arange(0, LEFT)
    right = part % across * RIGHT + tl.arange(0, RIGHT)
    inside = right < hidden
    sums = tl.zeros([LEFT, RIGHT], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        here = row < end
        change = tile(logits_ptr + row * width, left, here, left < width)
        sums = product(tl.trans(change), tile(hidden_ptr + row * hidden, right, here, inside), sums)
    mask = (left < slots)[:, None] & inside[None, :]
    tl.store(out_ptr + left[:, None] * hidden + right[None, :], sums, mask)


@Kernel
def collect(
    projected_ptr, x_ptr, logits_ptr, hidden_ptr, statistics_ptr, products_ptr, totals_ptr, w2_ptr,
    tokens, slots, rows, span, splits, channels_stride, hidden_stride, image_stride, row_stride,
    width_stride,
    ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Sums over a split of all tokens of the batch, for the gradients of the weights."""
    program = tl.program_id(0)
    split = (program % splits).to(tl.int64)
    part = program // splits
    begin, end = split * span, tl.minimum(split * span + span, rows)
    first = tl.cdiv(hidden_stride, LEFT) * tl.cdiv(channels_stride, RIGHT)
    if part < first:
        collect_tokens(
            projected_ptr, x_ptr, statistics_ptr,
            products_ptr + split * hidden_stride * channels_stride,
            totals_ptr + split * hidden_stride, part, begin, end, tokens, rows,
            channels_stride, hidden_stride, image_stride, row_stride, ROWS, LEFT, RIGHT,
        )  # fmt: skip
    else:
        collect_hidden(
            logits_ptr, hidden_ptr, w2_ptr + split * slots * hidden_stride, part - first,
            begin, end, slots, hidden_stride, width_stride, ROWS, LEFT, RIGHT,
        )  # fmt: skip


@triton.jit
def added(source_ptr, place, here, splits, stride, SPLITS: tl.constexpr):
    """The sum of all splits at some places."""
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & here[None, :]
    return tl.sum(
        tl.load(source_ptr + split.to(tl.int64)[:, None] * stride + place[None, :], inside, 0.0), 0
    )


@triton.jit
def finish_norm(
    products_ptr, totals_ptr, w1_ptr, gamma_ptr, beta_ptr, gamma_grad_ptr, beta_grad_ptr,
    w1_grad_ptr, part, splits, channels, hidden, w1_stride,
    SPLITS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of w1 and the norm's weights for a block of channels."""
    column = part * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    gamma = tl.load(gamma_ptr + column, inside, 0.0).to(tl.float32)
    beta = tl.load(beta_ptr + column, inside, 0.0).to(tl.float32)
    gamma_grad = tl.zeros([CHANNELS], tl.float32)
    beta_grad = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, hidden, HIDDEN):
        row = first + tl.arange(0, HIDDEN)
        known = row < hidden
        total = added(totals_ptr, row, known, splits, hidden, SPLITS)
        place = tl.reshape(row[:, None] * channels + column[None, :], [HIDDEN * CHANNELS])
        mask = known[:, None] & inside[None, :]
        here = tl.reshape(mask, [HIDDEN * CHANNELS])
        sums = added(products_ptr, place, here, splits, hidden * channels, SPLITS)
        sums = tl.reshape(sums, [HIDDEN, CHANNELS])
        w1 = tile(w1_ptr + row.to(tl.int64) * w1_stride, column, known, inside).to(tl.float32)
        gamma_grad += tl.sum(w1 * sums, 0)
        beta_grad += tl.sum(w1 * total[:, None], 0)
        result = gamma[None, :] * sums + beta[None, :] * total[:, None]
        store(w1_grad_ptr + row[:, None] * channels + column[None, :], result, mask)
    store(gamma_grad_ptr + column, gamma_grad, inside)
    store(beta_grad_ptr + column, beta_grad, inside)


@Kernel
def finish(
    products_ptr, totals_ptr, w2_ptr, change_ptr, w1_ptr, gamma_ptr, beta_ptr,
    gamma_grad_ptr, beta_grad_ptr, w1_grad_ptr, b1_grad_ptr, w2_grad_ptr, scale_grad_ptr,
    slots, splits, changes, channels_stride, hidden_stride, w1_stride,
    SPLITS: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Adds the splits: programs for blocks of channels, of w2, of b1, and one for the scale."""
    program = tl.program_id(0)
    across = tl.cdiv(channels_stride, CHANNELS)
    weights = slots * hidden_stride
    down = tl.cdiv(weights, NUMBERS)
    if program < across:
        finish_norm(
            products_ptr, totals_ptr, w1_ptr, gamma_ptr, beta_ptr, gamma_grad_ptr, beta_grad_ptr,
            w1_grad_ptr, program, splits, channels_stride, hidden_stride, w1_stride,
            SPLITS, HIDDEN, CHANNELS,
        )  # fmt: skip
    elif program < across + down:
        place = (program - across) * NUMBERS + tl.arange(0, NUMBERS)
        here = place < weights
        store(w2_grad_ptr + place, added(w2_ptr, place, here, splits, weights, SPLITS), here)
    elif program < tl.num_programs(0) - 1:
        place = (program - across - down) * NUMBERS + tl.arange(0, NUMBERS)
        here = place < hidden_stride
        total = added(totals_ptr, place, here, splits, hidden_stride, SPLITS)
        store(b1_grad_ptr + place, total, here)
    else:
        sums = tl.zeros([NUMBERS], tl.float32)
        for first in range(0, changes, NUMBERS):
            place = first + tl.arange(0, NUMBERS)
            sums += tl.load(change_ptr + place, place < changes, 0.0)
        tl.store(scale_grad_ptr, tl.sum(sums, 0))
