"""score_attention: how much attention each key receives from chosen queries, without the attention matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Case, Make, Op, autocast
from ..checks.score_attention import score_attention as _check


def score_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    lse: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    row_weights: Tensor | None = None,
    heads: str = "mean",
    reduce: str | Sequence[str] = ("sum",),
    pool: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scores every key by the attention that it receives from the rows of `query`.

    A[h, t, j] = softmax_j(scale · ⟨query[h, t], key[g(h), j]⟩) over the keys that row t sees: those below its key length and, with
    `causal`, up to its position. First the heads are reduced, then the rows: Σ_t w_t Ā[t, j], or max_t Ā[t, j] of the head mean Ā.
    A row that sees no key adds nothing; what a row does not see, a NaN too, has no influence on it. The matrix A is never stored, keys
    are not repeated for grouped heads, and no gradient flows back.

    Any strides are read in place; a last dimension that is not contiguous costs a copy. Statistics are float32.

    Args:
        query: (B, H, R, D), the chosen rows: one class token, the text rows, the last window, or all.
        key: (B, G, N, D), in the dtype of query; H is a multiple of G, head h reads key head h // (H / G).
        scale: Factor of the products, 1/√D by default.
        query_positions: (B, R) integers, with causal: row t sees the keys 0 … position (any position from N on: all of them); −1 marks a
            row that is not there. By default the rows are the last R of the N keys (of the first key_lengths).
        causal: A row sees no key behind its position.
        key_lengths: (B) integers 0 … N: keys from there on are padding, seen by no row.
        lse: (B, H, R), the natural logarithm of Σ_j exp(scale · ⟨q, k_j⟩) over the visible keys, as flash attention returns it. With
            it only the wanted columns are read.
        columns: (first, end): only the scores of these keys are returned; the softmax still runs over all of them.
        row_weights: (B, R), the w_t of the sum, 1 by default. The maximum does not know them.
        heads: "mean" over all heads, "group" mean over the heads of each key head, "none" keeps every head.
        reduce: ("sum",), ("max",) or ("sum", "max").
        pool: Odd, up to 1023: the scores become their average over so many neighbouring columns; zeros beyond both ends count (SnapKV).
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        float32 (B, N'), (B, G, N') or (B, H, N') for heads "mean", "group", "none", N' = end − first; two of them, sum and
        maximum, where both are wanted.

    Raises:
        ValueError: shapes that do not fit, key lengths outside 0 … N, positions below −1, unknown options.
        TypeError: dtypes outside the list.

    Source: class token: EViT (Liang et al. 2022) §3.2, VisionZip; text rows: MustDrop (arXiv 2411.10803) eq. 4–6; observation window:
    SnapKV (arXiv 2404.14469) §4; all rows: H2O (arXiv 2306.14048).

    Example:
        >>> import torch, tokenkernels as tk
        >>> query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)
        >>> tk.score_attention(query, key, causal=True).round(decimals=2)
        tensor([[1.0800, 1.0800, 0.5800, 0.2500]])
    """
    first, end, total, top = _check(
        query, key, scale, query_positions, causal, key_lengths, lse, columns, row_weights, heads, reduce, pool, backend
    )
    query, key = autocast(_constant(query), _constant(key))
    outputs = OP(
        backend, query.device.type, query, key, scale, causal, _as(query_positions, torch.int64), _as(key_lengths, torch.int64),
        _as(lse, _statistics(query)), _as(row_weights, _statistics(query)), first, end, heads, total, top, pool,
    )  # fmt: skip
    return outputs.unbind(0) if total and top else outputs


