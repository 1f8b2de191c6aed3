"""The soft aggregations beyond the registry: huge strides, threads, masks, what is kept for the
gradient.
"""

import pytest
import torch
from torch import Tensor

import tokenkernels as tk

pytestmark = pytest.mark.usefixtures("native")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def test_offsets_beyond_two_to_the_31() -> None:
    """Memory that is never touched costs nothing: only a few far-apart rows are written."""
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    by_image = memory.as_strided((2, 8, 16), (2**31, 16, 1))
    by_row = memory.as_strided((1, 3, 16), (16, 2**30, 1))
    for far in (by_image, by_row):
        far.copy_(drawn(*far.shape))
        query = drawn(5, 16).bfloat16()
        near = far.clone()
        assert torch.equal(tk.aggregate_soft(query, far, far), tk.aggregate_soft(query, near, near))
        assert torch.equal(tk.aggregate_logits(far, far), tk.aggregate_logits(near, near))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    query, key, value = (drawn(*s).to(dtype) for s in ((300, 24), (1, 700, 24), (1, 700, 40)))

    def run() -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        tokens = tk.aggregate_soft(*inputs)
        return [tokens, *torch.autograd.grad(tokens.float().square().sum(), inputs)]

    both = run()
    torch.set_num_threads(1)
    try:
        alone = run()
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_their_own_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    inputs = [drawn(*s).to(dtype) for s in ((3, 70, 12), (3, 300, 12), (3, 300, 33))]

    def run(images: slice) -> list[Tensor]:
        some = [t[images].clone().requires_grad_() for t in inputs]
        tokens = tk.aggregate_soft(*some)
        return [tokens, *torch.autograd.grad(tokens.float().square().sum(), some)]

    whole = run(slice(0, 3))
    for image in range(3):
        for one, all_ in zip(run(slice(image, image + 1)), whole, strict=True):
            assert torch.equal(one[0], all_[image])


def test_an_expanded_query_has_a_gradient_per_image() -> None:
    shared, key, value = drawn(7, 12), drawn(3, 50, 12), drawn(3, 50, 9)

    def gradient(*inputs: Tensor, backend: str) -> Tensor:
        query, key, value = inputs
        query = query.expand(3, 7, 12).requires_grad_()
        tokens = tk.aggregate_soft(query, key, value, backend=backend)
        return torch.autograd.grad(tokens.square().sum(), query)[0]

    got = gradient(shared, key, value, backend="native")
    want = gradient(shared.double(), key.double(), value.double(), backend="reference")
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_operands_of_no_dimension_are_refused_in_words() -> None:
    op, none = torch.ops.tokenkernels, torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="aggregate_soft: query, key, value: allowed"):
        op.aggregate_soft(none, none, none, None, None, None, 1.0, False)
    with pytest.raises(RuntimeError, match="aggregate_logits: logits, value: allowed"):
        op.aggregate_logits(none, none, None)


def test_one_token_is_every_slot() -> None:
    value = drawn(2, 1, 7)
    for got in (
        tk.aggregate_soft(drawn(4, 3), drawn(2, 1, 3), value),
        tk.aggregate_logits(drawn(2, 1, 4), value),
    ):
        assert torch.equal(got, value.expand(2, 4, 7))


def test_logits_of_ten_thousand_with_ties() -> None:
    logits, value = 1e4 * drawn(2, 21, 6).sign(), drawn(2, 21, 7)
    logits[:, :, 0] = -1e4
    got = tk.aggregate_logits(logits, value)
    want = tk.aggregate_logits(logits.double(), value.double(), backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_weights_are_those_of_the_tokens() -> None:
    value = drawn(2, 600, 5)
    tokens, weights = tk.aggregate_soft(
        drawn(9, 4), 3 * drawn(2, 600, 4), value, return_weights=True
    )
    assert weights.shape == (2, 9, 600)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    torch.testing.assert_close(weights @ value, tokens)


def test_a_bias_of_log_sizes_counts_tokens_several_times() -> None:
    query, key, value = drawn(6, 8), drawn(1, 10, 8), drawn(1, 10, 8)
    sizes = torch.arange(1, 11)
    got = tk.aggregate_soft(query, key, value, bias=sizes.float().log()[None])
    repeated = [t.repeat_interleave(sizes, 1) for t in (key, value)]
    torch.testing.assert_close(got, tk.aggregate_soft(query, *repeated))


def test_what_is_masked_gives_no_gradient_and_spreads_none() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    x = torch.where(mask[..., None], drawn(2, 3, 4), torch.nan).requires_grad_()
    query = drawn(2, 4).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    tk.aggregate_soft(query, x, x, mask=mask, scale=scale).square().sum().backward()
    assert torch.equal(x.grad == 0, ~mask[..., None].expand_as(x))
    assert query.grad.isfinite().all() and scale.grad.isfinite()
    logits = torch.where(mask[..., None], drawn(2, 3, 5), torch.nan).requires_grad_()
    tk.aggregate_logits(logits, x.detach(), mask=mask).square().sum().backward()
    assert torch.equal(logits.grad == 0, ~mask[..., None].expand_as(logits))


@pytest.mark.parametrize(("slots", "kept"), [(16, True), (17, False)])
def test_nothing_larger_than_the_values_is_kept(slots: int, kept: bool) -> None:
    query, x = drawn(slots, 16).requires_grad_(), drawn(2, 50, 16)
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(t.shape) or t, lambda t: t
    ):
        tk.aggregate_soft(query, x, x)
    assert ((2, 50, slots) in shapes) == kept


def test_autocast_decides_the_dtype() -> None:
    x = drawn(1, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert tk.aggregate_soft(drawn(2, 4), x, x).dtype == torch.bfloat16
        assert tk.aggregate_logits(x, x).dtype == torch.bfloat16
