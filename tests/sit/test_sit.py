"""SiT's forward pass, sizes and costs against the official code's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sit_golden import SMALL, filled, filler, official_shapes, tensors
from tokenmodels.sit import VARIANTS, SiT, SiTConfig, SlimTokens
from torch import Tensor


def _close(got: Tensor, want: np.ndarray, bound: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.from_numpy(want).to(got.dtype), atol=bound, rtol=0)


@torch.inference_mode()
def test_small_student(folder: Path) -> None:
    want = np.load(folder / "lvvit_small_4c.npz")
    model = SiT.from_official(folder_weights(folder, "student"), config=SMALL)
    images = torch.from_numpy(want["img"])
    _close(model.stem(images), want["patch_embed_f32"])
    cls: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, x: cls.append(x[:, 0]))
    got = model(images, return_tokens=True)
    _close(got.logits, want["logits_f64"])
    _close(torch.stack(cls), want["cls_after_block_f32"])
    for i, tokens in enumerate(got.tokens):
        _close(tokens, want[f"tokens_eval/{i}"])
    _close(model.fold_for_inference()(images), want["logits_f64"])


@torch.inference_mode()
def test_small_teacher(folder: Path) -> None:
    want = np.load(folder / "lvvit_small_4c.npz")
    config = replace(SMALL, dense=True)
    model = SiT.from_official(folder_weights(folder, "teacher"), config=config)
    got = model(torch.from_numpy(want["img"]), return_tokens=True)
    _close(got.logits, want["teacher_logits_f32"])
    for i, tokens in enumerate(got.tokens):
        stored = want[f"teacher_tokens/{i}"]
        _close(tokens[:, : stored.shape[1]], stored)
    assert not model.slims


def folder_weights(folder: Path, which: str) -> dict[str, Tensor]:
    return tensors(folder / f"lvvit_small_4c_{which}_sd.npz")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["sit_tiny", "sit_small"])
@pytest.mark.parametrize("dense", [False, True], ids=["slim", "dense"])
def test_official_variants(folder: Path, name: str, dense: bool) -> None:
    """The released architectures, filled with numbers: stages, logits and tokens."""
    want, short = np.load(folder / "official_variants_filled.npz"), name.removeprefix("sit_")
    weights = filled(folder, name, dense)
    model = SiT.from_official({"model": weights}, variant=None if dense else name)
    expected = SiTConfig.variant(name, dense=dense)
    assert model.config.slim_after == expected.slim_after
    images = torch.from_numpy(filler(folder).image("img", (1, 3, 224, 224)))
    got = model(images, return_tokens=True)
    _close(got.logits, want[f"{short}/{'noslim_' if dense else ''}logits_f32"])
    folded = model.fold_for_inference()(images)
    assert (folded - got.logits).abs().max() <= 2e-6 * max(1, got.logits.abs().max().item())
    if not dense:
        moments = torch.tensor([[x.mean(), x.std()] for x in got.tokens])
        _close(moments, want[f"{short}/tokens_mean_std"], 1e-4)
        _close(got.tokens[-1][0, :, :8], want[f"{short}/last_tokens_first8ch"])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_slimming_module(folder: Path, fused: bool) -> None:
    """Values, and in float64 gradients; of the stage-1 module of SiT-S values only."""
    small, stage1 = np.load(folder / "tsm_small.npz"), np.load(folder / "tsm_sit_s_stage1.npz")
    module = _slimming(tensors(folder / "tsm_small.npz"), 48, 11)
    module.fused = fused
    _close(module(torch.from_numpy(small["x"])).detach(), small["y_f64"])
    real = _slimming(tensors(folder / "tsm_sit_s_stage1_sd.npz"), 384, 98)
    real.fused = fused
    _close(real(torch.from_numpy(stage1["x"])).detach(), stage1["y_f64"])
    if fused:
        return
    module.double()
    x = torch.from_numpy(small["x"]).double().requires_grad_()
    y = module(x)
    _close(y.detach(), small["y_f64"], 1e-12)
    (y * torch.from_numpy(small["dy"])).sum().backward()
    _close(x.grad, small["dx_f64"], 1e-12)
    for name, official in _SLIMMING.items():
        gradient = module.get_parameter(name).grad
        if name != "fc2.bias":  # exactly zero, which the official code computes up to rounding
            _close(
                gradient.reshape(small[f"grad_f64/{official}"].shape),
                small[f"grad_f64/{official}"],
                1e-10,
            )


_SLIMMING = {
    "logit_scale": "scale",
    **{f"norm.{kind}": f"weight.0.{kind}" for kind in ("weight", "bias")},
    **{f"fc1.{kind}": f"weight.1.{kind}" for kind in ("weight", "bias")},
    **{f"fc2.{kind}": f"weight.3.{kind}" for kind in ("weight", "bias")},
}


def _slimming(weights: dict[str, Tensor], dim: int, slots: int) -> SlimTokens:
    module = SlimTokens(dim, slots)
    names = {key.removeprefix("sd/"): value for key, value in weights.items()}
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    ours = {name: names[official].reshape(shapes[name]) for name, official in _SLIMMING.items()}
    module.load_state_dict(ours)
    return module


class Counts(NamedTuple):
    """Parameters, keys and 1e9 multiply-accumulates of a released network and its teacher."""

    everything: int
    trained: int
    recovery: int
    slimming: int
    deployed: int
    teacher: int
    keys: tuple[int, int]
    gmacs: tuple[float, float]


COUNTS = {
    "sit_tiny": Counts(
        29_888_110,
        29_567_110,
        14_015_176,
        183_534,
        15_551_934,
        15_689_400,
        (375, 186),
        (0.9875, 3.4567),
    ),
    "sit_xsmall": Counts(
        47_408_414,
        47_023_414,
        21_782_640,
        257_070,
        25_240_774,
        25_368_704,
        (421, 208),
        (1.4815, 5.5315),
    ),
    "sit_small": Counts(
        36_691_534,
        36_306_534,
        11_065_760,
        257_070,
        25_240_774,
        25_368_704,
        (325, 208),
        (4.0158, 5.5315),
    ),
    "sit_medium": Counts(
        80_960_586,
        80_447_586,
        25_318_284,
        441_006,
        55_129_302,
        55_201_296,
        (405, 252),
        (8.0194, 11.8391),
    ),
    "sit_large": Counts(
        226_943_274,
        226_174_274,
        78_774_876,
        999_454,
        147_399_398,
        147_168_944,
        (509, 308),
        (34.3142, 55.9743),
    ),
}


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_keys_and_costs(folder: Path, name: str) -> None:
    """All five released networks and their teachers, exactly."""
    counts = COUNTS[name]
    for dense in (False, True):
        config = SiTConfig.variant(name, dense=dense)
        with torch.device("meta"):
            model, deployed = SiT(config, training_parts=True), SiT(config)
        got = {key: tuple(x.shape) for key, x in model.official_state_dict().items()}
        want = official_shapes(folder, name, dense)
        assert got == {key: tuple(x.shape) for key, x in want.items()}
        assert len(got) == counts.keys[dense]
        assert round(config.macs() / 1e9, 4) == counts.gmacs[dense]
        if dense:
            assert _numel(model) == counts.teacher
            continue
        assert _numel(model) == counts.everything
        assert _numel(model.training_parts.recover) == counts.recovery
        assert _numel(model.slims) == counts.slimming
        assert _numel(deployed) == counts.deployed
        frozen = sum(config.slim_after.values())  # biases without effect, which we do not train
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == counts.trained - frozen


BLOCKS = {
    "sit_tiny": {98: 1, 49: 1, 24: 12},
    "sit_xsmall": {98: 1, 49: 1, 24: 14},
    "sit_small": {196: 8, 98: 3, 49: 2, 24: 3},
    "sit_medium": {196: 9, 98: 4, 49: 3, 24: 4},
    "sit_large": {324: 9, 162: 4, 81: 3, 40: 8},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_of_all_variants(name: str) -> None:
    """Patch tokens behind every block, and as training recovers them; logits."""
    config = SiTConfig.variant(name)
    size = config.image_size
    with torch.device("meta"):
        model = SiT(config, training_parts=True).set_fused(False)
        got = model(torch.empty(2, 3, size, size), return_tokens=True)
    left = [tokens for tokens, blocks in BLOCKS[name].items() for _ in range(blocks)]
    assert [x.shape[1] for x in got.tokens] == left == list(config.tokens_after)
    assert got.logits.shape == (2, 1000)
    full = (2, config.patches, config.embed_dim)
    assert all(x.shape == full for x in model.training_parts(got.tokens))


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (224, [98, 49, 24]),
        (256, [128, 64, 32]),
        (288, [162, 81, 40]),
        (384, [288, 144, 72]),
        ((224, 112), [49, 24, 12]),
    ],
)
def test_kept_tokens(size: int | tuple[int, int], kept: list[int]) -> None:
    config = SiTConfig.variant("sit_small", image_size=size)
    assert list(config.slim_after.values()) == kept


def test_slimming_is_a_set_function() -> None:
    torch.manual_seed(0)
    slim, x = SlimTokens(32, 6), torch.randn(2, 50, 32)
    torch.testing.assert_close(slim(x[:, torch.randperm(50)]), slim(x))
    torch.testing.assert_close(slim(x[:, :1]), x[:, :1].expand(-1, 6, -1))
