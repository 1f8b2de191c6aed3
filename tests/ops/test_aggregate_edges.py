"""The soft aggregations where there is nothing to aggregate into, and of what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trial import DEVICE, MAIN

from tokenkernels._op import OPS, Op


def _fits(op: Op, backend: str) -> str:
    kind = backend.partition("-")[0]
    if reason := op.why_not(kind, DEVICE):
        pytest.skip(reason)
    return kind


@pytest.mark.parametrize("op", [OPS["aggregate_logits"]], ids=lambda op: op.name)
@pytest.mark.parametrize("backend", MAIN)
def test_no_slots_give_a_gradient_of_zeros(op: Op, backend: str) -> None:
    logits = torch.zeros(2, 70, 0, device=DEVICE)
    value = torch.ones(2, 70, 5, device=DEVICE, requires_grad=True)
    kwargs = {"logits": logits, "value": value}
    tokens: Tensor = op.run(kwargs, _fits(op, backend))[0]
    (gradient,) = torch.autograd.grad(tokens.sum(), value)
    assert gradient.count_nonzero() == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [OPS["aggregate_logits"]], ids=lambda op: op.name)
@pytest.mark.parametrize("backend", MAIN)
def test_an_infinite_value_makes_its_own_channel_infinite(
    op: Op, backend: str, dtype: torch.dtype
) -> None:
    value = torch.ones(1, 3, 4, dtype=dtype, device=DEVICE)
    value[0, 1, 2] = torch.inf
    kwargs = {"logits": torch.zeros(1, 3, 2, dtype=dtype, device=DEVICE), "value": value}
    tokens: Tensor = op.run(kwargs, _fits(op, backend))[0].cpu().float()
    assert tokens[..., 2].eq(torch.inf).all()
    assert tokens[..., [0, 1, 3]].sub(1).abs().max() < 0.01
