"""merge_adjacent gives what MustDrop's own code gave: uniform counts, order of similarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenkernels as tk

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "mustdrop" / "stage1_merge.npz"
if not GOLDEN.exists():
    pytest.skip("no golden tensors here", allow_module_level=True)
STORED = np.load(GOLDEN)
CASES = sorted({name.partition("__")[0] for name in STORED})


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("case", CASES)
def test_mustdrop_stage_one(case: str, backend: str | None) -> None:
    golden = {
        name.partition("__")[2]: torch.from_numpy(STORED[name])
        for name in STORED
        if name.startswith(case)
    }
    x, w, r = golden["x"], int(golden["window"]), int(golden["r"])
    side = round((x.shape[1] - 1) ** 0.5)
    merged = tk.merge_adjacent(
        x,
        (side, side),
        (w, w),
        threshold=0.8,
        prefix=1,
        order="similarity",
        batch="uniform",
        backend=backend,
    )
    assert torch.allclose(merged.tokens, golden["y"], rtol=0, atol=1e-5)
    assert torch.equal(merged.size, golden["size"][:, :, 0])
    patches = merged.index[:, 1:] - 1
    assert torch.equal(
        patches.gather(1, golden["dst_idx"].long()), torch.arange(r).expand(len(x), r)
    )
    sources = golden["src_idx"].long()
    assert (patches.gather(1, sources) < r).all()
    rest = golden["unm_idx"].long()
    assert torch.equal(
        patches.gather(1, rest), torch.arange(r, r + rest.shape[1]).expand(len(x), -1)
    )
