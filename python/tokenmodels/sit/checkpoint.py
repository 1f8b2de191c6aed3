"""Weights of the official SiT code: read, checked against a config, and given back; a teacher's
weights for a student.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmodels._blocks import resample_positions
from tokenmodels._refuse import listed, refusal
from tokenmodels.sit.config import PATCH, STEMS, VARIANTS, SiTConfig

if TYPE_CHECKING:
    from tokenmodels.sit.model import SiT

WHERE = "SiT.from_official"

# Our name → the official one. What no line matches keeps its name.
_OFFICIAL = (
    (re.compile(r"^stem\.convs\.(\d+)\."), lambda m: f"patch_embed.conv{int(m[1]) + 1}."),
    (re.compile(r"^stem\.norms\.(\d+)\."), lambda m: f"patch_embed.bn{int(m[1]) + 1}."),
    (re.compile(r"^slims\.(\d+)\.norm\."), lambda m: f"tsm.{m[1]}.weight.0."),
    (re.compile(r"^slims\.(\d+)\.fc1\."), lambda m: f"tsm.{m[1]}.weight.1."),
    (re.compile(r"^slims\.(\d+)\.fc2\."), lambda m: f"tsm.{m[1]}.weight.3."),
    (re.compile(r"^slims\.(\d+)\.logit_scale$"), lambda m: f"tsm.{m[1]}.scale"),
    (re.compile(r"^training_parts\.recover\."), lambda m: "rtsm."),
    (re.compile(r"^training_parts\.aux_head\."), lambda m: "aux_head."),
)
_TRAINING = ("rtsm.", "aux_head.")


def official_name(name: str) -> str:
    """What the official code calls a weight of ours."""
    for pattern, rename in _OFFICIAL:
        name = pattern.sub(rename, name)
    return name


def official_state_dict(model: SiT) -> dict[str, Tensor]:
    """See `SiT.official_state_dict`."""
    if model.folded:
        raise ValueError(refusal("SiT.official_state_dict", "model", "one as trained", "a folded"))
    weights = {}
    for name, value in model.state_dict().items():
        scale = name.endswith(".logit_scale")
        weights[official_name(name)] = value.reshape(1, 1, 1) if scale else value
    return weights


def from_official(
    cls: type[SiT],
    source: str | Path | Mapping[str, Any],
    *,
    variant: str | None,
    config: SiTConfig | None,
    training_parts: bool,
) -> SiT:
    """See `SiT.from_official`."""
    weights = _weights(source)
    if variant is not None and config is not None:
        raise ValueError(refusal(WHERE, "variant, config", "one of them", "both"))
    if config is None:
        config = infer_config(weights, variant=variant)
    with torch.device("meta"):
        model = cls(config, training_parts=training_parts)
    if not training_parts:
        weights = {k: v for k, v in weights.items() if not k.startswith(_TRAINING)}
    require_fit(WHERE, official_state_dict(model), weights)
    ours = {}
    for name in model.state_dict():
        value = weights[official_name(name)].detach().cpu().clone()
        ours[name] = value.reshape(()) if name.endswith(".logit_scale") else value
    model.load_state_dict(ours, assign=True)
    return model.eval()


def _weights(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in what the user has."""
    if isinstance(source, str | Path):
        source = _read(Path(source))
    if not isinstance(source, Mapping):
        allowed = "a file, a state dict, or a checkpoint with a state dict as 'model'"
        raise TypeError(refusal(WHERE, "source", allowed, type(source).__name__))
    weights = source.get("model", source)
    if not isinstance(weights, Mapping) or "cls_token" not in weights:
        found = listed([str(key) for key in weights]) if isinstance(weights, Mapping) else "none"
        raise ValueError(refusal(WHERE, "source", "weights of a SiT, with cls_token", found))
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(refusal(WHERE, name, "a tensor", type(value).__name__))
    return dict(weights)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(refusal(WHERE, "source", "a file that exists", path))
    # Released files hold the options that they were trained with, beside tensors.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and tensor storage fail each in their own way
            lines = str(error).splitlines() or [""]
            told = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
            reason = f"{path}, {type(error).__name__}: {told}"
            allowed = "a whole file of tensors, as torch.save writes it"
            raise ValueError(refusal(WHERE, "source", allowed, reason)) from error