def _constant(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _constant(x if x.dtype == dtype else x.to(dtype))


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _visible(
    query: Tensor, key: Tensor, causal: bool, positions: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """(B, 1, R, N) bool: does row t see key j?"""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if lengths is None:
        lengths = torch.full((batch,), keys, device=key.device)
    if bool(((lengths < 0) | (lengths > keys)).any()) or (positions is not None and bool((positions < -1).any())):
        raise ValueError("score_attention: key_lengths, query_positions: allowed 0 … N and at least -1")
    column = torch.arange(keys, device=key.device)
    seen = (column < lengths[:, None]).unsqueeze(1).expand(batch, rows, keys)
    if causal:
        if positions is None:
            positions = lengths[:, None] - rows + torch.arange(rows, device=key.device)
        seen = seen & (column <= positions[:, :, None])
    return seen.unsqueeze(1)


def _reference(
    query: Tensor, key: Tensor, scale: float | None, causal: bool, query_positions: Tensor | None, key_lengths: Tensor | None,
    lse: Tensor | None, row_weights: Tensor | None, first_column: int, end_column: int, heads: str, sum: bool, max: bool, pool: int,
) -> Tensor:  # fmt: skip
    wide = _statistics(query)
    group = query.shape[1] // key.shape[1]
    seen = _visible(query, key, causal, query_positions, key_lengths)
    logits = query.to(wide) @ key.to(wide).repeat_interleave(group, 1).mT
    logits = logits * (query.shape[3] ** -0.5 if scale is None else scale)
    if lse is None:
        attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    else:
        attention = (logits - lse.unsqueeze(-1)).exp()
    attention = torch.where(seen, attention, 0)[..., first_column:end_column]
    if heads == "mean":
        attention = attention.mean(1)
    elif heads == "group":
        attention = attention.unflatten(1, (key.shape[1], group)).mean(2)
    outputs = []
    if sum:
        weighted = attention
        if row_weights is not None:
            weighted = attention * (row_weights if heads == "mean" else row_weights.unsqueeze(1)).unsqueeze(-1)
        outputs.append(weighted.sum(-2))
    if max:
        outputs.append(attention.amax(-2))
    scores = torch.stack(outputs) if sum and max else outputs[0]
    if pool == 1 or scores.numel() == 0:
        return scores
    return F.avg_pool1d(scores.reshape(-1, 1, scores.shape[-1]), pool, 1, pool // 2).reshape(scores.shape)


def _fake(
    query: Tensor, key: Tensor, scale: float | None, causal: bool, query_positions: Tensor | None, key_lengths: Tensor | None,
    lse: Tensor | None, row_weights: Tensor | None, first_column: int, end_column: int, heads: str, sum: bool, max: bool, pool: int,
) -> Tensor:  # fmt: skip
    shape = [query.shape[0], end_column - first_column]
    if heads != "mean":
        shape.insert(1, key.shape[1] if heads == "group" else query.shape[1])
    return query.new_empty([2, *shape] if sum and max else shape, dtype=_statistics(query))


def _tokens(t: Make, batch: int, heads: int, key_heads: int, rows: int, keys: int, dim: int) -> dict[str, Any]:
    return {"query": t.randn(batch, heads, rows, dim), "key": t.randn(batch, key_heads, keys, dim)}


def _simple(*sizes: int, **options: Any) -> Any:
    return lambda t: _tokens(t, *sizes) | options


def _positioned(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 3, 4, 2, 9, 300, 20)
    return kwargs | {
        "causal": True,
        "query_positions": t.randint(-1, 305, (3, 9)),
        "key_lengths": torch.tensor([300, 0, 259], device=t.device),
        "row_weights": t.rand(3, 9, dtype=torch.float32),
        "reduce": ("sum", "max"),
    }


def _padded(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 3, 6, 2, 4, 37, 16)
    return kwargs | {"causal": True, "key_lengths": torch.tensor([37, 2, 20], device=t.device), "heads": "group"}


def _given_lse(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 4, 2, 5, 600, 24)
    keys = kwargs["key"].double().repeat_interleave(2, 1)
    logits = kwargs["query"].double() @ keys.mT * 0.3
    return kwargs | {
        "scale": 0.3, "lse": logits.logsumexp(-1).float(), "columns": (270, 590), "heads": "none", "reduce": ("sum", "max"),
    }  # fmt: skip


def _unseen_nan(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 2, 1, 12, 70, 8)
    lengths = torch.tensor([61, 30], device=t.device)
    kwargs["key"][0, :, 61:] = torch.nan
    kwargs["key"][1, :, 40] = torch.inf
    kwargs["query"][0, 1, 3] = torch.nan
    kwargs["key"][0, 0, 60, 0] = torch.nan
    return kwargs | {"causal": True, "key_lengths": lengths, "heads": "none", "reduce": ("sum", "max")}


def _large_logits(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 2, 2, 7, 530, 32)
    kwargs["query"][:, :, 1] *= 40
    kwargs["query"][:, :, 2] = 0
    return kwargs | {"scale": -0.5, "reduce": ("sum", "max")}


def _split_heads(t: Make) -> dict[str, Any]:
    tokens = t.randn(2, 50, 3, 4, 16)
    return {"query": tokens[:, 1:8, 0].transpose(1, 2), "key": tokens[:, :, 1].transpose(1, 2), "pool": 3}


CASES = [
    Case("class-token", _simple(3, 4, 4, 1, 50, 32, columns=(1, 50))),
    Case("text-rows", _simple(2, 6, 6, 13, 158, 17, causal=True, columns=(11, 139), reduce=("sum", "max"))),
    Case("window-gqa", _simple(2, 8, 2, 16, 300, 64, causal=True, columns=(0, 284), heads="group", pool=5)),
    Case("window-per-head", _simple(2, 8, 2, 5, 90, 20, heads="none", reduce=("max",), pool=9)),
    Case("all-rows", _simple(1, 2, 1, 130, 130, 8, causal=True)),
    Case("group-of-three", _simple(2, 6, 2, 1, 65, 40, heads="group", reduce="max")),
    Case("few-rows", _simple(2, 4, 2, 2, 261, 9, reduce=("sum", "max"))),
    Case("one-key", _simple(2, 2, 2, 3, 1, 3)),
    Case("no-columns", _simple(2, 2, 1, 3, 20, 8, columns=(7, 7), pool=3)),
    Case("deep", _simple(1, 3, 1, 7, 70, 300, pool=101)),
    Case("long", _simple(1, 4, 2, 3, 3000, 8, reduce=("sum", "max"), pool=1023)),
    Case("many-heads", _simple(2, 67, 1, 5, 300, 8, heads="group", reduce=("sum", "max"))),
    Case("positions", _positioned),
    Case("padded", _padded),
    Case("lse", _given_lse),
    Case("unseen-nan", _unseen_nan),
    Case("large-logits", _large_logits),
    Case("split-heads", _split_heads),
    Case("text rows L=640 H=32 R=29", _simple(1, 32, 32, 29, 640, 128, causal=True, reduce=("sum", "max")), ("bench",)),
    Case("text rows L=2944 H=32 R=29", _simple(1, 32, 32, 29, 2944, 128, causal=True, reduce=("sum", "max")), ("bench",)),
    Case(
        "snapkv w=64 H=32/8 S=8192",
        _simple(1, 32, 8, 64, 8192, 128, causal=True, columns=(0, 8128), heads="group", pool=5),
        ("bench",),
    ),
    Case("class token B=16 16x577", _simple(16, 16, 16, 1, 577, 64, columns=(1, 577)), ("bench",)),
]


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    query, key = kwargs["query"], kwargs["key"]
    columns = kwargs.get("columns") or (0, key.shape[2])
    results = 1 + (len(kwargs.get("reduce", ())) > 1)
    outputs = {"mean": 1, "group": key.shape[1], "none": query.shape[1]}[kwargs.get("heads", "mean")]
    moved = (query.numel() + key.numel()) * query.element_size()
    moved += 4 * results * query.shape[0] * outputs * (columns[1] - columns[0])
    return moved, 2 * query.numel() * key.shape[2]


OP = Op(
    schema="score_attention(Tensor query, Tensor key, float? scale, bool causal, Tensor? query_positions, Tensor? key_lengths, "
    "Tensor? lse, Tensor? row_weights, SymInt first_column, SymInt end_column, str heads, bool sum, bool max, SymInt pool) -> Tensor",
    reference=_reference,
    fake=_fake,
    function=score_attention,
    cases=CASES,
    bad=[
        (lambda kw: {"query": kw["query"][0]}, ValueError, "score_attention: query: allowed 4 dimensions"),
        (lambda kw: {"query": kw["query"][:, :, :0]}, ValueError, "score_attention: query: allowed .B, H, R, D. with"),
        (lambda kw: {"query": kw["query"][:, :3]}, ValueError, "score_attention: key: allowed .3, G, N, 32. with N"),
        (lambda kw: {"query": kw["query"].long()}, TypeError, "score_attention: query: allowed a tensor of float32"),
        (lambda kw: {"query": kw["query"].double(), "key": kw["key"].double()}, TypeError, 'backend="reference"'),
        (lambda kw: {"key": kw["key"].half()}, TypeError, "score_attention: key: allowed the dtype of query .float32., got float16"),
        (lambda kw: {"key": kw["key"][..., :31]}, ValueError, "score_attention: key: allowed .3, G, N, 32."),
        (lambda kw: {"key": kw["key"][:, :, :0]}, ValueError, "score_attention: key: allowed .3, G, N, 32."),
        (lambda kw: {"scale": "big"}, TypeError, "score_attention: scale: allowed a number"),
        (lambda kw: {"causal": 1}, TypeError, "score_attention: causal: allowed True, False, got 1"),
        (lambda kw: {"query_positions": torch.zeros(3, 1).long()}, ValueError, "query_positions: allowed None without causal"),
        (
            lambda kw: {"causal": True, "query_positions": torch.zeros(3, 2).long()},
            ValueError,
            "query_positions: allowed shape .3, 1.",
        ),
        (
            lambda kw: {"causal": True, "query_positions": torch.full((3, 1), -2)},
            ValueError,
            "key_lengths, query_positions: allowed 0 … N and at least -1",
        ),
        (lambda kw: {"key_lengths": torch.tensor([50, 51, 0])}, ValueError, "key_lengths, query_positions: allowed 0 … N"),
        (lambda kw: {"key_lengths": torch.ones(3)}, TypeError, "key_lengths: allowed a tensor of int64, int32"),
        (lambda kw: {"lse": torch.ones(3, 4)}, ValueError, "lse: allowed shape .3, 4, 1."),
        (lambda kw: {"row_weights": torch.ones(1)}, ValueError, "row_weights: allowed shape .3, 1."),
        (lambda kw: {"columns": 5}, ValueError, "columns: allowed a pair"),
        (lambda kw: {"columns": (0, 51)}, ValueError, "columns: allowed 0 … 50, got 51"),
        (lambda kw: {"columns": (9, 8)}, ValueError, "columns: allowed 0 … 8, got 9"),
        (lambda kw: {"heads": "all"}, ValueError, "heads: allowed 'mean', 'group', 'none'"),
        (lambda kw: {"reduce": ()}, ValueError, "reduce: allowed"),
        (lambda kw: {"reduce": ("max", "sum")}, ValueError, "reduce: allowed"),
        (lambda kw: {"pool": 4}, ValueError, "pool: allowed an odd number, got 4"),
        (lambda kw: {"pool": 0}, ValueError, "pool: allowed 1"),
    ],
    cost=_cost,
    length=lambda kwargs: max(kwargs["query"].shape[2:] + kwargs["key"].shape[2:]),
    batch=("query", "key", "query_positions", "key_lengths", "lse", "row_weights"),
)
