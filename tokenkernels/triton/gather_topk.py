"""gather_topk in Triton: select by radix digits and gather, one launch up to 8192 tokens.

A row of programs serves each image. Every one of them selects for itself (histograms of 8-bit
digits of the scores as ordered integers, then a scan in index order, which gives lowest-index
ties), writes the same indices, and moves its share of the rows. Beyond 8192 tokens, or where more
than 1024 are ranked, one launch selects and another moves. A threshold counts first; `fuse` sums
the dropped tokens in a second launch, by columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from tokenkernels.triton import _fill
from tokenkernels.triton._launch import (
    PROGRAMS,
    Config,
    Entry,
    Kernel,
    Table,
    aligned,
    blocks,
    capability,
    launch,
    to_host,
)
from tokenkernels.triton._math import store, total, total_of
from tokenkernels.triton._rows import move, rows_of
from tokenkernels.triton._select import count_above, pick, rank

ONE_LAUNCH, MOST_RANKED = 8192, 1024
"""Tokens up to which every program repeats the selection, or the ranking."""
LOW_BITS = {torch.bfloat16: 16, torch.float16: 8, torch.float32: 0}
"""Bits that are alike in all keys of a dtype: one or two rounds less."""
TABLE = Table(
    [
        Entry(Config({"ROWS": 8, "WIDTH": 128}), width=128),
        Entry(Config({"ROWS": 4, "WIDTH": 256}), width=512),
        Entry(Config({"ROWS": 4, "WIDTH": 1024}, warps=8), bytes=(1, 2)),
        Entry(Config({"ROWS": 4, "WIDTH": 512}, warps=8), bytes=(4, 8)),
    ],
    "By width: whole rows in wide loads, several of them under way.",
)
SELECT_TABLE = Table(
    [
        Entry(Config({"TOKENS": 256}), width=256),
        Entry(Config({"TOKENS": 2048}, warps=8), capability=90),
        Entry(Config({"TOKENS": 1024}, warps=8)),
    ],
    "All scores of most images in one block; sm_80 spills with 2048.",
)
FUSE_TABLE = Table(
    [Entry(Config({"ROWS": 32, "WIDTH": 128}))],
    "128 columns are full lines, 32 tokens under way; the sums stay in registers.",
)


@Kernel
def count(
    scores_ptr, keep_ptr, counts_ptr, tokens, threshold, scores_stride, score_stride,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """How many tokens of each image reach the threshold or are kept."""
    image = tl.program_id(0).to(tl.int64)
    keep = keep_ptr
    if keep_ptr is not None:
        keep = keep_ptr + image * tokens
    scores = scores_ptr + image * scores_stride
    found = count_above(scores, score_stride, keep, tokens, threshold, TOKENS)
    tl.store(counts_ptr + image, found.to(tl.int64))


@Kernel
def gather(
    scores_ptr, keep_ptr, counts_ptr, index_ptr, picked_ptr, flags_ptr, offsets_ptr,
    sources_ptrs, targets_ptrs, widths, image_strides, row_strides,
    tokens, k, extra, prefix, threshold, programs, scores_stride, score_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr,
    BY_THRESHOLD: tl.constexpr, BY_SCORE: tl.constexpr,
    SELECT: tl.constexpr, SHARED_RANKS: tl.constexpr, MOVE: tl.constexpr,
):  # fmt: skip
    """Program `share` of `programs` of an image: select, rank, move; each where its option is on.

    `extra` rows of an image are not chosen: the prefix, and the fused token.
    """
    program = tl.program_id(0)
    image, share = (program // programs).to(tl.int64), program % programs
    before, mine = image * k, k
    if counts_ptr is not None:
        mine = tl.load(counts_ptr + image).to(tl.int32)
        before = image * 0
        for first in range(0, image, 128):
            other = first + tl.arange(0, 128)
            before += tl.sum(tl.load(counts_ptr + other, other < image, 0), 0)
    if share == 0:
        tl.store(offsets_ptr + image + 1, before + mine + (image + 1) * extra)
        if image == 0:
            tl.store(offsets_ptr, image)
    scores, index = scores_ptr + image * scores_stride, index_ptr + before
    if SELECT:
        keep, flags, picked = keep_ptr, flags_ptr, index
        if keep_ptr is not None:
            keep = keep_ptr + image * tokens
        if flags_ptr is not None:
            flags = flags_ptr + image * tokens
        if BY_SCORE:
            picked = picked_ptr + before
        pick(
            scores, score_stride, keep, picked, flags, tokens, mine, threshold,
            TOKENS, LOW, BY_THRESHOLD,
        )  # fmt: skip
        tl.debug_barrier()
        if BY_SCORE:
            part = tl.cdiv(mine, programs) if SHARED_RANKS else mine
            first = share * part if SHARED_RANKS else 0
            last = tl.minimum(first + part, mine)
            rank(scores, score_stride, picked, index, mine, first, last, 64)
            tl.debug_barrier()
    if MOVE:
        base = before + image * extra
        for first in range(share * ROWS, prefix + mine, programs * ROWS):
            row = first + tl.arange(0, ROWS)
            here = row < prefix + mine
            token = prefix + tl.load(index + row - prefix, here & (row >= prefix), 0)
            token = tl.where(row < prefix, row.to(tl.int64), token)
            move(
                sources_ptrs, targets_ptrs, widths, image_strides, row_strides,
                image, token, base + row, here, WIDTH,
            )  # fmt: skip


@Kernel
def fuse_dropped(
    scores_ptr, flags_ptr, offsets_ptr, x_ptrs, targets_ptrs, widths, image_strides, row_strides,
    tokens, prefix, programs, scores_stride, score_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The score-weighted sum of the dropped tokens, a block of columns of each tensor."""
    program = tl.program_id(0)
    image, first = (program // programs).to(tl.int64), (program % programs) * WIDTH
    row = tl.load(offsets_ptr + image + 1) - 1
    column = first + tl.arange(0, WIDTH)
    for t in tl.static_range(len(x_ptrs)):
        inside = column < widths[t]
        sums, weights = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS,), tl.float32)
        source = x_ptrs[t] + image * image_strides[t]
        for start in range(0, tokens, ROWS):
            number = start + tl.arange(0, ROWS)
            here = number < tokens
            flag = tl.load(flags_ptr + image * tokens + number, here, 1)
            here &= flag == 0
            score = scores_ptr + image * scores_stride + number.to(tl.int64) * score_stride
            weight = tl.load(score, here, 0.0).to(tl.float32)
            token = (prefix + number).to(tl.int64)
            at = source + token[:, None] * row_strides[t] + column[None, :]
            value = tl.load(at, here[:, None] & inside[None, :], 0.0).to(tl.float32)
            sums += tl.where(here[:, None], weight[:, None] * value, 0.0)
            weights += weight
        fused = total(tl.trans(sums))
        if MEAN:
            divisor = total_of(weights)
            fused = tl.where(divisor != 0, fused / divisor, fused)
        store(targets_ptrs[t] + row * widths[t] + column, fused, inside)


