"""The search among packed codes: for few dimensions product by product in float32; for more on
tensor cores, whose best candidates are then scored again exactly.

An approximate score is off by at most
‖x−x₁−x₂‖·E + ‖x‖·E₀ + ‖x₂‖·E₂ + (n·D + 64)·2⁻²³·‖x‖·E + 2⁻²⁰·E² + 2⁻¹⁶·|score|: what packing
left of the token and of the codes (E, E₀, E₂ the largest lengths of codes, of what is left of
them, of their second parts), n products of D terms summed with truncation, the codes' own squares,
and the bits that name the column (which make up to 2⁻¹⁴³ of a score of 0). Twice that is the
window: only a code whose score lies within it of the best can be the nearest. `scan` keeps the best
codes of the two best blocks and the highest of all other scores; where that lies within the window,
`rescan` goes through the codes once more and scores exactly whatever is inside it. So the index is
that of the highest exact score, of equal ones the lowest, whatever the blocks.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from tokenkernels.triton._codes import BIG, PREPARED, is_finite, load_chunk, products, rounded
from tokenkernels.triton._launch import INTERPRETED, Config, Entry, Table, capability
from tokenkernels.triton._math import dot


def _wide(rows: int, codes: int, width: int, stages: int) -> Config:
    return Config({"ROWS": rows, "CODES": codes, "WIDTH": width}, 4, stages)


NARROW_TABLE = Table(
    [
        Entry(Config({"ROWS": 4, "CODES": 64, "WIDTH": 16}, 1, 1), capability=100),
        Entry(Config({"ROWS": 8, "CODES": 64, "WIDTH": 16}, 1, 1)),
    ],
    "One warp: 8 rows share every code that a lane loads; on sm_100 8 rows spill, so 4.",
)
"""One warp: 8 rows share every code that a lane loads, and their components stay in registers. On
sm_100 8 rows spill.
"""
WIDE_TABLE = Table(
    [
        Entry(_wide(64, 64, 32, 3), width=32),
        Entry(_wide(64, 64, 64, 3), width=64),
        Entry(_wide(64, 64, 64, 2), width=128),
        Entry(_wide(64, 64, 64, 2), width=256, bytes=(2,), capability=90),
        Entry(_wide(64, 64, 32, 2), width=256, capability=90),
        Entry(_wide(64, 32, 32, 2), width=256, bytes=(2,)),
        Entry(_wide(64, 64, 128, 2), bytes=(2,), capability=90),
        Entry(_wide(64, 32, 128, 1), capability=90),
        Entry(_wide(32, 32, 64, 2), width=256),
        Entry(_wide(32, 32, 64, 1)),
    ],
    "64 × 64 is the least that keeps wgmma busy, and lets two programs share a multiprocessor.",
)
"""By bytes: 2 for one part of 16 bits, 4 for two. Tokens and a block of codes in shared memory in
their whole width; 64 × 64 is the least that keeps wgmma busy, and leaves room for two programs on a
multiprocessor up to 256 dimensions (two parts: 128).
"""


def config_of(
    parts: int, dim: int, device: torch.device, wide: Table = WIDE_TABLE,
    narrow: Table = NARROW_TABLE,
) -> Config:  # fmt: skip
    """Blocks for codes packed in so many parts. From sm_120 on there is less shared memory."""
    arch = capability(device)
    table = wide if parts else narrow
    config = table.choose(2 * max(parts, 1), dim, arch if arch < 120 else 89)
    if INTERPRETED and not parts:  # numpy is fastest with few large blocks
        return replace(config, blocks=config.blocks | {"ROWS": 64, "CODES": 128})
    return config


@triton.jit
def operands_of(
    rows, here, dim, dim_stride, centre_ptr, TYPE: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """First parts and second parts of x − μ, chunk by chunk; the lengths of x − μ, of its second
    part, of what is left; which rows are finite.
    """
    ROWS: tl.constexpr = rows.shape[0]
    firsts = ()
    seconds = ()
    length = tl.zeros((ROWS,), tl.float32)
    second = length
    left = length
    broken = length
    for c in tl.static_range(CHUNKS):
        x = load_chunk(rows, here, c * WIDTH, dim, dim_stride, WIDTH)
        broken += tl.sum(x * 0.0, 1)
        x -= tl.load(centre_ptr + c * WIDTH + tl.arange(0, WIDTH))[None, :]
        x = tl.where(is_finite(x), x, 0.0)
        length += tl.sum(x * x, 1)
        first = rounded(x, TYPE)
        x -= first
        firsts = firsts + (first.to(TYPE),)  # type: ignore[assignment]  # noqa: RUF005
        if PARTS == 2:
            second += tl.sum(x * x, 1)
            first = rounded(x, TYPE)
            x -= first
            seconds = seconds + (first.to(TYPE),)  # type: ignore[assignment]  # noqa: RUF005
        left += tl.sum(x * x, 1)
    return firsts, seconds, tl.sqrt(length), tl.sqrt(second), tl.sqrt(left), broken == 0.0


@triton.jit
def bounds_of(bounds_ptr, programs):
    """The largest of what the programs of `prepare` found."""
    lane = tl.arange(0, 128)
    length = tl.zeros((128,), tl.float32)
    left = tl.zeros((128,), tl.float32)
    second = tl.zeros((128,), tl.float32)
    for first in range(0, programs, 128):
        at = bounds_ptr + (first + lane) * 4
        here = first + lane < programs
        length = tl.maximum(length, tl.load(at, here, 0.0))
        left = tl.maximum(left, tl.load(at + 1, here, 0.0))
        second = tl.maximum(second, tl.load(at + 2, here, 0.0))
    return tl.max(length, 0), tl.max(left, 0), tl.max(second, 0)


@triton.jit
def scores_of(
    firsts, seconds, packed_ptr, terms_ptr, k, padded,
    METRIC: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Approximate scores of a block of codes."""
    column = tl.arange(0, CODES)
    d = tl.arange(0, WIDTH)
    tile = packed_ptr + tl.cast(k, tl.int64) * (WIDTH * CHUNKS)
    at = column[None, :] * (WIDTH * CHUNKS) + d[:, None]
    acc = tl.zeros((firsts[0].shape[0], CODES), tl.float32)
    for c in tl.static_range(CHUNKS):
        e = tl.load(tile + (at + c * WIDTH))
        if PARTS == 2:
            f = tl.load(tile + padded.to(tl.int64) * (WIDTH * CHUNKS) + (at + c * WIDTH))
            acc = dot(firsts[c], f, acc)
            acc = dot(seconds[c], e, acc)
        acc = dot(firsts[c], e, acc)
    bias = tl.load(terms_ptr + padded + k + column)
    if METRIC == "cosine":
        return acc * tl.load(terms_ptr + k + column)[None, :] + bias[None, :]
    return acc + bias[None, :]


