"""compact_kv beyond the registry: far offsets, results larger than the cache, few rows, refusals
that leave the cache alone, and what fill promises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenkernels as tk
from tokenkernels._op import OPS

pytestmark = pytest.mark.usefixtures("native")


def _kept(tokens: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_two_to_the_31_elements(inplace: bool) -> None:
    """Memory that is never touched costs nothing: only a few rows are written and read."""
    tokens, channels = 2**25 + 9, 64
    cache = torch.empty(1, 1, tokens, channels, dtype=torch.uint8)
    index = torch.tensor([5, 2**24 + 1, tokens - 2, tokens - 1])
    for value, position in enumerate(index.tolist()):
        cache[0, 0, position] = value + 1
    kept = tk.compact_kv([(cache,)], index, inplace=inplace)
    assert kept.layers[0][0].flatten(0, 2).tolist() == [[v] * channels for v in (1, 2, 3, 4)]


@pytest.mark.parametrize("channels", [128, 120, 35])
@pytest.mark.parametrize("order", ["stable", "fill"])
def test_results_larger_than_the_cache(channels: int, order: str) -> None:
    cache = torch.randint(0, 255, (2, 3, 30_000, channels * 2), dtype=torch.uint8)
    index = _kept(30_000, 20_000)
    want = tk.compact_kv([(cache, cache)], index, order=order, backend="reference").layers[0][0]
    got = tk.compact_kv([(cache, cache)], index, order=order).layers[0]
    assert torch.equal(got[0], want) and torch.equal(got[1], want)
    within = tk.compact_kv([(cache, cache.clone())], index, order=order, inplace=True).layers[0]
    assert torch.equal(within[0], want) and torch.equal(within[1], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_moved_by_several_threads(dtype: torch.dtype) -> None:
    """In place and in order, one tensor of one head is cut into columns."""
    cache, index = torch.randn(1, 1, 900, 257).to(dtype), _kept(900, 700)
    want = cache[:, :, index]
    assert torch.equal(tk.compact_kv([(cache,)], index, inplace=True).layers[0][0], want)


BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*BYTES, torch.float64], ids=str)
def test_any_dtype_moves_as_bytes(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2, (2, 2, 50, 24 * size), dtype=torch.uint8)
    index = _kept(50, 20)
    got = tk.compact_kv([(raw.view(dtype),)], index).layers[0][0]
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), raw[:, :, index])


def _refused(kwargs: dict[str, Any]) -> None:
    before = [[t.clone() for t in layer] for layer in kwargs["layers"]]
    with pytest.raises(ValueError, match=r"compact_kv_?: "):
        tk.compact_kv(**kwargs, inplace=True)
    for layer, old in zip(kwargs["layers"], before, strict=True):
        assert all(torch.equal(t, o) for t, o in zip(layer, old, strict=True))


@pytest.mark.parametrize("order", ["stable", "fill"])
def test_a_refused_call_changes_nothing(order: str) -> None:
    """The fault is in the last layer, the last head, the last entry: all is read before a move."""
    layers = [(torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)) for _ in range(3)]
    good = _kept(39, 20).expand(2, 3, -1).clone()
    for fault in (40, 2**33, -2, int(good[-1, -1, -2]), 0):
        bad = good.clone()
        bad[-1, -1, -1] = fault
        _refused({"layers": layers, "index": [good, good, bad], "order": order})
    lengths = torch.full((2, 3), 40)
    lengths[-1, -1] = int(good[-1, -1, -1])
    _refused({"layers": layers, "index": good, "lengths": lengths, "order": order})
    far = torch.full((20,), 2**31)
    rope = (torch.ones(4), [good, good, good], [good, good, far])
    _refused({"layers": layers, "index": good, "rope": rope, "order": order})


def test_fill_moves_only_what_lies_beyond() -> None:
    cache, index = torch.randn(1, 1, 2304, 16), _kept(2304, 2048)
    before = cache.clone()
    kept = tk.compact_kv([(cache,)], index, inplace=True, order="fill")
    slots = torch.arange(2048)
    stays = torch.isin(slots, index)
    assert torch.equal(kept.positions[stays], slots[stays])
    assert torch.equal(kept.positions.sort().values, index)
    moved = kept.positions[~stays]
    assert (moved >= 2048).all() and torch.equal(moved, moved.sort().values)
    assert torch.equal(kept.layers[0][0], before[:, :, kept.positions])
    assert torch.equal(cache[:, :, 2048:], before[:, :, 2048:])


def test_one_compaction_after_another() -> None:
    """The lengths of the first are what the second may keep of."""
    layers = [(torch.randn(2, 2, 30, 4),), (torch.randn(2, 2, 20, 4),)]
    first = [_kept(30, 12), torch.tensor([[3, 9, -1, -1], [0, 5, 6, 19]])]
    once = tk.compact_kv(layers, first)
    second = [torch.tensor([0, 11]), torch.tensor([[1, -1], [0, 3]])]
    twice = tk.compact_kv(once.layers, second, lengths=once.lengths)
    assert torch.equal(twice.layers[0][0], layers[0][0][:, :, first[0][[0, 11]]])
    assert torch.equal(twice.layers[1][0][1], layers[1][0][1][:, [0, 19]])
    second[1][0] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="index: allowed ascending positions below the length"):
        tk.compact_kv(once.layers, second, lengths=once.lengths)


def test_turned_keys_are_those_of_the_new_position() -> None:
    """Keys rotated to where they were, then re-rotated, are keys rotated to where they go."""
    raw, inv_freq = torch.randn(1, 2, 64, 32), 10_000.0 ** -(torch.arange(16) / 16)

    def rotated(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[:, None] * inv_freq
        cosine, sine = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        turned = torch.cat((-keys[..., 16:], keys[..., :16]), -1)
        return keys * cosine + turned * sine

    index, new = _kept(64, 20), torch.arange(20)
    layers = [(rotated(raw, torch.arange(64)), raw)]
    kept = tk.compact_kv(layers, index, rope=(inv_freq, index, new))
    torch.testing.assert_close(kept.layers[0][0], rotated(raw[:, :, index], new))
    assert torch.equal(kept.layers[0][1], raw[:, :, index])


def test_in_place_the_versions_of_all_tensors_go_up() -> None:
    """What a graph saved of the cache is known to have changed."""
    layers = [(torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)) for _ in range(2)]
    tensors = [tensor for layer in layers for tensor in layer]
    before = [tensor._version for tensor in tensors]
    tk.compact_kv(layers, _kept(12, 5))
    assert [tensor._version for tensor in tensors] == before
    tk.compact_kv(layers, _kept(12, 5), inplace=True)
    assert all(t._version > old for t, old in zip(tensors, before, strict=True))
    factor = torch.ones((), requires_grad=True)
    product = (factor * tensors[0]).sum()
    tk.compact_kv(layers, _kept(12, 5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_in_place_a_leaf_that_requires_grad_is_refused() -> None:
    cache, leaf = torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match=r"layers .in place.: allowed no leaf that requires grad"):
        tk.compact_kv([(cache, leaf)], _kept(12, 5), inplace=True)
    assert torch.equal(leaf, before)
    assert not tk.compact_kv([(cache, leaf)], _kept(12, 5)).layers[0][1].requires_grad
    with torch.no_grad():
        tk.compact_kv([(cache, leaf)], _kept(12, 5), inplace=True)
    assert torch.equal(leaf[:, :, :5], before[:, :, _kept(12, 5)])


def _triton() -> None:
    if reason := OPS["compact_kv"].why_not("triton", "cpu"):
        pytest.skip(reason)


@pytest.mark.parametrize("order", ["stable", "fill"])
@pytest.mark.parametrize("inplace", [False, True])
def test_triton_walks_many_tiles(inplace: bool, order: str) -> None:
    """The second tensor has rows of 4 bytes; the keys are turned."""
    _triton()
    few = torch.cat((_kept(900, 150), torch.full((550,), -1)))
    index = torch.stack([_kept(900, 700), few])[None]
    rope = (torch.rand(8), index, torch.arange(700))
    layer = (torch.randn(1, 2, 900, 16), torch.randint(9, (1, 2, 900, 1)).int())
    results = []
    for backend in ("reference", "triton"):
        cache = tuple(t.clone() for t in layer)
        kept = tk.compact_kv(
            [cache], index, order=order, inplace=inplace, rope=rope, backend=backend
        )
        results.append([*cache, *kept.layers[0], kept.lengths, kept.positions])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", ["stable", "fill"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fault", [24, 0, -7, 2**32 + 3, -(2**40)])
def test_triton_skips_a_bad_entry(inplace: bool, order: str, fault: int) -> None:
    """A GPU refuses no values: other heads are right, and memory around the cache is untouched."""
    _triton()
    around = torch.randn(4, 30, 16)
    before, cache = around.clone(), around[1:3].unsqueeze(0)
    good = _kept(24, 12)
    index = good.repeat(1, 2, 1)
    index[0, 1, 5] = fault
    want = tk.compact_kv([(cache,)], good, order=order, backend="reference").layers[0][0]
    got = tk.compact_kv(
        [(cache,)], index, lengths=torch.tensor(24), order=order, inplace=inplace, backend="triton"
    )
    assert torch.equal(got.layers[0][0][0, 0], want[0, 0])
    assert torch.equal(around[[0, 3]], before[[0, 3]])


def test_triton_leaves_the_bits_of_keys_that_stay() -> None:
    """NaN among them, whatever its payload."""
    _triton()
    bits = torch.randint(-(2**15), 2**15, (1, 1, 20, 8)).to(torch.int16)
    index = _kept(20, 9)
    rope = (torch.ones(4), index, index)
    kept = tk.compact_kv([(bits.view(torch.bfloat16),)], index, rope=rope, backend="triton")
    assert torch.equal(kept.layers[0][0].view(torch.int16), bits[:, :, index])
