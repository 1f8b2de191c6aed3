"""compact_kv against golden tensors of MustDrop's official code: the cache behind four prunes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenkernels as tk


@pytest.mark.parametrize("backend", [None, "reference"])
def test_cache_after_four_prunes(golden: Path, backend: str | None) -> None:
    """Every layer pruned step by step, as in prefill, is that compacted by the composed index."""
    step = np.load(golden / "mustdrop" / "stage3_cache.npz")
    before, stages = step["len_before"], step["layer_stage"].tolist()
    layers = [(torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)) for n in before.tolist()]
    composed = [torch.from_numpy(step[f"cache_idx_stage{s}"]) for s in range(4)]
    index = [torch.arange(n) if s < 0 else composed[s] for n, s in zip(before, stages, strict=True)]
    kept = tk.compact_kv(layers, index, backend=backend)
    assert [layer[0].shape[2] for layer in kept.layers] == step["len_after"].tolist()
    for layer, stage, moved in zip(layers, stages, kept.layers, strict=True):
        want = list(layer)
        for prune in range(stage, 4) if stage >= 0 else ():
            rows = torch.from_numpy(step[f"prune{prune}_merged"])
            want = [tensor[:, :, rows] for tensor in want]
        assert all(torch.equal(m, w) for m, w in zip(moved, want, strict=True))


@pytest.mark.parametrize("order", ["stable", "fill"])
def test_cache_lengths_of_the_whole_model(golden: Path, order: str) -> None:
    """The official model's own cache of layer 0, kept in full there, under the index of layer 2."""
    model = np.load(golden / "mustdrop" / "e2e_tiny.npz")
    layer = tuple(torch.from_numpy(model[f"cache{part}_0"]) for part in "KV")
    index = torch.from_numpy(model["stage3_0_cache_idx"])
    kept = tk.compact_kv([layer], index, order=order)
    assert kept.layers[0][0].shape == model["cacheK_2"].shape
    assert kept.lengths.item() == model["cache_len"][2]
    for got, whole in zip(kept.layers[0], layer, strict=True):
        assert torch.equal(got, whole[:, :, kept.positions])
    assert torch.equal(kept.positions.sort().values, index)
