"""Linear layers and convolutions of frozen weights: on a CPU by oneDNN, with the GELU behind them.

Torch gives float32 products to MKL, which uses half of what some processors can do; oneDNN makes
its kernels for the one it finds. It takes the GELU along while a result is still in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


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
    in other dtypes, under autocast, in an exported or traced graph, and where somebody else looks
    at the call: hooks, another kind of layer or of tensor, modes such as that which counts flops.

    Example:
        >>> layer = nn.Linear(8, 16).requires_grad_(False)
        >>> linear(torch.randn(2, 3, 8), layer, gelu=True).shape
        torch.Size([2, 3, 16])
    """
    if not (type(layer) is nn.Linear and _frozen(x, layer) and x.shape[-1] == layer.in_features):
        return F.gelu(layer(x)) if gelu else layer(x)
    run = torch.ops.tokenmodels.linear if torch.compiler.is_compiling() else _linear
    return run(x, layer.weight, layer.bias, gelu)


def convolution(x: Tensor, layer: nn.Conv2d, *, gelu: bool = False) -> Tensor:
    """What a layer gives, then the GELU if wanted; as `linear`.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        >>> convolution(torch.randn(2, 3, 6, 6), layer, gelu=True).shape
        torch.Size([2, 8, 6, 6])
    """
    if not (_is_simple(layer) and _frozen(x, layer) and x.shape[1] == layer.in_channels):
        return F.gelu(layer(x)) if gelu else layer(x)
    # As one operator in a graph: the compiler takes oneDNN's for weights that it packed itself.
    run = torch.ops.tokenmodels.convolution if torch.compiler.is_compiling() else _convolution
    padding, stride = [int(n) for n in layer.padding], list(layer.stride)
    return run(x, layer.weight, layer.bias, padding, stride, gelu)


def _is_simple(layer: nn.Conv2d) -> bool:
    """Without dilation, groups, and padding but zeros, as `_convolution` has it."""
    return (
        type(layer) is nn.Conv2d
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _frozen(x: Tensor, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether nothing but the values of weights matters to a call."""
    weight, bias = layer.weight, layer.bias
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and not weight.requires_grad
        and (bias is None or (bias.is_contiguous() and not bias.requires_grad))
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not _exporting()
        and (torch.compiler.is_compiling() or not _watched(x, layer))
    )


def _exporting() -> bool:
    """As `torch.compiler.is_exporting`, which is true in every compiled graph before torch 2.12."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return bool(torch.compiler.is_exporting() if flag is None else flag)


def _watched(x: Tensor, layer: nn.Module) -> bool:
    """Whether somebody else has a say in a call, which compilers look after themselves."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return (
        tracing
        or not torch.backends.mkldnn.enabled
        or type(x) is not Tensor
        or type(layer.weight) is not nn.Parameter
        or "forward" in vars(layer)
        or _has_any_global_hook()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


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


_LIBRARY = library.Library("tokenmodels", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
_LIBRARY.define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, bool gelu)"
    " -> Tensor"
)
for _name, _function in (("linear", _linear), ("convolution", _convolution)):
    _LIBRARY.impl(_name, _function, "CPU")
    library.register_fake(f"tokenmodels::{_name}", _function, lib=_LIBRARY)
