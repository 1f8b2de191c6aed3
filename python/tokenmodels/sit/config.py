"""What distinguishes one SiT from another, and what each costs in multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

PATCH = 16  # the stride of the whole stem


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """The shape of a SiT.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3 and the released
    models.

    Attributes:
        dim: channels C of a token.
        depth: transformer blocks; `stages` sums up to it.
        heads: attention heads; they divide `dim`.
        stages: blocks per stage. Patch tokens are slimmed after the last block of every stage but
            the last.
        slim: False gives the dense teacher: the same network without slimming.
        mlp_ratio: hidden channels of a block's MLP, as a multiple of `dim`.
        residual_scale: every residual branch is divided by it.
        keep: patch tokens that a slimming keeps, as a fraction; token counts are truncated.
        image_size: height and width in pixels.
        classes: outputs of the head.

    Example:
        >>> SiTConfig(dim=384, depth=16, heads=6, stages=(9, 3, 2, 2)).slim_after
        {8: 98, 11: 49, 13: 24}
    """

    dim: int
    depth: int
    heads: int
    stages: tuple[int, ...]
    slim: bool = True
    mlp_ratio: float = 3.0
    residual_scale: float = 2.0
    keep: float = 0.5
    image_size: int = 224
    classes: int = 1000

    def __post_init__(self) -> None:
        if sum(self.stages) != self.depth:
            raise ValueError(
                f"SiTConfig: stages: allowed a sum of depth={self.depth}, got {self.stages}"
            )
        if self.dim % self.heads:
            raise ValueError(
                f"SiTConfig: heads: allowed a divisor of dim={self.dim}, got {self.heads}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image; the convolutions round up."""
        return -(-self.image_size // PATCH)

    @property
    def slim_after(self) -> dict[int, int]:
        """Block index → patch tokens that are left behind it; empty for the dense teacher."""
        if not self.slim:
            return {}
        ends = list(accumulate(self.stages))[:-1]
        return {end - 1: int(self.grid**2 * self.keep ** (i + 1)) for i, end in enumerate(ends)}

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels behind each of the stem's 3x3 convolutions of stride 2."""
        return self.dim // 8, self.dim // 4, self.dim // 2, self.dim

    def macs(self) -> int:
        """Multiply-accumulates of one image: convolutions and matrix products, as papers count."""
        total, side, before = 0, self.image_size, 3
        for channels in self.stem_channels:
            side = -(-side // 2)
            total += side * side * channels * before * 9
            before = channels
        patches, dim, hidden = self.grid**2, self.dim, int(self.dim * self.mlp_ratio)
        for block in range(self.depth):
            tokens = patches + 1
            total += tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens * tokens * dim
            if block in self.slim_after:
                kept, keys = self.slim_after[block], dim // 2
                total += patches * (dim * keys + keys * kept + kept * dim)
                patches = kept
        return total + dim * self.classes


VARIANTS = {
    "sit_tiny": SiTConfig(dim=320, depth=14, heads=5, stages=(1, 1, 1, 11)),
    "sit_xsmall": SiTConfig(dim=384, depth=16, heads=6, stages=(1, 1, 1, 13)),
    "sit_small": SiTConfig(dim=384, depth=16, heads=6, stages=(9, 3, 2, 2)),
}
