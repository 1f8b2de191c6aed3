"""The kernels of slim_tokens_backward up to the gradient of the tokens."""

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
    tokens, slots, scale, eps, rows, places,
    channels_stride, hidden_stride, image_stride, row_stride,
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
    """Divides the weights of a tile by their sum over all tokens, of which a large `lse` is too
    coarse to make one, takes from the logits' gradient the multiple of the weights by which its sum
    is not 0, and gives what the tile adds to the scale's.
    """
    total = tl.zeros([SLOTS], tl.float32)
    for first in range(0, width, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        known = slot < slots
        source = sums_ptr + image * tiles * slots + slot
        masses = tl.zeros([SLOTS, TILES], tl.float32)
        rests = tl.zeros([SLOTS, TILES], tl.float32)
        for low in range(0, tiles, TILES):
            some = low + tl.arange(0, TILES)
            masses += tile(source, some * slots, known, some < tiles)
            rests += tile(source + places, some * slots, known, some < tiles)
        mass = tl.sum(masses, 1)
        inverse = 1.0 / tl.where(mass == 0.0, 1.0, mass)
        rest = tl.sum(rests, 1) * inverse
        source += index * slots
        raw = tl.load(source + 2 * places, known, 0.0)
        total += (tl.load(source + 3 * places, known, 0.0) - rest * raw) * inverse
        inside = slot < width
        change = tile(logits, slot, here, inside).to(tl.float32)
        kept = tile(weights, slot, here, inside).to(tl.float32)
        change = (change - kept * (rest * factor)[None, :]) * inverse[None, :]
        wanted = here[:, None] & inside[None, :]
        store(logits[:, None] + slot[None, :], change, wanted)
        store(weights[:, None] + slot[None, :], kept * inverse[None, :], wanted)
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
    scale_change = settle(
        logits_rows, weights_ptr + row * width_stride, sums_ptr, image, index, here,
        chosen(scale_ptr, scale), slots, tiles, places, width_stride, TILES, SLOTS,
    )  # fmt: skip
    tl.store(change_ptr + program, scale_change)
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
