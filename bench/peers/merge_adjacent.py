"""What people write today to merge windows: MustDrop's formulation, and a careful one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from . import Peer


def _split(x: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """The tokens of every window of an image, (B, windows, n, C)."""
    (height, width), (h, w) = grid, window
    parts = x.reshape(x.shape[0], height // h, h, width // w, w, x.shape[2]).transpose(2, 3)
    return parts.reshape(x.shape[0], -1, h * w, x.shape[2])


def _numbers(grid: Sequence[int], window: Sequence[int], device: torch.device) -> Tensor:
    tokens = torch.arange(grid[0] * grid[1], device=device, dtype=torch.float64)
    return _split(tokens[None, :, None], grid, window)[0, :, :, 0].long()


def _uncovered(kwargs: dict[str, Any]) -> bool:
    return len(kwargs["grid"]) != 2 or any(
        g % w for g, w in zip(kwargs["grid"], kwargs["window"], strict=True)
    )


def official(x: Tensor, grid: Sequence[int], window: Sequence[int], **options: Any) -> Any:
    """All pairwise cosines, the fewest of the batch, topk, gather, scatter_reduce, cat."""
    prefix, n = options.get("prefix", 0), window[0] * window[1]
    if (
        _uncovered({"grid": grid, "window": window})
        or options.get("threshold") is None
        or options.get("size") is not None
    ):
        return NotImplemented
    patches, channels = x[:, prefix:], x.shape[2]
    windows = (
        patches.transpose(1, 2)
        .unflatten(2, tuple(grid))
        .unfold(2, window[0], window[0])
        .unfold(3, window[1], window[1])
    )
    windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(x.shape[0], -1, channels, n)
    pairs = cosine_similarity(windows[..., :, None], windows[..., None, :], dim=2)
    apart = 1 - torch.eye(n, device=x.device)
    similarity = (pairs * apart).sum((2, 3)) / (n * (n - 1))
    merging = int((similarity >= options["threshold"]).sum(1).min())
    best = similarity.topk(merging, dim=1).indices
    members = _numbers(grid, window, x.device)[best]
    target, source = members[..., -1:], members[..., :-1]
    kept = torch.ones(patches.shape[:2], dtype=torch.bool, device=x.device).scatter_(
        1, members.flatten(1), False
    )
    sizes = torch.ones_like(patches[..., :1])
    rest, rest_sizes = [t[kept].reshape(x.shape[0], -1, t.shape[2]) for t in (patches, sizes)]
    joined = []
    slots = torch.arange(merging, device=x.device)[:, None].expand(-1, n - 1).reshape(1, -1, 1)
    for values in (patches * sizes, sizes):
        into = values.gather(1, target.flatten(1)[..., None].expand(-1, -1, values.shape[2]))
        from_ = values.gather(1, source.flatten(1)[..., None].expand(-1, -1, values.shape[2]))
        joined.append(
            into.scatter_reduce(
                1, slots.expand(x.shape[0], -1, values.shape[2]), from_, reduce="sum"
            )
        )
    tokens = torch.cat([x[:, :prefix], joined[0] / joined[1], rest], 1)
    sizes = torch.cat([torch.ones_like(x[:, :prefix, :1]), joined[1], rest_sizes], 1)
    return [tokens, sizes[..., 0].float()]


def _similarity(windows: Tensor) -> Tensor:
    """Mean pairwise cosine without pairs, (B, windows)."""
    unit, n = normalize(windows, dim=3, eps=1e-8), windows.shape[2]
    return (unit.sum(2).float().square().sum(2) - unit.float().square().sum((2, 3))) / (n * (n - 1))


def careful(x: Tensor, grid: Sequence[int], window: Sequence[int], **options: Any) -> Any:
    """No pairs; means of all windows at once; rows placed by one cumsum, written by index_copy."""
    prefix, n = options.get("prefix", 0), window[0] * window[1]
    ragged = (
        options.get("batch", "ragged") == "ragged" and options.get("order", "raster") == "raster"
    )
    if (
        _uncovered({"grid": grid, "window": window})
        or not ragged
        or options.get("size") is not None
    ):
        return NotImplemented
    batch, tokens, channels = x.shape[0], x.shape[1] - prefix, x.shape[2]
    windows = _split(x[:, prefix:], grid, window)
    similarity = _similarity(windows)
    if options.get("threshold") is not None:
        merges = similarity >= options["threshold"]
    else:
        best = similarity.topk(options["num_windows"], dim=1).indices
        merges = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)
    members = _numbers(grid, window, x.device)
    leads = torch.ones(batch, prefix + tokens, dtype=torch.bool, device=x.device)
    leads[:, prefix + members[:, 1:].flatten()] = ~merges.repeat_interleave(n - 1, 1)
    row = leads.flatten().cumsum(0).reshape(leads.shape) - 1
    first = row[:, prefix + members[:, 0]]
    packed = x[leads]
    packed.index_copy_(0, first[merges], windows[merges].mean(1))
    size = packed.new_ones(len(packed), dtype=torch.float32).index_fill_(0, first[merges], n)
    row[:, prefix + members[:, 1:].flatten()] = torch.where(
        merges[..., None], first[..., None], row[:, prefix + members[:, 1:]]
    ).flatten(1)
    if options.get("num_windows") is None:
        return [packed, size, row]
    return [packed.reshape(batch, -1, channels), size.reshape(batch, -1), row - row[:, :1]]


def _shape_like(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Only MustDrop's rule is known to it: otherwise sizes must fit, no more."""
    if kwargs.get("batch") != "uniform" or kwargs.get("order") != "similarity":
        saved = kwargs["window"][0] * kwargs["window"][1] - 1
        assert (
            got[0].shape[1] >= want[0].shape[0] // len(kwargs["x"])
            and got[0].shape[1] <= kwargs["x"].shape[1]
        )
        assert (kwargs["x"].shape[1] - got[0].shape[1]) % saved == 0
        return
    assert got[0].shape == want[0].shape
    assert torch.allclose(got[1].double(), want[1].double())
    near = (
        torch.isclose(got[0].double(), want[0].double(), rtol=0.02, atol=0.02)
        .all(-1)
        .double()
        .mean()
    )
    assert near > 0.9, f"{near:.0%} of the tokens are those of the reference"


def _nearly(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Similarities from rounded unit vectors: in half precision a few windows decide otherwise."""
    if got[0].dtype == torch.float32:
        assert got[0].shape == want[0].shape and torch.equal(got[2], want[2])
        assert torch.allclose(got[0].double(), want[0].double(), rtol=1e-5, atol=1e-5)
        return
    assert abs(got[0].shape[-2] - want[0].shape[-2]) <= 0.05 * want[0].shape[-2]


PEERS = {
    "MustDrop's formulation": Peer(official, compiled=True, compare=_shape_like, gradient=False),
    "identity, cumsum, index_copy": Peer(careful, compiled=True, compare=_nearly, gradient=False),
}
