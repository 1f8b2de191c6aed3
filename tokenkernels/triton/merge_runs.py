"""merge_runs in Triton: compare neighbours, then number the runs and write their means.

The first launch reads x once, in blocks of tokens, and notes which are like their predecessors, and
of every block what numbering needs: its first and last break (a token unlike its predecessor) and
how many runs begin between them. Chains between breaks are cut into runs of `max_run`, so the
number of a block's first run follows from the blocks before it by one scan of their maxima. In the
second launch each program scans what precedes its blocks, then loads, run by run, the members of
the runs that begin there; padded, a token that begins none clears one row at the end instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import (
    INTERPRETED,
    PROGRAMS,
    Config,
    Entry,
    Kernel,
    Table,
    aligned,
    blocks,
    capability,
    is_aligned,
    launch,
    to_host,
)
from tokenkernels.triton._math import store
from tokenkernels.triton._merge import tile, tile_of, whole

TABLE = Table(
    [
        Entry(Config({"TOKENS": 64, "WIDTH": 32}), width=32),
        Entry(Config({"TOKENS": 32, "WIDTH": 64}), width=64),
        Entry(Config({"TOKENS": 16, "WIDTH": 128}), width=128),
        Entry(Config({"TOKENS": 16, "WIDTH": 256}), width=256),
        Entry(Config({"TOKENS": 16, "WIDTH": 512}, warps=8)),
    ],
    "Neighbours lie in one tile, so each token is read once but for the last of the block before.",
)
MEMBERS = 4
"""Of a run that are loaded at once."""
MOST_PROGRAMS = PROGRAMS if INTERPRETED else 4 * PROGRAMS
"""Programs that wait for one run after another: many hide that."""


@triton.jit
def breaks_of(position, breaks, last):
    """The last break before each token of a block, and up to and with it; `last` where none is."""
    earlier = breaks[None, :] & (position[None, :] < position[:, None])
    before = tl.max(tl.where(earlier, position[None, :], last), 1)
    return before, tl.where(breaks, position, before)


@Kernel
def compare(
    x_ptr, alike_ptr, first_ptr, last_ptr, between_ptr,
    length, channels, prefix, max_run, threshold, per_image, image_stride, token_stride,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of tokens: which are like their predecessors; its first and last break, −1 if none,
    counted through the batch, and how many runs begin from the one up to the other.
    """
    program = tl.program_id(0)
    image = (program // per_image).to(tl.int64)
    token = (program % per_image) * TOKENS + tl.arange(0, TOKENS)
    here = token < length
    after = here & (token > prefix)
    row = x_ptr + image * image_stride + token.to(tl.int64) * token_stride
    product = tl.full((TOKENS,), 0.0, tl.float32)
    square = tl.full((TOKENS,), 0.0, tl.float32)
    square_before = tl.full((TOKENS,), 0.0, tl.float32)
    for start in range(0, channels, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = after[:, None] & (column < channels)[None, :]
        at = row[:, None] + column[None, :]
        value = tl.load(at, mask, 0.0).to(tl.float32)
        before = tl.load(at - token_stride, mask, 0.0).to(tl.float32)
        product += tl.sum(value * before, 1)
        square += tl.sum(value * value, 1)
        square_before += tl.sum(before * before, 1)
    norm = tl.maximum(tl.sqrt(square), 1e-8) * tl.maximum(tl.sqrt(square_before), 1e-8)
    alike = after & (product / norm >= threshold)
    position = image * length + token
    tl.store(alike_ptr + position, alike.to(tl.int8), here)
    breaks = here & (alike == 0)
    first = tl.min(tl.where(breaks, position, (image + 1) * length), 0)
    last = tl.max(tl.where(breaks, position, -1), 0)
    before, _ = breaks_of(position, breaks, first)
    runs = tl.where(breaks, (position - before + max_run - 1) // max_run, 0)
    tl.store(first_ptr + program, tl.where(last < 0, -1, first))
    tl.store(last_ptr + program, last)
    tl.store(between_ptr + program, tl.sum(runs, 0))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def runs_before(
    first_ptr, last_ptr, between_ptr, block, image_block, max_run, BLOCKS: tl.constexpr
):
    """Of the chain that is open where a block begins: its break and the number of its first run;
    and how many runs the images before have.
    """
    open_break, runs, earlier = block * 0, block * 0, block * 0
    for start in range(0, block + 1, BLOCKS):
        number = start + tl.arange(0, BLOCKS)
        there = number <= block
        first = tl.load(first_ptr + number, there, -1)
        last = tl.load(last_ptr + number, there, -1)
        # the last break before each block: of the block before, or the greatest so far
        previous = tl.load(last_ptr + number - 1, there & (number > start), -1)
        before = tl.maximum(tl.associative_scan(previous, 0, larger), open_break)
        closing = tl.where(first >= 0, (first - before + max_run - 1) // max_run, 0)
        between = tl.load(between_ptr + number, there, 0)
        whole = tl.where(number < block, closing + between, 0)
        runs += tl.sum(whole, 0)
        part = tl.where(number < image_block, whole, tl.where(number == image_block, closing, 0))
        earlier += tl.sum(part, 0)
        open_break = tl.maximum(open_break, tl.max(tl.where(number < block, last, -1), 0))
    return open_break, runs, earlier


@triton.jit
def end_of_last(alike_ptr, begin, block_end, end, max_run, BLOCK: tl.constexpr):
    """Where the run that begins at `begin`, and is open at the end of its block, ends."""
    limit = tl.minimum(begin + max_run, end)
    stop, start = limit, block_end
    while (start < limit) & (stop == limit):
        position = start + tl.arange(0, BLOCK)
        inside = position < limit
        breaks = inside & (tl.load(alike_ptr + position, inside, 1) == 0)
        stop = tl.min(tl.where(breaks, position, limit), 0)
        start += BLOCK
    return stop


@triton.jit
def number_block(
    alike_ptr, token, position, length, image_end, block_end, open_break, runs, max_run,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens: which begin a run, of how many tokens, the run of each, counted through
    the batch; then the chain that is open behind the block.
    """
    here = token < length
    breaks = here & (tl.load(alike_ptr + position, here, 1) == 0)
    before, own = breaks_of(position, breaks, open_break)
    closed = tl.where(breaks, (position - before + max_run - 1) // max_run, 0)
    row = runs + tl.cumsum(closed, 0) + (position - own) // max_run
    begins = here & ((position - own) % max_run == 0)
    last = tl.max(tl.where(begins, position, block_end - max_run), 0)
    stop = end_of_last(alike_ptr, last, block_end, image_end, max_run, TOKENS)
    later = begins[None, :] & (position[None, :] > position[:, None])
    following = tl.min(tl.where(later, position[None, :], stop), 1)
    open_break = tl.max(tl.where(breaks, position, open_break), 0)
    return begins, (following - position).to(tl.int32), row, open_break, runs + tl.sum(closed, 0)


@Kernel
def merge(
    x_ptr, size_ptr, alike_ptr, first_ptr, last_ptr, between_ptr, begin_ptr, count_ptr,
    out_ptr, out_size_ptr, index_ptr, offsets_ptr,
    images, length, channels, max_run, per_image, per_program, programs,
    image_stride, token_stride, image_size_stride, size_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_MEMBERS: tl.constexpr, ALL_CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Some blocks of an image, one after another: number the runs, write those that begin there."""
    program = tl.program_id(0)
    image = (program // programs).to(tl.int64)
    begin = (program % programs) * per_program
    open_break, runs, earlier = runs_before(
        first_ptr,
        last_ptr,
        between_ptr,
        image * per_image + begin,
        image * per_image,
        max_run,
        1024,
    )
    image_begin, image_end = image * length, (image + 1) * length
    x, sizes = x_ptr + image * image_stride, size_ptr
    if size_ptr is not None:
        sizes = size_ptr + image * image_size_stride
    for block in range(begin, tl.minimum(begin + per_program, per_image)):
        token = block * TOKENS + tl.arange(0, TOKENS)
        here, position = token < length, image_begin + token
        block_end = tl.minimum(image_begin + (block + 1) * TOKENS, image_end)
        begins, count, row, open_break, runs = number_block(
            alike_ptr, token, position, length, image_end, block_end, open_break, runs, max_run,
            TOKENS,
        )  # fmt: skip
        row -= earlier
        tl.store(index_ptr + position, row if PADDED else earlier + row, here)
        tl.store(begin_ptr + image_begin + row, token, begins)
        tl.store(count_ptr + image_begin + row, count, begins)
        rows = tl.max(tl.where(here, row, 0), 0) + 1
        if block == 0:
            tl.store(offsets_ptr + image, earlier)
        if (block == per_image - 1) & (image == images - 1):
            tl.store(offsets_ptr + images, earlier + rows)
        tl.debug_barrier()
        many = tl.sum(begins.to(tl.int32), 0)
        all_rows = tl.sum(here.to(tl.int32), 0) if PADDED else many
        cleared = rows - (block_end - image_begin) + length
        target = image_begin if PADDED else earlier
        for start in range(0, all_rows, ROWS):
            number = start + tl.arange(0, ROWS)
            slot = rows - many + number
            place = target + tl.where(number < many, slot, cleared + number - many)
            write_runs(
                x, sizes, begin_ptr + image_begin + slot, count_ptr + image_begin + slot,
                number < many, out_ptr, out_size_ptr, place, number < all_rows,
                channels, token_stride, size_stride,
                ROWS, MEMBERS, WIDTH, ALL_MEMBERS, ALL_CHANNELS,
            )  # fmt: skip


@triton.jit
def write_runs(
    x, sizes, begin_ptr, count_ptr, known, out_ptr, out_size_ptr, place, written,
    channels, token_stride, size_stride,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_MEMBERS: tl.constexpr, ALL_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The means of some runs to their rows; zeros where a run is not `known`."""
    begin, count = tl.load(begin_ptr, known, 0)[:, None], tl.load(count_ptr, known, 0)
    for start in range(0, WIDTH if ALL_CHANNELS else channels, WIDTH):
        mean = tl.full((ROWS, WIDTH), 0.0, tl.float32)
        total = tl.full((ROWS,), 0.0, tl.float32)
        for first in range(0, MEMBERS if ALL_MEMBERS else tl.max(count, 0), MEMBERS):
            member = first + tl.arange(0, MEMBERS)[None, :]
            here = member < count[:, None]
            value = tile_of(x, begin + member, token_stride, here, start, channels, WIDTH)
            size = tl.where(here, 1.0, 0.0)
            if sizes is not None:
                size = tl.load(sizes + (begin + member).to(tl.int64) * size_stride, here, 0.0)
                weight = tl.where(count[:, None] == 1, 1.0, size)
                value *= weight[:, :, None]
            mean += tl.sum(value, 1)
            total += tl.sum(size, 1)
        mean /= tl.where(count > 1, total, 1.0)[:, None]
        column = start + tl.arange(0, WIDTH)
        at = out_ptr + place[:, None] * channels + column[None, :]
        store(at, mean, written[:, None] & (column < channels)[None, :])
        if start == 0:
            tl.store(out_size_ptr + place, total, written)


def merge_runs(
    x: Tensor, threshold: float, max_run: int, size: Tensor | None, prefix: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded without synchronisation; packed with one, for the total."""
    (images, length, channels), device = x.shape, x.device
    rows = images * length
    tokens = x.new_empty((rows, channels))
    size_out = torch.empty(rows, dtype=torch.float32, device=device)
    index = torch.empty((images, length), dtype=torch.int64, device=device)
    offsets = torch.empty(images + 1, dtype=torch.int64, device=device)
    if rows == 0:
        offsets.zero_()
    else:
        outputs = tokens, size_out, index, offsets
        _launch_both(aligned(x), threshold, min(max_run, length), size, prefix, padded, outputs)
    if padded:
        size_out = size_out.view(images, length)
        return tokens.view(images, length, channels), size_out, index, offsets
    if rows > 0:
        rows = to_host(offsets[-1:]).tolist()[0]
    return tokens[:rows], size_out[:rows], index, offsets


def _launch_both(
    x: Tensor, threshold: float, max_run: int, size: Tensor | None, prefix: int, padded: bool,
    outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    (images, length, channels), device = x.shape, x.device
    config = TABLE.choose(x.element_size(), channels, capability(device))
    per_image = blocks(length, config.blocks["TOKENS"])
    alike = torch.empty((images, length), dtype=torch.int8, device=device)
    begin, count = torch.empty((2, images, length), dtype=torch.int32, device=device)
    breaks = torch.empty((3, images * per_image), dtype=torch.int64, device=device)
    launch(
        compare, (images * per_image,), x, alike, *breaks,
        length, channels, prefix, max_run, threshold, per_image, x.stride(0), x.stride(1),
        config=config, aligned=is_aligned(channels),
    )  # fmt: skip
    shape = tile(min(max_run, MEMBERS), x)
    per_program = blocks(per_image, max(1, MOST_PROGRAMS // images))
    programs = blocks(per_image, per_program)
    launch(
        merge, (images * programs,), x, size, alike, *breaks, begin, count, *outputs,
        images, length, channels, max_run, per_image, per_program, programs,
        x.stride(0), x.stride(1), *((0, 0) if size is None else size.stride()),
        config=shape, aligned=is_aligned(channels), TOKENS=config.blocks["TOKENS"],
        PADDED=padded, **whole(shape, max_run, channels),
    )  # fmt: skip
