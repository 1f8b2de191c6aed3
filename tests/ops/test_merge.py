"""What only the merges promise: un-merging by one gather, and more than 2³¹ elements."""

from __future__ import annotations

import pytest
import torch

import tokenkernels as tk
from tokenkernels import _native

native = pytest.mark.skipif(_native.WHY_NOT is not None, reason=str(_native.WHY_NOT))


def test_one_gather_unmerges() -> None:
    x = torch.randn(2, 37, 8)
    x[:, 1:] = (
        x[:, 1:]
        .reshape(2, 3, 2, 3, 2, 8)[:, :, :1, :, :1]
        .expand(-1, -1, 2, -1, 2, -1)
        .reshape(2, 36, 8)
    )
    packed = tk.merge_adjacent(x, (6, 6), (2, 2), threshold=0.9, prefix=1)
    dense = tk.merge_adjacent(x, (6, 6), (2, 2), num_windows=9, prefix=1)
    assert packed.tokens.shape == (20, 8) and dense.tokens.shape == (2, 10, 8)
    assert torch.equal(packed.tokens[packed.index], x)
    assert torch.equal(dense.tokens.gather(1, dense.index[:, :, None].expand(-1, -1, 8)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_that_stay_keep_their_bits(dtype: torch.dtype) -> None:
    numbers = torch.arange(-0x7C00, 0x7C00, dtype=torch.int16).view(dtype)  # denormals among them
    x = numbers[numbers.isfinite()][: 64 * 900].reshape(1, 900, -1)
    runs = tk.merge_runs(x, 2.0).tokens
    windows = tk.merge_adjacent(x, (30, 30), (2, 2), num_windows=0).tokens
    assert torch.equal(runs.view(torch.int16), x[0].view(torch.int16))
    assert torch.equal(windows.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_may_be_tiny(dtype: torch.dtype) -> None:
    x, size = torch.ones(1, 4, 20, dtype=dtype), torch.full((1, 4), 2.0**-133)
    runs = tk.merge_runs(x, 0.5, size=size).tokens
    windows = tk.merge_adjacent(x, (4,), (2,), num_windows=2, size=size).tokens
    assert torch.equal(runs, x[0, :1]) and torch.equal(windows, x[:, :2])


def test_an_index_outside_the_gradient_is_refused() -> None:
    grad, index = torch.ones(3, 4), torch.tensor([[0, 1, 3]])
    if _native.WHY_NOT is None:
        with pytest.raises(RuntimeError, match="merge_backward: index: allowed rows of grad"):
            torch.ops.tokenkernels.merge_backward(grad, index, None, torch.ones(3))


def test_tokens_without_channels_merge() -> None:
    x = torch.empty(2, 37, 0)
    for options in ({"threshold": 0.5}, {"threshold": 0.0}, {"num_windows": 3}):
        got = tk.merge_adjacent(x, (6, 6), (2, 2), prefix=1, **options)
        want = tk.merge_adjacent(x, (6, 6), (2, 2), prefix=1, **options, backend="reference")
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@native
@pytest.mark.parametrize(
    ("grid", "window", "counts", "prefix", "words"),
    [
        ([2**32, 1, 2**32], [2, 1, 2], None, 16, "x: allowed"),
        ([4, 4], [2, 2], None, -1, "x: allowed"),
        ([4, 4], [2, 2], [1, 2], 0, "num_windows: allowed one for all"),
    ],
)
def test_the_kernel_refuses_what_would_leave_its_memory(
    grid: list[int], window: list[int], counts: list[int] | None, prefix: int, words: str
) -> None:
    merge = torch.ops.tokenkernels.merge_adjacent
    x = torch.randn(2, 16, 4)
    with pytest.raises(RuntimeError, match=f"merge_adjacent: {words}"):
        merge(x, grid, window, 0.5, counts, True, None, prefix, False)
    with pytest.raises(RuntimeError, match="merge_adjacent: x: allowed"):
        merge(x[0, 0, 0], [1], [2], 0.5, None, True, None, 0, False)


@native
def test_a_window_far_beyond_the_grid_merges_nothing() -> None:
    x = torch.ones(2, 16, 4)
    got = tk.merge_adjacent(x, (4, 1, 4), (2**62, 2**62, 2**62), threshold=0.0)
    assert torch.equal(got.tokens, x.reshape(32, 4)) and got.size.eq(1).all()


@native
def test_beyond_two_to_the_31_elements() -> None:
    images, channels = 260, 2048
    x = torch.ones(1, 1, channels, dtype=torch.bfloat16).expand(images, 64 * 64, channels)
    merged = tk.merge_adjacent(x, (64, 64), (64, 64), num_windows=1)
    assert merged.tokens.shape == (images, 1, channels)
    assert merged.tokens.eq(1).all() and merged.size.eq(64 * 64).all()


@native
def test_runs_beyond_two_to_the_31_elements() -> None:
    tokens, channels = 2**20 + 64, 2048
    x = torch.ones(1, 1, channels, dtype=torch.bfloat16).expand(1, tokens, channels)
    runs = tk.merge_runs(x, 0.5, max_run=2**14)
    assert runs.tokens.shape == (65, channels) and runs.tokens.eq(1).all()
    assert runs.size[:-1].eq(2**14).all() and runs.size[-1] == 64
