"""gather_topk beyond the registry: more than 2³¹ elements, adversarial scores, autocast."""

import pytest
import torch

import tokenkernels as tk

pytestmark = pytest.mark.usefixtures("native")


def test_more_than_two_to_the_31_elements() -> None:
    """Memory that is never touched costs nothing: only the rows at the far end are written and
    read.
    """
    tokens, channels = 70_000, 40_000
    x = torch.empty(1, tokens, channels, dtype=torch.bfloat16)
    x[0, -2:] = torch.arange(2 * channels).reshape(2, channels)
    scores = torch.zeros(1, tokens)
    scores[0, -2:] = torch.tensor([1.0, 2.0])
    selected = tk.gather_topk(x, scores, 2)
    assert selected.index.tolist() == [[tokens - 2, tokens - 1]]
    assert torch.equal(selected.tokens[0], x[0, -2:])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1000, 70_001])
def test_equal_scores_keep_the_first(tokens: int) -> None:
    scores = torch.full((2, tokens), 0.25, dtype=torch.bfloat16)
    k = tokens // 2 + 1
    selected = tk.gather_topk(torch.arange(tokens).expand(2, -1), scores, k)
    assert torch.equal(selected.index, torch.arange(k).expand(2, -1))


def test_bf16_softmax_scores_tie_and_the_kept_set_is_still_defined() -> None:
    scores = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).softmax(-1).bfloat16()
    got = tk.gather_topk(scores.float(), scores, 512)
    want = tk.gather_topk(scores.float(), scores, 512, backend="reference")
    assert torch.equal(got.index, want.index)


def test_autocast_decides_the_dtype() -> None:
    x, scores = torch.randn(1, 8, 4), torch.rand(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert tk.gather_topk(x, scores, 2).tokens.dtype == torch.bfloat16


def test_budgets_may_be_a_tensor() -> None:
    x, scores = torch.randn(2, 8, 4), torch.rand(2, 8)
    selected = tk.gather_topk(x, scores, torch.tensor([2, 5]))
    assert selected.offsets.tolist() == [0, 2, 7]


def test_numpy_integers_are_a_budget_for_all_images() -> None:
    x, scores = torch.randn(2, 8, 4), torch.rand(2, 8)
    k = pytest.importorskip("numpy").int64(3)
    assert torch.equal(tk.gather_topk(x, scores, k).tokens, tk.gather_topk(x, scores, 3).tokens)


def backward(**changes: object) -> None:
    scores = torch.rand(2, 8)
    arguments = {
        "gradients": [torch.randn(2, 4, 4)],
        "index": torch.tensor([[0, 3, 7], [1, 2, 5]]),
        "offsets": torch.tensor([0, 4, 8]),
        "tensors": [torch.randn(2, 8, 4)],
        "scores": scores,
        "prefix": 0,
        "fuse": "sum",
    }
    torch.ops.tokenkernels.gather_topk_backward(*(arguments | changes).values())


def test_a_good_gradient_call_passes() -> None:
    backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index": torch.tensor([[0, 3, 8], [1, 2, 5]])}, "index"),
        ({"index": torch.tensor([[0, -1, 7], [1, 2, 5]])}, "index"),
        ({"index": torch.tensor([[0, 3, 7], [1, 2, 5]]).int()}, "index, offsets"),
        ({"offsets": torch.tensor([0, 9, 8])}, "offsets"),
        ({"offsets": torch.tensor([1, 4, 8])}, "offsets"),
        ({"offsets": torch.tensor([0, 4, 9])}, "offsets"),
        ({"offsets": torch.tensor([0, 4, 8]).int()}, "index, offsets"),
        ({"prefix": -1}, "prefix"),
        ({"scores": torch.rand(16)}, "scores"),
        ({"gradients": [torch.randn(32)]}, "gradients"),
        ({"gradients": [torch.randn(4, 2, 4)]}, "gradients"),
        ({"tensors": [torch.randn(8, 2, 4)]}, "tensors"),
    ],
)
def test_a_bad_gradient_call_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"gather_topk_backward: {words}"):
        backward(**changes)
