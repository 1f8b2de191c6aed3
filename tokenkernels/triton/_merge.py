"""The tile of both merges: some windows or runs, of each some members, of each all channels if they
fit, so that a row is summed in one order whatever its neighbours.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton._launch import Config, Entry, Table, capability

TABLE = Table(
    [
        Entry(Config({"ROWS": 64, "WIDTH": 32}), width=32),
        Entry(Config({"ROWS": 32, "WIDTH": 64}), width=64),
        Entry(Config({"ROWS": 16, "WIDTH": 128}), width=128),
        Entry(Config({"ROWS": 16, "WIDTH": 256}), width=256),
        Entry(Config({"ROWS": 8, "WIDTH": 512}), width=512),
        Entry(Config({"ROWS": 4, "WIDTH": 1024}, registers=168), width=1024, capability=100),
        Entry(Config({"ROWS": 4, "WIDTH": 1024}), width=1024, capability=90),
        Entry(Config({"ROWS": 4, "WIDTH": 1024}, registers=168), width=1024),
        Entry(Config({"ROWS": 4, "WIDTH": 2048}, warps=8), width=2048),
        Entry(Config({"ROWS": 4, "WIDTH": 4096}, warps=16)),
    ],
    "A tile holds whole rows, so norms and means come out of registers: 32 numbers per thread.",
)


def tile(members: int, x: Tensor) -> Config:
    """The rows of a tile as so many times `members` where they fit, else as part of them."""
    config = TABLE.choose(x.element_size(), x.shape[2], capability(x.device))
    rows = config.blocks["ROWS"]
    fit = min(triton.next_power_of_2(members), rows)
    shape = {"ROWS": rows // fit, "MEMBERS": fit, "WIDTH": config.blocks["WIDTH"]}
    return replace(config, blocks=shape)


def whole(config: Config, members: int, channels: int) -> dict[str, bool]:
    """Whether a tile holds all members of a row, and all channels: loops that a kernel lacks."""
    return {
        "ALL_MEMBERS": members <= config.blocks["MEMBERS"],
        "ALL_CHANNELS": channels <= config.blocks["WIDTH"],
    }


@triton.jit
def tile_of(x, token, token_stride, here, start, channels, WIDTH: tl.constexpr):
    """WIDTH channels of these tokens, (…, …, WIDTH), zeros elsewhere."""
    column = start + tl.arange(0, WIDTH)
    row = x + token.to(tl.int64) * token_stride
    mask = here[:, :, None] & (column < channels)[None, None, :]
    return tl.load(row[:, :, None] + column[None, None, :], mask, 0.0).to(tl.float32)