def gather_topk(
    tensors: list[Tensor], scores: Tensor, keep: Tensor | None, k: list[int], ragged: bool,
    threshold: float | None, prefix: int, order: str, fuse: str,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Dense, ragged or by threshold; with a threshold one synchronisation, for the lengths."""
    (images, tokens), device = scores.shape, scores.device
    keep = None if keep is None else keep.contiguous().view(torch.int8)
    extra = prefix + bool(fuse)
    dense = threshold is None and not ragged
    chosen = images * (k[0] if dense else tokens) if not ragged else sum(k)
    index = torch.empty(chosen, dtype=torch.int64, device=device)
    outputs = [t.new_empty((chosen + images * extra, *t.shape[2:])) for t in tensors]
    offsets = torch.empty(images + 1, dtype=torch.int64, device=device)
    if images == 0:
        offsets.zero_()
    else:
        _launch_all(
            tensors, scores, keep, k, ragged, threshold, prefix, order, fuse,
            index, outputs, offsets,
        )  # fmt: skip
    if threshold is not None and images > 0:
        rows = to_host(offsets[-1:]).tolist()[0]
        index = index[: rows - images * extra]
        outputs = [out[:rows] for out in outputs]
    if dense:
        index = index.view(images, k[0])
        outputs = [out.view(images, k[0] + extra, *out.shape[1:]) for out in outputs]
    return outputs, index, offsets


def _launch_all(
    tensors: list[Tensor], scores: Tensor, keep: Tensor | None, k: list[int], ragged: bool,
    threshold: float | None, prefix: int, order: str, fuse: str,
    index: Tensor, outputs: list[Tensor], offsets: Tensor,
) -> None:  # fmt: skip
    (images, tokens), device = scores.shape, scores.device
    rows, targets = rows_of(tensors), rows_of([o.view(1, *o.shape) for o in outputs])
    word = max(t.element_size() for t in rows.tensors)
    moving = TABLE.choose(word, max(rows.widths), capability(device))
    selecting = SELECT_TABLE.choose(4, tokens, capability(device))
    config = replace(
        moving,
        blocks=moving.blocks | selecting.blocks,
        warps=max(moving.warps, selecting.warps),
    )
    strides = scores.stride()
    counts = None
    if ragged:
        counts = _fill.integers(list(k), device)
    if threshold is not None:
        counts = torch.empty(images, dtype=torch.int64, device=device)
        launch(
            count, (images,), scores, keep, counts, tokens, threshold, *strides,
            config=selecting, aligned=False,
        )  # fmt: skip
    by_score = order == "score"
    picked = torch.empty_like(index) if by_score else None
    flags = torch.empty((images, tokens), dtype=torch.int8, device=device) if fuse else None
    most = max(k) if threshold is None else tokens
    two = tokens > ONE_LAUNCH or (by_score and most > MOST_RANKED)
    extra = prefix + bool(fuse)
    shares = max(1, min(blocks(PROGRAMS, images), blocks(prefix + most, config.blocks["ROWS"])))

    def run(programs: int, select: bool, moving: bool) -> None:
        launch(
            gather, (images * programs,),
            scores, keep, counts, index, picked, flags, offsets,
            rows.tensors, targets.tensors, rows.widths, rows.image_strides, rows.row_strides,
            tokens, most, extra, prefix, threshold or 0.0, programs, *strides,
            config=config, aligned=rows.aligned, LOW=LOW_BITS[scores.dtype],
            BY_THRESHOLD=threshold is not None, BY_SCORE=by_score,
            SELECT=select, SHARED_RANKS=not moving, MOVE=moving,
        )  # fmt: skip

    if two:
        run(shares if by_score else 1, True, False)
    run(shares, not two, True)
    if fuse:
        assert flags is not None
        block = FUSE_TABLE.choose(4, max(rows.widths), capability(device))
        columns = blocks(max(rows.widths), block.blocks["WIDTH"])
        kept = tuple(aligned(t if t.ndim == 3 else t.unsqueeze(-1)) for t in tensors)
        launch(
            fuse_dropped, (images * columns,),
            scores, flags, offsets, kept, tuple(outputs), rows.widths,
            rows.image_strides, rows.row_strides, tokens, prefix, columns, *strides,
            config=block, aligned=rows.aligned, MEAN=fuse == "mean",
        )  # fmt: skip
