"""What both passes of score_attention share: tiles of query rows, what each row sees, products with
keys.

A tile holds ROWS rows of each of HEADS heads that read one key head, so keys are read once for a
whole group.
"""

import triton
import triton.language as tl

from tokenkernels.triton._math import dot_as

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def length_of(lengths_ptr, image, length_step, keys):
    """How many keys an image has; none where its length is not allowed."""
    length = keys
    if lengths_ptr is not None:
        given = tl.load(lengths_ptr + image * length_step)
        length = tl.where((given >= 0) & (given <= keys), given, 0).to(tl.int32)
    return length


@triton.jit
def seen_by(
    row, here, positions_ptr, image, position_steps, length, rows, CAUSAL: tl.constexpr
):  # fmt: skip
    """How many keys each row sees; none where it is not here."""
    seen = tl.where(here, length, 0)
    if CAUSAL:
        if positions_ptr is not None:
            at = positions_ptr + image * position_steps[0] + row.to(tl.int64) * position_steps[1]
            position = tl.minimum(tl.load(at, here, -1), length).to(tl.int32)
        else:
            position = length - rows + row
        position = tl.maximum(tl.minimum(position, length - 1), -1)
        seen = tl.where(here, position + 1, 0)
    return seen


@triton.jit
def least_seen(
    head_tile, row_block, group, positions_ptr, length, rows,
    HEADS: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A number of keys that all rows of a tile are known to see without a look at them."""
    least = length
    if CAUSAL:
        least = length - rows + row_block * ROWS + 1
        if positions_ptr is not None:
            least = least * 0
    whole = (head_tile * HEADS + HEADS <= group) & (row_block * ROWS + ROWS <= rows)
    return tl.where(whole, least, 0)


@triton.jit
def place_of(head_tile, row_block, group, rows, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Head in its group and row of each line of a tile, and which are there."""
    line = tl.arange(0, HEADS * ROWS)
    head = head_tile * HEADS + line // ROWS
    row = row_block * ROWS + line % ROWS
    return head, row, (head < group) & (row < rows)


@triton.jit
def chunk(at, here, dim_stride, first, DIM: tl.constexpr):
    """DIM elements of some rows; zeros for rows that are not here."""
    d = first + tl.arange(0, DIM)
    inside = here[:, None] & (d < dim_stride)[None, :]
    return tl.load(at[:, None] + d[None, :], inside, 0.0)


@triton.jit
def products(
    left, left_here, right, right_here, dim_stride,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨left, right⟩ of rows longer than DIM, by their addresses: (LEFT, RIGHT)."""
    sums = tl.zeros((LEFT, RIGHT), tl.float32)
    for first in range(0, dim_stride, DIM):
        a = chunk(left, left_here, dim_stride, first, DIM)
        b = chunk(right, right_here, dim_stride, first, DIM)
        sums = dot_as(a, tl.trans(b), sums, PRECISION)
    return sums


@triton.jit
def attention_bits(value):
    """Attention as integers of the same order; NaN comes out on top, which a maximum of floats
    would lose.
    """
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def averaged(value, column, source, reach, pool):
    """Sums of `value` at `source` within reach of each column, over pool."""
    near = tl.abs(column[:, None] - source[None, :]) <= reach
    return tl.sum(tl.where(near, value[None, :], 0.0), 1) / pool
