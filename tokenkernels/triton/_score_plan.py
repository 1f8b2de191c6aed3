"""How score_attention is cut into tiles of rows, blocks of keys, shares, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenkernels.triton._launch import (
    PROGRAMS,
    Config,
    Table,
    blocks,
    capability,
    is_aligned,
)

MOST_POOLED = 63
"""Columns averaged in the launch that scores them."""
MOST_SPLITS = 16
LOWEST_SHARED = 64
"""Rows up to which they are never shared out."""
SHARED = 96 << 10
"""Bytes of shared memory that a program may take on any GPU; sm_90 and sm_100 have more."""
EXACT_DIM = 64
"""From here on three products of 11-bit parts (tf32x3) err less than the bound of a sum in order:
3·2⁻²² + 3·(D/8)·2⁻²³ against D·2⁻²⁴ of Σ|q·k|.
"""


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Seen:
    """What decides which keys a row sees."""

    positions: Tensor | None
    lengths: Tensor | None
    causal: bool

    @property
    def position_steps(self) -> tuple[int, ...]:
        return steps(self.positions, 2)

    @property
    def length_step(self) -> int:
        return steps(self.lengths, 1)[0]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call but for the batch."""

    heads: int
    key_heads: int
    rows: int
    keys: int
    dim: int
    element: int
    capability: int

    @staticmethod
    def of(query: Tensor, key: Tensor) -> Shape:
        (_, heads, rows, dim), arch = query.shape, capability(query.device)
        return Shape(
            heads, key.shape[1], rows, key.shape[2], dim,
            query.element_size(), arch if arch < 120 else 89,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    def tiled(self, table: Table, one_head: bool = False) -> Config:
        """The block shapes of a table, its LINES laid out as HEADS times ROWS."""
        config = table.choose(self.element, self.dim, self.capability)
        sizes = dict(config.blocks)
        lines = sizes.pop("LINES")
        sizes["ROWS"] = min(lines, power(self.rows))
        sizes["HEADS"] = 1 if one_head else min(lines // sizes["ROWS"], power(self.group))
        sizes["ROWS"] = max(sizes["ROWS"], 16 // sizes["HEADS"])
        sizes["DIM"] = min(sizes["DIM"], max(16, power(self.dim)))
        return replace(config, blocks=sizes)

    def staged(self, config: Config, height: int, kept: int, streamed: int, most: int) -> Config:
        """With as many stages as shared memory holds beside the `kept` rows of DIM elements, if a
        stage is `streamed` rows; products of `height` rows from 64 on read it directly on sm_90.
        """
        width = config.blocks["DIM"] * self.element
        direct = self.capability >= 90 and height >= 64
        buffers = (SHARED - kept * width) // (streamed * width)
        return replace(config, stages=min(most, max(1 + direct, buffers)) + (not direct))

    def tiles(self, config: Config) -> tuple[int, int]:
        """Tiles of heads in a group, and blocks of rows."""
        return blocks(self.group, config.blocks["HEADS"]), blocks(self.rows, config.blocks["ROWS"])

    def whole(self, config: Config) -> bool:
        """Whether rows are as short as a block."""
        return self.dim <= config.blocks["DIM"]

    @property
    def precision(self) -> str:
        return "tf32x3" if self.element == 4 and self.dim >= EXACT_DIM else "ieee"

    @property
    def aligned(self) -> bool:
        return is_aligned(self.dim)


def splits_of(shape: Shape, config: Config) -> tuple[int, int]:
    """Among how many programs the keys of a tile of rows are split, and blocks of keys of each."""
    head_tiles, row_blocks = shape.tiles(config)
    key_blocks = blocks(shape.keys, config.blocks["KEYS"])
    wanted = PROGRAMS // 2 // (shape.key_heads * head_tiles * row_blocks)
    each = blocks(key_blocks, max(1, min(MOST_SPLITS, wanted)))
    return blocks(key_blocks, each), each


@dataclass(frozen=True)
class Units:
    """What one program of `score` goes through: all heads, a key head, or a tile of heads."""

    count: int
    key_heads: int
    tiles: int
    per_key_head: int
    averaged: int

    @staticmethod
    def of(shape: Shape, heads: str, config: Config) -> Units:
        tiles = shape.tiles(config)[0]
        if heads == "mean":
            return Units(1, shape.key_heads, tiles, 1, shape.heads)
        if heads == "group":
            return Units(shape.key_heads, 1, tiles, 1, shape.group)
        return Units(shape.key_heads * tiles, 1, 1, tiles, 1)


@dataclass(frozen=True)
class Scoring:
    """How `score` runs: blocks, units, among how many programs rows are shared out, whether heads
    are averaged before a maximum, and whether keys are kept while rows stream past.
    """

    config: Config
    units: Units
    parts: int
    mean_first: bool
    kept: bool


def scoring(
    shape: Shape, table: Table, heads: str, columns: int, max: bool, pool: int
) -> Scoring:  # fmt: skip
    """Blocks of keys shrink where there are too few to keep a GPU busy, and grow where the columns
    that pooling scores twice would be most of them.
    """
    config = shape.tiled(table, one_head=heads == "none" and pool > 1)
    units = Units.of(shape, heads, config)
    sizes, most = config.blocks, config.blocks["KEYS"]
    least = 32 if pool <= 16 else power(2 * pool)

    def programs() -> int:
        return units.count * blocks(columns, sizes["KEYS"] - pool + 1)

    if most < least:
        sizes |= {"KEYS": least, "DIM": min(sizes["DIM"], 64)}
    while sizes["KEYS"] > least and programs() < PROGRAMS // 4:
        sizes["KEYS"] //= 2
    row_blocks, each = shape.tiles(config)[1], shape.tiles(config)[1]
    if units.averaged > 1 and shape.rows > LOWEST_SHARED:
        each = blocks(row_blocks, min(MOST_SPLITS, PROGRAMS // programs()) or 1)
    mean_first = max and units.averaged > 1
    kept = shape.whole(config) and not mean_first and units.tiles * each > 1
    keys, lines = sizes["KEYS"], sizes["ROWS"] * sizes["HEADS"]
    config = shape.staged(config, keys, keys * kept, lines + keys * (not kept), 2 if kept else 4)
    return Scoring(config, units, blocks(row_blocks, each), mean_first, kept)


def steps(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor that may be absent."""
    return (0,) * dims if x is None else x.stride()


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last; where there is one index only, none."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))
