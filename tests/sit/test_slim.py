"""Slimmed vision transformers against their blocks run by hand, and back."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_hosts import (
    DIM,
    HOSTS,
    SHAPE,
    SLOTS,
    by_hand,
    clip_with_text,
    hugging,
    images_of,
    lively,
    result,
    slimmed,
    slots_by_formula,
    vit,
)
from tokenmodels.sit import record_tokens, slim, unpool
from torch import Tensor


@pytest.mark.parametrize("name", HOSTS)
def test_values_and_removal(native: None, name: str) -> None:
    model = lively(HOSTS[name][0]())
    keys, want = list(model.state_dict()), result(model, images_of())
    before = copy.deepcopy(model)
    slimming = slim(model, **SHAPE)
    assert slimming.slots == SLOTS and slimming.tokens_after == (8, 8, 4, 4)
    lively(slimming)
    expected = by_hand(before, slimming, HOSTS[name][1])
    for fused in (True, False):
        slimming.set_fused(fused)
        got = result(model, images_of())
        torch.testing.assert_close(got, result(expected, images_of()), atol=2e-5, rtol=1e-5)
    assert (got.shape != want.shape) or (got - want).abs().max() > 1e-3
    slimming.remove()
    slimming.remove()
    assert list(model.state_dict()) == keys and not hasattr(model, "slimming")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not any(part._forward_hooks_with_kwargs for part in model.modules())
    assert torch.equal(result(model, images_of()), want)
    with slim(model, **SHAPE):  # once more
        assert any("slimming" in key for key in model.state_dict())
    assert torch.equal(result(model, images_of()), want)


@torch.no_grad()
def test_clip_with_text(native: None) -> None:
    """Whose words may be masked: the mask is not that of the patches."""
    model = lively(clip_with_text())
    words = {"input_ids": torch.arange(8).view(2, 4), "pixel_values": images_of()}
    words["attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    want, before = model(**words), copy.deepcopy(model.vision_model)
    slimming = slim(model, **SHAPE)
    expected = by_hand(before, lively(slimming), 1)
    got = model(**words)
    images = model.visual_projection(expected(images_of()).pooler_output)
    torch.testing.assert_close(got.image_embeds, torch.nn.functional.normalize(images, dim=-1))
    assert torch.equal(got.text_embeds, want.text_embeds)


def test_blocks_one_by_one() -> None:
    """Of timm, with nothing of the model's own forward between the blocks."""
    model, slimming, _ = slimmed("registers")
    slimming.set_fused(False)
    got = model(images_of())
    slimming.remove()
    x = model._pos_embed(model.patch_embed(images_of()))
    for index, block in enumerate(model.blocks):
        x = block(x)
        if index in SLOTS:
            weights = slimming.slims[list(SLOTS).index(index)]
            x = torch.cat((x[:, :5], slots_by_formula(weights, x[:, 5:])), dim=1)
    torch.testing.assert_close(got, model.head(model.norm(x)[:, 0]), atol=1e-5, rtol=1e-5)


