"""What `slim` refuses, and the forwards of a slimmed model that it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_hosts import DIM, SHAPE, images_of, slimmed, vit
from tokenmodels.sit import slim
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def _two() -> nn.Module:
    return nn.ModuleList([vit(), vit()])


def _masked() -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, intermediate_size=64, image_size=32, patch_size=16)
    return transformers.ViTForMaskedImageModeling(config)


def _timm_model(name: str, **given: Any) -> Any:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return timm.create_model(name, **given)


WRONG = {
    "a name": (lambda: "vit", TypeError, "VisionTransformer.*got str"),
    "no transformer": (lambda: nn.Linear(2, 2), TypeError, "got Linear"),
    "Swin": (lambda: _timm_model("swin_tiny_patch4_window7_224"), TypeError, "position bias"),
    "BEiT": (lambda: _timm_model("beit_base_patch16_224"), TypeError, "relative position bias"),
    "EVA": (lambda: _timm_model("eva02_tiny_patch14_224"), TypeError, "rotary positions"),
    "maps": (
        lambda: _timm_model("vit_tiny_patch16_224", features_only=True),
        TypeError,
        "maps of features need every patch",
    ),
    "reconstruction": (_masked, TypeError, "reconstructed images need every patch"),
    "two": (_two, ValueError, "one vision transformer, got 0, 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models(name: str) -> None:
    make, error, text = WRONG[name]
    with pytest.raises(error, match=f"slim: model: .*{text}"):
        slim(make())


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"stages": (2, 3)}, ValueError, "stages: .*the 4 blocks, got \\(2, 3\\)"),
        ({"stages": (4,)}, ValueError, "stages: allowed two or more"),
        ({"stages": (4, 0)}, ValueError, "stages: allowed at least 1"),
        ({"stages": (2, 2.0)}, TypeError, "stages: allowed an int"),
        ({"stages": 4}, TypeError, "stages: allowed a tuple"),
        ({"keep": 0.0}, ValueError, "keep: allowed above 0"),
        ({"keep": 1.5}, ValueError, "keep: allowed above 0 up to 1"),
        ({"keep": 0.2}, ValueError, "keep: allowed what leaves at least one token of 16"),
        ({"keep": (8, 4)}, ValueError, "keep: allowed one number per slimming, 3"),
        ({"keep": (8, 4, 0)}, ValueError, "keep: allowed at least 1"),
        ({"keep": (17, 4, 2)}, ValueError, "keep: allowed at most 16, the tokens before it"),
        ({"keep": (8, 9, 2)}, ValueError, "keep: allowed at most 8, the tokens before it"),
        ({"keep": (0.5, 0.5, 0.5)}, TypeError, "keep: allowed ints, or one fraction"),
        ({"keep": "half"}, TypeError, "keep: allowed a number"),
        ({"image_size": 0}, ValueError, "image_size: allowed at least 1"),
        ({"image_size": "big"}, TypeError, "image_size: allowed an int"),
        ({"image_size": (32,)}, ValueError, "image_size: allowed one size or"),
        ({"image_size": 4}, ValueError, "keep: .*at least one token of 0"),
        ({"slot_std": 0}, ValueError, "slot_std: allowed above 0"),
        ({"slot_std": float("inf")}, ValueError, "slot_std: allowed above 0, finite"),
    ],
    ids=str,
)
def test_wrong_values(given: dict[str, Any], error: type[Exception], text: str) -> None:
    model = vit(dynamic_img_size=True)
    with pytest.raises(error, match=f"slim: {text}"):
        slim(model, **given)
    assert not hasattr(model, "slimming")
    assert not any(part._forward_hooks for part in model.modules())


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match="stages: allowed blocks per stage, because 3 blocks"):
        slim(vit(depth=3))
    model = vit(dynamic_img_size=True)
    slimming = slim(model, **SHAPE)
    for one in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="slim: model: allowed one that is not slimmed"):
            slim(one, **SHAPE)
    compiled = vit()
    compiled.compile(backend="eager")
    for one in (compiled, torch.compile(vit(), backend="eager")):
        with pytest.raises(ValueError, match="slim: model: allowed one that is not compiled"):
            slim(one, **SHAPE)
    with pytest.raises(TypeError, match="Slimming: call"):
        slimming(images_of())
    slimming.remove()
    model.slimming = 3
    with pytest.raises(ValueError, match="slim: model: allowed one without attribute slimming"):
        slim(model, **SHAPE)


def test_wrong_sizes() -> None:
    fixed = r"image_size: allowed \(32, 32\), because the model takes no other, got \(64, 64\)"
    with pytest.raises(ValueError, match=f"slim: {fixed}"):
        slim(vit(), image_size=64)
    model = vit(dynamic_img_size=True)
    with slim(model, **SHAPE) as slimming:
        for size, error in (("big", TypeError), ((0, 64), ValueError), (64.0, TypeError)):
            with pytest.raises(error, match=r"Slimming\.macs: image_size: allowed"):
                slimming.macs(size)
    with slim(vit()) as slimming, pytest.raises(ValueError, match=rf"Slimming\.macs: {fixed}"):
        slimming.macs(64)


def test_wrapped(tmp_path: Path) -> None:
    """Wrappers have taken note of the weights that there were."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for wrapped in (nn.DataParallel(vit()), DistributedDataParallel(vit())):
            text = f"slim: model: allowed one that is not wrapped yet, got {type(wrapped).__name__}"
            with pytest.raises(ValueError, match=text):
                slim(wrapped)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("class token", {"attn_mask": torch.zeros(17, 17)}, r"\(17, 17\)"),
        ("class token", {"is_causal": True}, "causal"),
        ("ViT", {"attention_mask": torch.arange(17).expand(2, -1) < 9}, r"\(2, 17\)"),
        ("classifier", {"attention_mask": torch.ones(2, 17)}, r"\(2, 17\)"),
    ],
    ids=["timm", "causal", "transformers", "all"],
)
def test_attention_masks(name: str, given: dict[str, Any], text: str) -> None:
    model = slimmed(name)[0]
    run = getattr(model, "forward_features", model)
    if not given.keys() <= inspect.signature(getattr(run, "forward", run)).parameters.keys():
        pytest.skip("this release takes no such mask")
    with pytest.raises(ValueError, match=f"slim: attention mask: allowed none.*{text}"):
        run(images_of(), **given)


def test_masks_of_an_export(native: None) -> None:
    """One that was given is not taken for one that the model made."""
    model = slimmed("ViT")[0]
    with pytest.raises(ValueError, match="slim: attention mask: allowed none"):
        torch.export.export(model, (images_of(),), {"attention_mask": torch.ones(2, 17)})


def test_maps_of_slots() -> None:
    model = slimmed("class token")[0]
    given: dict[str, Any]
    for given in ({}, {"output_fmt": "NCHW"}, {"indices": 2}):
        with pytest.raises(ValueError, match="slim: output_fmt: allowed NLC"):
            model.forward_intermediates(images_of(), **given)
    with pytest.raises(ValueError, match=r"slim: output_fmt: allowed NLC .*reshape=False"):
        model.get_intermediate_layers(images_of(), reshape=True)
