"""merge_adjacent in Triton: measure all windows, then place and write every token, two launches.

The first reads x once: a tile holds whole windows over all channels, so that norms and ‖Σû‖² come
out of registers (channels beyond a tile go through memory, in a second pass of the same program).
In the second each program decides for its image which windows merge (radix selection of the few
similarities, or their threshold), counts those before every window, and takes its share of the
units: windows, windows cut off by an edge, stretches of the prefix. The count gives every token's
row in closed form; a unit's tile, most likely still in the L2, leaves as it came or as its mean.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton import _fill
from tokenkernels.triton._launch import (
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
from tokenkernels.triton._math import at_run_time, store
from tokenkernels.triton._merge import tile, tile_of, whole
from tokenkernels.triton._windows import (
    count_merging,
    fewest,
    place_of,
    places_of,
    sum_of,
    tokens_of,
)

DECIDE_TABLE = Table(
    [
        Entry(Config({"BLOCK": 64}), width=64),
        Entry(Config({"BLOCK": 256}), width=256),
        Entry(Config({"BLOCK": 1024})),
    ],
    "All windows of most images in one block, so that they are ranked in registers.",
)
FEW = 256
"""Windows, at most a block, up to which each is compared with all."""
MOST_SHARES = 64
"""Programs of an image that count what reaches the threshold."""


@Kernel
def measure(
    x_ptr, inverse_ptr, similarity_ptr, counts_ptr,
    grid, window, steps, along, tokens, channels, threshold, tiles, programs,
    image_stride, token_stride,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_MEMBERS: tl.constexpr, ALL_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean pairwise cosine of every window, and how many of a program's share reach the
    threshold. Where a tile does not hold all channels, 1/‖x‖ of every token is noted first.
    """
    program = tl.program_id(0)
    image, share = (program // programs).to(tl.int64), program % programs
    grid, window = at_run_time(grid), at_run_time(window)
    steps, along = at_run_time(steps), at_run_time(along)
    windows, members = along[0], steps[0]
    x = x_ptr + image * image_stride
    found = tl.full((ROWS,), 0, tl.int32)
    for step in range(share, tiles, programs):
        unit = step * ROWS + tl.arange(0, ROWS)
        place, there = place_of(unit, along), unit < windows
        alike = tl.full((ROWS,), 0.0, tl.float32)
        own = tl.full((ROWS,), 0.0, tl.float32)
        if not ALL_CHANNELS:
            for first in range(0, MEMBERS if ALL_MEMBERS else members, MEMBERS):
                member = first + tl.arange(0, MEMBERS)[None, :]
                corner, further, _ = tokens_of(place, place_of(member, steps), window, grid)
                token = corner[:, None] + further
                here = there[:, None] & (member < members)
                square = tl.full((ROWS, MEMBERS), 0.0, tl.float32)
                for start in range(0, channels, WIDTH):
                    value = tile_of(x, token, token_stride, here, start, channels, WIDTH)
                    square += tl.sum(value * value, 2)
                inverse = 1.0 / tl.maximum(tl.sqrt(square), 1e-8)
                own += tl.sum(square * inverse * inverse, 1)
                tl.store(inverse_ptr + image * tokens + token, inverse, here)
            tl.debug_barrier()
        for start in range(0, WIDTH if ALL_CHANNELS else channels, WIDTH):
            total = tl.full((ROWS, WIDTH), 0.0, tl.float32)
            for first in range(0, MEMBERS if ALL_MEMBERS else members, MEMBERS):
                member = first + tl.arange(0, MEMBERS)[None, :]
                corner, further, _ = tokens_of(place, place_of(member, steps), window, grid)
                token = corner[:, None] + further
                here = there[:, None] & (member < members)
                value = tile_of(x, token, token_stride, here, start, channels, WIDTH)
                if not ALL_CHANNELS:
                    inverse = tl.load(inverse_ptr + image * tokens + token, here, 0.0)
                else:
                    square = tl.sum(value * value, 2)
                    inverse = 1.0 / tl.maximum(tl.sqrt(square), 1e-8)
                    own += tl.sum(square * inverse * inverse, 1)
                total += tl.sum(value * inverse[:, :, None], 1)
            alike += tl.sum(total * total, 1)
        alike = (alike - own) / (members.to(tl.float32) * (members - 1).to(tl.float32))
        tl.store(similarity_ptr + image * windows + unit, alike, there)
        found += (there & (alike >= threshold)).to(tl.int32)
    if counts_ptr is not None:
        tl.store(counts_ptr + program, tl.sum(found, 0))


@Kernel
def merge(
    x_ptr, size_ptr, similarity_ptr, counts_ptr, before_ptr,
    out_ptr, out_size_ptr, index_ptr, offsets_ptr,
    grid, window, steps, cells, along, images, length, prefix, channels,
    k, threshold, shares, tiles, programs,
    image_stride, token_stride, image_size_stride, size_stride,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_MEMBERS: tl.constexpr, ALL_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, FEW: tl.constexpr,
    RANKED: tl.constexpr, UNIFORM: tl.constexpr, PACKED: tl.constexpr, BY_SIMILARITY: tl.constexpr,
):  # fmt: skip
    """Program `share` of `programs` of an image: decide, place its units, write their rows."""
    program = tl.program_id(0)
    image, share = (program // programs).to(tl.int64), program % programs
    grid, window, cells = at_run_time(grid), at_run_time(window), at_run_time(cells)
    steps, along = at_run_time(steps), at_run_time(along)
    windows, members = along[0], steps[0]
    if UNIFORM:
        k = fewest(counts_ptr, images, windows, shares, 32, 64)
    elif RANKED and counts_ptr is not None:
        k = tl.load(counts_ptr + image).to(tl.int32)
    gone = sum_of(counts_ptr, image * 0, image * shares, 1024) if PACKED else image * k
    similarity, before = similarity_ptr + image * windows, before_ptr + image * (windows + 1)
    merging = count_merging(similarity, before, windows, k, threshold, BLOCK, FEW, RANKED)
    base = image * length - gone * (members - 1)
    out, out_size = out_ptr + base * channels, out_size_ptr + base
    if share == 0:
        tl.store(offsets_ptr + image + 1, base + length - merging * (members - 1))
        if image == 0:
            tl.store(offsets_ptr, image)
    tl.debug_barrier()
    x, index = x_ptr + image * image_stride, index_ptr + image * length
    sizes = size_ptr
    if size_ptr is not None:
        sizes = size_ptr + image * image_size_stride
    for step in range(share, tiles, programs):
        unit = step * ROWS + tl.arange(0, ROWS)
        for start in range(0, WIDTH if ALL_CHANNELS else channels, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < channels
            mean = tl.full((ROWS, WIDTH), 0.0, tl.float32)
            total = tl.full((ROWS,), 0.0, tl.float32)
            merged_row = tl.full((ROWS,), 0, tl.int32)
            merges = unit < 0
            for first in range(0, MEMBERS if ALL_MEMBERS else members, MEMBERS):
                member = first + tl.arange(0, MEMBERS)[None, :]
                token, row, here, merges = places_of(
                    unit, member, before, similarity, merging, cells, along, window, steps,
                    grid, prefix, BY_SIMILARITY,
                )  # fmt: skip
                alone = here & (merges == 0)[:, None]
                value = tile_of(x, token, token_stride, here, start, channels, WIDTH)
                at = out + row.to(tl.int64)[:, :, None] * channels + column[None, None, :]
                store(at, value, alone[:, :, None] & inside[None, None, :])
                size = tl.where(here, 1.0, 0.0)
                if size_ptr is not None:
                    size = tl.load(sizes + token.to(tl.int64) * size_stride, here, 0.0)
                    value *= size[:, :, None]
                mean += tl.sum(value, 1)
                total += tl.sum(size, 1)
                merged_row = tl.maximum(merged_row, tl.max(tl.where(here, row, 0), 1))
                if start == 0:
                    tl.store(index + token, (base + row) if PACKED else row, here)
                    tl.store(out_size + row, size, alone)
            at = out + merged_row.to(tl.int64)[:, None] * channels + column[None, :]
            store(
                at, mean / tl.where(merges, total, 1.0)[:, None], merges[:, None] & inside[None, :]
            )
            if start == 0:
                tl.store(out_size + merged_row, total, merges)


def merge_adjacent(
    x: Tensor, grid: list[int], window: list[int], threshold: float | None,
    counts: list[int] | None, dense: bool, size: Tensor | None, prefix: int, by_similarity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Dense, ragged or by threshold; with a threshold one synchronisation, for the total."""
    (images, length, channels), saved = x.shape, prod(window) - 1
    rows = images * length
    if counts is not None:
        rows -= saved * (images * counts[0] if dense else sum(counts))
    tokens = x.new_empty((rows, channels))
    size_out = torch.empty(rows, dtype=torch.float32, device=x.device)
    index = torch.empty((images, length), dtype=torch.int64, device=x.device)
    offsets = torch.empty(images + 1, dtype=torch.int64, device=x.device)
    if images == 0:
        offsets.zero_()
    else:
        outputs = tokens, size_out, index, offsets
        _launch_both(
            aligned(x), grid, window, threshold, counts, dense, size, prefix, by_similarity, outputs
        )
    if counts is None and images > 0:
        rows = to_host(offsets[-1:]).tolist()[0]
        tokens, size_out = tokens[:rows], size_out[:rows]
    if dense:
        each = rows // images if images else length - saved * (counts[0] if counts else 0)
        tokens, size_out = tokens.view(images, each, channels), size_out.view(images, each)
    return tokens, size_out, index, offsets


def _launch_both(
    x: Tensor, grid: list[int], window: list[int], threshold: float | None,
    counts: list[int] | None, dense: bool, size: Tensor | None, prefix: int, by_similarity: bool,
    outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    (images, length, channels), device = x.shape, x.device
    missing = [1] * (3 - len(grid))
    grid, window = [*missing, *grid], [*missing, *window]
    along = [extent // step for extent, step in zip(grid, window, strict=True)]
    windows = prod(along)
    if windows == 0:
        window, along = [1, 1, 1], [0, 0, 0]
    cells = [blocks(extent, step) for extent, step in zip(grid, window, strict=True)]
    members, units = prod(window), prod(cells)
    similarity = torch.empty((images, windows), dtype=torch.float32, device=device)
    before = torch.empty((images, windows + 1), dtype=torch.int32, device=device)

    config = tile(members, x)
    all_of = whole(config, members, channels)
    tiles = blocks(windows, config.blocks["ROWS"])
    shares = min(tiles, MOST_SHARES, max(1, PROGRAMS // images))
    found, inverse = None, None
    if threshold is not None:
        found = torch.empty((images, shares), dtype=torch.int32, device=device)
    if not all_of["ALL_CHANNELS"]:
        inverse = torch.empty((images, length - prefix), dtype=torch.float32, device=device)
    launch(
        measure, (images * shares,), x[:, prefix:], inverse, similarity, found,
        tuple(grid), tuple(window), _counts(window), _counts(along), length - prefix, channels,
        threshold or 0.0, tiles, shares, x.stride(0), x.stride(1),
        config=config, aligned=is_aligned(channels), **all_of,
    )  # fmt: skip

    if counts is not None and not dense:
        found, shares = _fill.integers(counts, device), 1
    block = DECIDE_TABLE.choose(4, windows, capability(device)).blocks
    tiles = blocks(units + blocks(prefix, members), config.blocks["ROWS"])
    programs = max(1, min(tiles, PROGRAMS // images))
    launch(
        merge, (images * programs,), x, size, similarity, found, before, *outputs,
        tuple(grid), tuple(window), _counts(window), _counts(cells), _counts(along),
        images, length, prefix, channels,
        counts[0] if counts else 0, threshold or 0.0, shares, tiles, programs,
        x.stride(0), x.stride(1), *((0, 0) if size is None else size.stride()),
        config=replace(config, blocks=config.blocks | block),
        aligned=is_aligned(channels), RANKED=dense or counts is not None,
        UNIFORM=dense and counts is None, PACKED=not dense, BY_SIMILARITY=by_similarity,
        FEW=windows <= FEW, **all_of,
    )  # fmt: skip


def _counts(extents: list[int]) -> tuple[int, int, int]:
    """All, those of a step along the first axis, those of a step along the second."""
    return prod(extents), extents[1] * extents[2], extents[2]
