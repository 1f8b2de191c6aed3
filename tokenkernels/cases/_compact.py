"""What the cases of both compactions share: which positions are kept, what moves, how many launches
that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._case import Make


def kept(t: Make, tokens: int, count: int) -> Tensor:
    return t.permutation(tokens)[:count].sort().values


def ragged(t: Make, tokens: Sequence[int], room: int, shape: tuple[int, ...]) -> Tensor:
    """Rows (*shape, room) of 0 … room of the first tokens[i] positions; the last row is full."""
    rows = []
    for i in range(torch.Size(shape).numel()):
        most = min(room, tokens[i % len(tokens)])
        count = (
            (0, most, most // 2, most // 3)[i % 4] if i + 1 < torch.Size(shape).numel() else most
        )
        chosen = kept(t, tokens[i % len(tokens)], count)
        rows.append(torch.cat((chosen, chosen.new_full((room - count,), -1))))
    return torch.stack(rows).view(*shape, room).clone()


def with_options(make: Any, **options: Any) -> Any:
    return lambda t: make(t) | options


def moved_rows(row: list[int], inplace: bool, fill: bool) -> int:
    kept = [position for position in row if position >= 0]
    if not inplace:
        return len(kept)
    if fill:
        return sum(position >= len(kept) for position in kept)
    return sum(position != slot for slot, position in enumerate(kept))


def launches_of(
    layers: Sequence[Sequence[Tensor]], kwargs: dict[str, Any], keys_apart: bool = False
) -> tuple[int, int]:
    """One that moves, and one for every 256 integers of the table it reads: 3 for a tensor, 8 for
    those of one shape and layout (and place in the tuple, if keys are apart), 5 for each list of
    integers, and for each index 5 more. Integers of 32 bits that share a list with others of 64 are
    copied.
    """
    index = kwargs["index"]
    indices = [index] if isinstance(index, Tensor) else index
    counts = [one.shape[-1] for one in indices] * (1 if len(indices) > 1 else len(layers))
    kinds = {
        (t.shape, t.stride(), t.element_size(), count, keys_apart and place == 0)
        for layer, count in zip(layers, counts, strict=True)
        for place, t in enumerate(layer)
    }
    lists = [index, index, kwargs.get("lengths"), *(kwargs.get("rope") or ())[1:]]
    rows = sum(1 if isinstance(one, Tensor) else len(one or ()) for one in lists)
    narrow = [[t.dtype == torch.int32 for t in one] for one in lists[1:] if isinstance(one, list)]
    copies = sum(sum(one) for one in narrow if not all(one))
    integers = 3 * sum(len(layer) for layer in layers) + 8 * len(kinds) + 5 * rows
    return 1 + -(-integers // 256) + copies, 0
