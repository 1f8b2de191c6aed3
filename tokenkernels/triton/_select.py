"""Selecting the k highest scores of a row by radix digits, in one program."""

import triton
import triton.language as tl


@triton.jit
def ordered(scores):
    """Scores as unsigned integers of the same order: −0 is +0, and NaN comes before −inf."""
    wide = scores.to(tl.float32)
    wide = tl.where(wide == 0, 0.0, wide)
    bits = wide.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(wide == wide, key, 0)


@triton.jit
def load_scores(scores_ptr, score_stride, number, inside):
    """The scores of these tokens, which may lie far apart."""
    return tl.load(scores_ptr + number.to(tl.int64) * score_stride, inside, 0.0)


@triton.jit
def load_keys(scores_ptr, score_stride, keep_ptr, number, tokens, LOW: tl.constexpr):
    """The keys of these tokens without the bits that are alike in all, and which are kept."""
    inside = number < tokens
    key = ordered(load_scores(scores_ptr, score_stride, number, inside)) >> LOW
    kept = number < 0
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + number, inside, 0) != 0
    return key, kept, inside


@triton.jit
def kept_tokens(keep_ptr, tokens, TOKENS: tl.constexpr):
    """How many tokens are kept whatever their scores."""
    found = 0
    if keep_ptr is not None:
        for first in range(0, tokens, TOKENS):
            number = first + tl.arange(0, TOKENS)
            kept = tl.load(keep_ptr + number, number < tokens, 0) != 0
            found += tl.sum(kept.to(tl.int32), 0)
    return found


@triton.jit
def bar_of(
    scores_ptr, score_stride, keep_ptr, tokens, k, TOKENS: tl.constexpr, LOW: tl.constexpr
):  # fmt: skip
    """The key of the last one in, how many that equal it are in, and whether all kept ones are.

    8 bits of the keys a round, from the highest: a histogram says in which bin the k-th lies.
    """
    kept_count = kept_tokens(keep_ptr, tokens, TOKENS)
    all_kept = tl.where(kept_count < k, 1, 0)
    need = k - all_kept * kept_count
    bins = tl.arange(0, 512)
    bar = tl.full((), 0, tl.uint32)
    for step in tl.static_range((32 - LOW) // 8):
        shift = 24 - LOW - 8 * step
        found = tl.zeros((512,), tl.int32)
        for first in range(0, tokens, TOKENS):
            number = first + tl.arange(0, TOKENS)
            key, kept, inside = load_keys(scores_ptr, score_stride, keep_ptr, number, tokens, LOW)
            runs = inside
            if keep_ptr is not None:
                runs &= kept.to(tl.int32) != all_kept
            if step > 0:
                runs &= (key >> (shift + 8)) == (bar >> (shift + 8))
            digit = ((key >> shift) & 255).to(tl.int32)
            found += tl.histogram(tl.where(runs, digit, 256), 512)
        found = tl.where(bins < 256, found, 0)
        above = tl.sum(found, 0) - tl.cumsum(found, 0)
        here = (above < need) & (need <= above + found)
        bar |= tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32) << shift
        need -= tl.sum(tl.where(here, above, 0), 0)
    return tl.where(k > 0, bar, 0xFFFFFFFF), need, all_kept


@triton.jit
def pick(
    scores_ptr, score_stride, keep_ptr, index_ptr, flags_ptr, tokens, k, threshold,
    TOKENS: tl.constexpr, LOW: tl.constexpr, BY_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Writes the chosen tokens in ascending order; returns their number."""
    bar, take, all_kept = tl.full((), 0, tl.uint32), 0, 0
    if not BY_THRESHOLD:
        bar, take, all_kept = bar_of(scores_ptr, score_stride, keep_ptr, tokens, k, TOKENS, LOW)
    placed, equal_before = 0, 0
    for first in range(0, tokens, TOKENS):
        number = first + tl.arange(0, TOKENS)
        key, kept, inside = load_keys(scores_ptr, score_stride, keep_ptr, number, tokens, LOW)
        if BY_THRESHOLD:
            value = load_scores(scores_ptr, score_stride, number, inside).to(tl.float32)
            chosen = inside & ((value >= threshold) | kept)
        else:
            runs = inside
            if keep_ptr is not None:
                runs &= kept.to(tl.int32) != all_kept
            equal = (runs & (key == bar)).to(tl.int32)
            rank = equal_before + tl.cumsum(equal, 0)
            chosen = runs & ((key > bar) | ((equal > 0) & (rank <= take)))
            chosen |= kept.to(tl.int32) * all_kept > 0
            equal_before += tl.sum(equal, 0)
        one = chosen.to(tl.int32)
        place = placed + tl.cumsum(one, 0) - 1
        tl.store(index_ptr + place, number.to(tl.int64), chosen)
        if flags_ptr is not None:
            tl.store(flags_ptr + number, one.to(tl.int8), inside)
        placed += tl.sum(one, 0)
    return placed


@triton.jit
def rank(scores_ptr, score_stride, picked_ptr, index_ptr, count, first, last, BLOCK: tl.constexpr):
    """Writes the picked tokens `first` … `last` to their places by descending score.

    A token's place is the number of those before it: higher, or equal and of a lower index.
    """
    for i in range(first, last, BLOCK):
        mine = i + tl.arange(0, BLOCK)
        here = mine < last
        token = tl.load(picked_ptr + mine, here, 0)
        key = ordered(tl.load(scores_ptr + token * score_stride, here, 0.0))
        place = tl.zeros((BLOCK,), tl.int32)
        for j in range(0, count, BLOCK):
            other = j + tl.arange(0, BLOCK)
            there = other < count
            rival = tl.load(picked_ptr + other, there, 0)
            above = ordered(tl.load(scores_ptr + rival * score_stride, there, 0.0))
            before = (above[None, :] > key[:, None]) | (
                (above[None, :] == key[:, None]) & (rival[None, :] < token[:, None])
            )
            place += tl.sum((before & there[None, :]).to(tl.int32), 1)
        tl.store(index_ptr + place, token, here)


@triton.jit
def count_above(scores_ptr, score_stride, keep_ptr, tokens, threshold, TOKENS: tl.constexpr):
    """How many tokens reach the threshold, or are kept."""
    found = 0
    for first in range(0, tokens, TOKENS):
        number = first + tl.arange(0, TOKENS)
        _, kept, inside = load_keys(scores_ptr, score_stride, keep_ptr, number, tokens, 0)
        value = load_scores(scores_ptr, score_stride, number, inside).to(tl.float32)
        found += tl.sum((inside & ((value >= threshold) | kept)).to(tl.int32), 0)
    return found
