"""SiT by timm's names and with timm's tools."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmodels.sit import VARIANTS, SiT, SiTConfig, unpool
from torch import Tensor

timm = pytest.importorskip("timm")

from tokenmodels.sit.timm_models import TimmSiT, renamed  # noqa: E402

NAMES = [variant + dense for variant in VARIANTS for dense in ("", "_dense")]
SMALL = SiTConfig(
    embed_dim=16, depth=4, num_heads=2, stages=(1, 2, 1), image_size=64, num_classes=5
)


def _images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_names() -> None:
    assert sorted(timm.list_models("sit_*")) == sorted(NAMES)
    assert timm.list_models("sit_*", pretrained=True) == []
    assert timm.is_model("sit_small.tokenkernels")


@pytest.mark.parametrize("name", NAMES)
def test_variants(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"{name}.tokenkernels")
    variant, dense = name.removesuffix("_dense"), name.endswith("_dense")
    config = SiTConfig.variant(variant, dense=dense)
    assert isinstance(model, SiT) and model.config == config and len(model.slims) == 3 * (not dense)
    size = 288 if variant == "sit_large" else 224
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, size, size) and data["crop_pct"] == 224 / 256
    assert data["interpolation"] == "bicubic" and data["mean"] == (0.485, 0.456, 0.406)
    assert model.default_cfg == model.pretrained_cfg
    assert model.default_cfg["architecture"] == name and model.default_cfg["tag"] == "tokenkernels"


@pytest.fixture
def small_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sit_tiny` with the stages that it has, and little else."""
    small = replace(VARIANTS["sit_tiny"], embed_dim=16, num_heads=2, depth=5, stages=(1, 1, 1, 2))
    monkeypatch.setattr("tokenmodels.sit.config.VARIANTS", {"sit_tiny": small})


def test_arguments() -> None:
    given = {"num_classes": 7, "img_size": (48, 64), "in_chans": 1, "drop_path_rate": 0.25}
    with torch.device("meta"):
        model = timm.create_model("sit_tiny", drop_rate=0.0, **given).eval()
    config = model.config
    assert (config.num_classes, config.image_size, config.in_channels) == (7, (48, 64), 1)
    assert model.blocks[-1].drop_path.rate == 0.25 and model.num_classes == 7
    assert config.slim_after == {0: 6, 1: 3, 2: 1}
    assert model.set_fused(False)(torch.empty(2, 1, 48, 64, device="meta")).shape == (2, 7)
    assert model.num_features == model.head_hidden_size == 320


def test_arguments_that_change_nothing() -> None:
    rates = ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
    given = dict.fromkeys(rates, 0.0) | {"dynamic_img_size": True, "strict_img_size": False}
    model = timm.create_model("sit_tiny", device="meta", dtype=torch.bfloat16, **given)
    assert model.config == SiTConfig.variant("sit_tiny")
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {
        ("meta", torch.bfloat16)
    }
    images = torch.empty(1, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    assert model(images).shape == (1, 1000) and all(one.fused for one in model.slims)
    for name, value, text in (
        ("dynamic_img_size", False, "True alone"),
        ("attn_drop_rate", 0.1, "0.0 alone"),
    ):
        with pytest.raises(ValueError, match=f"sit_tiny: {name}: allowed {text}, got {value}"):
            timm.create_model("sit_tiny", **{name: value})


@torch.no_grad()
def test_head_and_features(native: None) -> None:
    model = TimmSiT(SMALL).eval()
    features = model.forward_features(_images())
    assert torch.allclose(model.forward_head(features), model(_images()), atol=1e-6)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    assert model.get_classifier() is model.head
    model.double().reset_classifier(9)
    assert model.head.weight.dtype == torch.float64 and model.num_classes == 9
    model.float().reset_classifier(0)
    assert torch.allclose(model(_images()), features[:, 0], atol=1e-6)
    two = TimmSiT(SiTConfig(**(vars(SMALL) | {"dist_token": True}))).eval()
    got = two.forward_head(two.forward_features(_images()))
    assert torch.allclose(got, two(_images()), atol=1e-6)


@torch.no_grad()
def test_intermediates(native: None) -> None:
    model = TimmSiT(SMALL).eval()
    got = model(_images(), return_assignment=True, return_tokens=True)
    last, slots = model.forward_intermediates(_images(), output_fmt="NLC")
    assert torch.equal(last, model.forward_features(_images()))
    assert [tuple(one.shape) for one in slots] == [(2, 16, 16), (2, 8, 16), (2, 4, 16)]
    assert torch.equal(slots[2], got.tokens[3])
    options: dict[str, Any] = {"intermediates_only": True, "norm": True}
    maps = model.forward_intermediates(_images(), [0, -1], **options)
    assert [tuple(one.shape) for one in maps] == [(2, 16, 4, 4)] * 2
    want = unpool(model.norm(got.tokens[3]), got.assignments)
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), want)
    named = model.forward_intermediates(_images(), [0, -1], norm=True, output_dict=True)
    assert list(named) == ["image_intermediates", "image_features"]
    assert torch.equal(named["image_features"], last)
    assert all(map(torch.equal, named["image_intermediates"], maps))
    modules = [one["module"] for one in model.feature_info]
    assert modules == ["blocks.0", "blocks.2", "blocks.3"]
    for wrong in ("all", [0.0], True):
        with pytest.raises(TypeError, match="SiT: indices: allowed an int or a list"):
            model.forward_intermediates(_images(), wrong)
    for given in ({"return_prefix_tokens": True}, {"output_fmt": "NHWC"}, {"indices": [3]}):
        with pytest.raises(ValueError, match=f"SiT: {next(iter(given))}: allowed"):
            model.forward_intermediates(_images(), **given)


