"""Small vision transformers of timm and transformers, slimmed and the same by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenmodels.sit import Slimming, SlimTokens, slim
from torch import Tensor, nn

DIM, DEPTH, SLOTS = 32, 4, {0: 8, 2: 4}
SHAPE = {"stages": (1, 2, 1), "keep": 0.5}  # of 16 patches


def vit(**given: Any) -> Any:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    return timm.models.VisionTransformer(**(shape | {"num_classes": 5} | given))


def deit() -> Any:
    timm = pytest.importorskip("timm")
    name, shape = "deit_tiny_distilled_patch16_224", {"embed_dim": DIM, "num_heads": 2}
    return timm.create_model(name, img_size=32, patch_size=8, depth=DEPTH, num_classes=5, **shape)


TIMM: dict[str, tuple[Callable[[], Any], int]] = {  # and how many tokens stand before the patches
    "class token": (vit, 1),
    "distilled": (deit, 2),
    "registers": (lambda: vit(reg_tokens=4), 5),
    "average": (lambda: vit(global_pool="avg", class_token=False), 0),
    "attention pooling": (lambda: vit(global_pool="map"), 1),
    "registers without position": (lambda: vit(reg_tokens=2, no_embed_class=True), 3),
    "any size": (lambda: vit(dynamic_img_size=True), 1),
}


def hugging(name: str, **given: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8} | given
    kind = name.removesuffix("ForImageClassification").removesuffix("Model")
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**shape))


def clip_with_text() -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    vision = shape | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text = shape | {"intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 9}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config)


TRANSFORMERS: dict[str, tuple[Callable[[], Any], int]] = {
    "ViT": (lambda: hugging("ViTModel"), 1),
    "ViT, eager": (lambda: hugging("ViTModel", attn_implementation="eager"), 1),
    "classifier": (lambda: hugging("ViTForImageClassification"), 1),
    "DeiT": (lambda: hugging("DeiTModel"), 2),
    "CLIP vision": (lambda: hugging("CLIPVisionModel"), 1),
    "CLIP": (lambda: clip_with_text().vision_model, 1),
    "SigLIP": (lambda: hugging("SiglipVisionModel"), 0),
    "DINOv2": (lambda: hugging("Dinov2Model"), 1),
    "DINOv2 registers": (lambda: hugging("Dinov2WithRegistersModel", num_register_tokens=3), 4),
}
HOSTS = TIMM | TRANSFORMERS


def lively(model: Any) -> Any:
    """Weights large enough for the blocks and the slots to differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.5))
    return model.eval()


def images_of(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def slots_by_formula(weights: SlimTokens, tokens: Tensor) -> Tensor:
    """Equations 2 and 3 of the paper, as the official code has them."""
    normed = F.layer_norm(tokens, (DIM,), weights.norm.weight, weights.norm.bias)
    logits = weights.fc2(F.gelu(weights.fc1(normed))) * weights.logit_scale
    return logits.softmax(1).transpose(1, 2) @ tokens


class _ByHand(nn.Module):
    def __init__(self, block: nn.Module, weights: SlimTokens, prefix: int) -> None:
        super().__init__()
        self.block, self.weights, self.prefix = block, weights, prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        x = output if isinstance(output, Tensor) else output[0]
        slots = slots_by_formula(self.weights, x[:, self.prefix :])
        x = torch.cat((x[:, : self.prefix], slots), dim=1)
        return x if isinstance(output, Tensor) else (x, *output[1:])


def by_hand(model: nn.Module, slimming: Slimming, prefix: int) -> nn.Module:
    """`model`, which is not slimmed, with other blocks, of the slimming's weights."""
    other = copy.deepcopy(model)
    (blocks,) = (
        part
        for part in other.modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
        and len(part) == DEPTH
        and type(part[0]).__name__.endswith(("Block", "Layer"))
    )
    for index, weights in zip(SLOTS, slimming.slims, strict=True):
        blocks[index] = _ByHand(blocks[index], copy.deepcopy(weights), prefix)
    return other


def result(model: Any, images: Tensor, **given: Any) -> Tensor:
    output = model(images, **given)
    if isinstance(output, Tensor):
        return output
    return output.logits if "logits" in output else output.last_hidden_state


def slimmed(name: str) -> tuple[Any, Slimming, nn.Module]:
    """A slimmed model, its slimmings, and the same by hand."""
    make, prefix = HOSTS[name]
    model = lively(make())
    before = copy.deepcopy(model)
    slimming = slim(model, **SHAPE)
    lively(slimming)
    return model, slimming, by_hand(before, slimming, prefix)
