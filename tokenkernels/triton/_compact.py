"""compact_kv on the device: which row goes where, and the moving of rows, as words or turned.

A launch reads what it moves from a table of int64: for every tensor its address, that of its
result, and the place of its kind (shape and strides); for every list of integers (index, lengths,
positions) the address and strides of each. One plane of the grid serves a tensor, the first one
writes lengths and positions. Where order must hold in place, a program owns columns of one head and
walks its rows upwards; else programs share the rows.
"""

import triton
import triton.language as tl

from tokenkernels.triton._launch import Kernel
from tokenkernels.triton._math import narrow

TENSOR, LIST, PLAN = (tl.constexpr(n) for n in (3, 4, 5))
"""Integers of a record: source, target, place of the kind; heads, tokens, count, strides of batch,
head and row, bytes of a row, bytes of a word; address, strides of batch, head and entry; rows of
samples, of heads, entries, and the places of the first length and position.
"""
MOST = tl.constexpr((1 << 31) - 1)
PROBES = tl.constexpr(128)


@triton.jit
def row_of(table_ptr, place, image, head, KIND: tl.constexpr):
    """One row of a list of integers: where it is, and the stride of its entries."""
    record = table_ptr + place
    first = image * tl.load(record + 1) + head * tl.load(record + 2)
    return tl.load(record).to(tl.pointer_type(KIND)) + first, tl.load(record + 3)


@triton.jit
def count_within(index, count, bound):
    """How many entries, from the first, are 0 … bound - 1: ascending, then others."""
    first, last = count * 0, count
    while first < last:
        step = tl.cdiv(last - first, PROBES)
        probe = first + (tl.arange(0, PROBES) + 1) * step - 1
        value = tl.load(index[0] + probe * index[1], probe < last, -1).to(tl.int64)
        good = (value >= 0) & (value < bound)
        first += tl.sum(good.to(tl.int32), 0) * step
        last = tl.minimum(first + step - 1, last)
    return first


@triton.jit
def count_below(index, count, bar, SLOPE: tl.constexpr):
    """Of the first `count` entries, how many less `SLOPE` times their number are below each bar."""
    step = count * 0 + 1
    while step * 2 <= count:
        step *= 2
    found = bar * 0
    while step > 0:
        number = found + step - 1
        inside = number < count
        value = tl.load(index[0] + number * index[1], inside, 0).to(tl.int64)
        found = tl.where(inside & (value - SLOPE * number < bar), number + 1, found)
        step = step // 2
    return found


@triton.jit
def moves_from(
    rows, first, last, ROWS: tl.constexpr, IN_PLACE: tl.constexpr, FILL: tl.constexpr
):  # fmt: skip
    """Entry, slot and position of `ROWS` moves, and which of them are good.

    Slot after slot; filling in place, entry after entry: those behind the first `stays` find holes.
    The n-th hole is slot n + the number of entries that stay before it. An entry out of order or
    out of range moves nothing, and none moves upwards; among such, a hole may lie behind the last.
    """
    index, limit, kept, stays = rows
    entry = first + tl.arange(0, ROWS)
    slot, here = entry, entry < last
    if FILL and not IN_PLACE:
        before = count_below(index, stays, slot, 0)
        stay = tl.load(index[0] + before * index[1], before < stays, -1) == slot
        entry = tl.where(stay, before, stays + slot - before)
        here &= (slot < kept) & (entry < kept)
    at = index[0] + entry * index[1]
    found = tl.load(at, here, -1)
    previous = tl.load(at - index[1], here & (entry > 0), -1)
    good = (found < limit) & (found > previous) & ((previous >= 0) | (entry == 0))
    position = tl.where(good, found, -1).to(tl.int32)
    if FILL and IN_PLACE:
        hole = entry - stays + count_below(index, stays, entry - stays + 1, 1)
        slot = tl.where(entry < stays, position, hole)
        good &= (entry < stays) | (position >= kept)
    good &= position >= slot
    return entry, slot, position, good


