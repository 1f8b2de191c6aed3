"""What the tests of training share: a folder of small pictures, and a recipe that takes seconds."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenmodels.sit import SiT, SiTConfig

ROOT = Path(__file__).parents[2]
NURSERY = Path(__file__).with_name("nursery.py")
MODEL = SiTConfig(
    embed_dim=16,
    depth=3,
    num_heads=2,
    stages=(1, 1, 1),
    keep=(2, 1),
    image_size=32,
    num_classes=3,
    drop_path=0.2,
)
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}


def pictures(folder: Path, images: int = 8, classes: int = 3) -> Path:
    """PNGs in a folder per class: noise, with one colour of full strength per class."""
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(images):
            pixels = torch.randint(256, (40, 44, 3), generator=generator, dtype=torch.uint8)
            pixels[..., label % 3] = 255
            Image.fromarray(pixels.numpy()).save(folder / f"class{label}" / f"{i}.png")
    return folder


def table(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A small student, taught by a teacher on pictures, with these options."""
    if not (folder / "train").exists():
        pictures(folder / "train")
        pictures(folder / "val", images=2)
        torch.manual_seed(1)
        SiT(replace(MODEL, dense=True)).save_pretrained(folder / "teacher")
    shape = ("embed_dim", "depth", "num_heads", "stages", "keep", "image_size", "num_classes")
    model = {name: getattr(MODEL, name) for name in (*shape, "drop_path")}
    result: dict[str, Any] = {
        "model": model,
        "optim": {"batch_size": 4, "epochs": 3, "cooldown": 1, "lr": 0.3, "clip": 5.0},
        "distil": {"teacher": str(folder / "teacher")},
        "augment": {"transforms": "plain"},
        "data": {"train": str(folder / "train"), "val": str(folder / "val"), "workers": 0},
        "run": {"precision": "fp32", "average": 0.9, "device": "cpu", "out": str(folder / "out")},
    }
    for name, section in sections.items():
        result[name] = result[name] | section
    return result


def write(path: Path, options: dict[str, Any]) -> Path:
    path.write_text(json.dumps(options))
    return path


def nursery(*arguments: object) -> list[str]:
    """The command of a process that has imported everything and forks runs."""
    return [sys.executable, str(NURSERY), *(str(one) for one in arguments)]


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