def test_deit_small_costs() -> None:
    """Positions of the public comparison: before blocks 3, 6 and 9."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    slimming = slim(model)
    assert slimming.slots == {2: 98, 5: 49, 8: 24} and slimming.image_size == (224, 224)
    assert slimming.tokens_after == (196,) * 2 + (98,) * 3 + (49,) * 3 + (24,) * 4
    assert all(value.is_meta for value in slimming.parameters())

    def block(tokens: int) -> int:
        return 12 * tokens * 384**2 + 2 * tokens**2 * 384

    ends = 196 * 3 * 16 * 16 * 384 + 384 * 1000
    dense = 12 * block(197) + ends
    pairs = ((196, 98), (98, 49), (49, 24))
    want = 3 * (block(197) + block(99) + block(50) + block(25)) + ends
    want += sum(n * 384 * 192 + n * 192 * m + n * m * 384 for n, m in pairs)
    assert (slimming.macs(), slimming.macs(dense=True)) == (want, dense) == (2186602368, 4598882304)
    assert all(one.fused for one in slimming.slims)


def test_where_and_how_many() -> None:
    assert slim(vit()).slots == {0: 8, 1: 4, 2: 2}
    assert slim(vit(), stages=[3, 1], keep=[7]).slots == {2: 7}
    assert slim(vit(), stages=(2, 2), keep=0.3).slots == {1: 4}  # 4.8 of 16
    slimming = slim(vit(dynamic_img_size=True), stages=(2, 2), image_size=[32, 64])
    assert slimming.slots == {1: 16} and slimming.image_size == (32, 64)
    anywhere = {"img_size": None, "pos_embed": "none", "no_embed_class": True}
    with pytest.raises(ValueError, match="slim: image_size: allowed one, because the model is"):
        slim(vit(**anywhere), stages=(2, 2))
    assert slim(vit(**anywhere), stages=(2, 2), image_size=32).slots == {1: 8}
    slimming = slim(vit(dynamic_img_size=True), stages=(2, 2), image_size=64)
    assert slimming.slots == {1: 32} and slimming.patches == 64
    assert slimming.macs(32) < slimming.macs() == slimming.macs((64, 64))
    assert slim(hugging("Dinov2Model", image_size=64), stages=(2, 2), image_size=32).slots == {1: 8}


def test_initial_slots() -> None:
    torch.manual_seed(0)
    for given, std in (({}, 0.02), ({"slot_std": 0.5}, 0.5)):
        slimming = slim(vit(img_size=64), keep=(64, 32, 16), **given)
        one = slimming.slims[0]
        assert one.fc2.weight.std().item() == pytest.approx(std, rel=0.1)
        assert one.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not one.fc2.bias.any() and one.logit_scale == 1
        assert not one.fc2.bias.requires_grad and one.fc2.weight.requires_grad


def test_parts_of_the_model(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = vit().requires_grad_(False).double().train()
    slimming = slim(model, **SHAPE)
    assert next(slimming.parameters()).dtype == torch.float64 and slimming.training
    assert not model.eval().slimming.training
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 6 and all(name.startswith("slimming.slims.") for name in trained)
    model, slimming, _ = slimmed("class token")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = vit().eval()
    slim(other, **SHAPE)
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(images_of()), model(images_of()))
    before = slimming.slims[0].fc2.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images_of()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(slimming.slims[0].fc2.weight, before)


@pytest.mark.parametrize("name", ["class token", "CLIP vision"])
def test_copies(name: str) -> None:
    """A copy runs and loses its own slimmings."""
    model, slimming, _ = slimmed(name)
    want = result(model, images_of())
    other = copy.deepcopy(model)
    assert other.slimming is not slimming
    with torch.no_grad():
        for value in slimming.parameters():
            value.add_(1)
    assert torch.equal(result(other, images_of()), want)
    assert not torch.equal(result(model, images_of()), want)
    other.slimming.remove()
    assert not hasattr(other, "slimming") and hasattr(model, "slimming")
    assert not any(part._forward_hooks for part in other.modules())
    assert not torch.equal(result(other, images_of())[:, :1], want[:, :1])


@pytest.mark.parametrize("name", ["class token", "ViT"])
def test_gradients(name: str) -> None:
    """In float64, with activations recomputed and without."""
    model, slimming, expected = slimmed(name)
    model.double(), expected.double()
    slimming.set_fused(False)
    images = images_of().double()
    result(expected, images).square().sum().backward()
    want = {key: value.grad for key, value in expected.named_parameters()}
    want = {key.replace(".block.", "."): grad for key, grad in want.items()}
    for recompute in (False, True):
        model.zero_grad()
        if recompute and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        elif recompute:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(model.train(), new if hasattr(model, new) else old)({"use_reentrant": False})
        result(model, images).square().sum().backward()
        for key, value in model.named_parameters():
            if not key.startswith("slimming."):
                _same(value.grad, want[key])
        blocks = "blocks" if name == "class token" else _blocks_name(want)
        for index, one in zip(SLOTS, slimming.slims, strict=True):
            for key, value in one.named_parameters():
                if key != "fc2.bias":
                    _same(value.grad, want[f"{blocks}.{index}.weights.{key}"])


def _blocks_name(names: dict[str, Any]) -> str:
    return next(key.partition(".0.weights")[0] for key in names if ".0.weights" in key)


def _same(got: Tensor | None, want: Tensor | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        torch.testing.assert_close(
            got, want, atol=1e-9 * max(1, want.abs().max().item()), rtol=1e-9
        )


def test_gradients_of_the_kernel(native: None) -> None:
    model, slimming, expected = slimmed("class token")
    expected(images_of()).square().sum().backward()
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(images_of()).square().sum().backward()
        for index, one in zip(SLOTS, slimming.slims, strict=True):
            for name in ("fc1.weight", "fc2.weight", "norm.bias", "logit_scale"):
                want = expected.blocks[index].weights.get_parameter(name).grad
                bound = 1e-4 * want.abs().max().item()
                got = one.get_parameter(name).grad
                torch.testing.assert_close(got, want, atol=bound, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["class token", "ViT"])
def test_compiled(native: None, name: str) -> None:
    model, _, _ = slimmed(name)
    want = result(model, images_of())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(compiled, images_of()), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_exported(native: None, fused: bool) -> None:
    model = lively(vit(depth=2))
    lively(slim(model, stages=(1, 1))).set_fused(fused)
    want, batch = model(images_of()), torch.export.Dim("batch")
    program = torch.export.export(model, (images_of(),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images_of()), want, atol=1e-6, rtol=1e-6)
    assert program.module()(images_of()[:1].repeat(3, 1, 1, 1)).shape == (3, 5)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("slim_tokens" in name for name in names) == fused


@torch.no_grad()
@pytest.mark.parametrize("name", ["classifier", "DeiT", "SigLIP", "DINOv2 registers"])
def test_exported_of_transformers(native: None, name: str) -> None:
    """Which hand their blocks a mask while they are exported."""
    model, _, _ = slimmed(name)
    program = torch.export.export(model, (images_of(),))
    got, want = result(program.module(), images_of()), result(model, images_of())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_half_precision(native: None, fused: bool) -> None:
    """Within what bfloat16's eight bits make of five blocks."""
    model, slimming, expected = slimmed("class token")
    with torch.no_grad():
        for value in (*model.parameters(), *expected.parameters()):
            value.mul_(0.3)
    slimming.set_fused(fused)
    want = expected(images_of())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images_of())
    assert got.dtype == torch.bfloat16
    bound = 0.03 * want.abs().max().item()
    torch.testing.assert_close(got.float(), want, atol=bound, rtol=0)
    got = model.bfloat16()(images_of().bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=bound, rtol=0)


