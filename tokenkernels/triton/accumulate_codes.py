"""accumulate_codes in Triton: a stable counting sort of the tokens by code, then sums in order.

Four launches: `rank` counts the codes of up to 64 chunks of tokens, each chunk by one program in
order, and notes the place of every token among those of its code; `scan` turns counts into where
every code begins (its last program joins what the others found); `place` writes where the rows of
each code lie, in order; `add` walks along these lists, a tile of codes at a time and eight tokens
ahead, so even a single code that took all tokens keeps loads in flight. Only integers are placed,
every sum runs in ascending order: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._codes import row_offsets, rows_of
from tokenkernels.triton._launch import Config, Entry, Kernel, Table, blocks, capability, launch

CHUNKS = 64
TABLE_ENTRIES = 1 << 22
"""Of the table of counts, chunks by codes: 16 MB."""
RANKED = Config({"TOKENS": 128}, 4, 1, reason="A token per thread.")
SCANNED = Config({"CODES": 512}, 4, 1, reason="Four counts, 16 bytes, per thread.")
ADDED = Table(
    [
        Entry(Config({"CODES": 32, "WIDTH": 16}, 4, 1), width=16),
        Entry(Config({"CODES": 16, "WIDTH": 64}, 4, 1), width=64),
        Entry(Config({"CODES": 8, "WIDTH": 128}, 4, 1), capability=90),
        Entry(Config({"CODES": 8, "WIDTH": 128}, 4, 1), bytes=(1, 2)),
        Entry(Config({"CODES": 4, "WIDTH": 128}, 4, 1)),
    ],
    "By width: tokens ahead in 16-byte loads, sums in registers; fewer where sm_80 spills.",
)


@triton.jit
def codes_of(index_ptr, token, end, n1, n2, n3, s0, s1, s2, s3, codes):
    """The codes of tokens, and which of them are any."""
    at = index_ptr + row_offsets(token, n1, n2, n3, s0, s1, s2, s3)
    code = tl.load(at, token < end, -1)
    counted = (code >= 0) & (code < codes)
    return tl.where(counted, code, -1).to(tl.int32), counted


@Kernel
def rank(
    index_ptr, table_ptr, rank_ptr, ticket_ptr,
    rows, codes, chunks, chunk,
    n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride, group_stride, last_stride,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens: the count of every code, and each token's place among its like."""
    group, part = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    table = table_ptr + tl.program_id(0).to(tl.int64) * codes
    lane = tl.arange(0, TOKENS)
    for first in range(0, codes, 8 * TOKENS):
        code = first + tl.arange(0, 8 * TOKENS)
        tl.store(table + code, tl.zeros((8 * TOKENS,), tl.int32), code < codes)
    if part == 0:
        tl.store(ticket_ptr + group, 0)
    tl.debug_barrier()
    index = index_ptr + group * group_stride
    end = tl.minimum((part + 1).to(tl.int64) * chunk, rows)
    for first in range(part.to(tl.int64) * chunk, end, TOKENS):
        token = first + lane.to(tl.int64)
        code, counted = codes_of(
            index, token, end, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride, codes
        )
        same = (code[:, None] == code[None, :]).to(tl.int32)
        before = tl.sum(tl.where(lane[None, :] < lane[:, None], same, 0), 1)
        after = tl.sum(tl.where(lane[None, :] > lane[:, None], same, 0), 1)
        seen = tl.load(table + code, counted, 0) + before
        tl.store(rank_ptr + group * rows + token, seen, counted)
        tl.debug_barrier()
        tl.store(table + code, seen + 1, counted & (after == 0))
        tl.debug_barrier()


@Kernel
def scan(
    table_ptr, counts_ptr, begin_ptr, block_ptr, ticket_ptr,
    codes, chunks,
    CODES: tl.constexpr,
):  # fmt: skip
    """CODES codes: counts of chunks → of all tokens before; where every code begins, counted from
    the first of these codes. The last program of a group adds up what lies before every block.
    """
    programs = tl.cdiv(codes, CODES)
    group, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    code = program * CODES + tl.arange(0, CODES)
    here = code < codes
    count = tl.zeros((CODES,), tl.int32)
    for part in range(0, chunks):
        at = table_ptr + (group * chunks + part) * codes + code
        here_now = tl.load(at, here, 0)
        tl.store(at, count, here)
        count += here_now
    tl.store(counts_ptr + group * codes + code, count.to(tl.int64), here)
    tl.store(begin_ptr + group * codes + code, tl.cumsum(count, 0) - count, here)
    block = block_ptr + group * programs
    tl.store(block + program, tl.sum(count, 0))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr + group, 1) == programs - 1:
        tl.debug_barrier()
        before = 0
        for first in range(0, programs, CODES):
            at = first + tl.arange(0, CODES)
            size = tl.load(block + at, at < programs, 0, volatile=True)
            tl.store(block + at, tl.cumsum(size, 0) - size + before, at < programs)
            before += tl.sum(size, 0)


