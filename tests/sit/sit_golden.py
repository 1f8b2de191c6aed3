"""What the tests of SiT share: a small network, and the golden tensors under the official names."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tokenmodels.sit import SiT, SiTConfig
from torch import Tensor

SMALL = SiTConfig(
    embed_dim=48, depth=6, num_heads=3, stages=(2, 1, 1, 2), image_size=96, num_classes=10
)
"""As the golden small student."""
TINY = SiTConfig(embed_dim=16, depth=3, num_heads=2, stages=(1, 1, 1), image_size=64, num_classes=5)
"""As small as there is: 16, 8 and 4 patch tokens."""
SHALLOW = replace(TINY, depth=2, stages=(1, 1))
"""For what compiles, which takes as long as there are blocks."""


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def filler(folder: Path) -> ModuleType:
    """The golden files' generator of weights and images."""
    spec = importlib.util.spec_from_file_location("fill", folder / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_shapes(folder: Path, name: str, dense: bool = False) -> dict[str, Tensor]:
    """Every key that the official code has for a variant, on meta."""
    keys = json.loads((folder / "state_dict_keys.json").read_text())
    shapes = keys[name.replace("sit_", "sit_lvvit_")]
    return {
        key: torch.empty(shape, device="meta")
        for key, shape in shapes.items()
        if not (dense and key.startswith(("tsm.", "rtsm.")))
    }


def filled(folder: Path, name: str, dense: bool) -> dict[str, Tensor]:
    value = filler(folder).value
    shapes = official_shapes(folder, name, dense)
    return {
        key: torch.from_numpy(np.asarray(value(key, tuple(x.shape)))) for key, x in shapes.items()
    }


def random_sit(config: SiTConfig = TINY, training_parts: bool = False) -> SiT:
    """In eval mode, its batch norms and logit scales like those of a trained one: not neutral."""
    torch.manual_seed(0)
    model = SiT(config, training_parts=training_parts).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim <= 1:
            value.copy_(torch.rand_like(value) + 0.5 if "bias" not in name else value.normal_())
    return model
