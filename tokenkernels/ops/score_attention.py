"""score_attention: how much attention each key receives from chosen queries, without the matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Op, autocast
from ..cases import score_attention as cases
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

    A[h, t, j] = softmax_j(scale · ⟨query[h, t], key[g(h), j]⟩) over the keys that row t sees: those
    below its key length and, with `causal`, up to its position. First the heads are reduced, then
    the rows: Σ_t w_t Ā[t, j], or max_t Ā[t, j] of the head mean Ā. A row that sees no key adds
    nothing; what a row does not see, a NaN too, has no influence on it. The matrix A is never
    stored, keys are not repeated for grouped heads, and no gradient flows back: the scores carry
    none, even if query and key do.

    Any strides are read in place; a last dimension that is not contiguous costs a copy. Statistics
    are float32.

    Args:
        query: (B, H, R, D), the chosen rows: one class token, the text rows, the last window, all.
        key: (B, G, N, D), in the dtype of query; H is a multiple of G, and head h reads key head
            h // (H / G).
        scale: Factor of the products, 1/√D by default.
        query_positions: (B, R) integers, with causal: row t sees the keys 0 … position (from N on:
            all of them); −1 marks a row that is not there. By default the rows are the last R of
            the N keys (of the first key_lengths).
        causal: A row sees no key behind its position.
        key_lengths: (B) integers 0 … N: keys from there on are padding, seen by no row.
        lse: (B, H, R), the natural logarithm of Σ_j exp(scale · ⟨q, k_j⟩) over the visible keys, as
            flash attention returns it. With it only the wanted columns are read.
        columns: (first, end): only these keys' scores are returned; the softmax runs over all.
        row_weights: (B, R), finite, the w_t of the sum, 1 by default. The maximum does not know
            them.
        heads: "mean" over all heads, "group" mean over the heads of each key head, "none" keeps
            every head.
        reduce: ("sum",), ("max",) or ("sum", "max").
        pool: Odd, up to 1023: scores become their average over so many neighbouring columns; zeros
            beyond both ends count (SnapKV).
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        float32 (B, N'), (B, G, N') or (B, H, N') for heads "mean", "group", "none", with
        N' = end − first; two of them, sum and maximum, where both are wanted.

    Raises:
        ValueError: shapes that do not fit, key lengths outside 0 … N, positions below −1, unknown
            options.
        TypeError: dtypes outside the list.

    Source: class token: EViT (Liang et al. 2022) §3.2, VisionZip; text rows: MustDrop (arXiv
    2411.10803) eq. 4–6; observation window: SnapKV (arXiv 2404.14469) §4; all rows: H2O (arXiv
    2306.14048).

    Example:
        >>> import torch, tokenkernels as tk
        >>> query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)
        >>> tk.score_attention(query, key, causal=True).round(decimals=2)
        tensor([[1.0800, 1.0800, 0.5800, 0.2500]])
    """
    query, key = autocast(query, key)
    first, end, total, top = _check(
        query,
        key,
        scale,
        query_positions,
        causal,
        key_lengths,
        lse,
        columns,
        row_weights,
        heads,
        reduce,
        pool,
        backend,
    )
    query, key = _constant(query), _constant(key)
    outputs = OP(
        backend,
        query.device.type,
        query,
        key,
        scale,
        causal,
        _as(query_positions, torch.int64),
        _as(key_lengths, torch.int64),
        _as(lse, _statistics(query)),
        _as(row_weights, _statistics(query)),
        first,
        end,
        heads,
        total,
        top,
        pool,
    )
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
    if bool(((lengths < 0) | (lengths > keys)).any()) or (
        positions is not None and bool((positions < -1).any())
    ):
        raise ValueError(
            "score_attention: key_lengths, query_positions: allowed 0 … N and at least -1"
        )
    column = torch.arange(keys, device=key.device)
    seen = (column < lengths[:, None]).unsqueeze(1).expand(batch, rows, keys)
    if causal:
        if positions is None:
            positions = lengths[:, None] - rows + torch.arange(rows, device=key.device)
        seen = seen & (column <= positions[:, :, None])
    return seen.unsqueeze(1)


def _reference(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    query_positions: Tensor | None,
    key_lengths: Tensor | None,
    lse: Tensor | None,
    row_weights: Tensor | None,
    first_column: int,
    end_column: int,
    heads: str,
    sum: bool,
    max: bool,
    pool: int,
) -> Tensor:
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
            weighted = attention * (
                row_weights if heads == "mean" else row_weights.unsqueeze(1)
            ).unsqueeze(-1)
        outputs.append(weighted.sum(-2))
    if max:
        outputs.append(attention.amax(-2))
    scores = torch.stack(outputs) if sum and max else outputs[0]
    if pool == 1 or scores.numel() == 0:
        return scores
    return F.avg_pool1d(scores.reshape(-1, 1, scores.shape[-1]), pool, 1, pool // 2).reshape(
        scores.shape
    )


def _fake(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    query_positions: Tensor | None,
    key_lengths: Tensor | None,
    lse: Tensor | None,
    row_weights: Tensor | None,
    first_column: int,
    end_column: int,
    heads: str,
    sum: bool,
    max: bool,
    pool: int,
) -> Tensor:
    shape = [query.shape[0], end_column - first_column]
    if heads != "mean":
        shape.insert(1, key.shape[1] if heads == "group" else query.shape[1])
    return query.new_empty([2, *shape] if sum and max else shape, dtype=_statistics(query))


OP = Op(
    schema="score_attention(Tensor query, Tensor key, float? scale, bool causal, "
    "Tensor? query_positions, Tensor? key_lengths, Tensor? lse, Tensor? row_weights, "
    "SymInt first_column, SymInt end_column, str heads, bool sum, bool max, SymInt pool) -> Tensor",
    reference=_reference,
    fake=_fake,
    function=score_attention,
    cases=cases.CASES,
    bad=cases.BAD,
    bad_values=cases.BAD_VALUES,
    cost=cases.cost,
    length=lambda kwargs: max(kwargs["query"].shape[2:] + kwargs["key"].shape[2:]),
    batch=("query", "key", "query_positions", "key_lengths", "lse", "row_weights"),
    launches=cases.launches,
)
