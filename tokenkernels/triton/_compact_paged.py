"""compact_kv_paged on the device: rows found through a block table, and which blocks came free."""

import triton
import triton.language as tl

from tokenkernels.triton._compact import LIST, MOST, PLAN, plan, serve
from tokenkernels.triton._launch import Kernel

LANES = tl.constexpr(128)
"""Rows of integers that are looked at together."""


@triton.jit
def entries_of(records, number, here, image, head, KIND: tl.constexpr):
    """Rows of several lists of integers: where each is, and the stride of its entries."""
    record = records + number * LIST
    first = image * tl.load(record + 1, here, 0) + head * tl.load(record + 2, here, 0)
    address = tl.load(record, here, 0) + first * (KIND.primitive_bitwidth // 8)
    return address.to(tl.pointer_type(KIND)), tl.load(record + 3, here, 0)


@triton.jit
def longest_kept(
    table_ptr, index, plans, indices, most_heads, image, INDEX: tl.constexpr
):  # fmt: skip
    """How many entries, from the first, are positions, in the fullest row of all layers."""
    longest = image * 0
    for first in range(longest, indices * most_heads, LANES):
        lane = first + tl.arange(0, LANES)
        number, head = lane // most_heads, lane % most_heads
        record = table_ptr + plans + number * PLAN
        heads = tl.load(record + 1, number < indices, 0)
        here = head < heads
        count = tl.load(record + 2, here, 0).to(tl.int32)
        row, stride = entries_of(table_ptr + index, number, here, image, head, INDEX)
        step, found = image * 0 + 1, lane * 0
        while step * 2 <= tl.max(count, 0):
            step *= 2
        while step > 0:
            entry = found + step - 1
            inside = here & (entry < count)
            value = tl.load(row + entry * stride, inside, -1).to(tl.int64)
            found = tl.where(inside & (value >= 0) & (value < MOST), entry + 1, found)
            step = step // 2
        longest = tl.maximum(longest, tl.max(found, 0))
    return longest


@triton.jit
def longest_held(table_ptr, limits, heads, layers, most_heads, most, image, LIMITS: tl.constexpr):
    """How many positions, `most` at most, the longest of the lengths of all layers are."""
    longest = most * 0
    for first in range(image * 0, layers * most_heads, LANES):
        lane = first + tl.arange(0, LANES)
        number, head = lane // most_heads, lane % most_heads
        here = head < tl.load(table_ptr + heads + number, number < layers, 0)
        row, _ = entries_of(table_ptr + limits, number, here, image, head, LIMITS)
        held = tl.minimum(tl.load(row, here, 0).to(tl.int64), most)
        longest = tl.maximum(longest, tl.max(held, 0))
    return longest


@triton.jit
def free(freed_ptr, blocks, kept, held, image, most_blocks, SLOTS: tl.constexpr):
    """Writes the blocks behind those that the kept rows take, up to the last that held one."""
    table, step = blocks[0] + image.to(tl.int64) * blocks[1], blocks[2]
    first, last = tl.cdiv(kept, blocks[3]), tl.cdiv(held, blocks[3])
    for begin in range(image * 0, most_blocks, SLOTS):
        place = begin + tl.arange(0, SLOTS)
        block = (first + place).to(tl.int64)
        number = tl.load(table + block * step, block < last, -1).to(tl.int64)
        number = tl.where((number >= 0) & (number < blocks[4]), number, -1)
        to = freed_ptr + image.to(tl.int64) * most_blocks + place
        tl.store(to, number, place < most_blocks)


@Kernel
def compact_paged(
    table_ptr, inv_freq_ptr, lengths_ptr, positions_ptr, freed_ptr, blocks_ptr,
    block_batch_step, block_step, block_size, block_count, most_blocks,
    per_layer, batch, shares, indices, most_rows, most_heads, plans,
    layers, held_heads, most_held_heads,
    index, index_step, limits, limits_step, old, old_step, new, new_step,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr,
    INDEX: tl.constexpr, LIMITS: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    KEY: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The first plane of the grid plans and tells what is free; each other one moves a tensor."""
    plane, program = tl.program_id(1), tl.program_id(0)
    blocks = (blocks_ptr, block_batch_step, block_step, block_size, block_count)
    if plane == 0:
        plan(
            table_ptr, lengths_ptr, positions_ptr, indices, most_rows, plans, index,
            program, tl.num_programs(0), SLOTS, INDEX, FILL,
        )  # fmt: skip
        for number in range(program, batch, tl.num_programs(0)):
            image = program * 0 + number  # a tensor, which the interpreter's numbers are not
            kept = longest_kept(table_ptr, index, plans, indices, most_heads, image, INDEX)
            most = block_size.to(tl.int64) * most_blocks
            held = longest_held(
                table_ptr, limits, held_heads, layers, most_held_heads, most, image, LIMITS
            )  # fmt: skip
            free(freed_ptr, blocks, kept, held, image, most_blocks, SLOTS)
    else:
        places = (index, index_step, limits, limits_step, old, old_step, new, new_step)
        serve(
            table_ptr, inv_freq_ptr, plane - 1, program, per_layer, batch, shares, places, blocks,
            ROWS, BYTES, WORDS, INDEX, LIMITS, OLD, NEW, KEY, BITS, VECTOR, True, FILL,
        )  # fmt: skip
