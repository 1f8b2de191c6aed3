"""assign_nearest in Triton: `prepare` packs the codebook, then one launch searches it.

A program keeps its block of tokens on chip and streams the codes past it. Up to 16 dimensions it
multiplies in float32; beyond, on tensor cores, and scores the few candidates that are left exactly
(`_search`); no list of doubtful tokens, no third launch. Where there are fewer blocks of tokens
than multiprocessors the codes are split among programs, and the last to finish a block merges
what they found by exact scores, so bits do not depend on the split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._codes import (
    NARROW,
    PAD,
    PREPARED,
    Packed,
    Rows,
    load_chunk,
    pack,
    products,
    row_offsets,
    rows_of,
)
from tokenkernels.triton._launch import Config, Kernel, blocks, launch
from tokenkernels.triton._math import store
from tokenkernels.triton._search import config_of, search_narrow, search_wide

WARPS = 2112
"""Sixteen for each multiprocessor of an H200."""
MAX_SPLITS = 16


@triton.jit
def merge_splits(index, score, score_ptr, index_ptr, ticket_ptr, at, here, total, split, splits):
    """Publishes what this split found; the last to do so returns the best of all splits."""
    tl.store(score_ptr + split * total + at, score, here)
    tl.store(index_ptr + split * total + at, index, here)
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1) == splits - 1
    tl.debug_barrier()
    if last:
        best = tl.full(score.shape, -float("inf"), tl.float32)
        index = tl.zeros(index.shape, tl.int32)
        for s in range(0, splits):
            other = tl.load(score_ptr + s * total + at, here, 0.0, volatile=True)
            code = tl.load(index_ptr + s * total + at, here, 0, volatile=True)
            better = other > best
            best = tl.where(better, other, best)
            index = tl.where(better, code, index)
    return index, last


@triton.jit
def write(
    x_rows, book, index, at, here, index_ptr, distance_ptr, codes_ptr, dim,
    x_dim_stride, code_stride, dim_stride,
    METRIC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Index, distance from the values as they came, and code of every row."""
    tl.store(index_ptr + at, index.to(tl.int64), here)
    codes = book + index.to(tl.int64) * code_stride
    x_length = tl.full(index.shape, 1.0, tl.float32)
    e_length = x_length
    if distance_ptr is not None and METRIC == "cosine":
        x_length = tl.zeros(index.shape, tl.float32)
        e_length = x_length
        for first in range(0, dim, WIDTH):
            x = load_chunk(x_rows, here, first, dim, x_dim_stride, WIDTH)
            e = load_chunk(codes, here, first, dim, dim_stride, WIDTH)
            x_length += products(x, x)
            e_length += products(e, e)
        x_length, e_length = tl.sqrt(x_length), tl.sqrt(e_length)
    differ = (x_length > 1e-12) & (e_length > 1e-12)
    x_length = tl.where(x_length < 1e-12, 1e-12, x_length)
    e_length = tl.where(e_length < 1e-12, 1e-12, e_length)
    apart = tl.zeros(index.shape, tl.float32)
    along = apart
    for first in range(0, dim, WIDTH):
        e = load_chunk(codes, here, first, dim, dim_stride, WIDTH)
        if codes_ptr is not None:
            d = first + tl.arange(0, WIDTH)
            target = codes_ptr + at[:, None] * dim + d[None, :]
            store(target, e, here[:, None] & (d < dim)[None, :])
        if distance_ptr is not None:
            x = load_chunk(x_rows, here, first, dim, x_dim_stride, WIDTH)
            if METRIC == "cosine":
                x, e = x / x_length[:, None], e / e_length[:, None]
            if METRIC != "dot":
                apart += products(x - e, x - e)
            if METRIC != "l2":
                along += products(x, e)
    if distance_ptr is not None:
        if METRIC == "l2":
            tl.store(distance_ptr + at, apart, here)
        elif METRIC == "dot":
            tl.store(distance_ptr + at, -along, here)
        else:
            # Between vectors of length 1, ½‖x−e‖² loses no digits near 0.
            tl.store(distance_ptr + at, tl.where(differ, 0.5 * apart, 1.0 - along), here)


