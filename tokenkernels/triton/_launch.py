"""How a kernel of this room is launched: its two compilations, the shapes of its blocks, a record
for whoever counts launches or compiles ahead of time.

Bits must not depend on where a tensor happens to lie. Triton compiles loads by alignment, and with
them the order of sums along the loaded axis; so alignment is decided by shape: rows of a multiple
of 16 elements are always read aligned (`aligned` copies what is not), all others never.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor

LANE = 16
"""Elements: Triton knows of a stride only whether 16 divides it."""


@dataclass(frozen=True)
class Config:
    """The blocks of one launch by the names of the kernel's constants, and how it is scheduled."""

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    """The most that a thread may take. Told so, the compiler spills none to let one more program
    onto a multiprocessor.
    """
    reason: str = field(default="", repr=False, compare=False)
    """Why these blocks, in a line."""

    @property
    def options(self) -> dict[str, Any]:
        """How Triton takes the schedule."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


@dataclass(frozen=True)
class Entry:
    """A line of a table: for these element sizes, up to this width, from this capability on."""

    config: Config
    width: int = 1 << 62
    bytes: tuple[int, ...] = (1, 2, 4, 8)
    capability: int = 80


@dataclass(eq=False)
class Table:
    """The block shapes of one kernel, and the reason in a line: the first entry that admits a call
    decides.
    """

    entries: list[Entry]
    reason: str
    candidates: list[Config] = field(default_factory=list)
    """What a sweep tries besides the entries."""
    forced: Config | None = None
    """What a sweep is trying now."""

    def choose(self, element_size: int, width: int, capability: int) -> Config:
        """A pure function of shape, dtype and architecture."""
        for e in self.entries:
            if element_size in e.bytes and width <= e.width and capability >= e.capability:
                if _record is not None:
                    _record.choices.setdefault(self, e.config)
                return replace(self.forced or e.config, reason=self.reason)
        raise ValueError(f"no entry for {element_size} bytes, width {width}, sm_{capability}")


class Kernel:
    """A Triton function compiled in two ways: for rows known to be aligned, and for any.

    Integers are run-time values that never compile anew; only of those whose names end in
    `_stride`, and of those only for aligned rows, Triton learns whether they are 1 and whether 16
    divides them. Into tuples Triton looks whatever it is told and however rows lie: it compiles a 1
    in (`_math.at_run_time` makes a number of it that has a type), and learns which integers and
    addresses 16 divides. So other sizes in a tuple may compile anew, a few times, not for each; and
    where a kernel sums what it loads from a tuple's tensors, it does so in an order of its own
    (`_math.total`), since that of a plain sum would follow from the addresses.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if "constexpr" not in str(parameter.annotation)
        ]
        known = ("_ptr", "_ptrs", "_stride", "_strides")
        sizes = [name for name in names if not name.endswith(known)]
        self.name = function.__name__
        self.vector = triton.jit(function, do_not_specialize=sizes)
        self.scalar = triton.jit(
            function, do_not_specialize=names, do_not_specialize_on_alignment=names
        )

    def variant(self, aligned: bool) -> Any:
        """The one of the two that a launch takes."""
        return self.vector if aligned else self.scalar


@dataclass(frozen=True)
class Launch:
    """One launch, as it is recorded."""

    kernel: Kernel
    aligned: bool
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


@dataclass
class Record:
    """What took place inside `recording`."""

    launches: list[Launch] = field(default_factory=list)
    choices: dict[Table, Config] = field(default_factory=dict)
    """Every table that was asked, and what it first answered."""
    syncs: int = 0


INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether numpy stands in for a GPU (TRITON_INTERPRET=1 when Triton was first imported)."""

PROGRAMS = 8 if INTERPRETED else 528
"""Programs that fill a large GPU, four for each of 132 multiprocessors: how work is shared where
sharing changes no bits. The interpreter runs one after another.
"""
_record: Record | None = None
_run = True
_capability: int | None = None


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    *arguments: Any,
    config: Config,
    aligned: bool = True,
    **constants: Any,
) -> None:
    """Launches `kernel` on the device of its first tensor; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _record is not None:
        _record.launches.append(Launch(kernel, aligned, grid, arguments, constants, config))
    if not _run:
        return
    function = kernel.variant(aligned)
    flat = (a for b in arguments for a in (b if isinstance(b, tuple) else (b,)))
    device = next(a.device for a in flat if isinstance(a, Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        function[grid](*arguments, **config.blocks, **constants, **config.options)


@contextmanager
def recording(run: bool = True, capability: int | None = None) -> Iterator[Record]:
    """Notes the launches inside; without `run` none takes place, and tensors may be on the meta
    device.
    """
    global _record, _run, _capability
    before = _record, _run, _capability
    _record, _run, _capability = Record(), run, capability
    try:
        yield _record
    finally:
        _record, _run, _capability = before


def capability(device: torch.device) -> int:
    """The compute capability as in sm_90; the interpreter plays an sm_90."""
    if _capability is not None:
        return _capability
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def to_host(counts: Tensor) -> Tensor:
    """The one synchronisation of a threshold form."""
    if _record is not None:
        _record.syncs += 1
    if not _run:
        return torch.frombuffer(bytearray(8 * counts.numel()), dtype=torch.int64).view(counts.shape)
    return counts.cpu()


def is_aligned(width: int) -> bool:
    """Whether rows of `width` elements are read aligned."""
    return width % LANE == 0


def aligned(x: Tensor) -> Tensor:
    """`x` itself where its rows can be read as its width promises, else a copy."""
    strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    if not is_aligned(x.shape[-1]):
        return x
    good = x.data_ptr() % 16 == 0 and all(s % LANE == 0 for s in strides)
    return x if good else x.clone(memory_format=torch.contiguous_format)


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)
