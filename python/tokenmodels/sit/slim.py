"""Token slimming for vision transformers of timm and transformers, put in and taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenmodels._blocks import initialise
from tokenmodels._refuse import refusal, require_number, require_whole
from tokenmodels.sit.config import slots_after, tokens_after
from tokenmodels.sit.hosts import Host, find, hidden
from tokenmodels.sit.slimming import SlimTokens, require_std


def slim(
    model: nn.Module,
    *,
    stages: Sequence[int] | None = None,
    keep: float | Sequence[int] = 0.5,
    image_size: int | tuple[int, int] | None = None,
    slot_std: float = 0.02,
) -> Slimming:
    """Puts token slimming between the stages of a vision transformer, in place.

    Class, distillation and register tokens pass by the slimmings and stay in front. The weights of
    the slimmings are new and have to be trained; they are parts of the model, under the name
    `slimming`, in `parameters()` and `state_dict()`. What else the model computes stays as it is,
    so what needs a token per patch behind the blocks (maps of features) does not work; nor do
    attention masks, since slots have no places among the tokens.

    An optimizer that was made before does not know the new weights. A saved model is loaded into
    one that is slimmed alike: `slim` first, then `load_state_dict`.

    With four equal stages, the default, slimming happens before blocks 3, 6 and 9 of the twelve of
    a DeiT, as in Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision
    Transformers", ICCVW 2023.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022.

    Args:
        model: a `VisionTransformer` of timm (ViT and DeiT, with a distillation token or registers,
            any pooling), or a ViT, DeiT, CLIP, SigLIP or DINOv2 vision model of transformers, or a
            model that contains one of them. Slim before `torch.compile` and before wrapping the
            model (`DistributedDataParallel`, FSDP; not `DataParallel`, whose copies share hooks).
        stages: blocks per stage, together all blocks. Patch tokens are slimmed behind the last
            block of every stage but the last. Four equal stages if not given.
        keep: the patch tokens that slimmings keep: a fraction of what was there before, counted
            from the patches of `image_size` and truncated, or the number left behind each slimming,
            at most those before it.
        image_size: height and width in pixels, or one number for both, from which `keep` counts;
            that of the model if not given. Images of other sizes work where they did before, with
            as many slots.
        slot_std: standard deviation of the new slots' weights. With 0.02, as published, all slots
            begin as almost the same mean of all tokens; larger ones begin further apart.

    Returns:
        The slimmings, with what takes them out again; as a context manager it does so at its end.

    Raises:
        TypeError: a model without such a vision transformer; values of another type.
        ValueError: a model that is slimmed, compiled or wrapped already, has more than one vision
            transformer, or one with relative position bias, rotary positions or windows; numbers
            that do not fit.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224")
        >>> with slim(model, stages=(3, 3, 3, 3), keep=0.5) as slimming:
        ...     logits = model(torch.randn(1, 3, 224, 224))
        >>> slimming.slots
        {2: 98, 5: 49, 8: 24}
    """
    host = find("slim", model)
    if any(isinstance(part, Slimming) for part in model.modules()):
        raise ValueError(refusal("slim", "model", "one that is not slimmed", "a slimmed one"))
    if any(map(_is_compiled, model.modules())):  # its graph would go on without the slimmings
        raise ValueError(refusal("slim", "model", "one that is not compiled yet", "a compiled one"))
    for part in model.modules():
        if _WRAPPERS & {kind.__name__ for kind in type(part).__mro__}:  # they know no new weights
            got = type(part).__name__
            raise ValueError(refusal("slim", "model", "one that is not wrapped yet", got))
    if hasattr(host.model, NAME):
        raise ValueError(refusal("slim", "model", f"one without attribute {NAME}", "one with it"))
    size = _image_size("slim", host, image_size)
    height, width = host.grid(size)
    require_std("slim", "slot_std", slot_std)
    slots = _slots(_stages(stages, len(host.blocks)), keep, height * width)
    slimming = Slimming(host, slots, size, slot_std)
    host.model.add_module(NAME, slimming)
    return slimming


NAME = "slimming"
"""What the part of the model is called that holds the slimmings."""

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

_MAPS = "forward_intermediates"
"""timm's method that gives maps of features; what else gives them calls it."""


