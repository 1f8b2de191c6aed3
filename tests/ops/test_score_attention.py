"""score_attention beyond the registry: golden tensors, known attention, more than 2³¹ elements,
long caches in several waves.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenkernels as tk

pytestmark = pytest.mark.usefixtures("native")


def queries_with_attention(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (B, H, 1, D) and key (B, H, N, D) whose attention is the given one."""
    key = attention.double().clamp_min(1e-300).log()[..., None].float()
    return torch.ones_like(key[:, :, :1]), key


@pytest.mark.parametrize("case", ["n576", "n344", "n36"])
def test_mustdrop_key_tokens(golden: Path, case: str) -> None:
    data = np.load(golden / "mustdrop" / "stage1_keyset.npz")
    row = torch.from_numpy(data[f"{case}_cls_row"])
    query, key = queries_with_attention(row)
    scores = tk.score_attention(query, key, scale=1.0, columns=(1, row.shape[2]))
    assert torch.allclose(scores, row[:, :, 1:].mean(1), rtol=1e-5, atol=0)
    index = tk.gather_topk(scores, scores, int(data[f"{case}_k"]), order="score").index
    assert torch.equal(index, torch.from_numpy(data[f"{case}_idx"]))


def test_mustdrop_text_rows(golden: Path) -> None:
    data = np.load(golden / "mustdrop" / "stage2_filter.npz")
    first, vision, text = int(data["v_token_start"]), int(data["img_seq"]), int(data["text_seq"])
    query, key = torch.from_numpy(data["q"]), torch.from_numpy(data["k"])
    columns = (first, first + vision)
    total, top = tk.score_attention(
        query[:, :, -text:], key, causal=True, columns=columns, reduce=("sum", "max")
    )
    assert np.allclose(total[0], data["colsum"], rtol=1e-5, atol=1e-6)
    assert np.allclose(top[0], data["colmax"], rtol=1e-5, atol=1e-6)
    last = tk.score_attention(query[:, :, -1:], key, columns=columns)
    assert np.allclose(last[0], data["last_row"], rtol=1e-5, atol=1e-6)
    for thresholds, keep in (
        (data[f"case{c}_thr"], data[f"case{c}_keep_fp32"]) for c in (0, 1, 2, 6)
    ):
        share, peak = total[0] / total[0].sum() / thresholds[0], top[0] / thresholds[1]
        assert torch.maximum(share, peak).ge(1).nonzero()[:, 0].tolist() == keep.tolist()


def test_the_maximum_is_that_of_the_head_mean() -> None:
    attention = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    query, key = queries_with_attention(attention)
    assert torch.allclose(
        tk.score_attention(query, key, scale=1.0, reduce="max"), torch.tensor([[0.25, 0.75]])
    )


def test_lse_given_or_not_is_the_same() -> None:
    query, key = torch.randn(2, 8, 20, 32), torch.randn(2, 2, 1000, 32)
    lse = (query @ key.repeat_interleave(4, 1).mT / math.sqrt(32)).logsumexp(-1)
    for columns in (None, (300, 700)):
        given = tk.score_attention(query, key, lse=lse, columns=columns)
        assert torch.allclose(
            given, tk.score_attention(query, key, columns=columns), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["mean", "group", "none"])
def test_many_waves(dtype: torch.dtype, heads: str) -> None:
    """Long enough that head sums are carried from wave to wave."""
    query, key = torch.randn(2, 12, 70, 16).to(dtype), torch.randn(2, 6, 1500, 16).to(dtype)
    options = {
        "causal": True,
        "heads": heads,
        "reduce": ("sum", "max"),
        "row_weights": torch.rand(2, 70),
    }
    want = tk.score_attention(query.double(), key.double(), **options, backend="reference")
    got = tk.score_attention(query, key, **options)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 3e-6 * w.abs().max()
    alone = tk.score_attention(
        query[1:], key[1:], **(options | {"row_weights": options["row_weights"][1:]})
    )
    for g, a in zip(got, alone, strict=True):
        assert torch.equal(g[1:], a)


def test_more_than_two_to_the_31_elements() -> None:
    """Heads that share their memory cost nothing; the last one differs."""
    heads, keys, dim = 40_000, 120, 512
    key = torch.randn(1, 1, keys, dim).expand(1, heads, keys, dim)
    query = torch.randn(1, 1, 1, dim).expand(1, heads, 1, dim)
    assert key.numel() > 2**31
    got = tk.score_attention(query, key)
    want = tk.score_attention(query[:, :1], key[:, :1])
    assert torch.allclose(got, want, rtol=1e-4)


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows that lie far apart: only those at the far end are touched."""
    stride = 2**31 + 64
    memory = torch.empty(stride + 64, dtype=torch.bfloat16)
    key = torch.as_strided(memory, (1, 1, 2, 32), (0, 0, stride, 1))
    key.copy_(torch.randn(1, 1, 2, 32))
    query = torch.randn(1, 4, 2, 32).bfloat16()
    assert torch.equal(tk.score_attention(query, key), tk.score_attention(query, key.contiguous()))


def test_a_query_at_the_largest_position_sees_every_key() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    positions = torch.full((1, 3), torch.iinfo(torch.int64).max)
    got = tk.score_attention(query, key, causal=True, query_positions=positions)
    assert torch.equal(got, tk.score_attention(query, key))


def test_tokens_of_no_dimension_are_refused_in_words() -> None:
    none, score = torch.tensor(1.0), torch.ops.tokenkernels.score_attention
    with pytest.raises(RuntimeError, match="score_attention: query, key: allowed"):
        score(none, none, None, False, None, None, None, None, 0, 1, "mean", True, False, 1)


def test_no_gradient_flows() -> None:
    query = torch.randn(1, 2, 3, 8, requires_grad=True)
    assert not tk.score_attention(query, torch.randn(1, 2, 5, 8)).requires_grad


def test_autocast_decides_the_dtype() -> None:
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = tk.score_attention(query, key)
    assert torch.equal(got, tk.score_attention(query.bfloat16(), key.bfloat16()))