@torch.no_grad()
def test_features_only(native: None, small_tiny: None) -> None:
    """By timm's wrapper, which drops what the wanted stages do not need."""
    given = {"img_size": 64, "features_only": True}
    model = timm.create_model("sit_tiny", out_indices=(0, 2), **given).eval()
    maps = model(_images())
    assert [tuple(one.shape) for one in maps] == [(2, 16, 4, 4)] * 2
    assert model.feature_info.channels() == [16, 16]
    assert model.feature_info.reduction() == [16, 16]
    assert len(model.model.blocks) == 3 and len(model.model.slims) == 2
    assert not any(key.startswith(("norm.", "head.")) for key in model.model.state_dict())
    want = model.model.features_only(_images(), unpooled=True)
    assert torch.equal(maps[0], want[0]) and torch.equal(maps[1], want[2])
    with torch.device("meta"):
        dense = timm.create_model("sit_tiny_dense", **given)
        assert len(dense(torch.empty(1, 3, 64, 64))) == 4 and not dense.model.slims
        first = timm.create_model("sit_tiny", out_indices=(0,), **given)
    assert first.model.config.dense and not first.model.slims and len(first.model.blocks) == 1


@torch.no_grad()
def test_pruned(native: None) -> None:
    model = TimmSiT(SMALL).eval()
    want = model.forward_intermediates(_images(), [1], intermediates_only=True, norm=True)
    assert model.prune_intermediate_layers([-2], prune_head=True) == [1]
    assert model.config.depth == 3 and model.config.slim_after == {0: 8}
    got = model.forward_intermediates(_images(), [1], intermediates_only=True, norm=True)
    assert torch.equal(got[0], want[0]) and not model.num_classes


def test_training_tools(native: None) -> None:
    from timm.optim import create_optimizer_v2

    model = TimmSiT(SMALL).train()
    model.set_grad_checkpointing()
    assert model.recompute
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    without = {id(one) for group in optimizer.param_groups for one in group["params"]
               if not group["weight_decay"]}  # fmt: skip
    assert {id(model.cls_token), id(model.pos_embed), id(model.norm.weight)} <= without
    assert id(model.slims[0].fc2.weight) not in without
    create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.7)
    model(_images()).square().sum().backward()
    optimizer.step()


def test_layers_of_learning_rates() -> None:
    """A slimming learns as fast as the block before it."""
    from timm.models import group_parameters

    model = TimmSiT(SMALL)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for slim, block in enumerate(SMALL.slim_after):
        assert groups[f"slims.{slim}.fc2.weight"] == groups[f"blocks.{block}.attn.qkv.weight"]
    assert groups["stem.convs.0.weight"] == 0 and groups["head.weight"] == max(groups.values())


@torch.no_grad()
def test_weights(native: None, small_tiny: None, tmp_path: Path) -> None:
    """Files of ours and of the official code, by both of timm's ways."""
    from safetensors.torch import save_file

    given = {"img_size": 64, "num_classes": 5}
    source = timm.create_model("sit_tiny", **given).eval()
    want = source(_images())
    parts = SiT(source.config, training_parts=True)
    parts.load_state_dict(source.state_dict(), strict=False)
    save_file(parts.state_dict(), tmp_path / "ours.safetensors")
    torch.save({"model": parts.official_state_dict()}, tmp_path / "official.pth")
    for name in ("ours.safetensors", "official.pth"):
        file = str(tmp_path / name)
        one = timm.create_model("sit_tiny.tokenkernels", checkpoint_path=file, **given).eval()
        assert torch.equal(one(_images()), want)
        overlay = {"file": file, "num_classes": 5}
        other = timm.create_model("sit_tiny", True, pretrained_cfg_overlay=overlay, **given).eval()
        assert torch.equal(other(_images()), want)
    others = given | {"num_classes": 3, "in_chans": 1}
    one = timm.create_model("sit_tiny", True, pretrained_cfg_overlay=overlay, **others)
    assert torch.equal(one.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert one.stem.convs[0].weight.shape[1] == 1 and one.num_classes == 3
    assert renamed(source.state_dict(), source).keys() == source.state_dict().keys()
    source.save_pretrained(tmp_path / "folder")
    again = TimmSiT.from_pretrained(tmp_path / "folder")
    assert torch.equal(again(_images()), want) and isinstance(again, TimmSiT)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tsm\.0"):
        timm.create_model("sit_tiny_dense", checkpoint_path=file, **given)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"sit_small: pretrained: allowed False.*SiT\.from_official"
    ):
        timm.create_model("sit_small.tokenkernels", pretrained=True)
    with pytest.raises(ValueError, match="sit_tiny: drop_rate: allowed 0"):
        timm.create_model("sit_tiny", drop_rate=0.1)
    with pytest.raises(ValueError, match="sit_tiny: global_pool: allowed token"):
        timm.create_model("sit_tiny", global_pool="avg")
    with pytest.raises(ValueError, match="reset_classifier: global_pool: allowed token"):
        TimmSiT(SMALL).reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="image_size: allowed at least 16"):
        timm.create_model("sit_tiny", img_size=8)
    with pytest.raises(TypeError, match="patch_size"):
        timm.create_model("sit_tiny", patch_size=8)


def test_without_timm() -> None:
    code = "import sys; sys.modules['timm'] = None; import tokenmodels.sit.timm_models"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert "package timm: allowed with it installed: pip install 'tokenkernels[timm]'" in (
        ran.stderr.decode()
    )
