"""assign_nearest on codes made to mislead it: a million tokens per metric natively, 4096 in all
where kernels are interpreted. Not one index may be wrong but where two codes are as near as the
contract allows.
"""

from __future__ import annotations

from collections.abc import Callable

import cuda_on_host
import pytest
import torch
from torch import Tensor
from trial import DEVICE, MAIN

from tokenkernels._op import OPS, Op
from tokenkernels.ops._codes import near_enough, nearest

CODES = 72
Pair = tuple[Tensor, Tensor]


def _normal(make: torch.Generator, rows: int, dim: int) -> Pair:
    return torch.randn(rows, dim, generator=make), torch.randn(CODES, dim, generator=make)


def _twice(make: torch.Generator, rows: int, dim: int) -> Pair:
    """Every code is there a second time, or a third."""
    x, book = _normal(make, rows, dim)
    return x, book[torch.randint(0, CODES // 3, (CODES,), generator=make)]


def _one_code(make: torch.Generator, rows: int, dim: int) -> Pair:
    x, book = _normal(make, rows, dim)
    return x, book[:1].repeat(CODES, 1)


def _offset(by: float) -> Callable[[torch.Generator, int, int], Pair]:
    def make_offset(make: torch.Generator, rows: int, dim: int) -> Pair:
        x, book = _normal(make, rows, dim)
        return x + by, book + by

    return make_offset


def _fresh(make: torch.Generator, rows: int, dim: int) -> Pair:
    x, _ = _normal(make, rows, dim)
    return x, (torch.rand(CODES, dim, generator=make) * 2 - 1) / CODES


def _between(make: torch.Generator, rows: int, dim: int) -> Pair:
    """Tokens about as far from one code as from another."""
    x, book = _normal(make, rows, dim)
    ends = torch.randint(0, CODES, (2, rows), generator=make)
    return (book[ends[0]] + book[ends[1]]) / 2 + x * 1e-4, book


def _one_far_code(make: torch.Generator, rows: int, dim: int) -> Pair:
    """What bounds the errors of all scores is the longest code."""
    x, book = _normal(make, rows, dim)
    book[CODES // 2] *= 1000
    return x, book


def _clusters(make: torch.Generator, rows: int, dim: int) -> Pair:
    """Many codes lie as near as makes no difference to 16 bits."""
    x, book = _normal(make, rows, dim)
    centres = book[torch.arange(CODES) % 8]
    return centres[torch.arange(rows) % CODES] + x * 1e-3, centres + book * 1e-3


HOSTILE = [
    _normal, _twice, _one_code, _offset(10.0), _offset(1000.0), _fresh, _between, _one_far_code,
    _clusters,
]  # fmt: skip
SHAPES = [(8, torch.float32), (24, torch.float32), (24, torch.bfloat16)]


def _assert_exact(op: Op, backend: str, metric: str, x: Tensor, book: Tensor) -> None:
    kwargs = {"x": x.to(DEVICE), "codebook": book.to(DEVICE), "metric": metric}
    found = op.run(kwargs, backend.partition("-")[0])[0].cpu()
    wide, codes = x.double(), book.double()
    near_enough(wide, codes, found, nearest(wide, codes, metric), metric)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("op", [OPS["assign_nearest"]], ids=lambda op: op.name)
@pytest.mark.parametrize("backend", MAIN)
def test_no_token_gets_a_wrong_code(op: Op, backend: str, metric: str) -> None:
    if reason := op.why_not(backend.partition("-")[0], DEVICE):
        pytest.skip(reason)
    interpreted = DEVICE == "cpu" and not backend.startswith("native")
    wanted = 4096 // 3 + 1 if interpreted or backend == cuda_on_host.KIND else 1_000_000
    rows = -(-wanted // (len(HOSTILE) * len(SHAPES)))
    make = torch.Generator().manual_seed(11)
    for hostile in HOSTILE:
        for dim, dtype in SHAPES:
            x, book = (t.to(dtype) for t in hostile(make, rows, dim))
            _assert_exact(op, backend, metric, x, book)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [OPS["assign_nearest"]], ids=lambda op: op.name)
@pytest.mark.parametrize("backend", MAIN)
def test_a_code_that_is_not_finite_never_wins(op: Op, backend: str, dtype: torch.dtype) -> None:
    """However high the product of what is finite in it."""
    if reason := op.why_not(backend.partition("-")[0], DEVICE):
        pytest.skip(reason)
    x, book = torch.zeros(3, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype)
    x[:, 0], book[:, 0], book[1, 1] = 1e19, torch.tensor([1.0, 1.6e19]), torch.inf
    kwargs = {"x": x.to(DEVICE), "codebook": book.to(DEVICE), "metric": "dot"}
    assert op.run(kwargs, backend.partition("-")[0])[0].tolist() == [0, 0, 0]
