"""What the kernels of vector quantisation share: rows in any layout, sums whose order is fixed,
and the codebook packed for the search.

Rows are read in place whatever their strides. No sum runs along a loaded axis but in the order
that `total` and `products` spell out, so bits do not depend on how a load was compiled.

Packed, a code is e−μ (l2; μ lies near the codes) or e: float32 with the codes side by side for few
dimensions, else one number of the input's 16 bits or two of bfloat16 for every component. What
that leaves over is measured, and bounds the error of every approximate score.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import INTERPRETED, Config, Kernel, blocks, launch
from tokenkernels.triton._math import halves, store, total

NARROW = 16
"""Up to so many dimensions products are taken one by one, in float32."""
PAD = 128
"""Packed codebooks are filled up to a multiple of the widest block of codes."""
PREPARED = tl.constexpr(128 if INTERPRETED else 32)
"""Codes per program of `prepare`; numpy is fastest with few programs."""
FEW_CODES = "32 codes a program: a codebook is small, and all multiprocessors should take part."
CENTRE_CODES = tl.constexpr(64)
AT_ONCE = tl.constexpr(8)
BIG = tl.constexpr(1e38)
"""No score is as low as −BIG but that of a code which must not win."""


@triton.jit
def products(a, b):
    """Σ a·b over the columns, by halves; which product is fused into which sum is fixed too."""
    a0, a1 = halves(a)
    b0, b1 = halves(b)
    return total(tl.fma(a0, b0, a1 * b1))


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """The nearest number of 16 bits, as float32; beyond float16 its largest."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def is_finite(x):
    return x * 0.0 == 0.0