@torch.no_grad()
def test_without_a_kernel() -> None:
    """In float64 and without numbers, where the kernels do not run, as the slimmings come."""
    model, slimming, expected = slimmed("class token")
    assert all(one.fused for one in slimming.slims)
    images, want = images_of().double(), expected.double()(images_of().double())
    torch.testing.assert_close(model.double()(images), want, atol=1e-12, rtol=1e-12)
    model.to("meta")
    assert model(images.to("meta")).shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["any size", "ViT", "CLIP vision", "DINOv2"])
def test_other_sizes(native: None, name: str) -> None:
    model, slimming, expected = slimmed(name)
    given = {} if name in ("any size", "DINOv2") else {"interpolate_pos_encoding": True}
    got = result(model, images_of(48), **given)
    want = result(expected, images_of(48), **given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    with slimming.record_assignments() as assignments:
        model(images_of(48), **given)
    assert [tuple(one.shape) for one in assignments] == [(2, 8, 36), (2, 4, 8)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["registers", "DINOv2 registers", "average"])
def test_recorded(native: None, name: str) -> None:
    """What slots took, and the patch tokens behind every block; of the last forward alone."""
    model, slimming, _ = slimmed(name)
    want = result(model, images_of())
    with slimming.record_assignments() as assignments, record_tokens(model) as tokens:
        model(images_of(32).flip(0))
        got = result(model, images_of())
    assert torch.equal(got, want)
    assert [one.shape[1] for one in tokens] == [8, 8, 4, 4]
    assert [tuple(one.shape) for one in assignments] == [(2, 8, 16), (2, 4, 8)]
    assert all(torch.allclose(one.sum(-1), torch.ones(2, 1)) for one in assignments)
    assert unpool(tokens[3], assignments).shape == (2, 16, DIM)
    slimming.remove()
    with record_tokens(model) as dense:
        model(images_of())
    first = assignments[0] @ dense[0]
    torch.testing.assert_close(tokens[0], first, atol=1e-5, rtol=1e-5)
    held = weakref.ref(assignments[0])
    del assignments
    gc.collect()
    assert held() is None and not any(part._forward_hooks for part in model.modules())


@torch.no_grad()
def test_recorded_in_turn(native: None) -> None:
    """What is recorded inside goes by what is outside, and counting costs records nothing."""
    model, slimming, _ = slimmed("class token")
    with slimming.record_assignments() as outer:
        with slimming.record_assignments() as inner:
            model(images_of())
        assert len(inner) == 2 and not outer
        model(images_of()[:1])
        assert slimming.macs() < slimming.macs(dense=True)
    assert [len(one) for one in (*outer, *inner)] == [1, 1, 2, 2]
    assert not any(one.is_meta for one in outer)


@torch.no_grad()
def test_intermediates_of_timm(native: None) -> None:
    """Slots as tokens, also by a copy; as maps again once there are no slimmings."""
    model, slimming, _ = slimmed("registers")
    other = copy.deepcopy(model)
    slimming.remove()
    maps = model.forward_intermediates(images_of(), intermediates_only=True)
    assert [tuple(one.shape) for one in maps] == [(2, DIM, 4, 4)] * 4
    last, slots = other.forward_intermediates(images_of(), [0, 3], output_fmt="NLC")
    assert [tuple(one.shape) for one in slots] == [(2, 8, DIM), (2, 4, DIM)]
    assert torch.equal(last, other.forward_features(images_of()))
    (again,) = other.get_intermediate_layers(images_of(), 1)
    assert torch.equal(again, slots[1])
    assert "forward_intermediates" in vars(other) and "forward_intermediates" not in vars(model)


@torch.no_grad()
def test_folded(native: None) -> None:
    model, slimming, _ = slimmed("class token")
    want = model(images_of())
    assert slimming.fold_for_inference() is slimming
    torch.testing.assert_close(model(images_of()), want, atol=1e-5, rtol=1e-5)
    assert "slimming.slims.0.fc2.bias" not in model.state_dict()
    slimming.remove()
