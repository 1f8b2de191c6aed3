"""SiT: forward, official weights, folding, sizes and costs against the official code's numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenmodels.sit import VARIANTS, SiT, SiTConfig, SlimTokens, from_official, infer_config
from torch import Tensor

SMALL = SiTConfig(dim=48, depth=6, heads=3, stages=(2, 1, 1, 2), image_size=96, classes=10)


def _tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "sit"


@pytest.fixture(scope="module")
def fill(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill", folder / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _official_keys(folder: Path, variant: str) -> dict[str, list[int]]:
    return json.loads((folder / "state_dict_keys.json").read_text())[f"sit_lvvit_{variant}"]


def _filled(folder: Path, fill: ModuleType, variant: str, slim: bool) -> dict[str, Tensor]:
    keys = _official_keys(folder, variant)
    keep = {k: s for k, s in keys.items() if slim or not k.startswith(("tsm.", "rtsm."))}
    return {key: torch.from_numpy(np.asarray(fill.value(key, tuple(s)))) for key, s in keep.items()}


def _patches_after_blocks(model: SiT, images: Tensor) -> list[Tensor]:
    """Patch tokens behind every block, and behind the slimming that follows it."""
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, x: seen.append(x[:, 1:])) for b in model.blocks]

    def replace(_module: Any, _inputs: Any, tokens: Tensor) -> None:
        seen[-1] = tokens

    hooks += [s.register_forward_hook(replace) for s in model.slims]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@torch.inference_mode()
def test_small_student(folder: Path) -> None:
    want = np.load(folder / "lvvit_small_4c.npz")
    model = from_official(_tensors(folder / "lvvit_small_4c_student_sd.npz"), config=SMALL)
    images = torch.from_numpy(want["img"])
    logits = torch.from_numpy(want["logits_f64"]).float()
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.fold_for_inference()(images), logits, atol=1e-5, rtol=0)
    for i, tokens in enumerate(_patches_after_blocks(model, images)):
        tokens_want = torch.from_numpy(want[f"tokens_eval/{i}"])
        torch.testing.assert_close(tokens, tokens_want, atol=2e-5, rtol=0, msg=f"block {i}")


@torch.inference_mode()
def test_small_teacher(folder: Path) -> None:
    want = np.load(folder / "lvvit_small_4c.npz")
    config = SiTConfig(dim=48, depth=6, heads=3, stages=(6,), image_size=96, classes=10, slim=False)
    model = from_official(_tensors(folder / "lvvit_small_4c_teacher_sd.npz"), config=config)
    logits = torch.from_numpy(want["teacher_logits_f32"])
    torch.testing.assert_close(model(torch.from_numpy(want["img"])), logits, atol=1e-5, rtol=0)
    assert not model.slims


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["tiny", "small"])
@pytest.mark.parametrize("slim", [True, False], ids=["slim", "dense"])
def test_official_variants(folder: Path, fill: ModuleType, variant: str, slim: bool) -> None:
    """The released architectures, filled with numbers: shapes, stages and logits."""
    want = np.load(folder / "official_variants_filled.npz")
    state_dict = _filled(folder, fill, variant, slim)
    model = from_official({"model": state_dict})
    config = VARIANTS[f"sit_{variant}"]
    assert model.config.slim_after == (config.slim_after if slim else {})
    images = torch.from_numpy(fill.image("img", (1, 3, 224, 224)))
    logits = torch.from_numpy(want[f"{variant}/{'' if slim else 'noslim_'}logits_f32"])
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.fold_for_inference()(images), logits, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_half_precision_runs_and_stays_close() -> None:
    torch.manual_seed(0)
    model = SiT(SMALL).fold_for_inference()
    images = torch.randn(2, 3, 96, 96)
    want = model(images)
    got = model.bfloat16()(images.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 0.05 * want.abs().max()


def test_the_whole_network_has_gradients() -> None:
    torch.manual_seed(0)
    model = SiT(SMALL)
    model(torch.randn(2, 3, 96, 96)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_round_trip_of_shapes(folder: Path, fill: ModuleType, name: str) -> None:
    """The slimming places are read off the recovery modules; without these, they must be given."""
    keys = _official_keys(folder, name.removeprefix("sit_"))
    shapes = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    assert infer_config(shapes) == VARIANTS[name]
    deploy = {key: value for key, value in shapes.items() if not key.startswith("rtsm.")}
    with pytest.raises(ValueError, match="from_official: config: allowed a SiTConfig"):
        infer_config(deploy)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "parameters"),
    [
        ("sit_tiny", 0.9875, 3.4567, 15_551_934),
        ("sit_xsmall", 1.4815, 5.5315, 25_240_774),
        ("sit_small", 4.0158, 5.5315, 25_240_774),
    ],
)
def test_costs(name: str, student: float, teacher: float, parameters: int) -> None:
    config = VARIANTS[name]
    assert round(config.macs() / 1e9, 4) == student
    assert round(_dense(config).macs() / 1e9, 4) == teacher
    dead = sum(config.slim_after.values())  # the biases behind the slots, which are left out here
    assert sum(p.numel() for p in SiT(config).parameters()) == parameters - dead


def _dense(config: SiTConfig) -> SiTConfig:
    return SiTConfig(**{**config.__dict__, "slim": False})


@pytest.mark.parametrize(
    ("size", "kept"),
    [(224, [98, 49, 24]), (256, [128, 64, 32]), (288, [162, 81, 40]), (384, [288, 144, 72])],
)
def test_kept_tokens(size: int, kept: list[int]) -> None:
    config = SiTConfig(dim=384, depth=16, heads=6, stages=(9, 3, 2, 2), image_size=size)
    assert list(config.slim_after.values()) == kept


def test_slimming_is_a_set_function() -> None:
    torch.manual_seed(0)
    slim, x = SlimTokens(32, 6), torch.randn(2, 50, 32)
    torch.testing.assert_close(slim(x[:, torch.randperm(50)]), slim(x))
    torch.testing.assert_close(slim(x[:, :1]), x[:, :1].expand(-1, 6, -1))


def test_other_image_sizes_and_configs_are_refused_in_words(folder: Path) -> None:
    with pytest.raises(ValueError, match="SiT: images: allowed 6 x 6 patches"):
        SiT(SMALL)(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match="SiTConfig: stages"):
        SiTConfig(dim=48, depth=6, heads=3, stages=(2, 1))
    with pytest.raises(ValueError, match="from_official: state_dict: does not fit"):
        from_official(
            _tensors(folder / "lvvit_small_4c_student_sd.npz"), config=VARIANTS["sit_tiny"]
        )
