"""What a SiT gives beside logits, for images of any size, in any dtype, compiled and exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sit_golden import SHALLOW, SMALL, TINY, random_sit
from tokenmodels.sit import SiT, SiTConfig, SlimTokens, compose, export_onnx, unpool


@torch.inference_mode()
def test_other_image_sizes() -> None:
    """The numbers of slots stay; a resized copy gives the same without interpolating."""
    model = random_sit()
    for height, width in ((64, 64), (96, 64), (48, 112), (60, 50), (16, 16)):
        images = torch.randn(2, 3, height, width)
        got = model(images, return_tokens=True)
        grid = -(-height // 16) * -(-width // 16)
        assert [x.shape[1] for x in got.tokens] == [8, 4, 4]
        assert model.features_only(images)[0].shape == (2, 16, -(-height // 16), -(-width // 16))
        copy = model.resized((height, width))
        torch.testing.assert_close(copy(images), got.logits, atol=1e-6, rtol=0)
        assert copy.pos_embed.shape[1] == 1 + grid and model.config == TINY
        assert copy.config.macs() == TINY.macs((height, width))


@torch.inference_mode()
def test_positions_are_interpolated_smoothly() -> None:
    """Of positions that are linear along the image, the interpolated ones are too."""
    model = random_sit(replace(TINY, image_size=128))
    ramp = torch.linspace(0, 1, 8)[None, :, None].expand(8, 8, 16).reshape(1, 64, 16)
    model.pos_embed[:, 1:] = ramp
    wide = model.resized((128, 256)).pos_embed[0, 1:].reshape(8, 16, 16)
    steps = wide[:, 3:-3].diff(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 14), atol=2e-3, rtol=0)
    torch.testing.assert_close(model.resized(128).pos_embed, model.pos_embed, atol=0, rtol=0)


@torch.inference_mode()
def test_assignments() -> None:
    """Rows sum to one, their products with the tokens are the slots, logits stay the same."""
    model, images = random_sit(), torch.randn(2, 3, 64, 64)
    got = model(images, return_assignment=True)
    assert torch.equal(got.logits, model(images)) and not got.tokens
    assert [x.shape for x in got.assignments] == [(2, 8, 16), (2, 4, 8)]
    for one in got.assignments:
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:2]))
    slots = got.assignments[0] @ model.features_only(images)[0].flatten(2).transpose(1, 2)
    (tokens, *_) = model(images, return_tokens=True).tokens
    torch.testing.assert_close(slots, tokens, atol=1e-5, rtol=0)


def test_slots_go_back_to_their_patches() -> None:
    torch.manual_seed(0)
    one, two = torch.rand(2, 8, 16).softmax(-1), torch.rand(2, 4, 8).softmax(-1)
    torch.testing.assert_close(compose([one, two]), two @ one)
    same = torch.randn(2, 1, 3).expand(2, 4, 3)
    torch.testing.assert_close(unpool(same, [one, two]), same[:, :1].expand(2, 16, 3))
    hard = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 1, 0]]])  # nobody takes the last patch
    back = unpool(torch.tensor([[[1.0], [2.0]]]), [hard])
    assert back.flatten().tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match=r"unpool: slots: allowed \(2, 4, C\)"):
        unpool(torch.zeros(2, 8, 3), [one, two])
    with pytest.raises(ValueError, match="compose: assignments: allowed"):
        compose([two, one])
    with pytest.raises(ValueError, match="compose: assignments: allowed one or more, got none"):
        compose([])


@torch.inference_mode()
def test_features_per_stage() -> None:
    images = torch.randn(2, 3, 64, 96)
    model, dense = random_sit(), random_sit(replace(TINY, dense=True))
    assert [x.shape for x in model.features_only(images)] == [(2, 16, 4, 6), (2, 8, 16), (2, 4, 16)]
    for maps in (model.features_only(images, unpooled=True), dense.features_only(images)):
        assert [x.shape for x in maps] == [(2, 16, 4, 6)] * 3
    last = dense.features_only(images)[-1].flatten(2).transpose(1, 2)
    features = dense.forward_features(images)
    torch.testing.assert_close(dense.norm(last), features[:, 1:])
    torch.testing.assert_close(dense.head(features[:, 0]), dense(images))
    assert model.forward_features(images).shape == (2, 5, 16)


@torch.inference_mode()
def test_a_network_without_classes_gives_features() -> None:
    model, images = (
        random_sit(replace(TINY, num_classes=0), training_parts=True),
        torch.randn(2, 3, 64, 64),
    )
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])
    weights = model.official_state_dict()
    assert not [name for name in weights if "head" in name]
    other = SiT.from_official(weights, config=model.config, training_parts=True)
    assert torch.equal(other(images), model(images))


@torch.inference_mode()
@pytest.mark.parametrize("stem", ["4c", "6c"])
@pytest.mark.parametrize("channels", [1, 4])
def test_folding(stem: str, channels: int) -> None:
    """A copy, in which only rounding differs; the model stays as it was."""
    config = replace(SMALL, stem=stem, in_channels=channels, residual_scale=3.0)
    model, images = random_sit(config, training_parts=True), torch.randn(2, channels, 96, 96)
    before = model(images)
    folded = model.fold_for_inference()
    exact = model.double().set_fused(False)(images.double())
    bound = 2 * (before - exact).abs().max() + 2e-6 * exact.abs().max()
    assert (folded(images) - exact).abs().max() <= bound
    assert torch.equal(folded.fold_for_inference()(images), folded(images))
    assert torch.equal(model.float().set_fused(True)(images), before)
    assert folded.training_parts is None and folded.slims[0].fc2.bias is None


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_modules(dtype: torch.dtype) -> None:
    model, images = random_sit(SMALL), torch.randn(2, 3, 96, 96)
    want = model(images)
    bound = 16 * torch.finfo(dtype).eps * want.abs().max()
    for one in (model.fold_for_inference(), model):
        got = one.to(dtype)(images.to(dtype), return_assignment=True)
        assert got.logits.dtype == dtype
        assert all(x.dtype == torch.float32 for x in got.assignments)
        assert (got.logits - want).abs().max() <= bound


def test_autocast_forward_and_backward() -> None:
    model, images = random_sit(SMALL), torch.randn(2, 3, 96, 96)
    want = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images)
    assert (got - want).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * want.abs().max()
    got.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.inference_mode()
def test_plain_and_fused_slimming_agree() -> None:
    torch.manual_seed(0)
    slim, x = SlimTokens(32, 6), torch.randn(2, 50, 32)
    want = slim(x)
    slim.fused = False
    torch.testing.assert_close(slim(x), want)
    assert slim.double()(x.double()).dtype == torch.float64


def test_compiled_in_one_graph() -> None:
    """Forward and gradient, without a break; and with everything that can be asked for."""
    model, images = random_sit(SHALLOW), torch.randn(2, 3, 64, 64)
    want = model(images, return_assignment=True, return_tokens=True)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(
        images, return_assignment=True, return_tokens=True
    )
    torch.testing.assert_close(got, want)
    got.logits.sum().backward()
    assert model.pos_embed.grad is not None


@torch.no_grad()
def test_compiled_by_the_default_backend() -> None:
    folded, images = random_sit(SHALLOW).fold_for_inference(), torch.randn(2, 3, 64, 64)
    got = torch.compile(folded, fullgraph=True)(images)
    torch.testing.assert_close(got, folded(images), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_exported_for_any_batch(folded: bool) -> None:
    model = random_sit(SHALLOW)
    model = model.fold_for_inference() if folded else model
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=batch)
    for images in (torch.randn(1, 3, 64, 64), torch.randn(5, 3, 64, 64)):
        torch.testing.assert_close(program.module()(images), model(images))


@torch.inference_mode()
def test_onnx_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = random_sit(SHALLOW)
    export_onnx(model, tmp_path / "sit.onnx")
    graph = onnx.load(tmp_path / "sit.onnx").graph
    assert {node.domain for node in graph.node} == {""}, "an operator that ONNX does not know"
    session = runtime.InferenceSession(tmp_path / "sit.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 64)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(got, model(images).numpy(), atol=1e-5)


BAD_CONFIGS = [
    ({"stages": (2, 2)}, ValueError, "stages: allowed a sum of depth=3"),
    ({"stages": (3,)}, ValueError, "stages: allowed two or more.* or dense=True"),
    ({"stages": 3}, TypeError, "stages: allowed a tuple of ints, got 3"),
    ({"stages": (3, 0)}, ValueError, "stages: allowed at least 1, got 0"),
    ({"num_heads": 3}, ValueError, "num_heads: allowed a divisor of embed_dim=16, got 3"),
    ({"embed_dim": 20}, ValueError, "embed_dim: allowed a multiple of 8, got 20"),
    ({"embed_dim": "16"}, TypeError, "embed_dim: allowed an int, got '16'"),
    ({"stem": "5c"}, ValueError, "stem: allowed 4c or 6c, got '5c'"),
    ({"keep": 0.0}, ValueError, "keep: allowed above 0 up to 1, got 0.0"),
    ({"keep": (8,)}, ValueError, r"keep: allowed one number per slimming, 2, got \(8,\)"),
    ({"keep": 0.1}, ValueError, "keep: allowed what leaves at least one token of 16"),
    ({"mlp_ratio": 0}, ValueError, "mlp_ratio: allowed above 0, got 0"),
    ({"residual_scale": "2"}, TypeError, "residual_scale: allowed a number, got '2'"),
    ({"image_size": 15}, ValueError, "image_size: allowed at least 16, got 15"),
    ({"image_size": (64, 64, 3)}, ValueError, "image_size: allowed one size or"),
    ({"num_classes": -1}, ValueError, "num_classes: allowed at least 0, got -1"),
    ({"in_channels": 0}, ValueError, "in_channels: allowed at least 1, got 0"),
    ({"drop_path": 1.0}, ValueError, "drop_path: allowed from 0 to below 1, got 1.0"),
    ({"dense": None}, TypeError, "dense: allowed True or False, got None"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD_CONFIGS, ids=lambda x: str(x)[:30])
def test_bad_configs(change: dict[str, object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"^SiTConfig: {words}"):
        replace(TINY, **change)


def test_bad_calls() -> None:
    model = random_sit()
    with pytest.raises(ValueError, match=r"SiT: images: allowed \(batch, 3, height, width\), got"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"SiT: images: allowed \(batch, 3, height, width\), got"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="SiT: images: allowed a height and width of 16 pixels"):
        model(torch.zeros(1, 3, 64, 15))
    with pytest.raises(TypeError, match=r"SiT: images: allowed a floating tensor, got torch.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(TypeError, match="SiT: images: allowed a floating tensor, got ndarray"):
        model(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(TypeError, match="SiT: config: allowed a SiTConfig, got 'sit_tiny'"):
        SiT("sit_tiny")
    with pytest.raises(
        ValueError, match=r"SiTConfig.variant: name: allowed sit_tiny, .*'sit_huge'"
    ):
        SiTConfig.variant("sit_huge")
