"""Loads the weights of the official SiT release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from tokenmodels.sit.config import PATCH, SiTConfig
from tokenmodels.sit.model import SiT

# Official name → ours. What no line matches keeps its name.
_RENAMES = (
    (re.compile(r"^patch_embed\.conv(\d+)\."), lambda m: f"stem.convs.{int(m[1]) - 1}."),
    (re.compile(r"^patch_embed\.bn(\d+)\."), lambda m: f"stem.norms.{int(m[1]) - 1}."),
    (re.compile(r"^tsm\.(\d+)\.weight\.0\."), lambda m: f"slims.{m[1]}.norm."),
    (re.compile(r"^tsm\.(\d+)\.weight\.1\."), lambda m: f"slims.{m[1]}.fc1."),
    (re.compile(r"^tsm\.(\d+)\.weight\.3\."), lambda m: f"slims.{m[1]}.fc2."),
    (re.compile(r"^tsm\.(\d+)\.scale$"), lambda m: f"slims.{m[1]}.logit_scale"),
)

# Only used in training (rtsm), never used (aux_head), or without effect: the last bias of a
# slimming module is constant along its softmax.
_UNUSED = re.compile(r"^rtsm\.|^aux_head\.|^tsm\.\d+\.weight\.3\.bias$")


def from_official(state_dict: Mapping[str, Any], *, config: SiTConfig | None = None) -> SiT:
    """Builds a SiT, or a dense teacher, from an official state dict.

    Args:
        state_dict: the official checkpoint's `model` entry, or the checkpoint that holds it.
        config: what the checkpoint describes. Without it the released shapes are assumed (see
            `infer_config`); a student stripped of its `rtsm.*` weights needs it, because nothing
            else tells where its tokens are slimmed.

    Returns:
        The model in eval mode, on the CPU, float32.

    Raises:
        ValueError: the config cannot be inferred, or the weights do not fit it.

    Example:
        >>> torch.serialization.add_safe_globals([argparse.Namespace])
        >>> model = from_official(torch.load("sit_small.pth", map_location="cpu"))
    """
    state_dict = state_dict.get("model", state_dict)
    config = infer_config(state_dict) if config is None else config
    ours = {}
    for name, value in state_dict.items():
        if _UNUSED.search(name) or (name.startswith("tsm.") and not config.slim):
            continue
        for pattern, rename in _RENAMES:
            name = pattern.sub(rename, name)
        ours[name] = value.reshape(()) if name.endswith("logit_scale") else value
    model = SiT(config)
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"from_official: state_dict: does not fit {config}: {error}") from None
    return model.eval()


def infer_config(state_dict: Mapping[str, Tensor]) -> SiTConfig:
    """Reads the shape of a released SiT from its official state dict.

    Heads have 64 channels and residuals are halved, as in the tiny, xsmall and small models. The
    slimming places are where a block's recovery module (`rtsm.*`) takes fewer tokens than the one
    before it.

    Raises:
        ValueError: no such places can be read, or the stem is of another kind.
    """
    dim = state_dict["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    convs = sum(bool(re.fullmatch(r"patch_embed\.conv\d+\.weight", name)) for name in state_dict)
    if convs != 4:
        raise ValueError(
            f"from_official: state_dict: allowed a stem of 4 convolutions, got {convs}"
        )
    slim = any(name.startswith("tsm.") for name in state_dict)
    return SiTConfig(
        dim=dim,
        depth=depth,
        heads=dim // 64,
        stages=_stages(state_dict, depth) if slim else (depth,),
        slim=slim,
        image_size=PATCH * round((state_dict["pos_embed"].shape[1] - 1) ** 0.5),
        classes=state_dict["head.weight"].shape[0],
    )


def _stages(state_dict: Mapping[str, Tensor], depth: int) -> tuple[int, ...]:
    """Blocks per stage; a stage ends with the block behind which fewer tokens are left."""
    patches = state_dict["pos_embed"].shape[1] - 1
    weights = (state_dict.get(f"rtsm.{i}.mlp1.fc1.weight") for i in range(depth))
    left = [patches if weight is None else weight.shape[1] for weight in weights]
    ends = [i + 1 for i, (a, b) in enumerate(pairwise([patches, *left])) if b < a]
    slims = len({name.split(".")[1] for name in state_dict if name.startswith("tsm.")})
    if len(ends) != slims:
        raise ValueError(
            "from_official: config: allowed a SiTConfig where the state dict has no rtsm.* "
            f"weights to tell the {slims} slimming places, got None"
        )
    return tuple(b - a for a, b in pairwise([0, *ends, depth]))