@triton.jit
def scan(
    firsts, seconds, packed_ptr, terms_ptr, begin, end, padded,
    METRIC: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best code of each of the two best blocks, and the highest of all other scores. The low
    bits of a score give way to its column, so one maximum finds both.
    """
    ROWS: tl.constexpr = firsts[0].shape[0]
    column = tl.arange(0, CODES)[None, :]
    best = tl.full((ROWS,), -3e38, tl.float32)
    next = best
    other = best
    best_at = tl.zeros((ROWS,), tl.int32)
    next_at = best_at
    for k in range(begin, end, CODES):
        s = scores_of(
            firsts, seconds, packed_ptr, terms_ptr, k, padded, METRIC, PARTS, CODES, WIDTH, CHUNKS
        )
        s = ((s.to(tl.int32, bitcast=True) & -CODES) | column).to(tl.float32, bitcast=True)
        top = tl.max(s, 1)
        runner = tl.max(tl.where(s == top[:, None], -3e38, s), 1)
        at = k + (top.to(tl.int32, bitcast=True) & (CODES - 1))
        other = tl.maximum(other, tl.maximum(runner, tl.minimum(next, top)))
        first = top > best
        second = (top > next) & ~first
        next_at = tl.where(first, best_at, tl.where(second, at, next_at))
        next = tl.where(first, best, tl.where(second, top, next))
        best_at = tl.where(first, at, best_at)
        best = tl.where(first, top, best)
    return best, best_at, next, next_at, other


@triton.jit
def exact_scores(
    rows, dim_stride, book, code, need, code_stride, book_dim_stride, terms_ptr, dim,
    METRIC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """−‖x−e‖², the cosine times ‖x‖, or ⟨x, e⟩ of one code per row, from the values given."""
    codes = book + code.to(tl.int64) * code_stride
    score = tl.zeros(code.shape, tl.float32)
    for first in range(0, dim, WIDTH):
        x = load_chunk(rows, need, first, dim, dim_stride, WIDTH)
        e = load_chunk(codes, need, first, dim, book_dim_stride, WIDTH)
        if METRIC == "l2":
            score -= products(x - e, x - e)
        else:
            score += products(x, e)
    if METRIC == "cosine":
        score *= tl.load(terms_ptr + code, need, 0.0)
    return tl.where(score == score, score, -float("inf"))


@triton.jit
def window_of(best, length, second, left, bounds_ptr, padded, dim, METRIC, PARTS):
    """Twice the bound above."""
    most, most_left, most_second = bounds_of(bounds_ptr, padded // PREPARED)
    error = left * most + (length + left) * most_left
    if PARTS == 2:
        error += second * most_second
    error += ((2 * PARTS - 1) * dim + 64) * 1.2e-7 * length * most + 1.6e-5 * tl.abs(best)
    if METRIC == "l2":
        error += 1e-6 * most * most
    return 2.02 * error + 1e-40


@triton.jit
def search_wide(
    rows, here, dim_stride, book, code_stride, book_dim_stride,
    packed_ptr, terms_ptr, centre_ptr, bounds_ptr, begin, end, padded, dim, always,
    METRIC: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best code of every row among [begin, end), and its exact score where there was a choice
    or `always`. Rows are given by pointers; one that is not finite gets code 0.
    """
    firsts, seconds, length, second, left, whole = operands_of(
        rows, here, dim, dim_stride, centre_ptr, packed_ptr.dtype.element_ty, PARTS, WIDTH, CHUNKS
    )
    best, index, next, next_at, other = scan(
        firsts, seconds, packed_ptr, terms_ptr, begin, end, padded,
        METRIC, PARTS, CODES, WIDTH, CHUNKS,
    )  # fmt: skip
    window = window_of(best, length, second, left, bounds_ptr, padded, dim, METRIC, PARTS)
    usable = here & whole & (best > -0.5 * BIG) & (window < BIG)
    floor = best - window
    index = tl.where(usable, index, 0)
    choice = usable & (next >= floor)
    score = exact_scores(
        rows, dim_stride, book, index, tl.where(always, usable, choice), code_stride,
        book_dim_stride, terms_ptr, dim, METRIC, WIDTH,
    )  # fmt: skip
    if tl.max(choice.to(tl.int32), 0) > 0:
        other_score = exact_scores(
            rows, dim_stride, book, next_at, choice, code_stride, book_dim_stride, terms_ptr, dim,
            METRIC, WIDTH,
        )  # fmt: skip
        better = (other_score > score) | ((other_score == score) & (next_at < index))
        score = tl.where(choice & better, other_score, score)
        index = tl.where(choice & better, next_at, index)
    unsure = usable & (other >= floor)
    if tl.max(unsure.to(tl.int32), 0) > 0:
        floor = tl.where(unsure, floor, 3e38)
        score = tl.where(unsure, -float("inf"), score)
        for k in range(begin, end, CODES):
            s = scores_of(
                firsts, seconds, packed_ptr, terms_ptr, k, padded,
                METRIC, PARTS, CODES, WIDTH, CHUNKS,
            )  # fmt: skip
            column = tl.arange(0, CODES)[None, :]
            at = tl.min(tl.where(s >= floor[:, None], column, CODES), 1)
            while tl.min(at, 0) < CODES:
                again = exact_scores(
                    rows, dim_stride, book, k + at, at < CODES, code_stride, book_dim_stride,
                    terms_ptr, dim, METRIC, WIDTH,
                )  # fmt: skip
                better = (at < CODES) & (again > score)
                score = tl.where(better, again, score)
                index = tl.where(better, k + at, index)
                rest = (s >= floor[:, None]) & (column > at[:, None])
                at = tl.min(tl.where(rest, column, CODES), 1)
    return index, tl.where(usable, score, -float("inf"))


@triton.jit
def search_narrow(
    xs, packed_ptr, terms_ptr, begin, end, padded,
    METRIC: tl.constexpr, DIM: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """The best code of every row among [begin, end), and its score. xs: DIM components, centred.

    Every lane keeps its best over all blocks; lanes are compared once, at the end.
    """
    ROWS: tl.constexpr = xs[0].shape[0]
    column = tl.arange(0, CODES)
    best = tl.full((ROWS, CODES), -BIG, tl.float32)
    found = tl.zeros((ROWS, CODES), tl.int32)
    for k in range(begin, end, CODES):
        bias = tl.load(terms_ptr + padded + k + column)
        s = tl.broadcast_to(bias[None, :], (ROWS, CODES))
        for d in tl.static_range(DIM):
            e = tl.load(packed_ptr + d * padded.to(tl.int64) + k + column)
            s = tl.fma(
                tl.broadcast_to(xs[d][:, None], (ROWS, CODES)),
                tl.broadcast_to(e[None, :], (ROWS, CODES)),
                s,
            )
        if METRIC == "cosine":
            s *= tl.load(terms_ptr + k + column)[None, :]
        better = s > best
        best = tl.where(better, s, best)
        found = tl.where(better, k, found)
    score = tl.max(best, 1)
    first = tl.min(tl.where(best == score[:, None], found + column[None, :], 2147483647), 1)
    usable = (score > -0.5 * BIG) & (score < 3e38)
    return tl.where(usable, first, 0), tl.where(usable, score, -float("inf"))
