"""SiT's weights: official ones read and given back, our own files, a teacher's for a student."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sit_golden import SMALL, TINY, official_shapes, random_sit, tensors
from tokenmodels._files import replace_file
from tokenmodels.sit import VARIANTS, SiT, SiTConfig, infer_config

WHERE = "SiT.from_official"
RELEASED = replace(TINY, embed_dim=64, num_heads=1)
"""Small, and of the proportions from which a config is inferred."""


def _same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("parts", [True, False])
def test_official_weights_come_back_as_they_were(folder: Path, parts: bool) -> None:
    weights = tensors(folder / "lvvit_small_4c_student_sd.npz")
    if not parts:
        dropped = ("rtsm.", "aux_head.")
        weights = {k: v for k, v in weights.items() if not k.startswith(dropped)}
    model = SiT.from_official(weights, config=SMALL, training_parts=parts)
    assert _same(model.official_state_dict(), weights)
    model.pos_embed.data.zero_()
    assert weights["pos_embed"].any(), "the model shares memory with what it was made from"


@pytest.mark.parametrize("config", [RELEASED, replace(RELEASED, dense=True)], ids=["slim", "dense"])
def test_official_files(config: SiTConfig, tmp_path: Path) -> None:
    """As the official code saves them: options beside the weights; they stay out of other loads."""
    model, path = random_sit(config, training_parts=True), tmp_path / "checkpoint.pth"
    options = argparse.Namespace(lr=2e-4, model="sit_lvvit_tiny")
    torch.save({"model": model.official_state_dict(), "epoch": 3, "args": options}, path)
    for source in (path, str(path)):
        loaded = SiT.from_official(source, training_parts=True)
        assert replace(loaded.config, stages=config.stages) == config and not loaded.training
        assert _same(loaded.state_dict(), model.state_dict())
    with pytest.raises(Exception, match=r"argparse.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_are_read_off_the_weights(folder: Path, name: str) -> None:
    """Of every released network; slimming places from the recovery modules or the variant."""
    shapes = official_shapes(folder, name)
    assert infer_config(shapes) == infer_config(shapes, variant=name) == VARIANTS[name]
    deployed = {key: value for key, value in shapes.items() if not key.startswith("rtsm.")}
    assert infer_config(deployed, variant=name) == VARIANTS[name]
    with pytest.raises(ValueError, match=f"{WHERE}: variant, config: allowed one of them where"):
        infer_config(deployed)
    teacher = official_shapes(folder, name, dense=True)
    depth = (VARIANTS[name].depth,)
    assert infer_config(teacher) == replace(VARIANTS[name], dense=True, stages=depth)
    with pytest.raises(ValueError, match=rf"{WHERE}: variant: allowed .*dense=True\) as config"):
        infer_config(teacher, variant=name)
    for other in set(VARIANTS) - {name}:
        words = f"{WHERE}: variant: allowed weights of {other}, got .*{other} has"
        with pytest.raises(ValueError, match=words):
            infer_config(shapes, variant=other)


def test_fine_tuned_and_resized_weights_keep_their_shape() -> None:
    config = SiTConfig.variant("sit_tiny", num_classes=7, image_size=256)
    with torch.device("meta"):
        weights = SiT(config).official_state_dict()
    assert infer_config(weights, variant="sit_tiny") == config
    with torch.device("meta"):
        resized = SiT(replace(config, keep=(98, 49, 24))).official_state_dict()
    assert infer_config(resized, variant="sit_tiny").keep == (98, 49, 24)


def test_weights_that_do_not_fit(folder: Path) -> None:
    """Official names are told: those that are missing, unexpected, of another shape."""
    weights = tensors(folder / "lvvit_small_4c_student_sd.npz")
    without = {k: v for k, v in weights.items() if k != "tsm.0.weight.1.bias"}
    with pytest.raises(ValueError, match=rf"{WHERE}: weights: .* missing tsm.0.weight.1.bias$"):
        SiT.from_official(without, config=SMALL)
    with pytest.raises(ValueError, match=r"unexpected dist_token$"):
        SiT.from_official(weights | {"dist_token": torch.zeros(1)}, config=SMALL)
    with pytest.raises(ValueError, match=r"unexpected tsm.0.scale, .* and 15 more$"):
        SiT.from_official(weights, config=replace(SMALL, dense=True))
    with pytest.raises(
        ValueError, match=r"other shapes: head.weight \(10, 48\) instead of \(3, 48\)"
    ):
        SiT.from_official(weights, config=replace(SMALL, num_classes=3))
    with pytest.raises(ValueError, match=r"missing tsm.3.scale"):
        SiT.from_official(weights, config=replace(SMALL, stages=(2, 1, 1, 1, 1)))
    with pytest.raises(ValueError, match="allowed weights of sit_tiny, got embed_dim 48, sit_tiny"):
        SiT.from_official(weights, variant="sit_tiny")
    with pytest.raises(ValueError, match="config: allowed a SiTConfig for 48 channels"):
        SiT.from_official(weights)
    with pytest.raises(ValueError, match="variant, config: allowed one of them, got both"):
        SiT.from_official(weights, variant="sit_tiny", config=SMALL)
    with pytest.raises(ValueError, match=r"allowed sit_tiny, .* got 'sit_huge'"):
        SiT.from_official(weights, variant="sit_huge")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"{WHERE}: source: allowed weights of a SiT, with cls_tok"
    ):
        SiT.from_official({"model": {"conv1.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=f"{WHERE}: pos_embed: allowed a tensor, got list"):
        SiT.from_official({"cls_token": torch.zeros(1), "pos_embed": []})
    with pytest.raises(TypeError, match=f"{WHERE}: source: allowed a file, .* got list"):
        SiT.from_official([])
    with pytest.raises(FileNotFoundError, match=f"{WHERE}: source: allowed a file that exists"):
        SiT.from_official(tmp_path / "none.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"model": random_sit().official_state_dict()}, whole)
    content = whole.read_bytes()
    torch.save({"model": {}, "optimizer": SimpleNamespace()}, tmp_path / "code.pth")
    for name, found in (
        ("cut", content[: len(content) // 2]),
        ("empty", b""),
        ("junk", b"\0" * 99),
    ):
        (tmp_path / f"{name}.pth").write_bytes(found)
    for name in ("cut", "empty", "junk", "code"):
        with pytest.raises(ValueError, match=f"{WHERE}: source: allowed a whole file of tensors"):
            SiT.from_official(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_read_again(parts: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_sit(replace(TINY, keep=(7, 3), image_size=(64, 48)), parts).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = SiT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and not loaded.training
    assert (loaded.training_parts is not None) == parts
    assert _same(loaded.state_dict(), model.state_dict())
    assert not loaded.slims[0].fc2.bias.requires_grad
    images = torch.randn(1, 3, 64, 48, dtype=dtype)
    assert torch.equal(loaded(images), model(images))


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        replace_file(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    replace_file(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_folders_that_are_none(tmp_path: Path) -> None:
    where = "SiT.from_pretrained"
    with pytest.raises(FileNotFoundError, match=f"{where}: name: allowed a folder that exists, or"):
        SiT.from_pretrained(tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=f"{where}: name: allowed a folder with config.json"
    ):
        SiT.from_pretrained(tmp_path)
    random_sit().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, whole = json.loads(config.read_text()), weights.read_bytes()

    def refused(words: str, change: dict[str, object]) -> None:
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=words):
            SiT.from_pretrained(tmp_path)

    refused(f"{where}: config.json: allowed model_type 'sit'", {"model_type": "vit"})
    refused(f"{where}: config.json: allowed dense, depth, .* got heads$", {"heads": 3})
    refused("SiTConfig: stages: allowed a sum of depth=4", {"depth": 4})
    refused(
        f"{where}: weights: .* missing blocks.3.norm1.weight", {"stages": [1, 1, 1, 1], "depth": 4}
    )
    config.write_text("{")
    with pytest.raises(ValueError, match=f"{where}: config.json: allowed a whole JSON file"):
        SiT.from_pretrained(tmp_path)
    config.write_text(json.dumps(good))
    for content in (whole[: len(whole) // 2], b"", b"junk" * 9):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=f"{where}: model.safetensors: allowed a whole safe"):
            SiT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"allowed a folder with model.safetensors"):
        SiT.from_pretrained(tmp_path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = random_sit(), []
    model.save_pretrained(tmp_path)

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    loaded = SiT.from_pretrained("owner/name", revision="v1")
    assert _same(loaded.state_dict(), model.state_dict())
    assert asked == [("owner/name", f, "v1") for f in ("config.json", "model.safetensors")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="with huggingface_hub installed, a hub id, got 'owner/n"):
        SiT.from_pretrained("owner/name")


def test_a_folded_model_is_not_saved(tmp_path: Path) -> None:
    folded = random_sit().fold_for_inference()
    with pytest.raises(ValueError, match=r"SiT.save_pretrained: model: allowed one as trained"):
        folded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SiT.official_state_dict: model: allowed one as trained"):
        folded.official_state_dict()
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_a_student_takes_over_its_teacher() -> None:
    """All but the slimmings; with slots that take single tokens it then is its teacher."""
    teacher = random_sit(replace(TINY, dense=True))
    torch.manual_seed(1)
    student = SiT(TINY, training_parts=True).eval()
    left = student.transplant(teacher)
    assert {name.split(".")[0] for name in left} == {"slims", "training_parts"}
    images = torch.randn(2, 3, 64, 64)
    stage = student.features_only(images)[0], teacher.features_only(images)[0]
    assert torch.equal(*stage)
    other = SiT(replace(TINY, num_classes=3, image_size=96))
    left = other.transplant(teacher)
    assert {name.split(".")[0] for name in left} == {"slims", "head"}
    assert torch.equal(other.pos_embed, teacher.resized(96).pos_embed)
    for change in ({"depth": 4, "stages": (2, 1, 1)}, {"mlp_ratio": 2.0}, {"in_channels": 1}):
        with pytest.raises(ValueError, match=f"SiT.transplant: teacher: .*{next(iter(change))}="):
            SiT(replace(TINY, **change)).transplant(teacher)