class Slimming(nn.Module):
    """The slimmings of a model, as `slim` puts them in.

    Attributes:
        slims: a `SlimTokens` per slimming, in order.
        slots: block index → patch tokens that are left behind it.
        tokens_after: patch tokens that each block leaves, of an image of `image_size`.
        image_size: height and width from which the slots were counted.
        patches: patch tokens of such an image.
    """

    def __init__(
        self, host: Host, slots: dict[int, int], image_size: tuple[int, int], slot_std: float
    ) -> None:
        super().__init__()
        height, width = host.grid(image_size)
        self.slots, self.image_size, self.patches = slots, image_size, height * width
        self.dim, self.prefix = host.dim, host.prefix
        self.tokens_after = tokens_after(slots, len(host.blocks), self.patches)
        self.slims = nn.ModuleList()
        self._host = host  # no part of this one, whose part this one is
        self._assignments: list[Tensor] | None = None
        self._passing = False
        self._hooks = []
        for index, (block, count) in enumerate(slots.items()):
            like = next(one for one in host.blocks[block].parameters() if one.is_floating_point())
            one = SlimTokens(host.dim, count)
            initialise(one)
            if slot_std != 0.02:
                one.spread(slot_std)
            self.slims.append(one.to(like))
            # A bound method, and no closure, so that a copy of the model runs its own slimmings.
            hook = partial(self._slim, index)
            self._hooks.append(host.blocks[block].register_forward_hook(hook))
        masked: list[tuple[nn.Module, Callable[..., Any]]]
        masked = [(part, self._unmask) for part in [*host.blocks][min(slots) :]]
        if host.makes_masks:
            masked.append((host.model, self._judge))
        for part, check in masked:
            self._hooks.append(part.register_forward_pre_hook(check, with_kwargs=True))
        if hasattr(host.model, _MAPS):
            setattr(host.model, _MAPS, self._intermediates)
        self.train(host.model.training)

    def _judge(self, _model: nn.Module, _args: Any, kwargs: Any) -> None:
        """Before the model: no attention mask may be given."""
        if not self._passing and (mask := kwargs.get("attention_mask")) is not None:
            _refuse_mask(tuple(mask.shape))

    def _unmask(self, _block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a block from the first slimming on: no mask, but for one that nobody gave."""
        masks = [tuple(x.shape) for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)]
        if self._passing or not (masks or kwargs.get("is_causal")):
            return None
        # What a transformers model asks, too, before it makes a mask.
        if not (self._host.makes_masks and torch.compiler.is_exporting()):
            _refuse_mask(masks or "causal")
        rest = (None if isinstance(x, Tensor) else x for x in args[1:])
        named = {key: None if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        return (args[0], *rest), named

    def _intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `forward_intermediates` where it need not make maps of slots."""
        method = getattr(type(self._host.model), _MAPS)
        given = inspect.signature(method).bind(self._host.model, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["output_fmt"] != "NLC":
            allowed = "NLC (of get_intermediate_layers reshape=False): slots are no map"
            raise ValueError(refusal("slim", "output_fmt", allowed, given.arguments["output_fmt"]))
        return method(*given.args, **given.kwargs)

    def _slim(self, index: int, _block: nn.Module, _args: Any, output: Any) -> Any:
        """What follows a block: its output with fewer patch tokens."""
        if self._passing:
            return output
        x = hidden(output)
        patches = x[:, self.prefix :]
        if self._assignments is not None:
            if index == 0:
                self._assignments.clear()
            self._assignments.append(self.slims[index].assignment(patches))  # type: ignore[operator]
        slots = self.slims[index](patches)
        x = torch.cat((x[:, : self.prefix], slots), dim=1) if self.prefix else slots
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def forward(self, *_: Any) -> Tensor:
        """Nothing is to be called: the slimmings run in the model."""
        raise TypeError(refusal("Slimming", "call", "that of the model", "that of its slimmings"))

    def remove(self) -> None:
        """Takes the slimmings out: the model is what it was before. A second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        model = self._host.model
        if getattr(model, NAME, None) is self:
            delattr(model, NAME)
            if _MAPS in vars(model):
                delattr(model, _MAPS)

    def __enter__(self) -> Slimming:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @contextmanager
    def record_assignments(self) -> Iterator[list[Tensor]]:
        """While it is open, a list of what the slots of each slimming took of the tokens before it.

        They are those of the last forward, one (B, M, N) per slimming, as `compose` and `unpool`
        take them. Afterwards nothing holds them but the list. For a model that is not compiled; in
        one that recomputes activations for gradients, without gradients.
        """
        before = self._assignments
        self._assignments = recorded = list[Tensor]()
        try:
            yield recorded
        finally:
            self._assignments = before

    def set_fused(self, fused: bool) -> Slimming:
        """Runs the slimmings as one kernel each, or (False) in plain PyTorch; returns itself.

        Plain PyTorch can be given to run-times that know torch's operators only.
        """
        for one in self.slims:
            one.fused = fused  # type: ignore[assignment]
        return self

    def fold_for_inference(self) -> Slimming:
        """Moves every logit scale into the slots' weights, in place, and drops their bias without
        effect; returns itself. Not meant for training or for saving.
        """
        for one in self.slims:
            one.fold()  # type: ignore[operator]
        return self

    @torch.no_grad()
    def macs(self, image_size: int | tuple[int, int] | None = None, *, dense: bool = False) -> int:
        """Multiply-accumulates of one image in the vision transformer: convolutions and matrix
        products, as papers count.

        They are counted in a forward without numbers (on the meta device).

        Args:
            image_size: of the image; `self.image_size` if not given.
            dense: without the slimmings.

        Raises:
            TypeError, ValueError: an `image_size` that `slim` would refuse.
        """
        size, host = self.image_size, self._host.model
        if image_size is not None:
            size = _image_size("Slimming.macs", self._host, image_size)
        weights = {
            name: value.to("meta")
            for name, value in chain(host.named_parameters(), host.named_buffers())
        }
        embedding = next(value for value in weights.values() if value.ndim == 4)
        images = embedding.new_empty((1, embedding.shape[1], *size))
        recorded, self._assignments, self._passing = self._assignments, None, dense
        try:
            with FlopCounterMode(display=False) as counter:
                torch.func.functional_call(host, weights, (images,))
        finally:
            self._assignments, self._passing = recorded, False
        return counter.get_total_flops() // 2


def _refuse_mask(got: Any) -> NoReturn:
    allowed = "none: slots have no places among the tokens"
    raise ValueError(refusal("slim", "attention mask", allowed, got))


def _is_compiled(part: Any) -> bool:
    return type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None


def _image_size(where: str, host: Host, given: Any) -> tuple[int, int]:
    if given is None:
        if host.image_size is None:
            allowed = "one, because the model is made for any"
            raise ValueError(refusal(where, "image_size", allowed, None))
        return host.image_size
    sizes = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(sizes) != 2:
        raise ValueError(refusal(where, "image_size", "one size or (height, width)", given))
    for size in sizes:
        require_whole(where, "image_size", size)
    if host.fixed and sizes != host.image_size:
        allowed = f"{host.image_size}, because the model takes no other"
        raise ValueError(refusal(where, "image_size", allowed, sizes))
    return sizes


def _stages(stages: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if stages is None:
        if depth % 4:
            allowed = f"blocks per stage, because {depth} blocks are no four equal stages"
            raise ValueError(refusal("slim", "stages", allowed, None))
        return (depth // 4,) * 4
    if not isinstance(stages, tuple | list):
        raise TypeError(refusal("slim", "stages", "a tuple of ints", repr(stages)))
    for blocks in stages:
        require_whole("slim", "stages", blocks)
    if sum(stages) != depth or len(stages) < 2:
        allowed = f"two or more, together the {depth} blocks"
        raise ValueError(refusal("slim", "stages", allowed, tuple(stages)))
    return tuple(stages)


def _slots(stages: tuple[int, ...], keep: float | Sequence[int], patches: int) -> dict[int, int]:
    """Block index → patch tokens that are left behind it."""
    if isinstance(keep, tuple | list):
        for count, before in zip(keep, (patches, *keep), strict=False):
            if isinstance(count, float):
                allowed = "ints, or one fraction that serves every slimming"
                raise TypeError(refusal("slim", "keep", allowed, tuple(keep)))
            require_whole("slim", "keep", count)
            if count > before:
                allowed = f"at most {before}, the tokens before it"
                raise ValueError(refusal("slim", "keep", allowed, count))
        if len(keep) != len(stages) - 1:
            allowed = f"one number per slimming, {len(stages) - 1}"
            raise ValueError(refusal("slim", "keep", allowed, tuple(keep)))
        return slots_after(stages, keep, patches)
    require_number("slim", "keep", keep, lambda x: 0 < x <= 1, "above 0 up to 1")
    slots = slots_after(stages, keep, patches)
    if min(slots.values()) < 1:
        allowed = f"what leaves at least one token of {patches}"
        raise ValueError(refusal("slim", "keep", allowed, keep))
    return slots
