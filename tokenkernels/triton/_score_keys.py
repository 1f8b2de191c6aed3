"""How score_attention scores keys: a program owns a block of them and goes through the rows that
see it; and how shares of rows are joined.
"""

import triton
import triton.language as tl

from tokenkernels.triton._launch import Kernel
from tokenkernels.triton._math import dot_as
from tokenkernels.triton._score_measure import statistics
from tokenkernels.triton._score_tiles import (
    LOG2E,
    attention_bits,
    averaged,
    chunk,
    least_seen,
    length_of,
    place_of,
    products,
    seen_by,
)


@triton.jit
def rows_seeing(
    first, part, parts, rows, length, positions_ptr, ROWS: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """The blocks of rows of one part that may see the key `first`: the first one, and how many."""
    row_blocks = tl.cdiv(rows, ROWS)
    per_part = tl.cdiv(row_blocks, parts)
    begin = part * per_part
    end = tl.where(first < length, tl.minimum(begin + per_part, row_blocks), 0)
    if CAUSAL and positions_ptr is None:
        begin = tl.maximum(begin, tl.maximum(first + rows - length, 0) // ROWS)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def tile_of(
    query_ptr, key_at, known, key_head, key_tile, head, row, here, query_strides, key_strides,
    dim_stride, KEYS: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨key, query⟩ of a block of keys (if KEPT, `key_tile` has it) and a tile of rows."""
    at = query_ptr + head * query_strides[1] + row.to(tl.int64) * query_strides[2]
    source = key_at + tl.cast(key_head, tl.int64) * key_strides[1]
    if WHOLE:
        query = chunk(at, here, dim_stride, 0, DIM)
        if not KEPT:
            key_tile = chunk(source, known, dim_stride, 0, DIM)
        empty = tl.zeros((KEYS, head.shape[0]), tl.float32)
        logits = dot_as(key_tile, tl.trans(query), empty, PRECISION)
    else:
        logits = products(
            source, known, at, here, dim_stride, KEYS, head.shape[0], DIM, PRECISION
        )  # fmt: skip
    return logits


@triton.jit
def normaliser(
    lse_ptr, peak_ptr, total_ptr, image, heads, head, row, here, rows, splits, lse_steps,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """attention = 2^(logit − shift)·part of each row."""
    if lse_ptr is not None:
        at = lse_ptr + image * lse_steps[0] + head * lse_steps[1]
        shift = tl.load(at + row.to(tl.int64) * lse_steps[2], here, 0.0) * LOG2E
        part = tl.where(here, 1.0, 0.0)
    else:
        at = (image * heads + head) * rows + row
        shift, part = statistics(peak_ptr, total_ptr, at, here, splits, SPLITS)
    return shift, part


@triton.jit
def summed(attention, OUT: tl.constexpr):
    """Sums of each key over the rows of each of OUT heads."""
    KEYS: tl.constexpr = attention.shape[0]
    LINES: tl.constexpr = attention.shape[1]
    return tl.sum(tl.reshape(attention, (KEYS, OUT, LINES // OUT)), 2)


@triton.jit
def highest(attention, OUT: tl.constexpr):
    """The maximum over the same, as bits."""
    KEYS: tl.constexpr = attention.shape[0]
    LINES: tl.constexpr = attention.shape[1]
    return tl.max(tl.reshape(attention_bits(attention), (KEYS, OUT, LINES // OUT)), 2)


@triton.jit
def weighted(attention, weights_ptr, image, row, here, weight_steps):
    """Each row times its weight in the sum."""
    if weights_ptr is not None:
        at = weights_ptr + image * weight_steps[0] + row.to(tl.int64) * weight_steps[1]
        attention *= tl.load(at, here, 0.0)[None, :]
    return attention


@triton.jit
def write(out_ptr, value, column, inside, head, heads, reach, pool, columns, POOLED: tl.constexpr):
    """Scores (KEYS, heads), averaged over their neighbours, to the columns that are not halo."""
    if POOLED:
        value = tl.where(inside, tl.sum(value, 1), 0.0)
        value = averaged(value, column, column, reach, pool)[:, None]
    place = tl.arange(0, column.shape[0])
    own = inside & (place >= reach) & (place < column.shape[0] - reach)
    target = out_ptr + head[None, :] * columns + column[:, None]
    tl.store(target, value, own[:, None] & (head < heads)[None, :])


@Kernel
def score(
    query_ptr, key_ptr, positions_ptr, lengths_ptr, lse_ptr, peak_ptr, total_ptr, weights_ptr,
    out_ptr, factor, share, images, key_heads, group, rows, keys, splits, parts, first_column,
    columns, pool, units, unit_heads, unit_tiles, key_head_units, out_group,
    position_steps, length_step, lse_steps, weight_steps, query_strides, key_strides, dim_stride,
    KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, OUT: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr,
    MEAN_FIRST: tl.constexpr, CAUSAL: tl.constexpr, SUM: tl.constexpr, MAX: tl.constexpr,
    POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys of one unit (all heads, a key head, or OUT heads of one) of one image, for
    one of `parts` shares of the rows.
    """
    LINES: tl.constexpr = HEADS * ROWS
    reach = 0
    if POOLED:
        reach = pool // 2
    own = KEYS - 2 * reach
    program, unit_blocks = tl.program_id(0), tl.cdiv(columns, own)
    column = program % unit_blocks * own - reach + tl.arange(0, KEYS)
    part, program = program // unit_blocks % parts, program // unit_blocks // parts
    image, unit = (program // units).to(tl.int64), program % units
    head_first, tile_first = unit // key_head_units, unit % key_head_units
    inside, number = (column >= 0) & (column < columns), first_column + column
    length = length_of(lengths_ptr, image, length_step, keys)
    begin = first_column + tl.maximum(tl.min(column, 0), 0)
    row_first, row_count = rows_seeing(
        begin, part, parts, rows, length, positions_ptr, ROWS, CAUSAL
    )  # fmt: skip
    known = inside & (number < length)
    query_ptr += image * query_strides[0]
    key_at = key_ptr + image * key_strides[0] + number.to(tl.int64) * key_strides[2]
    total = tl.zeros((KEYS, OUT), tl.float32)
    top = tl.zeros((KEYS, OUT), tl.int32)
    if KEPT:
        outer_first, outer_count = head_first, unit_heads
        inner_first, inner_count = 0, unit_tiles * row_count
    else:
        outer_first, outer_count = row_first, row_count
        inner_first, inner_count = head_first * unit_tiles, unit_heads * unit_tiles
    for outer in range(outer_first, outer_first + outer_count):
        key_tile = None
        if KEPT:
            source = key_at + tl.cast(outer, tl.int64) * key_strides[1]
            key_tile = chunk(source, known, dim_stride, 0, DIM)
        mean = tl.zeros((KEYS, LINES), tl.float32)
        for inner in range(inner_first, inner_first + inner_count):
            if KEPT:
                key_head, tile, block = outer, inner // row_count, row_first + inner % row_count
            else:
                key_head, tile, block = inner // unit_tiles, inner % unit_tiles, outer
            tile += tile_first
            head, row, here = place_of(tile, block, group, rows, HEADS, ROWS)
            head = tl.cast(key_head, tl.int64) * group + head
            logits = tile_of(
                query_ptr, key_at, known, key_head, key_tile, head, row, here,
                query_strides, key_strides, dim_stride, KEYS, DIM, WHOLE, KEPT, PRECISION,
            )  # fmt: skip
            shift, one = normaliser(
                lse_ptr, peak_ptr, total_ptr, image, key_heads * group, head, row, here,
                rows, splits, lse_steps, SPLITS,
            )  # fmt: skip
            attention = tl.exp2(logits * factor - shift[None, :]) * (one * share)[None, :]
            least = least_seen(
                tile, block, group, positions_ptr, length, rows, HEADS, ROWS, CAUSAL
            )  # fmt: skip
            if begin + KEYS > least:
                seen = seen_by(
                    row, here, positions_ptr, image, position_steps, length, rows, CAUSAL
                )  # fmt: skip
                attention = tl.where(number[:, None] < seen[None, :], attention, 0.0)
            if MEAN_FIRST:
                mean += attention
            else:
                if MAX:
                    top = tl.maximum(top, highest(attention, OUT))
                if SUM:
                    attention = weighted(attention, weights_ptr, image, row, here, weight_steps)
                    total += summed(attention, OUT)
        if MEAN_FIRST:
            mean = tl.sum(tl.reshape(mean, (KEYS, HEADS, ROWS)), 1)
            top = tl.maximum(top, highest(mean, 1))
            if SUM:
                row = outer * ROWS + tl.arange(0, ROWS)
                mean = weighted(mean, weights_ptr, image, row, row < rows, weight_steps)
                total += summed(mean, 1)
    head = head_first * out_group + tile_first * OUT + tl.arange(0, OUT)
    heads = units // key_head_units * out_group
    results: tl.constexpr = SUM + MAX
    out_ptr += (part * results * images + image) * heads * columns
    if SUM:
        write(out_ptr, total, column, inside, head, heads, reach, pool, columns, POOLED)
    if MAX:
        out_ptr += (results - 1) * (images.to(tl.int64) * heads * columns)
        top = top.to(tl.float32, bitcast=True)
        write(out_ptr, top, column, inside, head, heads, reach, pool, columns, POOLED)


@Kernel
def finish(
    parts_ptr, out_ptr, parts, lines, totals, columns, pool,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one line of scores: its parts joined, then averaged over their neighbours.
    The first `totals` lines are sums, the others maxima.
    """
    program = tl.program_id(0)
    per_line = tl.cdiv(columns, COLUMNS)
    line, first = (program // per_line).to(tl.int64), program % per_line * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    reach = pool // 2
    scores = tl.zeros((COLUMNS,), tl.float32)
    begin, end = tl.maximum(first - reach, 0), tl.minimum(first + COLUMNS + reach, columns)
    for start in range(begin, end, COLUMNS):
        source = start + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        top = tl.zeros((COLUMNS,), tl.int32)
        for part in range(0, parts):
            at = parts_ptr + (part * lines + line) * columns + source
            value = tl.load(at, source < columns, 0.0)
            total += value
            top = tl.maximum(top, attention_bits(value))
        total = tl.where(line < totals, total, top.to(tl.float32, bitcast=True))
        scores += averaged(total, column, source, reach, pool)
    tl.store(out_ptr + line * columns + column, scores, column < columns)
