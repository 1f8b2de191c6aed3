"""What the compiler makes of every Triton kernel that a bench case launches, for sm_90: compiled
without a GPU, kept in `bench/triton_kernels.json` and shown in NOTES.md; `python -m bench.kernels`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.tables import Table, number
from tokenkernels import ops
from tokenkernels._case import Make
from tokenkernels._op import OPS, Case, Op, tensors_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import ahead_of_time as ahead

PAGE = Path(__file__).parent / "NOTES.md"
BLOCK = re.compile(r"(?<=<!-- kernels -->\n).*(?=<!-- end of kernels -->)", re.DOTALL)
COMPILED = Path(__file__).with_name("triton_kernels.json")
CAPABILITY, MULTIPROCESSORS = 90, 132
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 227 << 10, 64, 32
"""Of one multiprocessor; a program takes 1 KB of shared memory besides its own."""


class Indices(ahead.Shapes):
    """Draws integers with their values, which tell how many rows move; nothing else has any."""

    def __init__(self, seed: str, dtype: torch.dtype) -> None:
        super().__init__(seed, dtype)
        self.device = "cpu"

    randint, permutation, bool = Make.randint, Make.permutation, Make.bool


@dataclass
class Call:
    """One op on one bench case: what Triton launches for it, forward or backward."""

    op: Op
    case: Case
    dtype: torch.dtype
    gradient: bool
    kwargs: dict[str, Any]
    cost: tuple[float, float]
    launches: list[tuple[Any, ahead.Job]] = field(default_factory=list)
    """Empty where only values tell how much there is to launch."""
    copies: int = 0

    def __str__(self) -> str:
        """As the bench names its cells."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name} · {self.case.id} · {dtype}" + self.gradient * " · +backward"


def recorded() -> Iterator[Call]:
    """The calls of all bench cases, with every launch and the compilation that it needs."""
    ops.load()
    for op in OPS.values():
        for case in op.cases if "triton" in op._kinds else ():
            for dtype in (torch.bfloat16, torch.float32):
                if "bench" in case.tags and dtype in case.dtypes:
                    yield from _calls(op, case, dtype)


def _calls(op: Op, case: Case, dtype: torch.dtype) -> Iterator[Call]:
    """Forward, and where there is a gradient backward, as far as shapes tell what is launched."""
    kwargs = case.make(ahead.Shapes(case.id, dtype))
    cost = _cost(op, case, dtype)
    dry = ahead.launches(op, kwargs, "meta", CAPABILITY)
    for gradient in (False, True) if op.differentiable else (False,):
        call = Call(op, case, dtype, gradient, kwargs, cost)
        try:
            launches = next(dry)
            call.launches = [(x, ahead.described(x, CAPABILITY)) for x in launches.launches]
            call.copies = len(launches.copies)
        except RuntimeError as error:
            if not ahead.only_values_tell(error):
                raise
        yield call


def _cost(op: Op, case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """By shapes, by the values of integers, or by all values: whatever it takes, in this order."""
    for make in (ahead.Shapes, Indices):
        try:
            return op.cost(case.make(make(case.id, dtype)))
        except RuntimeError:  # only values tell
            continue
    return op.cost(case.kwargs(dtype))


def key(job: ahead.Job) -> str:
    """What makes a compilation, without what the machine adds to it."""
    options = [job.options[name] for name in ("num_warps", "num_stages", "maxnreg")]
    text = repr((*job[:3], options, job.signature, job.constants, job.attributes))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compilations() -> dict[str, dict[str, Any]]:
    """What the committed table says of each, by `key`."""
    found: dict[str, dict[str, Any]] = json.loads(COMPILED.read_text())
    return found


def together(built: dict[str, Any]) -> int:
    """How many programs a multiprocessor holds at once."""
    registers = -(-built["registers"] // 8) * 8 * 32 * built["warps"]
    shared = built["shared"] + 1024
    return min(REGISTERS // registers, SHARED // shared, WARPS // built["warps"], PROGRAMS)


def touched(launch: Any) -> int:
    """Bytes of all tensors that a launch is given, each once."""
    flat = (a for b in launch.arguments for a in (b if isinstance(b, tuple) else (b,)))
    return sum({id(a): a.nbytes for a in flat if isinstance(a, torch.Tensor)}.values())


def compiled(job: ahead.Job) -> dict[str, Any]:
    """Of one compilation what a prediction needs."""
    found = ahead.compiled(job)
    kinds = " ".join(found["mma"])
    halves = "bf16" in kinds or "f16.f16" in kinds
    parts, precision = (found["constants"].get(name) for name in ("PARTS", "PRECISION"))
    return {
        "kernel": job.kernel.removeprefix("tokenkernels.triton."),
        **{name: found[name] for name in ("registers", "shared", "warps")},
        "multiplies": "16 bits" if halves else "tf32" if "tf32" in kinds else "float32",
        "products": 3 if (halves and parts == 2) or precision == "tf32x3" else 1,
        "groups": "wgmma" in kinds,
    }


def kernels_table(calls: list[Call], built: dict[str, dict[str, Any]]) -> Table:
    """Every compilation once, at the first of these calls that launches it."""
    columns = ["kernel", "call", "blocks", "warps", "registers", "shared KB", "per SM", "programs"]
    table = Table("Kernels", [*columns, "MB", "reason"], [])
    seen: set[str] = set()
    for call in calls:
        size = sum(tensor.nbytes for tensor in tensors_in(list(call.kwargs.values())))
        behind_a_table = 2 * sum(touched(launch) for launch, _ in call.launches) < size
        for launch, job in call.launches:
            if key(job) in seen:
                continue
            seen.add(key(job))
            k = built[key(job)]
            table.rows.append(
                [
                    k["kernel"],
                    str(call),
                    " × ".join(map(str, launch.config.blocks.values())),
                    str(k["warps"]),
                    str(k["registers"]),
                    number(k["shared"] / 1024),
                    str(together(k)),
                    str(math.prod(launch.grid)),
                    "" if behind_a_table else number(touched(launch) / 1e6),
                    launch.config.reason,
                ]
            )
    return table


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__).parse_args()
    calls = list(recorded())
    jobs = {key(job): job for call in calls for _, job in call.launches}
    with multiprocessing.Pool(2) as pool:
        built = dict(zip(jobs, pool.map(compiled, jobs.values(), 1), strict=True))
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(built[name])}" for name in sorted(built))
    COMPILED.write_text(f"{{\n{rows}\n}}\n")
    text = report.as_markdown(kernels_table(calls, built)) + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