@Kernel
def search(
    x_ptr, book_ptr, packed_ptr, terms_ptr, centre_ptr, bounds_ptr, tickets_ptr,
    split_score_ptr, split_index_ptr, index_ptr, distance_ptr, codes_ptr,
    rows, groups, dim, padded, splits, split_codes,
    n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride, x_group_stride, x_dim_stride,
    group_stride, code_stride, dim_stride,
    METRIC: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one group against one part of its codes. PARTS 0: few dimensions, DIM."""
    row_blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0).to(tl.int64)
    block, split = program % row_blocks, program // row_blocks % splits
    group = program // (row_blocks * splits)
    row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    here = row < rows
    offsets = row_offsets(row, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride)
    x_rows = x_ptr + group * x_group_stride + offsets
    book = book_ptr + group * group_stride
    terms_ptr += group * 2 * padded
    begin = (split * split_codes).to(tl.int32)
    end = tl.minimum(begin + split_codes, padded)
    if PARTS == 0:
        xs = ()
        whole = here
        for d in tl.static_range(DIM):
            inside = row < tl.where(d < dim, rows, 0)
            x = tl.load(x_rows + d * tl.cast(x_dim_stride, tl.int64), inside, 0.0).to(tl.float32)
            whole = whole & (x * 0.0 == 0.0)
            mu = tl.load(centre_ptr + group * DIM + d)
            xs = xs + (x - mu,)  # type: ignore[assignment]  # noqa: RUF005
        index, score = search_narrow(
            xs, packed_ptr + group * padded * DIM, terms_ptr, begin, end, padded,
            METRIC, DIM, CODES,
        )  # fmt: skip
        score = tl.where(whole, score, -float("inf"))
        index = tl.where(whole, index, 0)
    else:
        index, score = search_wide(
            x_rows, here, x_dim_stride, book, code_stride, dim_stride,
            packed_ptr + group * padded * (PARTS * WIDTH * CHUNKS), terms_ptr,
            centre_ptr + group * (WIDTH * CHUNKS), bounds_ptr + group * (padded // PREPARED * 4),
            begin, end, padded, dim, splits > 1,
            METRIC, PARTS, CODES, WIDTH, CHUNKS,
        )  # fmt: skip
    at = row * groups + group
    done = splits == 1
    if splits > 1:
        index, done = merge_splits(
            index, score, split_score_ptr, split_index_ptr,
            tickets_ptr + group * row_blocks + block, at, here, groups * rows.to(tl.int64), split,
            splits,
        )  # fmt: skip
    if done:
        write(
            x_rows, book, index, at, here, index_ptr, distance_ptr, codes_ptr, dim,
            x_dim_stride, code_stride, dim_stride, METRIC, WIDTH,
        )  # fmt: skip


def split_of(warps: int, padded: int) -> tuple[int, int]:
    """How many parts, and how many codes in each: enough for every multiprocessor."""
    wanted = max(1, min(MAX_SPLITS, WARPS // warps, padded // (2 * PAD)))
    length = blocks(blocks(padded, wanted), PAD) * PAD
    return blocks(padded, length), length


def run(
    rows: Rows, books: Tensor, packed: Packed, config: Config,
    index: Tensor, distance: Tensor | None, codes: Tensor | None,
) -> None:  # fmt: skip
    """Launches `search`."""
    groups = books.shape[0]
    row_blocks = blocks(rows.number, config.blocks["ROWS"])
    splits, length = split_of(groups * row_blocks * config.warps, packed.padded)
    shape = (splits, rows.number, groups) if splits > 1 else (0,)
    launch(
        search, (groups * splits * row_blocks,),
        rows.x, books, packed.codes, packed.terms, packed.centre, packed.bounds, packed.tickets,
        torch.empty(shape, dtype=torch.float32, device=books.device),
        torch.empty(shape, dtype=torch.int32, device=books.device),
        index, distance, codes,
        rows.number, groups, books.shape[2], packed.padded, splits, length,
        *rows.layout, *books.stride(),
        config=config, **({"PARTS": 0, "CHUNKS": 1, "DIM": 0} | packed.constants),
    )  # fmt: skip


def assign_nearest(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Any strides are read in place; more than four leading dimensions that do not fold into one
    another are copied.
    """
    books = codebook if codebook.ndim == 3 else codebook[None]
    dim = books.shape[2]
    rows = rows_of(x, codebook.ndim == 3)
    parts = 0 if dim <= NARROW else 2 if x.dtype == torch.float32 else 1
    config = config_of(parts, dim, x.device)
    index = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    distance = torch.empty(
        x.shape[:-1] if return_distance else (0,), dtype=torch.float32, device=x.device
    )
    codes = torch.empty(x.shape if return_codes else (0,), dtype=x.dtype, device=x.device)
    if index.numel():
        tickets = blocks(rows.number, config.blocks["ROWS"])
        packed = pack(books, metric, parts, config.blocks["WIDTH"], tickets)
        run(
            rows, books, packed, config, index,
            distance if return_distance else None, codes if return_codes else None,
        )  # fmt: skip
    return index, distance, codes
