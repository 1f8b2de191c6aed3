"""assign_residual in Triton: `prepare` packs all codebooks, then one launch runs whole chains.

A program takes a block of tokens through every round. Up to 16 dimensions what is left over stays
in registers; beyond, in a float32 buffer of its own, which is small enough to stay in the cache.
Programs go on to further blocks of tokens, so those buffers do not grow with their number.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._codes import NARROW, PREPARED, load_chunk, pack, row_offsets, rows_of
from tokenkernels.triton._launch import Config, Entry, Kernel, Table, blocks, launch
from tokenkernels.triton._math import store
from tokenkernels.triton._search import config_of, search_narrow, search_wide


def _wide(rows: int, codes: int, stages: int, warps: int = 4) -> Config:
    return Config({"ROWS": rows, "CODES": codes, "WIDTH": 32}, warps, stages)


NARROW_TABLE = Table(
    [
        Entry(Config({"ROWS": 4, "CODES": 64, "WIDTH": 16}, 1, 1), capability=100),
        Entry(Config({"ROWS": 8, "CODES": 64, "WIDTH": 16}, 1, 1), 8),
        Entry(Config({"ROWS": 4, "CODES": 64, "WIDTH": 16}, 1, 1, 255)),
    ],
    "One warp: 8 rows share every code that a lane loads; of more than 8 components 4 rows.",
)
WIDE_TABLE = Table(
    [
        Entry(_wide(64, 32, 2, 8), 256, capability=100),
        Entry(_wide(64, 64, 3), 64),
        Entry(_wide(64, 64, 2), 128),
        Entry(_wide(64, 64, 2, 8), 256, capability=90),
        Entry(_wide(64, 32, 1), capability=90),
        Entry(_wide(32, 32, 2), 256),
        Entry(_wide(32, 32, 1)),
    ],
    "As one search, but 32 components at a time to save registers; 8 warps where 4 would spill.",
)
PROGRAMS = 264
"""Two for each multiprocessor of an H200."""
SCRATCH = 32_000_000
"""Bytes that their buffers may take where results are smaller."""


@Kernel
def chain_narrow(
    x_ptr, books_ptr, packed_ptr, terms_ptr, centre_ptr, index_ptr, residual_ptr,
    rows, rounds, dim, padded,
    n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride, group_stride, x_dim_stride,
    round_stride, code_stride, dim_stride,
    METRIC: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """All rounds of ROWS tokens, one vector per component."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = row_offsets(row, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride)
    rest = ()
    for d in tl.static_range(DIM):
        inside = row < tl.where(d < dim, rows, 0)
        x = tl.load(x_ptr + offsets + d * tl.cast(x_dim_stride, tl.int64), inside, 0.0)
        rest = rest + (x.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for round in range(0, rounds):
        near = ()
        whole = row < rows
        for d in tl.static_range(DIM):
            whole = whole & (rest[d] * 0.0 == 0.0)
            mu = tl.load(centre_ptr + round * DIM + d)
            near = near + (rest[d] - mu,)  # type: ignore[assignment]  # noqa: RUF005
        index, _ = search_narrow(
            near, packed_ptr + tl.cast(round, tl.int64) * padded * DIM,
            terms_ptr + tl.cast(round, tl.int64) * 2 * padded, 0, padded, padded,
            METRIC, DIM, CODES,
        )  # fmt: skip
        index = tl.where(whole, index, 0).to(tl.int64)
        tl.store(index_ptr + row * rounds + round, index, row < rows)
        codes = books_ptr + tl.cast(round, tl.int64) * round_stride + index * code_stride
        less = ()
        for d in tl.static_range(DIM):
            inside = row < tl.where(d < dim, rows, 0)
            e = tl.load(codes + d * tl.cast(dim_stride, tl.int64), inside, 0.0).to(tl.float32)
            less = less + (rest[d] - e,)  # type: ignore[assignment]  # noqa: RUF005
        rest = less
    for d in tl.static_range(DIM):
        inside = row < tl.where(d < dim, rows, 0)
        store(residual_ptr + row * dim + d, rest[d], inside)


@Kernel
def chain_wide(
    x_ptr, books_ptr, packed_ptr, terms_ptr, centre_ptr, bounds_ptr, rest_ptr, index_ptr,
    residual_ptr,
    rows, rounds, dim, padded,
    n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride, group_stride, x_dim_stride,
    round_stride, code_stride, dim_stride,
    METRIC: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    CODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All rounds of ROWS tokens, then of the next that this program takes."""
    DIM: tl.constexpr = WIDTH * CHUNKS
    lane = tl.arange(0, ROWS).to(tl.int64)
    rest = rest_ptr + (tl.program_id(0) * ROWS + lane) * DIM
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + lane
        here = row < rows
        offsets = row_offsets(row, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride)
        for column in range(0, DIM, WIDTH):
            x = load_chunk(x_ptr + offsets, here, column, dim, x_dim_stride, WIDTH)
            tl.store(rest[:, None] + (column + tl.arange(0, WIDTH))[None, :], x)
        tl.debug_barrier()
        for round in range(0, rounds):
            wide = tl.cast(round, tl.int64)
            book = books_ptr + wide * round_stride
            index, _ = search_wide(
                rest, here, 1, book, code_stride, dim_stride,
                packed_ptr + wide * padded * (PARTS * DIM), terms_ptr + wide * 2 * padded,
                centre_ptr + round * DIM, bounds_ptr + wide * (padded // PREPARED * 4),
                0, padded, padded, dim, False,
                METRIC, PARTS, CODES, WIDTH, CHUNKS,
            )  # fmt: skip
            tl.store(index_ptr + row * rounds + round, index.to(tl.int64), here)
            codes = book + index.to(tl.int64) * code_stride
            tl.debug_barrier()
            for column in range(0, DIM, WIDTH):
                d = (column + tl.arange(0, WIDTH))[None, :]
                x = tl.load(rest[:, None] + d)
                x -= load_chunk(codes, here, column, dim, dim_stride, WIDTH)
                tl.store(rest[:, None] + d, x)
            tl.debug_barrier()
        for column in range(0, DIM, WIDTH):
            d = (column + tl.arange(0, WIDTH))[None, :]
            target = residual_ptr + row[:, None] * dim + d
            store(target, tl.load(rest[:, None] + d), here[:, None] & (d < dim))
        tl.debug_barrier()


def assign_residual(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Any strides are read in place; more than four leading dimensions that do not fold into one
    another are copied.
    """
    rounds, _, dim = codebooks.shape
    rows = rows_of(x, False)
    index = torch.empty((*x.shape[:-1], rounds), dtype=torch.int64, device=x.device)
    residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows.number:
        return index, residual
    parts = 0 if dim <= NARROW else 2
    config = config_of(parts, dim, x.device, WIDE_TABLE, NARROW_TABLE)
    packed = pack(codebooks, "l2", parts, config.blocks["WIDTH"], 0)
    programs = blocks(rows.number, config.blocks["ROWS"])
    sizes = (rows.number, rounds, dim, packed.padded, *rows.layout, *codebooks.stride())
    if not parts:
        launch(
            chain_narrow, (programs,),
            rows.x, codebooks, packed.codes, packed.terms, packed.centre, index, residual, *sizes,
            config=config, **packed.constants,
        )  # fmt: skip
        return index, residual
    buffer = config.blocks["ROWS"] * packed.centre.shape[1]
    most = max(SCRATCH, index.nbytes + residual.nbytes) // (4 * buffer)
    programs = max(1, min(programs, PROGRAMS, most))
    launch(
        chain_wide, (programs,),
        rows.x, codebooks, packed.codes, packed.terms, packed.centre, packed.bounds,
        torch.empty((programs, buffer), dtype=torch.float32, device=x.device), index, residual,
        *sizes, config=config, **packed.constants,
    )  # fmt: skip
    return index, residual
