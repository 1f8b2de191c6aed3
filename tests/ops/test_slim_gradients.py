"""Gradients of slim_tokens in halves where a softmax is sharp: the logits of the way back are not
those of the way there to the last bit, and may not turn weights into ones of another sum.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trial import DEVICE, MAIN, arguments, fresh, run, wide

from tokenkernels._case import Case
from tokenkernels._op import OPS, Op
from tokenkernels.cases.slim_tokens import _shapes


def _gradient_of_x(op: Op, kwargs: dict[str, object], backend: str) -> Tensor:
    kwargs = fresh(kwargs)
    x = kwargs["x"]
    assert isinstance(x, Tensor)
    x.requires_grad_()
    (tokens,) = run(op, kwargs, backend)[:1]
    seed = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(tokens, x, seed.to(tokens))[0].double().cpu()


@pytest.mark.parametrize("scale", [12.0, 100.0, 4000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [OPS["slim_tokens"]], ids=lambda op: op.name)
@pytest.mark.parametrize("backend", MAIN)
def test_sharp_weights_sum_to_one_on_the_way_back(
    op: Op, backend: str, dtype: torch.dtype, scale: float
) -> None:
    if reason := op.why_not(backend.partition("-")[0], DEVICE):
        pytest.skip(reason)
    kwargs = arguments(op, Case("sharp", _shapes(2, 40, 24, 6, scale=scale)), dtype)
    want = _gradient_of_x(op, wide(kwargs), "reference")
    got = _gradient_of_x(op, kwargs, backend)
    low = _gradient_of_x(op, kwargs, "reference")
    error, rounding = ((g - want).abs().max() for g in (got, low))
    length = kwargs["x"].shape[-1] ** 0.5
    assert error <= 2 * rounding + torch.finfo(dtype).eps * length * want.abs().max()
