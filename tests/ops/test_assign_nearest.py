"""assign_nearest, assign_residual and accumulate_codes beyond the registry: exactness on hostile
codebooks, independence of threads, more than 2³¹ elements, NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tokenkernels as tk
from tokenkernels.ops._codes import near_enough, nearest

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def assert_exact(x: Tensor, codebook: Tensor, metric: str = "l2") -> None:
    got = tk.assign_nearest(x, codebook, metric=metric).index
    wide, book = x.double(), codebook.double()
    near_enough(wide, book, got, nearest(wide, book, metric), metric)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0, 1e5])
@pytest.mark.parametrize("dim", [3, 16, 17, 64, 65, 256, 512])
def test_data_far_from_the_origin(offset: float, dim: int) -> None:
    x = torch.randn(40, dim, generator=make()) + offset
    codebook = torch.randn(300, dim, generator=make()) + offset
    assert_exact(x, codebook)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("dim", [12, 128, 512])
def test_sums_of_one_sign(metric: str, dim: int) -> None:
    x = torch.rand(100, dim, generator=make()) + 1
    assert_exact(x, torch.rand(900, dim, generator=make()) + 1, metric)


def test_freshly_initialised_codebook() -> None:
    """Codes of ±1/K next to tokens of length √D: ‖x‖² in the score would drown them."""
    codes = 65_536
    x = torch.randn(40, 64, generator=make())
    book = (torch.rand(codes, 64, generator=make()) * 2 - 1) / codes
    got = tk.assign_nearest(x, book).index
    assert torch.equal(got, nearest(x.double(), book.double(), "l2"))


def test_every_split_gives_the_same_bits(threads: int) -> None:
    x = torch.randn(11, 24, generator=make())
    book = torch.randn(1000, 24, generator=make())
    book[500:] = book[:500]
    whole = tk.assign_nearest(x, book, return_distance=True)
    assert (whole.index < 500).all()
    for row in range(len(x)):
        alone = tk.assign_nearest(x[row], book, return_distance=True)
        assert alone.index == whole.index[row] and alone.distance == whole.distance[row]
    narrow = tk.assign_nearest(x[:, :5].contiguous(), book[:, :5])
    alone = [tk.assign_nearest(row[:5], book[:, :5]).index for row in x]
    assert torch.equal(narrow.index, torch.stack(alone))


def test_statistics_do_not_depend_on_threads(threads: int) -> None:
    x = torch.randn(5000, 200, generator=make())
    index = torch.randint(-1, 7, (5000,), generator=make())
    counts, sums = tk.accumulate_codes(x, index, 7)
    in_order = torch.zeros(7, 200)
    for row, code in zip(x, index.tolist(), strict=True):
        if code >= 0:
            in_order[code] += row
    assert torch.equal(sums, in_order)
    assert counts.sum() == (index >= 0).sum()


def test_what_is_not_finite() -> None:
    x = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    book = torch.tensor([[9.0, 9.0], [torch.nan, 1.0], [0.0, torch.inf], [0.0, 0.5]])
    got = tk.assign_nearest(x, book, return_distance=True)
    assert got.index.tolist() == [3, 0, 0]
    assert got.distance[0] == 0.25 and got.distance[1].isnan() and got.distance[2].isinf()


def test_zero_vectors_have_no_direction() -> None:
    got = tk.assign_nearest(
        torch.tensor([[0.0, 0.0], [-1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        metric="cosine",
        return_distance=True,
    )
    assert got.index.tolist() == [0, 1] and got.distance.tolist() == [1.0, 1.0]


def test_more_than_two_to_the_31_elements() -> None:
    """Memory that is never touched costs nothing: the rows lie 2³⁰ elements apart."""
    far = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)
    x, book = far.as_strided((3, 40), (2**30, 1)), far[64:].as_strided((3, 40), (2**30, 1))
    x.copy_(torch.randn(3, 40, generator=make()))
    book.copy_(torch.randn(3, 40, generator=make()))
    near_x, near_book = x.contiguous(), book.contiguous()
    got = tk.assign_nearest(x, book, return_distance=True, return_codes=True)
    want = tk.assign_nearest(near_x, near_book, return_distance=True, return_codes=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    got, want = tk.assign_residual(x, book[None]), tk.assign_residual(near_x, near_book[None])
    assert torch.equal(got.residual, want.residual)
    sums = tk.accumulate_codes(x, want.index[:, 0], 3).sums
    assert torch.equal(sums, tk.accumulate_codes(near_x, want.index[:, 0], 3).sums)


def test_four_million_rows_that_are_one() -> None:
    rows, dim = 2**22 + 5, 512
    x = torch.randn(dim, generator=make()).expand(rows, dim)
    index = torch.arange(rows) % 2
    counts, sums = tk.accumulate_codes(x, index, 2)
    assert counts.tolist() == [rows // 2 + 1, rows // 2]
    assert sums.isfinite().all()


def test_no_group_has_no_statistics() -> None:
    x, index = torch.empty(4, 0, 3), torch.empty(4, 0, dtype=torch.int64)
    counts, sums = torch.ops.tokenkernels.accumulate_codes(x, index, 5, True)
    assert counts.shape == (0, 5) and sums.shape == (0, 5, 3)


def test_more_codes_than_a_32_bit_number_counts_are_refused() -> None:
    book = torch.ones(1, 4).expand(2**31, 4)
    with pytest.raises(RuntimeError, match="assign_nearest: codebook: allowed K below"):
        torch.ops.tokenkernels.assign_nearest(torch.ones(1, 4), book, "l2", False, False)


def test_gradient_stops() -> None:
    x, book = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    got = tk.assign_nearest(x, book, return_distance=True, return_codes=True)
    assert not (got.distance.requires_grad or got.codes.requires_grad)
    assert not tk.accumulate_codes(x, got.index, 5).sums.requires_grad
