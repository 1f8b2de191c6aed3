"""merge_adjacent: windows of alike tokens become one each, on a sequence, an image or a video."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .._case import close
from .._op import Op, autocast
from ..cases import merge_adjacent as cases
from ..checks.merge_adjacent import merge_adjacent as _check
from ._merge import average, gradient, remember


class Merged(NamedTuple):
    """What merge_adjacent returns."""

    tokens: Tensor
    size: Tensor
    index: Tensor  # type: ignore[assignment]
    offsets: Tensor


def merge_adjacent(
    x: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    *,
    threshold: float | None = None,
    num_windows: int | Sequence[int] | Tensor | None = None,
    size: Tensor | None = None,
    prefix: int = 0,
    order: str = "raster",
    batch: str = "ragged",
    backend: str | None = None,
) -> Merged:
    """Merges the windows of a grid whose n tokens are alike into their means Σ size·x / Σ size.

    Alike is the mean cosine over the pairs of a window: S = (‖Σû‖² − Σ‖û‖²) / (n(n−1)) with
    û = x / max(‖x‖, 1e-8). Windows do not overlap; tokens at the far edges of a grid that the
    window does not divide stay, and so do the prefix tokens, in front. Equal windows rank by
    number, a NaN window last (it reaches no threshold). Gradient to x. No host synchronisation
    with `num_windows` as ints, one otherwise.

    Args:
        x: (B, P+N, C), N = ∏ grid in raster order; float32, float16 or bfloat16. A last dimension
            that is not contiguous costs a copy.
        grid: 1, 2 or 3 extents: (length), (height, width) or (frames, height, width).
        window: Extents of a window, as many as grid has; at least 2 tokens in all.
        threshold: Every window with S ≥ threshold merges.
        num_windows: Instead of threshold: the so many windows of highest S merge; a sequence of B
            ints (or an int tensor (B)) per image.
        size: (B, P+N) float32, how many tokens each one stands for; 1 if not given. Where the
            sizes that merge are all 0, the mean is NaN.
        prefix: P, leading tokens (class token, registers) that pass through.
        order: "raster": a merged token stands where the first token of its window stood, so spatial
            order survives. "similarity": merged tokens first, the most similar first, then the
            others in raster order (MustDrop's order).
        batch: "ragged": every image merges its own windows. "uniform": every image merges as many
            windows as the image with the fewest reaches (MustDrop's rule), its best ones; dense,
            and what becomes of an image then depends on the others.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        tokens: packed (total, C), image after image; dense (B, M, C) if num_windows is an int or
            batch is "uniform".
        size: float32 (total,) or (B, M), the summed sizes.
        index: int64 (B, P+N), the output row of every token, so that un-merging is one gather;
            dense: the row within its image.
        offsets: int64 (B+1), the first row of every image among all rows.

    Raises:
        ValueError: shapes that do not fit, counts outside 0 … windows, both or none of threshold
            and num_windows.
        TypeError: dtypes outside the list.

    Source: MustDrop (Liu et al. 2024), stage 1 (window merge by mean pairwise cosine); ToMe (Bolya
    et al. 2023), §3 (sizes).

    Example:
        >>> import torch, tokenkernels as tk
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]])
        >>> tk.merge_adjacent(x, (4,), (2,), threshold=0.9).index
        tensor([[0, 0, 1, 2]])
    """
    (x,) = autocast(x)
    counts = _check(x, grid, window, threshold, num_windows, size, prefix, order, batch, backend)
    several = isinstance(num_windows, (list, tuple, Tensor))
    dense = batch == "uniform" or (num_windows is not None and not several)
    return Merged(
        *OP(
            backend,
            x.device.type,
            x,
            grid,
            window,
            threshold,
            counts,
            dense,
            size,
            prefix,
            order == "similarity",
        )
    )


def _windows(grid: list[int], window: list[int], device: torch.device) -> Tensor:
    """The tokens of every window, (windows, n), counted in raster order on the grid."""
    tokens = torch.arange(prod(grid), device=device).reshape(grid)
    if any(extent < step for extent, step in zip(grid, window, strict=True)):
        return tokens.new_empty(0, prod(window))
    for axis, step in enumerate(window):
        tokens = tokens.unfold(axis, step, step)
    return tokens.reshape(-1, prod(window))


def _similarity(tokens: Tensor, windows: Tensor) -> Tensor:
    """Mean pairwise cosine of every window: tokens (B, N, C) → (B, windows)."""
    unit = tokens / tokens.norm(dim=2, keepdim=True).clamp_min(1e-8)
    members, n = unit[:, windows], windows.shape[1]
    return (members.sum(2).square().sum(2) - members.square().sum((2, 3))) / (n * (n - 1))


def _ranks(
    similarity: Tensor, threshold: float | None, counts: list[int] | None
) -> tuple[Tensor, Tensor]:
    """The place of every window by descending similarity, and how many should merge."""
    place = (
        similarity.nan_to_num(nan=-torch.inf)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(dim=1)
    )
    if threshold is not None:
        return place, (similarity >= threshold).sum(1)
    return place, torch.tensor(counts, device=place.device).expand(len(place))


def _rows(
    place: Tensor, merges: Tensor, windows: Tensor, tokens: int, by_similarity: bool
) -> Tensor:
    """The output row of every token of the grid, (B, N), counted behind the prefix."""
    batch = place.shape[0]
    number = torch.arange(tokens, device=place.device).expand(batch, tokens)
    leader, key = number.clone(), number + (place.shape[1] if by_similarity else 0)
    n = windows.shape[1]
    first = windows[:, :1].expand(-1, n).flatten()
    inside = merges.repeat_interleave(n, dim=1)
    leader[:, windows.flatten()] = torch.where(inside, first, windows.flatten())
    if by_similarity:
        key[:, windows.flatten()] = torch.where(
            inside, place.repeat_interleave(n, dim=1), key[:, windows.flatten()]
        )
    key = torch.where(leader == number, key, 2 * tokens)
    return key.argsort(dim=1).argsort(dim=1).gather(1, leader)


def _merge(
    x: Tensor,
    windows: Tensor,
    place: Tensor,
    merging: Tensor,
    each: int | None,
    size: Tensor | None,
    prefix: int,
    by_similarity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges the `merging` first windows of each image; dense if that is `each` for all."""
    batch, length, channels = x.shape
    rows = _rows(place, place < merging[:, None], windows, length - prefix, by_similarity)
    front = torch.arange(prefix, device=x.device).expand(batch, prefix)
    index = torch.cat([front, prefix + rows], 1)
    kept = length - merging * (windows.shape[1] - 1)
    offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    packed = index + offsets[:-1, None]
    tokens, total = average(x, size, packed, int(offsets[-1]))
    if each is None:
        return tokens, total, packed, offsets
    left = length - each * (windows.shape[1] - 1)
    return tokens.reshape(batch, left, channels), total.reshape(batch, left), index, offsets


