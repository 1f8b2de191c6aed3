"""A SiT as `config.json` and `model.safetensors`, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenmodels._files import replace_file
from tokenmodels._refuse import listed, refusal
from tokenmodels.sit.checkpoint import require_fit
from tokenmodels.sit.config import SiTConfig

if TYPE_CHECKING:
    from tokenmodels.sit.model import SiT

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WHERE = "SiT.from_pretrained"
KIND = {"model_type": "sit"}


def save(model: SiT, folder: str | Path) -> None:
    """See `SiT.save_pretrained`."""
    from safetensors.torch import save_file

    if model.folded:
        raise ValueError(refusal("SiT.save_pretrained", "model", "one as trained", "a folded one"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    text = json.dumps(KIND | asdict(model.config), indent=2) + "\n"
    replace_file(folder / WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(text))


def load(cls: type[SiT], name: str | Path, *, revision: str | None) -> SiT:
    """See `SiT.from_pretrained`."""
    config_file, weights_file = _files(name, revision)
    config = _config(config_file)
    weights = _weights(weights_file)
    parts = any(key.startswith("training_parts.") for key in weights)
    with torch.device("meta"):
        model = cls(config, training_parts=parts)
    require_fit(WHERE, model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _files(name: str | Path, revision: str | None) -> tuple[Path, Path]:
    """Where the two files lie, fetched if they have to be."""
    folder = Path(name)
    if folder.is_dir():
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise FileNotFoundError(refusal(WHERE, "name", f"a folder with {file}", folder))
        return folder / CONFIG, folder / WEIGHTS
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        allowed = "a folder that exists, or a hub id such as owner/name"
        raise FileNotFoundError(refusal(WHERE, "name", allowed, repr(str(name))))
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        allowed = "a folder that exists, or, with huggingface_hub installed, a hub id"
        raise ImportError(refusal(WHERE, "name", allowed, repr(name))) from error
    config, weights = (Path(hf_hub_download(name, f, revision=revision)) for f in (CONFIG, WEIGHTS))
    return config, weights


def _config(path: Path) -> SiTConfig:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        reason = f"{path}: {error}"
        raise ValueError(refusal(WHERE, CONFIG, "a whole JSON file", reason)) from error
    if not isinstance(found, dict) or found.pop("model_type", None) != KIND["model_type"]:
        raise ValueError(refusal(WHERE, CONFIG, "model_type 'sit'", f"{path} without it"))
    known = {field.name for field in fields(SiTConfig)}
    if unknown := sorted(set(found) - known):
        raise ValueError(refusal(WHERE, CONFIG, listed(sorted(known), 99), listed(unknown)))
    if missing := sorted({"embed_dim", "depth", "num_heads"} - set(found)):
        raise ValueError(refusal(WHERE, CONFIG, "all fields", f"no {listed(missing)}"))
    return SiTConfig(**found)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copied, because in the file they lie anywhere, and products of unaligned weights may
        # differ in the last bit.
        return {name: value.clone() for name, value in load_file(path).items()}
    except SafetensorError as error:
        reason = f"{path}: {error}"
        raise ValueError(refusal(WHERE, WEIGHTS, "a whole safetensors file", reason)) from error
