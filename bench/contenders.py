"""Who meets in one cell of the bench: our backends, the reference, the peers; and what each must
show before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from bench.peers import COMPILED, Peer, peers_of, roughly
from tokenkernels._case import Case
from tokenkernels._op import Op, tensors_in

OURS = {"cpu": ("native",), "cuda": ("native", "triton")}
"""Triton runs in its interpreter on a CPU, which there is no point in timing."""
WIDE_LIMIT = 2**29
"""Inputs of more bytes are not repeated in float64: there the reference in their own dtype is the
truth.
"""

Kwargs = dict[str, Any]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """One input on which all contenders meet."""

    op: Op
    case: Case
    dtype: torch.dtype
    gradient: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name} · {self.case.id} · {dtype}" + self.gradient * " · +backward"

    def kwargs(self) -> Kwargs:
        return self.case.kwargs(self.dtype, self.device)

    def mode(self) -> AbstractContextManager[Any]:
        return torch.enable_grad() if self.gradient else torch.inference_mode()


@dataclass
class Contender:
    """One function of the case's arguments, and how its outputs are compared."""

    name: str
    role: str  # "ours", "reference" or "peer"
    function: Callable[..., Any]
    compare: Callable[..., None]
    compiled: bool = False
    note: str = ""


@dataclass
class Verdict:
    """Whether a contender is timed: it is where neither reason is given."""

    failed: str = ""
    left_out: str = ""


@dataclass
class Truth:
    """What outputs (or gradients) are held against: `want` in float64, `low` in the dtype of the
    cell.
    """

    want: Tensors = field(default_factory=list)
    low: Tensors = field(default_factory=list)


def names(cell: Cell) -> list[str]:
    """Every contender of a cell, whether it will be timed or not."""
    peers = peers_of(cell.op.name).items()
    ours = OURS[cell.device]
    return [*ours, *(name for name, peer in peers if takes_part(cell, peer)), "reference"]


def takes_part(cell: Cell, peer: Peer) -> bool:
    return (peer.dtypes is None or cell.dtype in peer.dtypes) and (
        peer.gradient or not cell.gradient
    )


def contenders(cell: Cell) -> list[Contender]:
    """Ours, the peers, and the reference behind them."""
    compare = cell.op.check_gradients if cell.gradient else cell.op.check
    ours = OURS[cell.device]
    found = [Contender(name, "ours", backend(cell.op, name), compare) for name in ours]
    for name, peer in peers_of(cell.op.name).items():
        if takes_part(cell, peer):
            function = torch.compile(peer.fn, dynamic=False) if peer.compiled else peer.fn
            own = (gradients(cell, peer) if cell.gradient else peer.compare) or compare
            found.append(Contender(name, "peer", function, own, name.endswith(COMPILED), peer.note))
    return [*found, Contender("reference", "reference", backend(cell.op, "reference"), compare)]


def gradients(cell: Cell, peer: Peer) -> Callable[..., None] | None:
    """How gradients of a peer are compared; in half precision they round in between, forward and
    again backward.
    """
    if peer.compare_gradients or cell.dtype == torch.float32:
        return peer.compare_gradients
    return functools.partial(roughly, roundings=16.0)


def backend(op: Op, name: str) -> Callable[..., Any]:
    if op.function is not None:
        return functools.partial(op.function, backend=name)
    return lambda **kwargs: op.run(kwargs, name)


def prepared(cell: Cell, kwargs: Kwargs, function: Callable[..., Any]) -> Callable[[], Any]:
    """The call that is timed: the function, or the function and the gradient of its first output to
    what is differentiable.
    """
    if not cell.gradient:
        return functools.partial(function, **kwargs)
    kwargs = {
        n: tree_map(_leaf, v) if n in cell.op.differentiable else v for n, v in kwargs.items()
    }
    leaves = [
        t for n in cell.op.differentiable for t in tensors_in(kwargs.get(n)) if t.requires_grad
    ]
    seeds: dict[torch.Size, torch.Tensor] = {}

    def forward_and_backward() -> Any:
        outputs = function(**kwargs)
        if outputs is NotImplemented:
            return outputs
        first = next(t for t in tensors_in(outputs) if t.requires_grad)
        if first.shape not in seeds:
            generator = torch.Generator().manual_seed(7)
            seed = torch.randn(first.shape, generator=generator)
            seeds[first.shape] = seed.to(cell.dtype).to(first)
        gradients = torch.autograd.grad(first, leaves, seeds[first.shape], allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)
        ]

    return forward_and_backward


def truth(cell: Cell, kwargs: Kwargs) -> Truth:
    reference = backend(cell.op, "reference")
    measure = cell.op.formula if cell.op.measured_by_formula(kwargs) else None
    low = tensors_in(prepared(cell, fresh(cell, kwargs), measure or reference)())
    if sum(t.nbytes for t in tensors_in(kwargs)) > WIDE_LIMIT:
        return Truth(low, low)
    return Truth(tensors_in(prepared(cell, tree_map(_wide, kwargs), reference)()), low)


def judge(cell: Cell, contender: Contender, kwargs: Kwargs, truth: Truth) -> Verdict:
    """Runs a contender once on the input of the cell and holds what it gives against the truth."""
    if contender.role == "ours" and (
        reason := cell.op.why_not(contender.name, cell.device, kwargs)
    ):
        return Verdict(left_out=reason)
    try:
        outputs = prepared(cell, fresh(cell, kwargs), contender.function)()
        if outputs is NotImplemented:
            return Verdict(left_out="does not cover this case")
        got = tensors_in(outputs)
        assert got, "no output"
        count = len(got) if contender.role == "peer" else None
        contender.compare(got, truth.want[:count], truth.low[:count], kwargs)
    except Exception as error:  # whatever goes wrong in there is the result of this contender
        return Verdict(failed=f"{type(error).__name__}: {error}".split("\n")[0][:200])
    return Verdict()


def fresh(cell: Cell, kwargs: Kwargs) -> Kwargs:
    """The arguments for one call: copies where it writes into them."""
    if "inplace" not in cell.case.tags:
        return kwargs
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, kwargs)


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.detach().requires_grad_()
    return value


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype.is_floating_point else value.clone()
    return value