def require_fit(where: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Raises unless `got` has the names of `wanted`, in its shapes.

    Raises:
        ValueError: it names what is missing, what is unexpected, what has another shape.
    """
    problems = []
    if missing := [name for name in wanted if name not in got]:
        problems.append(f"missing {listed(missing)}")
    if unexpected := [name for name in got if name not in wanted]:
        problems.append(f"unexpected {listed(unexpected)}")
    shapes = [
        f"{name} {tuple(got[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in got and got[name].shape != value.shape
    ]
    if shapes:
        problems.append(f"other shapes: {listed(shapes)}")
    if problems:
        raise ValueError(refusal(where, "weights", "those of the config", "; ".join(problems)))


def infer_config(weights: Mapping[str, Tensor], *, variant: str | None = None) -> SiTConfig:
    """Reads the shape of a released SiT from its official weights.

    Heads have 64 channels; residuals are divided by 2, and by 3 with the stem of six convolutions;
    images are square. The slimming places are where a block's recovery module (`rtsm.*`) takes
    fewer tokens than the one before it, or those of `variant`.

    Args:
        weights: official names and tensors; their shapes are enough.
        variant: the released student that they must be. Without `rtsm.*` the extra small and the
            small one have the same shapes: what is told is believed.

    Raises:
        ValueError: they are of another variant, or the shape cannot be read.

    Example:
        >>> with torch.device("meta"):
        ...     weights = SiT(VARIANTS["sit_small"], training_parts=True).official_state_dict()
        >>> infer_config(weights).stages
        (9, 3, 2, 2)
    """
    found = _described(weights)
    if variant is None:
        return _assumed(found)
    wanted = SiTConfig.variant(variant)
    if found["dense"]:
        allowed = f"the weights of a student; SiTConfig.variant({variant!r}, dense=True) as config"
        raise ValueError(refusal(WHERE, "variant", allowed, "those of a teacher, without tsm.*"))
    others = [
        f"{name} {found[name]}, {variant} has {getattr(wanted, name)}"
        for name in ("embed_dim", "depth", "stem", "mlp_ratio", "stages")
        if found[name] not in (None, getattr(wanted, name))
    ]
    if others:
        raise ValueError(refusal(WHERE, "variant", f"weights of {variant}", "; ".join(others)))
    free = ("image_size", "num_classes", "in_channels", "dist_token")
    sizes = {name: found[name] for name in free}
    return _with_slots(replace(wanted, **sizes), found["slots"])


def _described(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a config that the shapes tell; None where they do not."""
    depth = 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("blocks.")), default=-1)
    convs = [n for n in weights if re.fullmatch(r"patch_embed\.conv\d+\.weight", n)]
    named = ("cls_token", "pos_embed", "patch_embed.conv1.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in named if name not in weights]:
        raise ValueError(refusal(WHERE, "weights", "those of a SiT", f"no {listed(missing)}"))
    if (stem := f"{len(convs)}c") not in STEMS:
        allowed = f"a stem of {' or '.join(name[0] for name in STEMS)} convolutions"
        raise ValueError(refusal(WHERE, "weights", allowed, len(convs)))
    patches = weights["pos_embed"].shape[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(refusal(WHERE, "config", f"a SiTConfig for {patches} patches", None))
    dim, head = weights["cls_token"].shape[-1], weights.get("head.weight")
    ends = [n for n in weights if re.fullmatch(r"tsm\.\d+\.weight\.3\.weight", n)]
    slots = tuple(weights[n].shape[0] for n in sorted(ends, key=lambda n: int(n.split(".")[1])))
    return {
        "embed_dim": dim,
        "depth": depth,
        "stem": stem,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "image_size": PATCH * side,
        "num_classes": 0 if head is None else head.shape[0],
        "in_channels": weights["patch_embed.conv1.weight"].shape[1],
        "dense": not slots,
        "dist_token": "dist_token" in weights,
        "slots": slots,
        "stages": _stages(weights, depth, patches, len(slots)) if slots else (depth,),
    }


def _stages(
    weights: Mapping[str, Tensor], depth: int, patches: int, slims: int
) -> tuple[int, ...] | None:
    """Blocks per stage; a stage ends with the block behind which fewer tokens are left. None where
    no recovery modules tell.
    """
    sizes = (weights.get(f"rtsm.{i}.mlp1.fc1.weight") for i in range(depth))
    left = [patches if weight is None else weight.shape[1] for weight in sizes]
    ends = [i + 1 for i, (a, b) in enumerate(pairwise([patches, *left])) if b < a]
    if len(ends) != slims:
        return None
    return tuple(b - a for a, b in pairwise([0, *ends, depth]))


def _assumed(found: Mapping[str, Any]) -> SiTConfig:
    """A config by the customs of the released models."""
    if found["stages"] is None:
        allowed = (
            "one of them where the weights have no rtsm.* to tell the "
            f"{len(found['slots'])} slimming places"
        )
        raise ValueError(refusal(WHERE, "variant, config", allowed, None))
    if found["embed_dim"] % 64:
        allowed = f"a SiTConfig for {found['embed_dim']} channels, no multiple of 64"
        raise ValueError(refusal(WHERE, "config", allowed, None))
    fields = {name: value for name, value in found.items() if name != "slots"}
    scale = VARIANTS["sit_large"].residual_scale if found["stem"] == "6c" else 2.0
    config = SiTConfig(num_heads=found["embed_dim"] // 64, residual_scale=scale, **fields)
    return _with_slots(config, found["slots"])


def _with_slots(config: SiTConfig, slots: tuple[int, ...]) -> SiTConfig:
    """The config with these numbers of slots, if halving does not give them."""
    if tuple(config.slim_after.values()) == slots or len(slots) != len(config.stages) - 1:
        return config
    return replace(config, keep=slots)


def transplant(student: SiT, teacher: SiT) -> list[str]:
    """See `SiT.transplant`."""
    shape = ("embed_dim", "depth", "num_heads", "mlp_ratio", "stem", "residual_scale")
    for name in (*shape, "in_channels"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            allowed = f"one with {name}={ours!r}, as the student"
            raise ValueError(refusal("SiT.transplant", "teacher", allowed, repr(theirs)))
    if student.folded or teacher.folded:
        raise ValueError(refusal("SiT.transplant", "teacher", "models as trained", "a folded one"))
    given = teacher.state_dict()
    given["pos_embed"] = resample_positions(
        given["pos_embed"], teacher.config.grid, student.config.grid
    )
    left = []
    for name, value in student.state_dict().items():
        own_part = name.startswith(("slims.", "training_parts."))
        if own_part or name not in given or given[name].shape != value.shape:
            left.append(name)
        else:
            value.copy_(given[name])
    return left