@triton.jit
def in_words(pages, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pages, the stride of their blocks in words of this size, `VECTOR` at a time."""
    stride = tl.multiple_of(pages[4] // SIZE, VECTOR)
    return pages[0], pages[1], pages[2], pages[3], stride


@triton.jit
def words_at(address, SIZE: tl.constexpr):
    """The address as one of integers of this size."""
    if SIZE == 8:
        pointer = address.to(tl.pointer_type(tl.int64))
    elif SIZE == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif SIZE == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    return pointer


@triton.jit
def offset_of(row, wanted, row_stride, pages):
    """How far the wanted rows are, and for which of them there is a block: for all where the cache
    has no `pages`.

    Pages are the block table of a sequence and the stride of its entries, the rows of a block, the
    blocks there are, and their stride.
    """
    offset = row.to(tl.int64) * row_stride
    if pages is not None:
        block = row // pages[2]
        number = tl.load(pages[0] + block.to(tl.int64) * pages[1], wanted, -1).to(tl.int64)
        wanted &= (number >= 0) & (number < pages[3])
        offset = number * pages[4] + (row - block * pages[2]).to(tl.int64) * row_stride
    return offset, wanted


@triton.jit
def fetch(
    source, rows, row_stride, target_stride, pages, column, width, first, last,
    ROWS: tl.constexpr, IN_PLACE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """A tile of words, the offsets it goes to, and which of it is written."""
    _, slot, position, good = moves_from(rows, first, last, ROWS, IN_PLACE, FILL)
    writes = slot < last
    if IN_PLACE:
        good &= position != slot
    offset, good = offset_of(position, good, row_stride, pages)
    if IN_PLACE:
        writes = good
    inside = (column < width)[None, :]
    value = tl.load(source + offset[:, None] + column[None, :], good[:, None] & inside, 0)
    to, writes = offset_of(slot, writes, target_stride, pages)
    return value, to[:, None] + column[None, :], writes[:, None] & inside


@triton.jit
def carry(
    source, target, rows, row_stride, target_stride, pages, row_bytes, cut, first, last, step,
    WORD: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    IN_PLACE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Moves rows as words; 16 bytes are two words of 8 that are loaded together."""
    SIZE: tl.constexpr = WORD if WORD < 8 else 8
    source, target = words_at(source, SIZE), words_at(target, SIZE)
    source, target = tl.multiple_of(source, WORD), tl.multiple_of(target, WORD)
    row_stride = tl.multiple_of(row_stride // SIZE, WORD // SIZE)
    target_stride = tl.multiple_of(target_stride // SIZE, WORD // SIZE)
    if pages is not None:
        pages = in_words(pages, SIZE, WORD // SIZE)
    width = tl.multiple_of(row_bytes // SIZE, WORD // SIZE)
    column = cut * (BYTES // SIZE) + tl.arange(0, BYTES // SIZE)
    if IN_PLACE and not FILL:
        # A tile's slots lie below all that the next tile reads, so that is loaded before.
        value, to, writes = fetch(
            source, rows, row_stride, target_stride, pages, column, width, first, last,
            ROWS, IN_PLACE, FILL,
        )  # fmt: skip
        for number in range(first, last, step):
            value_2, to_2, writes_2 = fetch(
                source, rows, row_stride, target_stride, pages, column, width, number + step, last,
                ROWS, IN_PLACE, FILL,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(target + to, value, writes)
            value, to, writes = value_2, to_2, writes_2
    else:
        for number in range(first, last, step):
            value, to, writes = fetch(
                source, rows, row_stride, target_stride, pages, column, width, number, last,
                ROWS, IN_PLACE, FILL,
            )  # fmt: skip
            tl.store(target + to, value, writes)


@triton.jit
def cos_sin(angle):
    """Error below 2 ulp of 1 while |angle| < 2^50: the multiple of π/2 is taken off in float64."""
    wide = angle.to(tl.float64)
    shifted = wide * 0.63661977236758134308 + 6755399441055744.0
    turns = shifted - 6755399441055744.0
    rest = (wide - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32)
    r = rest.to(tl.float32)
    z = r * r
    s = r + r * z * ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1)
    c = (z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * z * z - z * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), sine


@triton.jit
def turn(
    source, target, rows, old, new, inv_freq_ptr, row_stride, target_stride, pages, half, cut,
    first, last, step,
    KEY: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, IN_PLACE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Moves keys, each pair (i, half + i) turned by (new - old) · inv_freq, or as bits."""
    SIZE: tl.constexpr = BITS.primitive_bitwidth // 8
    source = tl.multiple_of(source.to(tl.pointer_type(BITS)), VECTOR * SIZE)
    target = tl.multiple_of(target.to(tl.pointer_type(BITS)), VECTOR * SIZE)
    row_stride = tl.multiple_of(row_stride // SIZE, VECTOR)
    target_stride = tl.multiple_of(target_stride // SIZE, VECTOR)
    if pages is not None:
        pages = in_words(pages, SIZE, VECTOR)
    half = tl.multiple_of(half, VECTOR)
    column = cut * PAIRS + tl.arange(0, PAIRS)
    inside = (column < half)[None, :]
    frequency = tl.load(inv_freq_ptr + column, column < half, 0.0)
    for number in range(first, last, step):
        entry, slot, position, good = moves_from(rows, number, last, ROWS, IN_PLACE, FILL)
        by = tl.load(new[0] + entry * new[1], good, 0).to(tl.int64)
        by -= tl.load(old[0] + entry * old[1], good, 0)
        offset, good = offset_of(position, good, row_stride, pages)
        at = source + offset[:, None] + column[None, :]
        low = tl.load(at, good[:, None] & inside, 0)
        high = tl.load(at + half, good[:, None] & inside, 0)
        cosine, sine = cos_sin(by.to(tl.float32)[:, None] * frequency[None, :])
        x = low.to(KEY, bitcast=True).to(tl.float32)
        y = high.to(KEY, bitcast=True).to(tl.float32)
        turned = narrow(x * cosine - y * sine, KEY).to(BITS, bitcast=True)
        low = tl.where(by[:, None] == 0, low, turned)
        turned = narrow(y * cosine + x * sine, KEY).to(BITS, bitcast=True)
        high = tl.where(by[:, None] == 0, high, turned)
        writes = slot < last
        if IN_PLACE:
            writes = good & ((position != slot) | (by != 0))
        if IN_PLACE and not FILL:
            tl.debug_barrier()
        offset, writes = offset_of(slot, writes, target_stride, pages)
        to = target + offset[:, None] + column[None, :]
        tl.store(to, low, writes[:, None] & inside)
        tl.store(to + half, high, writes[:, None] & inside)


@triton.jit
def plan(
    table_ptr, lengths_ptr, positions_ptr, indices, most_rows, plans, index, program, programs,
    SLOTS: tl.constexpr, INDEX: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Writes how many entries each index row has, and the position that fills each slot."""
    for unit in range(program, indices * most_rows, programs):
        number, row = unit // most_rows, unit % most_rows
        record = table_ptr + plans + number * PLAN
        images, heads = tl.load(record).to(tl.int32), tl.load(record + 1).to(tl.int32)
        count = tl.load(record + 2).to(tl.int32)
        lengths, positions = tl.load(record + 3), tl.load(record + 4)
        if row < images * heads:
            place = index + number * LIST
            entries = row_of(table_ptr, place, row // heads, row % heads, INDEX)
            kept = count_within(entries, count, MOST)
            tl.store(lengths_ptr + lengths + row, kept)
            stays = kept * 0
            if FILL:
                stays = count_within(entries, kept, kept)
            rows = (entries, MOST, kept, stays)
            first_ptr = positions_ptr + positions + row.to(tl.int64) * count
            for first in range(kept * 0, count, SLOTS):
                _, slot, position, _ = moves_from(rows, first, count, SLOTS, False, FILL)
                tl.store(first_ptr + slot, position.to(tl.int64), slot < count)


@triton.jit
def serve(
    table_ptr, inv_freq_ptr, tensor, program, per_layer, batch, shares, places, blocks,
    ROWS: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr,
    INDEX: tl.constexpr, LIMITS: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    KEY: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr,
    IN_PLACE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Moves what one program has of a head of a tensor: some columns, every so many tiles.

    The cache may lie in `blocks`: a table, its strides, the rows of a block, the blocks there are.
    """
    layer = tensor // per_layer
    record = table_ptr + tensor * TENSOR
    source, target, kind = tl.load(record), tl.load(record + 1), table_ptr + tl.load(record + 2)
    heads, count = tl.load(kind).to(tl.int32), tl.load(kind + 2).to(tl.int32)
    limit, row_stride = tl.load(kind + 1), tl.load(kind + 5)
    row_bytes, word = tl.load(kind + 6).to(tl.int32), tl.load(kind + 7).to(tl.int32)
    heads, cuts = tl.maximum(heads, 1), tl.maximum(tl.cdiv(row_bytes, BYTES), 1)
    share, unit = program % shares, program // shares
    cut, unit = unit % cuts, unit // cuts
    head, image = unit % heads, unit // heads
    if image < batch:
        entries = row_of(table_ptr, places[0] + layer * places[1], image, head, INDEX)
        kept, stays, start, last = count, count * 0, count * 0, count
        if FILL:
            kept = count_within(entries, count, MOST)
            stays = count_within(entries, kept, kept)
        if FILL and IN_PLACE:
            start, last = stays, kept
        if LIMITS is not None:
            at, _ = row_of(table_ptr, places[2] + layer * places[3], image, head, LIMITS)
            limit = tl.minimum(tl.load(at, count > 0, 0), limit)
        rows = (entries, limit, kept, stays)
        source += head * tl.load(kind + 4)
        pages = None
        if blocks is None:
            source += image * tl.load(kind + 3)
        else:
            own = blocks[0] + image.to(tl.int64) * blocks[1]
            pages = (own, blocks[2], blocks[3], blocks[4], tl.load(kind + 3))
        to, to_stride = source, row_stride
        if not IN_PLACE:
            to = target + (image * heads + head).to(tl.int64) * count * row_bytes
            to_stride = row_bytes
        if KEY is not None:  # noqa: SIM102
            if tensor % per_layer == 0:
                word = word * 0
                old = row_of(table_ptr, places[4] + layer * places[5], image, head, OLD)
                new = row_of(table_ptr, places[6] + layer * places[7], image, head, NEW)
                SIZE: tl.constexpr = BITS.primitive_bitwidth // 8
                FEWER: tl.constexpr = ROWS * SIZE // 8
                turn(
                    source, to, rows, old, new, inv_freq_ptr, row_stride, to_stride, pages,
                    row_bytes // (2 * SIZE), cut, share * FEWER, last, shares * FEWER,
                    KEY, BITS, VECTOR, FEWER, BYTES // (2 * SIZE), IN_PLACE, FILL,
                )  # fmt: skip
        for w in tl.static_range(len(WORDS)):
            if word == WORDS[w]:
                carry(
                    source, to, rows, row_stride, to_stride, pages, row_bytes, cut,
                    start + share * ROWS, last, shares * ROWS,
                    WORDS[w], ROWS, BYTES, IN_PLACE, FILL,
                )  # fmt: skip


@Kernel
def compact(
    table_ptr, inv_freq_ptr, lengths_ptr, positions_ptr,
    per_layer, batch, shares, indices, most_rows, plans,
    index, index_step, limits, limits_step, old, old_step, new, new_step,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr,
    INDEX: tl.constexpr, LIMITS: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    KEY: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr,
    IN_PLACE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The first plane of the grid plans; each other one moves a tensor, its keys turned where KEY
    is a dtype.
    """
    plane, program = tl.program_id(1), tl.program_id(0)
    if plane == 0:
        plan(
            table_ptr, lengths_ptr, positions_ptr, indices, most_rows, plans, index,
            program, tl.num_programs(0), SLOTS, INDEX, FILL,
        )  # fmt: skip
    else:
        places = (index, index_step, limits, limits_step, old, old_step, new, new_step)
        serve(
            table_ptr, inv_freq_ptr, plane - 1, program, per_layer, batch, shares, places, None,
            ROWS, BYTES, WORDS, INDEX, LIMITS, OLD, NEW, KEY, BITS, VECTOR, IN_PLACE, FILL,
        )  # fmt: skip
