"""The softmax of each row of score_attention without its values: peak and sum of exponentials over
each split of the keys, and how splits are joined.
"""

import triton
import triton.language as tl

from tokenkernels.triton._launch import Kernel
from tokenkernels.triton._math import dot_as
from tokenkernels.triton._score_tiles import (
    chunk,
    least_seen,
    length_of,
    place_of,
    products,
    seen_by,
)


@triton.jit
def statistics(peak_ptr, total_ptr, at, here, splits, SPLITS: tl.constexpr):
    """Peak and reciprocal sum of the exponentials of some rows, joined over the splits of keys."""
    split = tl.arange(0, SPLITS)
    inside = here[:, None] & (split < splits)[None, :]
    at = at[:, None] * splits + split[None, :]
    peaks = tl.load(peak_ptr + at, inside, float("-inf"))
    totals = tl.load(total_ptr + at, inside, 0.0)
    peak = tl.max(peaks, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, 1.0 / tl.sum(totals * tl.exp2(peaks - peak[:, None]), 1)


@Kernel
def measure(
    query_ptr, key_ptr, positions_ptr, lengths_ptr, peak_ptr, total_ptr,
    factor, key_heads, group, rows, keys, splits, blocks, position_steps, length_step,
    query_strides, key_strides, dim_stride,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows over `blocks` blocks of keys: the peak of its logits (to base 2) and the sum
    of their exponentials relative to it. The longest rows come first.
    """
    row_blocks, head_tiles = tl.cdiv(rows, ROWS), tl.cdiv(group, HEADS)
    program = tl.program_id(0)
    split, tile = program % splits, program // splits
    row_block, tile = row_blocks - 1 - tile % row_blocks, tile // row_blocks
    head_tile, tile = tile % head_tiles, tile // head_tiles
    image, key_head = (tile // key_heads).to(tl.int64), (tile % key_heads).to(tl.int64)
    head, row, here = place_of(head_tile, row_block, group, rows, HEADS, ROWS)
    length = length_of(lengths_ptr, image, length_step, keys)
    seen = seen_by(row, here, positions_ptr, image, position_steps, length, rows, CAUSAL)
    least = least_seen(
        head_tile, row_block, group, positions_ptr, length, rows, HEADS, ROWS, CAUSAL
    )
    head = key_head * group + head
    at = query_ptr + image * query_strides[0] + head * query_strides[1]
    at += row.to(tl.int64) * query_strides[2]
    if WHOLE:
        query = chunk(at, here, dim_stride, 0, DIM)
    key_ptr += image * key_strides[0] + key_head * key_strides[1]
    peak = tl.full((HEADS * ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS * ROWS,), tl.float32)
    last = tl.minimum(tl.max(seen, 0), (split + 1) * blocks * KEYS)
    for first in range(split * blocks * KEYS, last, KEYS):
        number = first + tl.arange(0, KEYS)
        key_at = key_ptr + number.to(tl.int64) * key_strides[2]
        if WHOLE:
            key = chunk(key_at, number < last, dim_stride, 0, DIM)
            empty = tl.zeros((HEADS * ROWS, KEYS), tl.float32)
            logits = dot_as(query, tl.trans(key), empty, PRECISION)
        else:
            logits = products(
                at, here, key_at, number < last, dim_stride, HEADS * ROWS, KEYS, DIM, PRECISION
            )
        logits *= factor
        if first + KEYS > least:
            logits = tl.where(number[None, :] < seen[:, None], logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total *= tl.exp2(peak - shift)
        total += tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = top
    target = ((image * key_heads * group + head) * rows + row) * splits + split
    tl.store(peak_ptr + target, peak, here)
    tl.store(total_ptr + target, total, here)
