"""Frozen linear layers and convolutions give what torch's own give, however they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenmodels import _frozen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest result: a sum of 27 products at most, rounded once or, with a GELU, twice."""


class Both(nn.Module):
    """A convolution, then a linear layer of its pixels, with a GELU behind each or without."""

    def __init__(self, channels: int, gelu: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gelu = gelu
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=bias)
        self.fc = nn.Linear(8, 24, bias=bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        y = _frozen.convolution(x, self.conv, gelu=self.gelu).flatten(2).transpose(1, 2)
        return _frozen.linear(y, self.fc, gelu=self.gelu)

    def exact(self, x: Tensor) -> Tensor:
        behind: Callable[[Tensor], Tensor] = F.gelu if self.gelu else nn.Identity()
        y = behind(self.conv.double()(x.double())).flatten(2).transpose(1, 2)
        return behind(self.fc.double()(y))


@torch.inference_mode()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_frozen_layers(channels: int, gelu: bool, bias: bool, dtype: torch.dtype) -> None:
    both = Both(channels, gelu, bias).requires_grad_(False).to(dtype)
    for batch in (0, 1, 5):
        x = torch.randn(batch, channels, 9, 14).to(dtype)
        got = both(x)
        want = Both(channels, gelu, bias).to(dtype).exact(x)
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        if batch:
            assert (got - want).abs().max() <= BOUND[dtype] * want.abs().max()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two was computed by oneDNN; tests that ask need a processor where it is."""
    if torch.float32 not in _frozen.DTYPES:
        pytest.skip("no oneDNN")
    seen: list[str] = []
    for name in ("_linear", "_convolution"):
        run = getattr(_frozen, name)

        def told(*arguments: Any, name: str = name, run: Callable[..., Tensor] = run) -> Tensor:
            seen.append(name)
            return run(*arguments)

        monkeypatch.setattr(_frozen, name, told)
    return seen


def test_frozen_layers_go_to_onednn(calls: list[str]) -> None:
    Both(3, True).requires_grad_(False)(torch.randn(2, 3, 9, 14))
    assert calls == ["_convolution", "_linear"]


def _hooked(both: Both) -> None:
    for layer in (both.conv, both.fc):
        layer.register_forward_hook(lambda module, args, out: 2 * out)


def _replaced(both: Both) -> None:
    for layer in (both.conv, both.fc):
        layer.forward = lambda x, run=layer.forward: 2 * run(x)  # type: ignore[method-assign]


def _strided(both: Both) -> None:
    both.fc.bias = nn.Parameter(torch.randn(48)[::2], requires_grad=False)
    both.conv.padding_mode = "circular"


def _dilated(both: Both) -> None:
    both.conv.dilation = (2, 2)
    both.fc.bias = nn.Parameter(torch.randn(1).expand(24), requires_grad=False)


def _learning_bias(both: Both) -> None:
    for layer in (both.conv, both.fc):
        assert layer.bias is not None
        layer.bias.requires_grad_()


@pytest.mark.parametrize("change", [_hooked, _replaced, _strided, _dilated, _learning_bias])
def test_other_layers_are_called_themselves(change: Any, calls: list[str]) -> None:
    both, x = Both(3, False).requires_grad_(False), torch.randn(2, 3, 9, 14)
    change(both)
    want = both.fc(both.conv(x).flatten(2).transpose(1, 2))
    assert torch.equal(both(x), want) and not calls
    if want.requires_grad:
        both(x).sum().backward()
        assert both.fc.bias.grad is not None and both.conv.bias.grad is not None


def test_whoever_watches_sees_torchs_operators(calls: list[str]) -> None:
    both, x = Both(3, True).requires_grad_(False), torch.randn(2, 3, 9, 14)
    with FlopCounterMode(display=False) as counter:
        both(x)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * (27 * 8 + 8 * 24)
    _, slope = torch.func.jvp(both, (x,), (x,))
    assert slope.abs().sum() > 0
    with torch.backends.mkldnn.flags(enabled=False):
        both(x)
    assert not calls
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _frozen.linear(torch.randn(2, 9), both.fc)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_recorded_calls(channels: int) -> None:
    """Compiled in one graph: bit for bit; exported or traced: of torch's own operators."""
    both, x = Both(channels, True).requires_grad_(False), torch.randn(2, channels, 9, 14)
    want = both(x)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(both, (x,))
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert names and all(name.startswith("aten.") for name in names)
    torch.testing.assert_close(program.module()(x), want)
    traced = torch.jit.trace(both, x)
    assert not {n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("tokenm")}
    torch.testing.assert_close(traced(x), want)


def test_a_gradient_is_never_lost() -> None:
    frozen, x = Both(3, True).requires_grad_(False), torch.randn(2, 3, 9, 14)
    assert not frozen(x).requires_grad
    frozen(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    learning = Both(3, True)
    learning(x).sum().backward()
    assert all(p.grad is not None for p in learning.parameters())


@torch.inference_mode()
def test_a_layer_that_was_changed_is_called() -> None:
    """One with a hook, and one that a quantised layer took the place of."""
    both, x = Both(3, True).requires_grad_(False), torch.randn(2, 3, 9, 14)
    want, seen = both(x), []
    both.fc.register_forward_hook(lambda *call: seen.append(call[0]))
    both.conv.register_forward_pre_hook(lambda *call: seen.append(call[0]))
    torch.testing.assert_close(both(x), want)
    assert seen == [both.conv, both.fc]
    both.fc = type("Other", (nn.Linear,), {"forward": lambda self, x: 0 * x})(8, 24)
    assert not both.requires_grad_(False)(x).any()


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Both(3, True).requires_grad_(False)(torch.randn(2, 3, 9, 14)).dtype == torch.bfloat16
