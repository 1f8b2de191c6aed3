"""SiT under timm's names: importing this module registers them for `timm.create_model`.

Slimmed: `sit_tiny`, `sit_xsmall`, `sit_small`, `sit_medium`, `sit_large`; their teachers, which
slim nothing: the same names with `_dense`. Each may carry the tag `.tokenkernels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tokenmodels._blocks import initialise
from tokenmodels._optional import optional
from tokenmodels._refuse import refusal
from tokenmodels.sit.checkpoint import official_name
from tokenmodels.sit.config import PATCH, VARIANTS, SiTConfig, grid_of
from tokenmodels.sit.model import SiT
from tokenmodels.sit.slimming import unpool

_timm = optional("timm", use="timm.create_model of a SiT", extra="timm")
_models, _data = _timm.models, optional("timm.data", use="timm", extra="timm")

TAG = "tokenkernels"


class TimmSiT(SiT):
    """A SiT with the methods that timm's tools call.

    Features are counted by stages: index i is the end of stage i.

    Args:
        config: see `SiT`.
        training_parts: see `SiT`.

    Example:
        >>> model = TimmSiT(SiTConfig(embed_dim=48, depth=2, num_heads=3, stages=(1, 1)))
        >>> model.reset_classifier(10)
        >>> model.forward_head(model.forward_features(torch.randn(1, 3, 224, 224))).shape
        torch.Size([1, 10])
    """

    def __init__(self, config: SiTConfig, *, training_parts: bool = False) -> None:
        super().__init__(config, training_parts=training_parts)
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
        self.feature_info = [
            {"num_chs": config.embed_dim, "reduction": PATCH, "module": f"blocks.{end - 1}"}
            for end in accumulate(config.stages)
        ]

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 for none."""
        return self.config.num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of weights that are to keep their size, beside those of one dimension or none."""
        return {"cls_token", "pos_embed", "dist_token", "dist_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names, from the image to the head, for learning rates by depth; a slimming
        belongs to the block before it.
        """
        stem = r"^stem|^cls_token|^pos_embed|^dist_token|^dist_pos_embed"
        slims = [(rf"^slims\.{i}\.", (end,)) for i, end in enumerate(self.config.slim_after)]
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), *slims, (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `SiT.set_recompute`."""
        self.set_recompute(enable)

    def get_classifier(self) -> nn.Module:
        """The head of the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a new head, or (0) none.

        Raises:
            ValueError: another pooling than that by the class token.
        """
        _require_token("reset_classifier", global_pool)
        self.config = replace(self.config, num_classes=num_classes)
        for name in ("head", "head_dist") if self.config.dist_token else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(self.config.embed_dim, num_classes)
                initialise(head)
            setattr(self, name, head.to(self.pos_embed))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` gives, or the features that they are computed from."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return (logits + self.head_dist(x[:, 1])) / 2 if self.config.dist_token else logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Patch tokens at the end of stages.

        Args:
            x: images, (B, in_channels, height, width).
            indices: of the stages; the last so many if one number, all if not given.
            return_prefix_tokens: not to be had.
            norm: by the last layer norm.
            stop_early: without effect; see `prune_intermediate_layers`.
            output_fmt: "NCHW" gives maps, slots brought back to the patches they came from (see
                `unpool`); "NLC" the slots.
            intermediates_only: without what `forward_features` gives.
            output_dict: under names, `image_intermediates` and `image_features`, and no longer a
                list or a pair.

        Raises:
            ValueError: another format; prefix tokens; stages that are not there.
            TypeError: indices that are no integers.
        """
        if return_prefix_tokens:
            allowed = "False: they are in what forward_features gives"
            raise ValueError(refusal("SiT", "return_prefix_tokens", allowed, True))
        if str(getattr(output_fmt, "value", output_fmt)) not in ("NCHW", "NLC"):
            raise ValueError(refusal("SiT", "output_fmt", "NCHW or NLC", repr(output_fmt)))
        maps = str(getattr(output_fmt, "value", output_fmt)) == "NCHW"
        stages: list[Tensor] = []
        assignments: list[Tensor] = []
        last = self._run(x, assignments=assignments if maps else None, stages=stages)
        taken = _taken(len(stages), indices)
        grid, features = grid_of((x.shape[2], x.shape[3])), []
        for i in taken:
            one = self.norm(stages[i]) if norm else stages[i]
            if maps:
                one = unpool(one, assignments[:i]) if assignments[:i] else one
                one = one.transpose(1, 2).unflatten(2, grid)
            features.append(one)
        named = {"image_intermediates": features}
        if intermediates_only:
            return named if output_dict else features
        last = self.norm(last)
        return named | {"image_features": last} if output_dict else (last, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what those stages do not need: later blocks and slimmings, the norm, the head.

        Returns:
            The indices of the stages, counted from the first.
        """
        taken = _taken(len(self.config.stages), indices)
        last = max(taken)
        stages = self.config.stages[: last + 1]
        keep = tuple(self.config.slim_after.values())[:last]
        self.config = replace(
            self.config,
            depth=sum(stages),
            stages=stages,
            keep=keep or self.config.keep,
            dense=self.config.dense or not last,
        )
        self.blocks, self.slims = self.blocks[: sum(stages)], self.slims[: len(keep)]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ever; weights of the official code are taken under their names too."""
        weights = renamed(state_dict, self)
        return super().load_state_dict(weights, strict=strict, assign=assign)


def renamed(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights of the official code under our names, which stay; without what only training has
    where the model has no such parts.
    """
    names = model.state_dict().keys()
    ours = {official_name(name): name for name in names}
    training = ("rtsm.", "aux_head.", "training_parts.")
    found = {
        ours.get(name, name): value
        for name, value in weights.items()
        if name in ours or name in names or not name.startswith(training)
    }
    for name, value in found.items():
        if name.endswith(".logit_scale") and value.numel() == 1:
            found[name] = value.reshape(())
    return found


def _taken(stages: int, indices: Any) -> list[int]:
    """Stages counted from the first: all, the last so many, or those of a list."""
    if indices is None:
        return list(range(stages))
    chosen = range(-indices, 0) if type(indices) is int else indices
    if not isinstance(chosen, Sequence) or not all(type(one) is int for one in chosen):
        raise TypeError(refusal("SiT", "indices", "an int or a list of them", repr(indices)))
    if not chosen or not all(-stages <= one < stages for one in chosen):
        raise ValueError(refusal("SiT", "indices", f"of {stages} stages", indices))
    return [one % stages for one in chosen]


def _require_token(where: str, global_pool: str | None) -> None:
    if global_pool not in (None, "", "token"):
        raise ValueError(refusal(where, "global_pool", "token", repr(global_pool)))


_ALONE: dict[str, Any] = {"dynamic_img_size": True, "strict_img_size": False} | dict.fromkeys(
    ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.0
)
"""Arguments of timm's vision transformers → what they are for every SiT, which has no choice there.
"""


def _build(
    variant: str,
    dense: bool,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> TimmSiT:
    """A model from timm's names for what a config holds."""
    _require_token(variant, global_pool)
    if drop_rate:
        raise ValueError(refusal(variant, "drop_rate", "0: use drop_path_rate", drop_rate))
    for name, value in others.items():
        if name not in _ALONE:
            raise TypeError(refusal(variant, name, "none: SiT has no such argument", repr(value)))
        if value != _ALONE[name]:
            raise ValueError(refusal(variant, name, f"{_ALONE[name]} alone", repr(value)))
    size = tuple(img_size) if isinstance(img_size, list) else img_size
    config = SiTConfig.variant(variant, dense=dense, image_size=size, num_classes=num_classes)
    model = TimmSiT(replace(config, in_channels=in_chans, drop_path=drop_path_rate))
    return model.to(device=device, dtype=dtype)


def _create(name: str, variant: str, dense: bool, pretrained: bool, **given: Any) -> nn.Module:
    config = _models.resolve_pretrained_cfg(
        name,
        pretrained_cfg=given.get("pretrained_cfg"),
        pretrained_cfg_overlay=given.get("pretrained_cfg_overlay"),
    )
    if pretrained and not (config.has_weights or config.state_dict):
        allowed = (
            "False, because no weights are hosted; SiT.from_official reads the released ones, and "
            "pretrained_cfg_overlay={'file': path} or checkpoint_path=path give a file"
        )
        raise ValueError(refusal(name, "pretrained", allowed, True))
    stages = given.pop("out_indices", tuple(range(len(VARIANTS[variant].stages))))
    return _models.build_model_with_cfg(
        partial(_build, variant, dense),
        name,
        pretrained,
        pretrained_filter_fn=renamed,
        feature_cfg={"out_indices": stages, "feature_cls": "getter"},
        **given,
    )


def _default_cfg(size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": _data.IMAGENET_DEFAULT_MEAN,
        "std": _data.IMAGENET_DEFAULT_STD,
        "first_conv": "stem.convs.0",
        "classifier": "head",
    }


_SIZES = {variant: int(config.grid[0] * PATCH) for variant, config in VARIANTS.items()}
default_cfgs = _models.generate_default_cfgs(  # where timm looks for them
    {
        f"{variant}{ending}.{TAG}": _default_cfg(size)
        for variant, size in _SIZES.items()
        for ending in ("", "_dense")
    }
)


def _register(variant: str, dense: bool) -> None:
    name = variant + "_dense" * dense

    def create(pretrained: bool = False, **given: Any) -> nn.Module:
        return _create(name, variant, dense, pretrained, **given)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{'The dense teacher of ' * dense}{variant}, by timm's arguments."
    globals()[name] = _models.register_model(create)


__all__ = ["TimmSiT"]
for _variant in VARIANTS:
    for _dense in (False, True):
        _register(_variant, _dense)
