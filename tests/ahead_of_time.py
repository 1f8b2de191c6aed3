"""Compiles every Triton kernel that the bench shapes launch to cubins, without a GPU.

`python tests/ahead_of_time.py [--only TEXT] [--capabilities 80 90 100] [--variants]` prints a line
of JSON for each. It runs in a process of its own: here kernels are compiled, not interpreted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tokenkernels import ops
from tokenkernels._case import Case, Make
from tokenkernels._op import OPS, Op, tensors_in
from tokenkernels.triton import _launch


class Job(NamedTuple):
    """One compilation, in the terms of Triton's compiler."""

    kernel: str
    aligned: bool
    capability: int
    options: dict[str, Any]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


class Shapes(Make):
    """Draws tensors that have no values."""

    def __init__(self, seed: str, dtype: torch.dtype) -> None:
        super().__init__(seed, dtype, "meta")

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    rand = randn

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def permutation(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int64, device="meta")

    def bool(self, probability: float, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")


class Dry:
    """Inside, Triton ops only record what they would launch, and what torch would between."""

    def __init__(self, device: str, capability: int) -> None:
        self.device, self.capability = device, capability
        self.launches: list[_launch.Launch] = []
        self.choices: dict[_launch.Table, _launch.Config] = {}
        self.copies: list[str] = []
        self.syncs = 0

    def __enter__(self) -> Dry:
        self.kept = {op: op._kinds["triton"] for op in OPS.values() if "triton" in op._kinds}
        for op in self.kept:
            op._kinds["triton"] = op.overloads["triton", self.device] = partial(self._run, op)
        return self

    def __exit__(self, *_: Any) -> None:
        for op, overload in self.kept.items():
            op._kinds["triton"] = op.overloads["triton", self.device] = overload

    def _run(self, op: Op, *args: Any) -> Any:
        with _launch.recording(False, self.capability) as record, _Copies() as copies:
            result = op._triton(*args)
        self.launches += record.launches
        self.choices |= record.choices
        self.syncs += record.syncs
        self.copies += copies.names
        return result


class _Copies(TorchDispatchMode):
    """Notes the torch calls that would launch something: all but views and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not function.is_view and "empty" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(op: Op, kwargs: dict[str, Any], device: str, capability: int) -> Iterator[Dry]:
    """What a call launches, forward and backward."""
    with Dry(device, capability) as forward:
        op.run(kwargs, "triton")
    yield forward
    backward = Dry(device, capability)
    inputs = [t for n in op.differentiable for t in tensors_in(kwargs.get(n))]
    inputs = [t.requires_grad_() for t in inputs if t.dtype.is_floating_point]
    op.overloads["triton", device] = op._kinds["triton"]
    outputs = [t for t in op.run(kwargs, "triton") if t.requires_grad] if inputs else []
    if outputs:
        seeds = [torch.empty_like(t) for t in outputs]
        with backward:
            torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    yield backward


def described(launch: _launch.Launch, capability: int) -> Job:
    """What Triton would compile for a launch: its own launcher looks at the arguments."""
    jit = launch.kernel.variant(launch.aligned)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    named = launch.config.blocks | launch.constants | launch.config.options
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    bound, found, rest = bind(*launch.arguments, **named)
    options, *source = jit._pack_args(backend, named, bound, found, rest)
    name = f"{jit.module}:{launch.kernel.name}"
    return Job(name, launch.aligned, capability, options.__dict__, *source)


def traits(job: Job) -> set[tuple[Any, ...]]:
    """What a compilation stands for: its kernel with each option, constant and type. The two halves
    are alike, integers of 32 and 64 bits too.
    """
    names = list(job.signature)
    found: list[tuple[Any, ...]] = [("warps", job.options["num_warps"])]
    found += [(names[first], *rest, value) for (first, *rest), value in job.constants.items()]
    for name, kinds in job.signature.items():
        for place, kind in enumerate(kinds if isinstance(kinds, tuple) else (kinds,)):
            found.append((name, place, kind.replace("fp16", "bf16").replace("i64", "i32")))
    return {(job.kernel, job.aligned, *trait) for trait in found}


def jobs(only: str, capability: int, variants: bool) -> Iterator[Job]:
    """Every distinct compilation that the bench cases ask for. Of what only test cases ask for
    kernels that no bench case reaches; with `variants` as much as it takes to meet every trait.
    """
    seen: set[str] = set()
    reached: set[str] = set()
    known: set[tuple[Any, ...]] = set()
    for tag in ("bench", "test"):
        before = set(reached)
        for op in list(OPS.values()):
            if "triton" not in op._kinds or only not in op.name:
                continue
            for case in op.cases:
                for dtype in case.dtypes if tag in case.tags else ():
                    for job in _asked(op, case, dtype, capability):
                        met = tag == "test" and traits(job) <= known
                        reached.add(job.kernel)
                        known |= traits(job)
                        if met or (job.kernel in before and not variants):
                            continue
                        if repr(job) not in seen:
                            seen.add(repr(job))
                            yield job


def _asked(op: Op, case: Case, dtype: torch.dtype, capability: int) -> Iterator[Job]:
    try:
        kwargs = case.make(Shapes(case.id, dtype))
        for dry in launches(op, kwargs, "meta", capability):
            yield from (described(launch, capability) for launch in dry.launches)
    except RuntimeError as error:
        if not only_values_tell(error):
            raise


def only_values_tell(error: RuntimeError) -> bool:
    """Whether a call broke off because a size follows from the values of a tensor."""
    words = "data-dependent", "meta tensors", "meta tensor; no data"
    return any(w in str(error) for w in words)


def compiled(job: Job) -> dict[str, Any]:
    """Registers, spills and shared memory of one kernel."""
    module, function = job.kernel.split(":")
    jit = getattr(import_module(module), function).variant(job.aligned)
    source = ASTSource(jit, job.signature, job.constants, job.attributes)
    target = GPUTarget("cuda", job.capability, 32)
    binary = triton.compile(source, target=target, options=job.options)
    mma = sorted(
        set(re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*", binary.asm["ptx"]))
    )
    names = jit.arg_names
    return {
        "kernel": job.kernel,
        "capability": job.capability,
        "aligned": job.aligned,
        "types": " ".join(str(t) for t in job.signature.values() if t != "constexpr"),
        "constants": {
            ".".join([names[first], *map(str, rest)]): value
            for (first, *rest), value in job.constants.items()
        },
        "warps": job.options["num_warps"],
        "shared": binary.metadata.shared,
        "mma": mma,
        **resources(binary.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump reads: registers per thread, and bytes of local memory, where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--variants", action="store_true", help="those of the test cases too")
    options = parser.parse_args()
    ops.load()
    work = [
        job
        for capability in options.capabilities
        for job in jobs(options.only, capability, options.variants)
    ]
    with multiprocessing.Pool(2) as pool:
        for result in pool.imap_unordered(compiled, work):
            print(json.dumps(result, default=str), flush=True)


if __name__ == "__main__":
    main()
