"""What distinguishes one SiT from another, and what each costs in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType

from tokenmodels._refuse import refusal, require_number, require_whole

PATCH = 16
"""The stride of the whole stem, in pixels."""

STEMS = {
    "4c": ((8, 2), (4, 2), (2, 2), (1, 2)),
    "6c": ((8, 2), (8, 1), (8, 1), (4, 2), (2, 2), (1, 2)),
}
"""Per stem its 3x3 convolutions: what `embed_dim` is divided by for channels, and the stride."""


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """The shape of a SiT, or of its dense teacher.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3 and the released
    models.

    Attributes:
        embed_dim: channels C of a token, a multiple of 8.
        depth: transformer blocks.
        num_heads: attention heads; they divide `embed_dim`.
        stages: blocks per stage, together `depth`. Patch tokens are slimmed after the last block of
            every stage but the last. A dense network may leave it out.
        dense: True gives the teacher: the same network without slimming.
        image_size: height and width in pixels, or one number for both, for which the position
            embedding and the slots are made. The model takes images of other sizes too.
        keep: the patch tokens that slimmings keep: a fraction of what was there before, counted
            from the patches of `image_size` and truncated, or the number left behind each slimming.
        mlp_ratio: hidden channels of a block's MLP, as a multiple of `embed_dim`.
        stem: "4c" or "6c", the convolutions that make patches of 16 x 16 pixels.
        residual_scale: every residual branch is divided by it.
        num_classes: outputs of the head; 0 for no head.
        in_channels: channels of an image.
        drop_path: stochastic depth in training; it rises linearly from 0 to this in the last block.
        dist_token: True adds a token with a position and a head of its own, which learns the labels
            that a second, convolutional teacher gives; predictions are the mean of both heads.

    Raises:
        ValueError: values that do not fit together; the text names the field.
        TypeError: values of another type.

    Example:
        >>> SiTConfig(embed_dim=384, depth=16, num_heads=6, stages=(9, 3, 2, 2)).slim_after
        {8: 98, 11: 49, 13: 24}
    """

    embed_dim: int
    depth: int
    num_heads: int
    stages: tuple[int, ...] = ()
    dense: bool = False
    image_size: int | tuple[int, int] = 224
    keep: float | tuple[int, ...] = 0.5
    mlp_ratio: float = 3.0
    stem: str = "4c"
    residual_scale: float = 2.0
    num_classes: int = 1000
    in_channels: int = 3
    drop_path: float = 0.0
    dist_token: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "stages", "keep"):  # as JSON gives them
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("dense", "dist_token"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(refusal("SiTConfig", name, "True or False", repr(value)))
        for name, least in (("embed_dim", 8), ("depth", 1), ("num_heads", 1)):
            require_whole("SiTConfig", name, getattr(self, name), least)
        require_whole("SiTConfig", "num_classes", self.num_classes, 0)
        require_whole("SiTConfig", "in_channels", self.in_channels)
        self._check_numbers()
        self._check_image_size()
        self._check_stages()
        self._check_keep()

    def _check_numbers(self) -> None:
        if self.embed_dim % 8:
            raise ValueError(refusal("SiTConfig", "embed_dim", "a multiple of 8", self.embed_dim))
        if self.embed_dim % self.num_heads:
            allowed = f"a divisor of embed_dim={self.embed_dim}"
            raise ValueError(refusal("SiTConfig", "num_heads", allowed, self.num_heads))
        if self.stem not in STEMS:
            raise ValueError(refusal("SiTConfig", "stem", " or ".join(STEMS), repr(self.stem)))
        for name in ("mlp_ratio", "residual_scale"):
            require_number("SiTConfig", name, getattr(self, name), lambda x: x > 0, "above 0")
        require_number(
            "SiTConfig", "drop_path", self.drop_path, lambda x: 0 <= x < 1, "from 0 to below 1"
        )

    def _check_image_size(self) -> None:
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sizes) != 2:
            raise ValueError(
                refusal("SiTConfig", "image_size", "one size or (height, width)", sizes)
            )
        for size in sizes:
            require_whole("SiTConfig", "image_size", size, PATCH)

    def _check_stages(self) -> None:
        if not isinstance(self.stages, tuple):
            raise TypeError(refusal("SiTConfig", "stages", "a tuple of ints", repr(self.stages)))
        if self.dense and not self.stages:
            object.__setattr__(self, "stages", (self.depth,))
        for blocks in self.stages:
            require_whole("SiTConfig", "stages", blocks)
        if sum(self.stages) != self.depth:
            allowed = f"a sum of depth={self.depth}"
            raise ValueError(refusal("SiTConfig", "stages", allowed, self.stages))
        if not self.dense and len(self.stages) < 2:
            allowed = "two or more, so that something is slimmed, or dense=True"
            raise ValueError(refusal("SiTConfig", "stages", allowed, self.stages))

    def _check_keep(self) -> None:
        if not isinstance(self.keep, tuple):
            require_number("SiTConfig", "keep", self.keep, lambda x: 0 < x <= 1, "above 0 up to 1")
        for slots in self.keep if isinstance(self.keep, tuple) else ():
            require_whole("SiTConfig", "keep", slots)
        if self.dense:
            return
        if isinstance(self.keep, tuple) and len(self.keep) != len(self.stages) - 1:
            allowed = f"one number per slimming, {len(self.stages) - 1}"
            raise ValueError(refusal("SiTConfig", "keep", allowed, self.keep))
        if min(self.slim_after.values()) < 1:
            allowed = f"what leaves at least one token of {self.patches}"
            raise ValueError(refusal("SiTConfig", "keep", allowed, self.keep))

    @classmethod
    def variant(
        cls,
        name: str,
        *,
        dense: bool = False,
        image_size: int | tuple[int, int] | None = None,
        num_classes: int = 1000,
    ) -> SiTConfig:
        """One of the released networks.

        Args:
            name: "sit_tiny", "sit_xsmall", "sit_small", "sit_medium" or "sit_large".
            dense: its teacher instead, which slims nothing.
            image_size: as released if not given. The numbers of slots follow it, so the released
                weights fit only the released size; for other images of theirs see `SiT.resized`.
            num_classes: outputs of the head.

        Raises:
            ValueError: no such variant.

        Example:
            >>> SiTConfig.variant("sit_small").macs(), SiTConfig.variant("sit_tiny").stages
            (4015757952, (1, 1, 1, 11))
        """
        if name not in VARIANTS:
            raise ValueError(refusal("SiTConfig.variant", "name", ", ".join(VARIANTS), repr(name)))
        config = replace(VARIANTS[name], dense=dense, num_classes=num_classes)
        return config if image_size is None else replace(config, image_size=image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across an image of `image_size`; the convolutions round up."""
        return grid_of(self.image_size)

    @property
    def patches(self) -> int:
        """Patch tokens before any slimming."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches, which nothing slims: class and distillation token."""
        return 1 + self.dist_token

    @property
    def slim_after(self) -> dict[int, int]:
        """Block index → patch tokens that are left behind it; empty for the dense teacher."""
        return {} if self.dense else slots_after(self.stages, self.keep, self.patches)

    @property
    def tokens_after(self) -> tuple[int, ...]:
        """Patch tokens that each block leaves, behind the slimming where one follows it."""
        return tokens_after(self.slim_after, self.depth, self.patches)

    @property
    def stem_layers(self) -> tuple[tuple[int, int], ...]:
        """(channels, stride) of each of the stem's 3x3 convolutions."""
        return tuple((self.embed_dim // part, stride) for part, stride in STEMS[self.stem])

    def macs(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one image: convolutions and matrix products, as papers count.

        Args:
            image_size: of the image, where it is not the one that the config is made for.
        """
        size = self.image_size if image_size is None else image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        total, before = 0, self.in_channels
        for channels, stride in self.stem_layers:
            height, width = -(-height // stride), -(-width // stride)
            total += height * width * channels * before * 9
            before = channels
        patches, dim, hidden = height * width, self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        for block in range(self.depth):
            tokens = patches + self.prefix
            total += tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens * tokens * dim
            if block in self.slim_after:
                kept, keys = self.slim_after[block], dim // 2
                total += patches * (dim * keys + keys * kept + kept * dim)
                patches = kept
        return total + self.prefix * dim * self.num_classes


def grid_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Patches down and across an image, of whose last ones a part may lie outside."""
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    return -(-height // PATCH), -(-width // PATCH)


def slots_after(stages: Sequence[int], keep: float | Sequence[int], patches: int) -> dict[int, int]:
    """Block index → patch tokens that are left behind it, for `keep` as in `SiTConfig`."""
    ends = [end - 1 for end in accumulate(stages)][:-1]
    if isinstance(keep, float | int):
        return {end: int(patches * keep ** (i + 1)) for i, end in enumerate(ends)}
    return dict(zip(ends, keep, strict=True))


def tokens_after(slots: Mapping[int, int], depth: int, patches: int) -> tuple[int, ...]:
    """Patch tokens that each block leaves, behind the slimming where one follows it."""
    left, counts = patches, []
    for block in range(depth):
        left = slots.get(block, left)
        counts.append(left)
    return tuple(counts)


VARIANTS: Mapping[str, SiTConfig] = MappingProxyType(
    {
        "sit_tiny": SiTConfig(embed_dim=320, depth=14, num_heads=5, stages=(1, 1, 1, 11)),
        "sit_xsmall": SiTConfig(embed_dim=384, depth=16, num_heads=6, stages=(1, 1, 1, 13)),
        "sit_small": SiTConfig(embed_dim=384, depth=16, num_heads=6, stages=(9, 3, 2, 2)),
        "sit_medium": SiTConfig(embed_dim=512, depth=20, num_heads=8, stages=(10, 4, 3, 3)),
        "sit_large": SiTConfig(
            embed_dim=768,
            depth=24,
            num_heads=12,
            stages=(10, 4, 3, 7),
            stem="6c",
            residual_scale=3.0,
            image_size=288,
        ),
    }
)
"""The released networks, slimmed; `SiTConfig.variant` also gives their teachers."""
