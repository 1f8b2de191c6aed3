"""The kernels of slim_tokens_backward."""

import triton
import triton.language as tl

from tokenkernels.triton._launch import Kernel
from tokenkernels.triton._math import narrow, store
from tokenkernels.triton._slim import (
    LOG2E,
    below,
    chosen,
    product,
    rounded_product,
    slope,
    statistics,
    tile,
)


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
def logits_again(
    projected, w2, hidden_rows, here, slot_here, hidden,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The logits, before their scale, of a tile of tokens; keeps the hidden tokens on the way."""
    raw = tl.zeros([TOKENS, SLOTS], tl.float32)
    for first in range(0, hidden, WIDTH):
        column = first + tl.arange(0, WIDTH)
        known = column < hidden
        value = tile(projected, column, here, known)
        value *= below(value)
        store(hidden_rows[:, None] + column[None, :], value, here[:, None] & known[None, :])
        raw = rounded_product(value, tl.trans(tile(w2, column, slot_here, known)), raw)
    return raw


@triton.jit
def shares_of(
    x, grad, tokens, here, slot_here, channels,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """⟨x, grad⟩ of a tile of tokens, less about its mean over all tokens, ⟨tokens, grad⟩."""
    shares = tl.zeros([TOKENS, SLOTS], tl.float32)
    mean = tl.zeros([SLOTS], tl.float32)
    for first in range(0, channels, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = column < channels
        some = tile(grad, column, slot_here, inside)
        shares = product(tile(x, column, here, inside), tl.trans(some), shares)
        result = tile(tokens, column, slot_here, inside).to(tl.float32)
        mean += tl.sum(some.to(tl.float32) * result, 1)
    return shares - mean[None, :]


@Kernel
def spread(
    grad_ptr, tokens_ptr, x_ptr, projected_ptr, w2_ptr, lse_ptr, scale_ptr,
    weights_ptr, logits_ptr, hidden_ptr, statistics_ptr, sums_ptr,
    tokens, slots, scale, eps, rows, places, channels_stride, hidden_stride, image_stride, row_stride,
    grad_image_stride, grad_stride, tokens_image_stride, tokens_stride, w2_stride, width_stride,
    projected_image_stride, projected_stride,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Weights, the logits' gradient to within a multiple of them, and sums of both, of a tile of
    tokens of one image and a block of slots; hidden tokens, mean and 1 / deviation of these tokens.
    """
    program = tl.program_id(0)
    down, tiles = tl.cdiv(slots, SLOTS), tl.cdiv(tokens, TOKENS)
    block = program % down
    tile_index = program // down
    image = (tile_index // tiles).to(tl.int64)
    token = tile_index % tiles * TOKENS + tl.arange(0, TOKENS)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    here, slot_here = token < tokens, slot < slots
    row = image * tokens + token
    x = x_ptr + image * image_stride + token.to(tl.int64) * row_stride
    if block == 0:
        mean, rstd = statistics(x, here, channels_stride, eps, TOKENS, WIDTH)
        tl.store(statistics_ptr + row, mean, here)
        tl.store(statistics_ptr + rows + row, rstd, here)
    raw = logits_again(
        projected_ptr + image * projected_image_stride + token.to(tl.int64) * projected_stride,
        w2_ptr + slot.to(tl.int64) * w2_stride, hidden_ptr + row * hidden_stride,
        here, slot_here, hidden_stride, TOKENS, SLOTS, WIDTH,
    )  # fmt: skip
    shares = shares_of(
        x, grad_ptr + image * grad_image_stride + slot.to(tl.int64) * grad_stride,
        tokens_ptr + image * tokens_image_stride + slot.to(tl.int64) * tokens_stride,
        here, slot_here, channels_stride, TOKENS, SLOTS, WIDTH,
    )  # fmt: skip
    factor = chosen(scale_ptr, scale)
    lse = tl.load(lse_ptr + image * slots + slot, slot_here, 0.0)
    inside = here[:, None] & slot_here[None, :]
    weights = tl.where(inside, tl.exp2((raw * factor - lse[None, :]) * LOG2E), 0.0)
    change = tl.where(inside & (tokens > 1), weights * shares, 0.0)
    mask = here[:, None] & (slot < width_stride)[None, :]
    place = row[:, None] * width_stride + slot[None, :]
    store(weights_ptr + place, weights, mask)
    store(logits_ptr + place, change * factor, mask)
    target = sums_ptr + tile_index.to(tl.int64) * slots + slot
    tl.store(target, tl.sum(weights, 0), slot_here)
    tl.store(target + places, tl.sum(change, 0), slot_here)
    tl.store(target + 2 * places, tl.sum(weights * raw, 0), slot_here)
    tl.store(target + 3 * places, tl.sum(change * raw, 0), slot_here)


@triton.jit
def settle(
    logits, weights, sums_ptr, image, index, here, factor, slots, tiles, places, width,
    TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Takes from the logits' gradient of a tile the multiple of the weights by which its sum over
    all tokens is not 0, and gives what the tile adds to the scale's.
    """
    total = tl.zeros([SLOTS], tl.float32)
    for first in range(0, width, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        known = slot < slots
        source = sums_ptr + image * tiles * slots + slot
        mass = tl.zeros([SLOTS], tl.float32)
        rest = tl.zeros([SLOTS], tl.float32)
        for low in range(0, tiles, TILES):
            some = low + tl.arange(0, TILES)
            mass += tl.sum(tile(source, some * slots, known, some < tiles), 1)
            rest += tl.sum(tile(source + places, some * slots, known, some < tiles), 1)
        rest /= tl.where(mass == 0.0, 1.0, mass)
        source += index * slots
        raw = tl.load(source + 2 * places, known, 0.0)
        total += tl.load(source + 3 * places, known, 0.0) - rest * raw
        inside = slot < width
        change = tile(logits, slot, here, inside).to(tl.float32)
        change -= tile(weights, slot, here, inside).to(tl.float32) * (rest * factor)[None, :]
        store(logits[:, None] + slot[None, :], change, here[:, None] & inside[None, :])
    return tl.sum(total)


@Kernel
def lower(
    logits_ptr, weights_ptr, sums_ptr, scale_ptr, projected_ptr, w2_ptr, folded_ptr,
    out_ptr, statistics_ptr, change_ptr,
    tokens, slots, scale, rows, places, channels, hidden_stride, w2_stride, width_stride,
    projected_image_stride, projected_stride,
    TOKENS: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """The projection's gradient dU from the logits', of a tile of tokens of one image, and the two
    means that layer norm needs.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, TOKENS)
    image, index = (program // tiles).to(tl.int64), program % tiles
    token = index * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    row = image * tokens + token
    logits_rows = logits_ptr + row * width_stride
    change = settle(
        logits_rows, weights_ptr + row * width_stride, sums_ptr, image, index, here,
        chosen(scale_ptr, scale), slots, tiles, places, width_stride, TILES, SLOTS,
    )  # fmt: skip
    tl.store(change_ptr + program, change)
    tl.debug_barrier()  # what follows reads logits that other threads wrote
    projected = projected_ptr + image * projected_image_stride
    projected += token.to(tl.int64) * projected_stride
    mean = tl.zeros([TOKENS], tl.float32)
    along = tl.zeros([TOKENS], tl.float32)
    for first in range(0, hidden_stride, HIDDEN):
        column = first + tl.arange(0, HIDDEN)
        known = column < hidden_stride
        change = tl.zeros([TOKENS, HIDDEN], tl.float32)
        for low in range(0, width_stride, SLOTS):
            slot = low + tl.arange(0, SLOTS)
            logits = tile(logits_rows, slot, here, slot < width_stride)
            w2 = tile(w2_ptr + slot.to(tl.int64) * w2_stride, column, slot < slots, known)
            change = product(logits, w2, change)
        value = tile(projected, column, here, known)
        change = narrow(change * slope(value), out_ptr.dtype.element_ty)
        mask = here[:, None] & known[None, :]
        tl.store(out_ptr + row[:, None] * hidden_stride + column[None, :], change, mask)
        change = change.to(tl.float32)
        scaled = tl.load(folded_ptr + column, known, 0.0)
        shifted = tl.load(folded_ptr + hidden_stride + column, known, 0.0)
        mean += tl.sum(change * scaled[None, :], 1)
        along += tl.sum(change * (value - shifted[None, :]), 1)
    tl.store(statistics_ptr + 2 * rows + row, mean / channels, here)
    tl.store(statistics_ptr + 3 * rows + row, along / channels, here)


@Kernel
def resist(
    weights_ptr, grad_ptr, projected_ptr, w1_ptr, x_ptr, gamma_ptr, statistics_ptr, out_ptr,
    tokens, slots, rows, channels_stride, hidden_stride, image_stride, row_stride,
    grad_image_stride, grad_stride, w1_stride, width_stride,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of tokens of one image and a block of channels: through the sums and
    through layer norm.
    """
    program = tl.program_id(0)
    across, tiles = tl.cdiv(channels_stride, CHANNELS), tl.cdiv(tokens, TOKENS)
    column = program % across * CHANNELS + tl.arange(0, CHANNELS)
    token = program // across % tiles * TOKENS + tl.arange(0, TOKENS)
    image = (program // (across * tiles)).to(tl.int64)
    here, inside = token < tokens, column < channels_stride
    row = image * tokens + token
    through_sums = tl.zeros([TOKENS, CHANNELS], tl.float32)
    grad = grad_ptr + image * grad_image_stride
    for first in range(0, width_stride, WIDTH):
        slot = first + tl.arange(0, WIDTH)
        weights = tile(weights_ptr + row * width_stride, slot, here, slot < width_stride)
        some = tile(grad + slot.to(tl.int64) * grad_stride, column, slot < slots, inside)
        through_sums = product(weights, some, through_sums)
    normal = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for first in range(0, hidden_stride, WIDTH):
        hidden = first + tl.arange(0, WIDTH)
        known = hidden < hidden_stride
        change = tile(projected_ptr + row * hidden_stride, hidden, here, known)
        w1 = tile(w1_ptr + hidden.to(tl.int64) * w1_stride, column, known, inside)
        normal = product(change, w1, normal)
    mean = tl.load(statistics_ptr + row, here, 0.0)
    rstd = tl.load(statistics_ptr + rows + row, here, 0.0)
    offset = tl.load(statistics_ptr + 2 * rows + row, here, 0.0)
    along = tl.load(statistics_ptr + 3 * rows + row, here, 0.0)
    gamma = tl.load(gamma_ptr + column, inside, 0.0).to(tl.float32)
    x = tile(x_ptr + image * image_stride + token.to(tl.int64) * row_stride, column, here, inside)
    standard = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    normal = normal * gamma[None, :] - offset[:, None] - standard * along[:, None]
    result = through_sums + normal * rstd[:, None]
    mask = here[:, None] & inside[None, :]
    store(out_ptr + row[:, None] * channels_stride + column[None, :], result, mask)


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
    return tl.sum(tl.load(source_ptr + split[:, None] * stride + place[None, :], inside, 0.0), 0)


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