@triton.jit
def row_offsets(row, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride):
    """Where rows begin that are counted through four leading dimensions."""
    offset = (row % n3) * x3_stride
    row = row // n3
    offset += (row % n2) * x2_stride
    row = row // n2
    return offset + (row % n1) * x1_stride + (row // n1) * x0_stride


@triton.jit
def load_chunk(rows, here, first, dim, dim_stride, WIDTH: tl.constexpr):
    """Columns [first, first + WIDTH) of rows that are given by pointers, as float32."""
    d = first + tl.arange(0, WIDTH).to(tl.int64)
    mask = here[:, None] & (d < dim)[None, :]
    return tl.load(rows[:, None] + (d * dim_stride)[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def spaced_codes(book, codes, code_stride, at, d, dim, dim_stride):
    """Components d of AT_ONCE of the CENTRE_CODES evenly spaced codes, and which are finite."""
    count = tl.minimum(codes, CENTRE_CODES)
    number = at + tl.arange(0, AT_ONCE).to(tl.int64)
    rows = book + (number * codes // count) * code_stride
    there = (d < dim)[:, None] & (number < count)[None, :]
    x = tl.load(rows[None, :] + (d * dim_stride)[:, None], there, 0.0).to(tl.float32)
    good = is_finite(x) & (number < count)[None, :]
    return tl.where(good, x, 0.0), good


@triton.jit
def find_centre(book, codes, code_stride, first, dim, dim_stride, HALF: tl.constexpr, WIDTH):
    """WIDTH components of the mean of some evenly spaced codes, as far as they are finite.

    With 16 bits only of components that lie far from 0 beside how they vary, and rounded: then
    most differences to it are exact (Sterbenz), as the numbers themselves are.
    """
    d = first + tl.arange(0, WIDTH).to(tl.int64)
    sums = tl.zeros((WIDTH, AT_ONCE), tl.float32)
    seen = tl.zeros((WIDTH, AT_ONCE), tl.float32)
    for at in range(0, CENTRE_CODES, AT_ONCE):
        x, good = spaced_codes(book, codes, code_stride, at, d, dim, dim_stride)
        sums += x
        seen += good.to(tl.float32)
    count = tl.maximum(tl.sum(seen, 1), 1.0)
    mean = total(sums) / count
    if HALF:
        apart = tl.zeros((WIDTH, AT_ONCE), tl.float32)
        for at in range(0, CENTRE_CODES, AT_ONCE):
            x, good = spaced_codes(book, codes, code_stride, at, d, dim, dim_stride)
            off = tl.where(good, x - mean[:, None], 0.0)
            apart = tl.fma(off, off, apart)
        far = mean * mean * count > 16.0 * total(apart)
        mean = tl.where(far, rounded(mean, book.dtype.element_ty), 0.0)
    return tl.where(is_finite(mean), mean, 0.0)


@Kernel
def prepare(
    book_ptr, packed_ptr, terms_ptr, centre_ptr, bounds_ptr, tickets_ptr,
    dim, size, codes, padded, group_tickets,
    group_stride, code_stride, dim_stride,
    METRIC: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """CODES codes: packed; factor and bias of their scores; the largest of their lengths, of what
    packing left over, and of their second parts. Clears the tickets of the search.
    """
    programs = padded // CODES
    group, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    code = program * CODES + tl.arange(0, CODES).to(tl.int64)
    here = code < codes
    book = book_ptr + group * group_stride
    squares = tl.zeros((CODES,), tl.float32)
    left = tl.zeros((CODES,), tl.float32)
    second = tl.zeros((CODES,), tl.float32)
    broken = tl.zeros((CODES,), tl.float32)
    packed = packed_ptr + group * padded * DIM * (2 if PARTS == 2 else 1)
    for first in range(0, size, WIDTH):
        d = first + tl.arange(0, WIDTH)
        e = load_chunk(book + code * code_stride, here, first, dim, dim_stride, WIDTH)
        broken += tl.sum(e * 0.0, 1)
        e = tl.where(is_finite(e), e, 0.0)
        centre = tl.zeros((WIDTH,), tl.float32)
        if METRIC == "l2":
            centre = find_centre(book, codes, code_stride, first, dim, dim_stride, HALF, WIDTH)
            e = tl.where(here[:, None], e - centre[None, :], 0.0)
        if program == 0:
            tl.store(centre_ptr + group * DIM + d, centre, d < DIM)
        squares += products(e, e)
        if PARTS == 0:
            at = d[None, :].to(tl.int64) * padded + code[:, None]
            tl.store(packed + at, e, (d < DIM)[None, :])
        else:
            at = code[:, None] * DIM + d[None, :]
            for part in tl.static_range(PARTS):
                piece = rounded(e, packed_ptr.dtype.element_ty)
                store(packed + part * padded * DIM + at, piece, None)
                e -= piece
                if part == 1:
                    second += tl.sum(piece * piece, 1)
            left += tl.sum(e * e, 1)
    factor = tl.full((CODES,), 1.0, tl.float32)
    bias = tl.zeros((CODES,), tl.float32)
    if METRIC == "cosine":
        factor = 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)
    if METRIC == "l2":
        bias = -0.5 * squares
    usable = here & (broken == 0.0) & (bias > -BIG) & is_finite(squares)
    terms = terms_ptr + group * 2 * padded + code
    tl.store(terms, tl.where(usable, factor, 1.0))
    never = -float("inf") if PARTS == 0 else -BIG  # in parts the low bits name a column
    tl.store(terms + padded, tl.where(usable, bias, never))
    factor = tl.where(usable, factor, 0.0)
    bound = bounds_ptr + tl.program_id(0) * 4
    tl.store(bound, tl.max(factor * tl.sqrt(squares), 0))
    tl.store(bound + 1, tl.max(factor * tl.sqrt(left), 0))
    tl.store(bound + 2, tl.max(factor * tl.sqrt(second), 0))
    for first in range(program * CODES, group_tickets, padded):
        ticket = first + tl.arange(0, CODES)
        zero = tl.zeros((CODES,), tl.int32)
        tl.store(tickets_ptr + group * group_tickets + ticket, zero, ticket < group_tickets)


class Packed(NamedTuple):
    """What `prepare` leaves behind, and how it is laid out."""

    codes: Tensor
    terms: Tensor  # (G, 2, padded): factor and bias of every code's score
    centre: Tensor  # (G, DIM)
    bounds: Tensor  # (G, programs, 4)
    tickets: Tensor  # (G, row blocks)
    padded: int
    constants: dict[str, Any]
    """METRIC; PARTS and CHUNKS, or DIM for few dimensions."""


def pack(books: Tensor, metric: str, parts: int, width: int, tickets: int) -> Packed:
    """Launches `prepare` on codebooks (G, K, D); parts 0: for few dimensions."""
    groups, codes, dim = books.shape
    padded = blocks(codes, PAD) * PAD
    size = blocks(dim, width) * width if parts else blocks(dim, 4) * 4
    dtype = torch.float32 if not parts else torch.bfloat16 if parts == 2 else books.dtype
    device = books.device
    packed = Packed(
        torch.empty(groups * max(parts, 1) * padded * size, dtype=dtype, device=device),
        torch.empty((groups, 2, padded), dtype=torch.float32, device=device),
        torch.empty((groups, size), dtype=torch.float32, device=device),
        torch.empty((groups, padded // PREPARED.value, 4), dtype=torch.float32, device=device),
        torch.empty((groups, tickets), dtype=torch.int32, device=device),
        padded,
        {"METRIC": metric}
        | ({"PARTS": parts, "CHUNKS": size // width} if parts else {"DIM": size}),
    )
    step = width if INTERPRETED else min(width, 32)
    launch(
        prepare, (groups * (padded // PREPARED.value),),
        books, packed.codes, packed.terms, packed.centre, packed.bounds, packed.tickets,
        dim, size, codes, padded, tickets, *books.stride(),
        config=Config({"CODES": PREPARED.value, "WIDTH": step}, 4, 1, 168, FEW_CODES),
        METRIC=metric, HALF=books.dtype != torch.float32 and parts == 1, PARTS=parts, DIM=size,
    )  # fmt: skip
    return packed


class Rows(NamedTuple):
    """Tokens in place: how many per group, and the arguments that `row_offsets` wants."""

    x: Tensor
    number: int
    layout: tuple[int, ...]
    """n1, n2, n3; the strides of the four leading dimensions, of groups, of components."""


def rows_of(x: Tensor, grouped: bool) -> Rows:
    """Folds the leading dimensions of (…, D) or (…, G, D) to four; more are copied."""
    own = 2 if grouped else 1
    count = x.shape[:-own].numel()
    folded: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-own], x.stride()[:-own], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 4:
        return rows_of(x.contiguous(), grouped)
    folded = [(1, 0)] * (4 - len(folded)) + folded
    sizes = tuple(size for size, _ in folded[1:])
    group = x.stride(-2) if grouped else 0
    return Rows(x, count, (*sizes, *(stride for _, stride in folded), group, x.stride(-1)))
