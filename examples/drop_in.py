"""An ordinary vision transformer made faster by two lines: patch tokens leave on the way.

Usage: python examples/drop_in.py [output.png]

The class token's attention says which patches matter (as in EViT); the others are dropped. The
network below is plain PyTorch on flash attention, which hands out no attention weights: that is
what `tk.score_attention` is for. Its weights are random, so the picture shows the mechanism, not
what a trained network looks at.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import tokenkernels as tk

PATCH, SIZE, PRUNE_AFTER = 16, 224, (3, 6)
"""Pixels of a patch, pixels of the image, the blocks whose attention chooses."""


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens out, and the queries and keys that they were mixed with: (B, heads, N, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), q, k


class ViT(nn.Module):
    """ViT-S/16; `keep` is the fraction of patch tokens that survives a pruning, 1 prunes none."""

    def __init__(
        self, *, keep: float = 1.0, dim: int = 384, depth: int = 12, heads: int = 6
    ) -> None:
        super().__init__()
        self.keep = keep
        self.patch = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (SIZE // PATCH) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and for every image the patches that were there at the end."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.positions
        where = torch.arange(-1, x.shape[1] - 1).expand(len(x), -1)  # the class token is patch −1
        for i, block in enumerate(self.blocks):
            x, q, k = block(x)
            if i in PRUNE_AFTER and self.keep < 1:
                budget = round((x.shape[1] - 1) * self.keep)
                scores = tk.score_attention(q[:, :, :1], k, columns=(1, k.shape[2]))
                (x, where), *_ = tk.gather_topk((x, where), scores, budget, prefix=1)
        return self.head(self.norm(x[:, 0])), where[:, 1:]


def photograph() -> Tensor:
    """scikit-learn's photograph of a flower, the middle of it: (1, 3, SIZE, SIZE), 0 … 1."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    height, width = pixels.shape[2:]
    left = (width - height) // 2
    square = pixels[..., left : left + height]
    return F.interpolate(square, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def milliseconds(models: dict[str, ViT], images: Tensor) -> dict[str, float]:
    """Median latency of each model; they take turns, so that both meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(8):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def picture(image: Tensor, kept: Tensor, path: Path) -> None:
    """Writes the photograph, and beside it the same with the dropped patches darkened."""
    side = SIZE // PATCH
    mask = torch.full((side * side,), 0.15).index_fill(0, kept, 1.0).reshape(1, 1, side, side)
    dimmed = image * F.interpolate(mask, scale_factor=PATCH)[0]
    pixels = torch.cat((image, dimmed), dim=2).permute(1, 2, 0).numpy()
    Image.fromarray(np.uint8(pixels * 255)).save(path)


@torch.inference_mode()
def main(path: Path) -> None:
    """Times the network as it is and with the two lines, and shows which patches stayed."""
    models = {}
    for name, keep in (("before", 1.0), ("after", 0.5)):
        torch.manual_seed(0)
        models[name] = ViT(keep=keep).eval()
    image = photograph()
    images = image.repeat(4, 1, 1, 1) * 4 - 2
    latency = milliseconds(models, images)
    for name, model in models.items():
        kept = model(images)[1][0]
        print(f"{name:>6}: {latency[name]:6.1f} ms for {len(images)} images, {len(kept)} patches")
    picture(image[0], kept, path)
    print(f"{latency['before'] / latency['after']:.2f} x faster; the kept patches are in {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "kept_patches.png"))
