"""Linear layers and convolutions of frozen weights: on a CPU by oneDNN, with the GELU behind them.

Torch gives float32 products to MKL, which uses half of what some processors can do; oneDNN makes
its kernels for the one it finds. It takes the GELU along while a result is still in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _known_dtypes() -> tuple[torch.dtype, ...]:
    """Those in which oneDNN computes on this processor."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return ()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


DTYPES = _known_dtypes()


def linear(x: Tensor, layer: nn.Linear, *, gelu: bool = False) -> Tensor:
    """What a layer gives, then the exact (erf) GELU if wanted: (…, C) → (…, D).

    The layer itself is called, and torch's GELU, wherever a gradient is needed, on other devices,
    in other dtypes, under autocast, in an exported graph, and where it has hooks or is a layer of
    another kind that took the place of this one.
    """
    if not _by_onednn(x, layer, nn.Linear):
        return F.gelu(layer(x)) if gelu else layer(x)
    run = torch.ops.tokenmodels.linear if _recorded() else _linear
    return run(x, layer.weight, layer.bias, gelu)


def convolution(x: Tensor, layer: nn.Conv2d, *, gelu: bool = False) -> Tensor:
    """What a layer without dilation, groups or padding but zeros gives, then the GELU if wanted; as
    `linear`.
    """
    if not _by_onednn(x, layer, nn.Conv2d):
        return F.gelu(layer(x)) if gelu else layer(x)
    run = torch.ops.tokenmodels.convolution if _recorded() else _convolution
    padding, stride = [int(n) for n in layer.padding], list(layer.stride)
    return run(x, layer.weight, layer.bias, padding, stride, gelu)


def _by_onednn(x: Tensor, layer: nn.Linear | nn.Conv2d, kind: type[nn.Module]) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and type(layer) is kind
        and not layer.weight.requires_grad
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


def _recorded() -> bool:
    """Whether a graph is made of this call: one of an operator of our own, because the compiler
    takes oneDNN's for weights that it has packed itself alone, and the tracer not at all.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or tracing


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_behind(gelu))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    gelu: bool,
) -> Tensor:
    out = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, [1, 1], 1, *_behind(gelu)
    )
    return out.contiguous(memory_format=torch.channels_last)  # of one channel it might not be


def _behind(gelu: bool) -> tuple[str, list[float], str]:
    return ("gelu", [], "none") if gelu else ("none", [], "")


_LIBRARY = torch.library.Library("tokenmodels", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
_LIBRARY.define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, bool gelu)"
    " -> Tensor"
)
for _name, _function in (("linear", _linear), ("convolution", _convolution)):
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"tokenmodels::{_name}", _function, lib=_LIBRARY)
