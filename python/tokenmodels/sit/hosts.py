"""The vision transformers of other packages that can be slimmed, and where their parts are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenmodels._refuse import refusal


@dataclass(frozen=True)
class Host:
    """A vision transformer whose blocks map (B, prefix + N, C) to the same.

    Attributes:
        model: the part of what was given that holds the blocks.
        blocks: in order.
        prefix: tokens in front of the patches: class, distillation and register tokens.
        dim: channels C.
        image_size: height and width that it is made for; None where it is made for any.
        grid: pixels to patches, (height, width) to (h, w).
        fixed: whether it takes images of `image_size` alone.
        makes_masks: whether it hands its blocks an attention mask of its own while it is exported,
            one that hides nothing.
    """

    model: nn.Module
    blocks: nn.ModuleList | nn.Sequential
    prefix: int
    dim: int
    image_size: tuple[int, int] | None
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    fixed: bool = False
    makes_masks: bool = False


def _timm(model: Any) -> Host:
    embed = model.patch_embed
    return Host(
        model,
        model.blocks,
        model.num_prefix_tokens,
        model.embed_dim,
        None if embed.img_size is None else pair(embed.img_size),
        partial(_timm_grid, embed),
        fixed=embed.img_size is not None and embed.strict_img_size,
    )


def _timm_grid(embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    return pair(embed.dynamic_feat_size(size))


def _transformers(model: Any, *, prefix: int, registers: bool = False) -> Host:
    config = model.config
    if registers:
        prefix += config.num_register_tokens
    return Host(
        model,
        _layers(model),
        prefix,
        config.hidden_size,
        pair(config.image_size),
        partial(_grid, pair(config.patch_size)),
        makes_masks=True,
    )


def _grid(patch: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]


def _layers(model: Any) -> nn.ModuleList:
    """The blocks, by the names that releases of transformers have given them."""
    owners = (model, getattr(model, "encoder", None))
    found = (getattr(owner, name, None) for owner in owners for name in ("layers", "layer"))
    return next(one for one in found if isinstance(one, nn.ModuleList))


_CLASS, _NO_CLASS = partial(_transformers, prefix=1), partial(_transformers, prefix=0)

KINDS: dict[tuple[str, str], Callable[[Any], Host]] = {
    ("timm", "VisionTransformer"): _timm,
    ("transformers", "ViTModel"): _CLASS,
    ("transformers", "DeiTModel"): partial(_transformers, prefix=2),
    ("transformers", "Dinov2Model"): _CLASS,
    ("transformers", "Dinov2WithRegistersModel"): partial(_CLASS, registers=True),
    # Where releases have both of a pair, one lies in the other and alone holds the layers.
    ("transformers", "CLIPVisionTransformer"): _CLASS,
    ("transformers", "CLIPVisionModel"): _CLASS,
    ("transformers", "SiglipVisionTransformer"): _NO_CLASS,
    ("transformers", "SiglipVisionModel"): _NO_CLASS,
}
"""Package and class, of the model or of what it is derived from → how to read it."""

SUPPORTED = (
    "a timm VisionTransformer (ViT, DeiT, with registers, any pooling), or a transformers ViT, "
    "DeiT, CLIP, SigLIP or DINOv2 vision model, or what contains one of them"
)

_BOUND = (  # in the name of a part, a weight or a class → what binds the model to its tokens
    (re.compile(r"(^|[._])rel(ative)?_pos|Rel(ative)?Pos"), "relative position bias"),
    (re.compile(r"(^|[._])(rope|rotary)|Ro[Pp][Ee]|Rotary"), "rotary positions"),
    (re.compile(r"(^|[._])window|Window"), "windowed attention"),
)
_MAPS = {  # classes that give the patches back as images or maps
    "FeatureGetterNet": "maps of features",
    "ViTForMaskedImageModeling": "reconstructed images",
    "DeiTForMaskedImageModeling": "reconstructed images",
    "Dinov2Backbone": "maps of features",
    "Dinov2WithRegistersBackbone": "maps of features",
}


def find(where: str, model: Any) -> Host:
    """The one vision transformer in a model.

    Args:
        where: who asks, for errors.
        model: it, or what contains it.

    Raises:
        TypeError: no module, or nothing that can be slimmed in it; the text names what prevents it.
        ValueError: more than one, or one whose attention depends on where a token is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(refusal(where, "model", SUPPORTED, type(model).__name__))
    found: list[nn.Module] = []
    for part in model.modules():
        maps = _MAPS.get(type(part).__name__)
        if maps:
            got = f"{type(part).__name__}, whose {maps} need every patch"
            raise TypeError(refusal(where, "model", SUPPORTED, got))
        if _reader(part):
            found.append(part)
    if not found:
        reason = _bound(model)
        got = type(model).__name__ + (f", which has {reason}" if reason else "")
        raise TypeError(refusal(where, "model", SUPPORTED, got))
    if len(found) > 1:
        names = ", ".join(name for name, part in model.named_modules() if part in found)
        raise ValueError(refusal(where, "model", "one that contains one vision transformer", names))
    if reason := _bound(found[0]):
        allowed = "attention that does not depend on where a token is"
        raise ValueError(refusal(where, "model", allowed, reason))
    reader = _reader(found[0])
    assert reader is not None
    return reader(found[0])


def _reader(part: nn.Module) -> Callable[[Any], Host] | None:
    for kind in type(part).__mro__:
        reader = KINDS.get((kind.__module__.partition(".")[0], kind.__name__))
        if reader is not None and (reader is _timm or _has_layers(part)):
            return reader
    return None


def _has_layers(part: Any) -> bool:
    return hasattr(part, "layers") or hasattr(part, "encoder")


def _bound(model: nn.Module) -> str | None:
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    names += {type(part).__name__ for part in model.modules()}
    for pattern, reason in _BOUND:
        if any(pattern.search(name) for name in names):
            return reason
    return None


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of what may be one number for both."""
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


@contextmanager
def record_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, a list that holds the patch tokens behind every block of the last forward.

    They are those of a vision transformer that `slim` knows, slimmed or not; behind a slimming they
    are its slots. Gradients flow through them. Afterwards nothing holds them but the list.

    Args:
        model: see `slim`; not compiled.

    Raises:
        TypeError: see `slim`, as for ValueError.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2)
        >>> with record_tokens(model) as tokens:
        ...     logits = model(torch.randn(1, 3, 224, 224))
        >>> len(tokens), tokens[0].shape
        (2, torch.Size([1, 196, 192]))
    """
    with keep_tokens(find("record_tokens", model)) as tokens:
        yield tokens


@contextmanager
def keep_tokens(host: Host) -> Iterator[list[Tensor]]:
    """See `record_tokens`."""
    tokens: list[Tensor] = []

    def keep(index: int, _block: nn.Module, _args: Any, output: Any) -> None:
        if index == 0:
            tokens.clear()
        tokens.append(hidden(output)[:, host.prefix :])

    hooks = [
        block.register_forward_hook(partial(keep, index)) for index, block in enumerate(host.blocks)
    ]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


def hidden(output: Any) -> Tensor:
    """The tokens in what a block gives; blocks of some releases give them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