@Kernel
def place(
    index_ptr, table_ptr, rank_ptr, begin_ptr, block_ptr, order_ptr,
    rows, codes, chunks, chunk, scanned,
    n1, n2, n3, i0_stride, i1_stride, i2_stride, i3_stride, group_stride, last_stride,
    m1, m2, m3, x0_stride, x1_stride, x2_stride, x3_stride, x_group_stride, x_dim_stride,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """A block of tokens: where each begins goes to its place in the list of its code."""
    programs = tl.cdiv(rows, TOKENS)
    group, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    code, counted = codes_of(
        index_ptr + group * group_stride, token, rows, n1, n2, n3,
        i0_stride, i1_stride, i2_stride, i3_stride, codes,
    )  # fmt: skip
    blocks = tl.cdiv(codes, scanned)
    at = tl.load(block_ptr + group * blocks + code // scanned, counted, 0)
    at += tl.load(begin_ptr + group * codes + code, counted, 0)
    at += tl.load(table_ptr + (group * chunks + token // chunk) * codes + code, counted, 0)
    at += tl.load(rank_ptr + group * rows + token, counted, 0)
    offsets = row_offsets(token, m1, m2, m3, x0_stride, x1_stride, x2_stride, x3_stride)
    tl.store(order_ptr + group * rows + at, offsets, counted)


@Kernel
def add(
    x_ptr, counts_ptr, begin_ptr, block_ptr, order_ptr, sums_ptr,
    rows, codes, dim, scanned, group_stride, dim_stride,
    CODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH components of the sums of CODES codes."""
    columns, ranges = tl.cdiv(dim, WIDTH), tl.cdiv(codes, CODES)
    program = tl.program_id(0).to(tl.int64)
    group = program // (columns * ranges)
    d = program % columns * WIDTH + tl.arange(0, WIDTH)
    code = program // columns % ranges * CODES + tl.arange(0, CODES)
    here, inside = code < codes, (d < dim)[None, :]
    count = tl.load(counts_ptr + group * codes + code, here, 0)
    first = tl.load(begin_ptr + group * codes + code, here, 0)
    first += tl.load(block_ptr + group * tl.cdiv(codes, scanned) + code // scanned, here, 0)
    order = order_ptr + group * rows + first
    x = x_ptr + group * group_stride + (d * dim_stride)[None, :]
    sums = tl.zeros((CODES, WIDTH), tl.float32)
    for step in range(0, tl.max(count, 0), 8):
        for ahead in tl.static_range(8):
            there = step + ahead < count
            row = tl.load(order + step + ahead, there, 0)
            value = tl.load(x + row[:, None], there[:, None] & inside, 0.0).to(tl.float32)
            sums = tl.where(there[:, None], sums + value, sums)
    target = sums_ptr + (group * codes + code)[:, None] * dim + d[None, :]
    tl.store(target, sums, here[:, None] & inside)


def accumulate_codes(x: Tensor, index: Tensor, codes: int, grouped: bool) -> tuple[Tensor, Tensor]:
    """Any strides are read in place; an index out of range counts nowhere."""
    groups, dim = x.shape[-2] if grouped else 1, x.shape[-1]
    shape = (groups, codes) if grouped else (codes,)
    device = x.device
    counts = torch.empty(shape, dtype=torch.int64, device=device)
    sums = torch.empty((*shape, dim), dtype=torch.float32, device=device)
    if not groups:
        return counts, sums
    tokens, numbers = rows_of(x, grouped), rows_of(index.unsqueeze(-1), grouped)
    rows, span = tokens.number, RANKED.blocks["TOKENS"]
    chunks = max(1, min(CHUNKS, blocks(rows, span), TABLE_ENTRIES // (groups * codes)))
    chunk = blocks(blocks(rows, chunks), span) * span
    scanned = SCANNED.blocks["CODES"]

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    table, ranks = ints(groups, chunks, codes), ints(groups, rows)
    order = torch.empty((groups, rows), dtype=torch.int64, device=device)
    begin, block, ticket = ints(groups, codes), ints(groups, blocks(codes, scanned)), ints(groups)
    launch(
        rank, (groups * chunks,), numbers.x, table, ranks, ticket, rows, codes, chunks,
        max(chunk, 1), *numbers.layout, config=RANKED,
    )  # fmt: skip
    launch(
        scan, (block.numel(),), table, counts, begin, block, ticket, codes, chunks, config=SCANNED
    )
    launch(
        place, (groups * blocks(rows, span),), numbers.x, table, ranks, begin, block, order,
        rows, codes, chunks, max(chunk, 1), scanned, *numbers.layout, *tokens.layout,
        config=RANKED,
    )  # fmt: skip
    config = ADDED.choose(x.element_size(), dim, capability(device))
    programs = groups * blocks(codes, config.blocks["CODES"]) * blocks(dim, config.blocks["WIDTH"])
    launch(
        add, (programs,), tokens.x, counts, begin, block, order, sums,
        rows, codes, dim, scanned, *tokens.layout[-2:], config=config,
    )  # fmt: skip
    return counts, sums
