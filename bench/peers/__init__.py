"""Who an op is measured against: one file per op in this folder holds its `PEERS`, name → function
of the case's arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Peer:
    """One competitor: called with the keyword arguments of a case, it returns outputs in the op's
    form, or the first ones of them.

    `compiled` adds the same function under torch.compile. `dtypes` are those it can run (None:
    all). A peer that does not cover a case returns NotImplemented. `compare(got, want, low,
    kwargs)` replaces the op's own where the form must differ, `compare_gradients` that of
    gradients. `gradient` is False where no gradient flows through it.
    """

    fn: Callable[..., Any]
    compiled: bool = False
    dtypes: tuple[torch.dtype, ...] | None = None
    note: str = ""
    compare: Callable[..., None] | None = None
    compare_gradients: Callable[..., None] | None = None
    gradient: bool = True


def roughly(
    got: list[torch.Tensor],
    want: list[torch.Tensor],
    low: list[torch.Tensor],
    kwargs: dict[str, Any],
    times: float = 8.0,
    roundings: float = 8.0,
) -> None:
    """For peers that round in between: up to so many times the error of the reference itself, or so
    many roundings of the largest value.
    """
    for number, (g, w, r) in enumerate(zip(got, want, low, strict=True)):
        assert g.shape == w.shape, f"output {number}: shape {tuple(g.shape)}"
        least = max(64 * torch.finfo(torch.float32).eps, roundings * torch.finfo(g.dtype).eps)
        own, scale = (r.double() - w).abs().max().item(), w.abs().max().item()
        error, bound = (g.double() - w).abs().max().item(), max(times * own, least * scale)
        assert error <= bound, f"output {number}: error {error:.3g}, bound {bound:.3g}"


COMPILED = " (compiled)"


def peers_of(op_name: str) -> dict[str, Peer]:
    """The peers of an op, with one more entry, `compiled=True`, behind each that is to be compiled
    too.
    """
    if importlib.util.find_spec(f"{__name__}.{op_name}") is None:
        return {}
    try:
        listed = importlib.import_module(f"{__name__}.{op_name}").PEERS
    except ImportError as error:
        return {f"peers of {op_name}": Peer(_raising(error))}
    found: dict[str, Peer] = {}
    for name, entry in listed.items():
        peer = entry if isinstance(entry, Peer) else Peer(entry)
        found[name] = replace(peer, compiled=False)
        if peer.compiled:
            found[name + COMPILED] = peer
    return found


def _raising(error: ImportError) -> Callable[..., Any]:
    """A library that is not there fails like any other peer: in its own line, with the reason."""

    def fail(**kwargs: Any) -> Any:
        raise error

    return fail
