"""Which windows of a grid merge, and the output row of every token, in closed form.

A unit is a window, or what an edge cuts off of one. `cells` counts units, `along` whole windows,
`steps` the members of one: in all, in a step along the first axis, in a step along the second.
"""

import triton
import triton.language as tl

from tokenkernels.triton._select import bar_of, ordered


@triton.jit
def place_of(number, counts):
    """Where a unit lies among the cells, or a member in its window, on each axis."""
    rest = number % counts[1]
    return number // counts[1], rest // counts[2], rest % counts[2]


@triton.jit
def tokens_of(unit_place, member_place, window, grid):
    """The number on the grid of the first member of each unit, how much further each is, and which
    lie inside.
    """
    i, j, k = unit_place
    di, dj, dk = member_place
    i, j, k = i * window[0], j * window[1], k * window[2]
    inside = (di < (grid[0] - i)[:, None]) & (dj < (grid[1] - j)[:, None])
    inside &= dk < (grid[2] - k)[:, None]
    return (i * grid[1] + j) * grid[2] + k, (di * grid[1] + dj) * grid[2] + dk, inside


@triton.jit
def fewest(counts_ptr, images, windows, shares, IMAGES: tl.constexpr, SHARES: tl.constexpr):
    """The least count of an image, each the sum of its shares."""
    least = windows
    share = tl.arange(0, SHARES)
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        there = (image < images)[:, None] & (share < shares)[None, :]
        at = counts_ptr + (image * shares)[:, None] + share[None, :]
        each = tl.sum(tl.load(at, there, 0), 1)
        least = tl.minimum(least, tl.min(tl.where(image < images, each, windows), 0))
    return least


@triton.jit
def sum_of(counts_ptr, first, last, BLOCK: tl.constexpr):
    """The sum of the counts `first` … `last`."""
    total = first * 0
    for start in range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(counts_ptr + number, number < last, 0).to(tl.int64), 0)
    return total


@triton.jit
def rank_of(similarity_ptr, window, there, windows, RIVALS: tl.constexpr):
    """The place of some windows by descending similarity, equals by number, NaN last."""
    place = tl.full(window.shape, 0, tl.int32)
    key = ordered(tl.load(similarity_ptr + window, there, 0.0))[:, None]
    for first in range(0, windows, RIVALS):
        number = first + tl.arange(0, RIVALS)[None, :]
        inside = number < windows
        other = ordered(tl.load(similarity_ptr + number, inside, 0.0))
        above = (other > key) | ((other == key) & (number < window[:, None]))
        place += tl.sum((inside & above).to(tl.int32), 1)
    return place


@triton.jit
def count_merging(
    similarity_ptr, before_ptr, windows, k, threshold,
    BLOCK: tl.constexpr, FEW: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Writes how many windows merge before each one, and in all: the k best, or by threshold.

    FEW windows, one block of them, are ranked by comparing all; of more, the bar is sought.
    """
    bar, take = tl.full((), 0, tl.uint32), 0
    if RANKED and not FEW:
        bar, take, _ = bar_of(similarity_ptr, 1, None, windows, k, BLOCK, 0)
    merging, equal_before = 0, 0
    for first in range(0, windows, BLOCK):
        number = first + tl.arange(0, BLOCK)
        inside = number < windows
        if RANKED and FEW:
            merges = inside & (rank_of(similarity_ptr, number, inside, windows, 4096 // BLOCK) < k)
        elif RANKED:
            key = ordered(tl.load(similarity_ptr + number, inside, 0.0))
            equal = (inside & (key == bar)).to(tl.int32)
            rank = equal_before + tl.cumsum(equal, 0)
            merges = inside & ((key > bar) | ((equal > 0) & (rank <= take)))
            equal_before += tl.sum(equal, 0)
        else:
            merges = inside & (tl.load(similarity_ptr + number, inside, 0.0) >= threshold)
        one = merges.to(tl.int32)
        tl.store(before_ptr + number, merging + tl.cumsum(one, 0) - one, inside)
        merging += tl.sum(one, 0)
    tl.store(before_ptr + windows, merging)
    return merging


@triton.jit
def rows_of(
    corner, token, unit_place, member_place, before_ptr, similarity_ptr, merging, along, steps,
    BY_SIMILARITY: tl.constexpr,
):  # fmt: skip
    """The output row of each member of each unit, and which units merge.

    A token's row is its number, less the members of merging windows before it, and one more for
    each merged token before it. Both follow from how many windows merge before the first one of the
    unit's slab (all windows of one place on the first axis) and of the next, of its row and of the
    next, before its own and the next. A unit that is cut off stands between windows.
    """
    i, j, k = unit_place
    di, dj, dk = member_place
    slab = tl.minimum(i * along[1], along[0])
    next_slab = tl.minimum(slab + along[1], along[0])
    row = tl.minimum(slab + j * along[2], next_slab)
    next_row = tl.minimum(row + along[2], next_slab)
    number = tl.minimum(row + k, next_row)
    own = tl.load(before_ptr + number)
    following = tl.load(before_ptr + tl.minimum(number + 1, next_row))
    slab, next_slab = tl.load(before_ptr + slab), tl.load(before_ptr + next_slab)
    row, next_row = tl.load(before_ptr + row), tl.load(before_ptr + next_row)
    merges = following > own
    in_slab, in_row = steps[1] * (next_slab - slab), steps[2] * (next_row - row)
    gone = steps[0] * slab + steps[1] * (row - slab) + steps[2] * (own - row)
    lost = gone[:, None] + di * in_slab[:, None] + dj * in_row[:, None]
    place = token - (lost + dk * (following - own)[:, None])
    if BY_SIMILARITY:
        place += merging
        first = rank_of(similarity_ptr, number, merges, along[0], 64)
    else:
        come = tl.where(dk > 0, following[:, None], own[:, None])
        come = tl.where(di > 0, next_slab[:, None], tl.where(dj > 0, next_row[:, None], come))
        place += come
        first = corner - gone + own
    return tl.where(merges[:, None], first[:, None], place), merges


@triton.jit
def places_of(
    unit, member, before_ptr, similarity_ptr, merging, cells, along, window, steps, grid,
    prefix, BY_SIMILARITY: tl.constexpr,
):  # fmt: skip
    """Of each member of each unit: its token of the image, its output row, whether it exists; and
    which units merge. Behind the units of the grid come stretches of the prefix.
    """
    unit_place, member_place = place_of(unit, cells), place_of(member, steps)
    corner, further, inside = tokens_of(unit_place, member_place, window, grid)
    token = corner[:, None] + further
    row, merges = rows_of(
        corner, token, unit_place, member_place, before_ptr, similarity_ptr, merging, along, steps,
        BY_SIMILARITY,
    )  # fmt: skip
    front = ((unit - cells[0]) * steps[0])[:, None] + member
    in_front = (unit >= cells[0])[:, None]
    here = tl.where(in_front, front < prefix, inside) & (member < steps[0])
    token = tl.where(in_front, front, prefix + token)
    return token, tl.where(in_front, front, prefix + row), here, merges
