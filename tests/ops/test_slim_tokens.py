"""slim_tokens beyond the registry: the official numbers, over 2³¹ elements, autocast."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenkernels as tk

BACKENDS = ["native", "reference"]
NAMES = ("weight.0.weight", "weight.0.bias", "weight.1.weight", "weight.1.bias", "weight.3.weight")


def _weights(file: dict[str, np.ndarray], prefix: str = "") -> list[Tensor]:
    weights = [torch.from_numpy(file[f"{prefix}{name}"]) for name in NAMES]
    return [*weights, torch.from_numpy(file[f"{prefix}scale"]).reshape(())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_golden(golden: Path, native: None, backend: str) -> None:
    file = np.load(golden / "sit" / "tsm_small.npz")
    x, *weights = (
        t.requires_grad_() for t in [torch.from_numpy(file["x"]), *_weights(file, "sd/")]
    )
    y = tk.slim_tokens(x, *weights, backend=backend)
    torch.testing.assert_close(
        y.detach().double(), torch.from_numpy(file["y_f64"]), atol=7e-6, rtol=0
    )
    y.backward(torch.from_numpy(file["dy"]))
    names = ["dx_f64", *(f"grad_f64/{name}" for name in (*NAMES, "scale"))]
    for name, tensor in zip(names, (x, *weights), strict=True):
        want = torch.from_numpy(file[name]).reshape(tensor.shape)
        error = (tensor.grad.double() - want).abs().max().item()
        assert error <= 1e-5 * want.abs().max().item(), f"{name}: {error:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_size_golden(golden: Path, native: None, backend: str) -> None:
    file = np.load(golden / "sit" / "tsm_sit_s_stage1.npz")
    weights = _weights(np.load(golden / "sit" / "tsm_sit_s_stage1_sd.npz"))
    y = tk.slim_tokens(torch.from_numpy(file["x"]), *weights, backend=backend)
    torch.testing.assert_close(y, torch.from_numpy(file["y_f64"]), atol=1e-5, rtol=0)


def _arguments(channels: int, hidden: int, slots: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = (channels,), (channels,), (hidden, channels), (hidden,), (slots, hidden)
    return [torch.randn(shape, generator=make) for shape in shapes]


def test_more_than_two_to_the_31_elements(native: None) -> None:
    """One image seen from very far away: its tokens lie 2²⁸ elements apart."""
    weights = _arguments(8, 4, 3)
    stride, tokens = 2**28, 17
    memory = torch.empty(stride * (tokens - 1) + 8, dtype=torch.bfloat16)
    x = memory.as_strided((2, tokens, 8), (0, stride, 1))
    x[0] = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))
    weights = [w.bfloat16() for w in weights]
    got = tk.slim_tokens(x, *weights)
    assert torch.equal(got, tk.slim_tokens(x.contiguous(), *weights))


def test_a_long_image_is_cut_into_segments(native: None) -> None:
    weights = _arguments(64, 32, 200)
    x = torch.randn(2, 9000, 64, generator=torch.Generator().manual_seed(2))
    want = tk.slim_tokens(x.double(), *(w.double() for w in weights), backend="reference")
    got = tk.slim_tokens(x, *weights)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(tk.slim_tokens(x[1:], *weights)[0], got[1])


def test_without_the_kept_projection_the_gradient_is_the_same(native: None) -> None:
    """What a graph traced without gradients saved is computed again."""
    x = torch.randn(2, 300, 24, generator=torch.Generator().manual_seed(3))
    weights = _arguments(24, 12, 5)
    op = torch.ops.tokenkernels
    grad = torch.ones(2, 5, 24)
    gradients = []
    for keep in (True, False):
        results = op.slim_tokens(x, *weights, None, 1.5, 1e-5, keep)
        gradients.append(op.slim_tokens_backward(grad, x, *weights, None, 1.5, 1e-5, *results))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_image_gives_no_gradient(native: None, dtype: torch.dtype) -> None:
    x = torch.empty(0, 300, 24, dtype=dtype, requires_grad=True)
    inputs = [w.to(dtype).requires_grad_() for w in _arguments(24, 12, 5)]
    scale = torch.tensor(1.5, requires_grad=True)
    tk.slim_tokens(x, *inputs, scale).sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (*inputs, scale))


def test_a_nan_token_stays_in_its_image(native: None) -> None:
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(4))
    weights = _arguments(16, 8, 4)
    want = tk.slim_tokens(x, *weights)
    x[0, 7] = torch.nan
    got = tk.slim_tokens(x, *weights)
    assert got[0].isnan().all()
    assert torch.equal(got[1], want[1])


def test_autocast_decides_the_dtype(native: None) -> None:
    x, weights = torch.randn(2, 40, 16), _arguments(16, 8, 4)
    scale = torch.tensor(1.3)
    with torch.autocast("cpu", torch.bfloat16):
        got = tk.slim_tokens(x, *weights, scale)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, tk.slim_tokens(x.bfloat16(), *(w.bfloat16() for w in weights), scale))