def _reference(
    x: Tensor, grid: list[int], window: list[int], threshold: float | None,
    counts: list[int] | None, dense: bool, size: Tensor | None, prefix: int, by_similarity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    windows = _windows(grid, window, x.device)
    similarity = _similarity(x[:, prefix:].to(torch.promote_types(x.dtype, torch.float32)), windows)
    place, merging = _ranks(similarity, threshold, counts)
    each = None
    if dense:
        each = counts[0] if counts is not None else min(merging.tolist(), default=0)
        merging = torch.full_like(merging, each)
    return _merge(x, windows, place, merging, each, size, prefix, by_similarity)


def _fake(
    x: Tensor, grid: list[int], window: list[int], threshold: float | None,
    counts: list[int] | None, dense: bool, size: Tensor | None, prefix: int, by_similarity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, channels = x.shape
    saved = prod(window) - 1
    rows: Any
    if counts is None:
        rows = library.get_ctx().new_dynamic_size()
    else:
        rows = length - counts[0] * saved if dense else batch * length - sum(counts) * saved
    shape = (batch, rows) if dense else (rows,)
    index = x.new_empty((batch, length), dtype=torch.int64)
    offsets = x.new_empty(batch + 1, dtype=torch.int64)
    return x.new_empty((*shape, channels)), x.new_empty(shape, dtype=torch.float32), index, offsets


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    remember(ctx, inputs[6], output)


def _backward(run: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return gradient(run, ctx, grad), *[None] * 8


def _compare(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Close; where a similarity is within rounding of its bar, either decision is right."""
    if not torch.equal(got[2], want[2]) or not torch.equal(low[2], want[2]):
        want, low = _decided(got, kwargs, torch.float64), _decided(got, kwargs, kwargs["x"].dtype)
    close(got, want, low, prod(kwargs["window"]))


def _decided(got: list[Tensor], kwargs: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """What the reference makes of the decisions in `got`, seen to be right within rounding."""
    x, grid, window = kwargs["x"].to(dtype), list(kwargs["grid"]), list(kwargs["window"])
    prefix, by_similarity = kwargs.get("prefix", 0), kwargs.get("order") == "similarity"
    windows = _windows(grid, window, x.device)
    exact = _similarity(x[:, prefix:].double(), windows)
    member_rows = got[2][:, prefix:][:, windows]
    merges = member_rows[..., 0] == member_rows[..., 1]
    place = (
        torch.where(merges, member_rows[..., 0], 2 * x.shape[1] * len(x))
        .argsort(dim=1, stable=True)
        .argsort(dim=1)
    )
    merging, tolerance = merges.sum(1), 64 * torch.finfo(torch.float32).eps
    if kwargs.get("threshold") is not None and kwargs.get("batch") != "uniform":
        doubtful = (exact - kwargs["threshold"]).abs() <= tolerance
        assert torch.equal(merges | doubtful, (exact >= kwargs["threshold"]) | doubtful), (
            "other windows merge"
        )
    else:
        ranked = exact.nan_to_num(nan=-2)
        worst = ranked.masked_fill(~merges, torch.inf).amin(1)
        assert (ranked.masked_fill(merges, -torch.inf).amax(1) <= worst + tolerance).all(), (
            "a better window does not merge"
        )
    if by_similarity:
        ordered = exact.nan_to_num(nan=-2).gather(1, place.argsort(dim=1))
        inside = torch.arange(1, ordered.shape[1], device=x.device) < merging[:, None]
        assert ((ordered.diff(dim=1) <= tolerance) | ~inside).all(), (
            "merged windows are not in order"
        )
    each = int(merging[0]) if got[0].ndim == 3 else None
    return list(_merge(x, windows, place, merging, each, kwargs.get("size"), prefix, by_similarity))


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x = kwargs["x"]
    rows = int(merge_adjacent(**kwargs).offsets[-1])
    moved = (x.numel() + rows * x.shape[2]) * x.element_size()
    return moved + x.shape[0] * x.shape[1] * 8, 6 * x.numel()


def _launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """One more for every 16 counts of single images."""
    counts = kwargs.get("num_windows")
    return 2 + (0 if counts is None or isinstance(counts, int) else -(-len(counts) // 16)), 1


OP = Op(
    schema="merge_adjacent(Tensor x, SymInt[] grid, SymInt[] window, float? threshold, "
    "SymInt[]? counts, bool dense, Tensor? size, SymInt prefix, bool by_similarity) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=merge_adjacent,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=_cost,
    length=lambda kwargs: prod(kwargs["window"]),
    differentiable=("x",),
    backward=_backward,
    setup_context=_setup_context,
    compare=_compare,
    batch=("x", "size", "num_windows"),
    sizes=("num_windows",),
    launches=_launches,
    waits=lambda kwargs: int(not isinstance(kwargs.get("num_windows"), (int, list, tuple))),
)
