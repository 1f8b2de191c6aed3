"""Compiles every Triton kernel that the bench shapes launch to cubins, without a GPU.

`python tests/ahead_of_time.py [--only TEXT] [--capabilities 80 90 100]` prints a line of JSON for
each. It runs in a process of its own: here kernels are compiled, not interpreted.
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
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenkernels import ops
from tokenkernels._case import Case, Make
from tokenkernels._op import OPS, Op, tensors_in
from tokenkernels.triton import _launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
Job = tuple[str, bool, dict[str, Any], dict[Any, Any], dict[Any, int], int, int]


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
    """Types, constants and alignments of a launch, as Triton would see them."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {(n,): v for n, v in launch.config.blocks.items()}
    constants |= {(n,): v for n, v in launch.constants.items()}
    attributes: dict[Any, int] = {}

    def see(place: tuple[Any, ...], value: Any) -> Any:
        is_stride = place[0].endswith(("_stride", "_strides"))
        if isinstance(value, tuple):
            return tuple(see((*place, number), item) for number, item in enumerate(value))
        if value is None or (is_stride and value == 1 and launch.aligned):
            constants[place] = value
            return "constexpr"
        known = isinstance(value, torch.Tensor) or (is_stride and value % 16 == 0)
        if known and launch.aligned:
            attributes[place] = 16
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        if isinstance(value, bool):
            return "i1"
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for name, value in zip(launch.kernel.arguments, launch.arguments, strict=True):
        signature[name] = see((name,), value)
    signature |= {key[0]: "constexpr" for key in constants if len(key) == 1}
    name = f"{launch.kernel.vector.__module__}:{launch.kernel.name}"
    schedule = launch.config.warps, launch.config.stages
    return name, launch.aligned, signature, constants, attributes, *schedule


def jobs(only: str, capability: int) -> Iterator[tuple[Job, int]]:
    """Every distinct compilation that the bench cases ask for; of kernels that none of them
    reaches, those of the test cases.
    """
    seen: set[str] = set()
    reached: set[str] = set()
    for tag in ("bench", "test"):
        before = set(reached)
        for op in list(OPS.values()):
            if "triton" not in op._kinds or only not in op.name:
                continue
            for case in op.cases:
                for dtype in case.dtypes if tag in case.tags else ():
                    for job in _asked(op, case, dtype, capability):
                        reached.add(job[0])
                        if job[0] not in before and repr(job) not in seen:
                            seen.add(repr(job))
                            yield job, capability


def _asked(op: Op, case: Case, dtype: torch.dtype, capability: int) -> Iterator[Job]:
    try:
        kwargs = case.make(Shapes(case.id, dtype))
        for dry in launches(op, kwargs, "meta", capability):
            yield from (described(launch, capability) for launch in dry.launches)
    except RuntimeError as error:  # only values tell a size
        if not any(words in str(error) for words in ("data-dependent", "meta tensors")):
            raise


def compiled(work: tuple[Job, int]) -> dict[str, Any]:
    """Registers, spills and shared memory of one kernel."""
    (name, aligned, signature, constants, attributes, warps, stages), capability = work
    module, function = name.split(":")
    kernel = getattr(__import__(module, fromlist=[function]), function)
    jit = kernel.vector if aligned else kernel.scalar
    order = jit.arg_names

    def place(key: tuple[Any, ...]) -> tuple[int, ...]:
        return order.index(key[0]), *key[1:]

    source = ASTSource(
        jit,
        {n: signature[n] for n in order},
        {place(key): value for key, value in constants.items()},
        {place(key): [["tt.divisibility", value]] for key, value in attributes.items()},
    )
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    mma = sorted(
        set(re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*", binary.asm["ptx"]))
    )
    return {
        "kernel": name,
        "capability": capability,
        "aligned": aligned,
        "types": " ".join(str(signature[n]) for n in order if signature[n] != "constexpr"),
        "constants": {".".join(map(str, key)): value for key, value in constants.items()},
        "warps": warps,
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
    options = parser.parse_args()
    ops.load()
    work = [job for capability in options.capabilities for job in jobs(options.only, capability)]
    with multiprocessing.Pool(2) as pool:
        for result in pool.imap_unordered(compiled, work):
            print(json.dumps(result, default=str), flush=True)


if __name__ == "__main__":
    main()
