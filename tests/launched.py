"""Launches every Triton kernel through Triton's own launcher, without a GPU.

`python tests/launched.py FOLDER [DTYPE …]` calls what the bench calls, and small cases of what that
does not reach; compiles for sm_90 and prints a line of JSON for each compilation. The driver is
`no_driver.c`, built in the folder, which runs nothing. A process of its own: here kernels are
compiled, not interpreted; the Triton is the first in PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from ahead_of_time import resources
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from tokenkernels import ops
from tokenkernels._op import OPS, Case, Op, tensors_in
from tokenkernels.triton import _launch

LIBRARY = "libcuda.so.1"
DTYPES = sys.argv[2:]


def restart(folder: Path) -> None:
    """This process once more, where the driver is found."""
    source = Path(__file__).with_name("no_driver.c")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, "libcuda.so"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / name, source], check=True)
    known = os.environ.get("LD_LIBRARY_PATH")
    paths = {
        "LD_LIBRARY_PATH": f"{folder}:{known}" if known else str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | paths)


def play_a_gpu() -> None:
    """Device 0 and its stream are there as far as Triton asks; memory is never without values, so
    that sizes that follow from what nobody computed are 0.
    """
    torch.cuda.current_device = lambda: 0
    gpu: Any = CudaDriver()
    gpu.get_current_device = lambda: 0
    gpu.get_current_stream = lambda _device=None: 0
    gpu.get_device_capability = lambda _device=None: (9, 0)
    driver.set_active(gpu)
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]


def call(op: Op, case: Case, dtype: torch.dtype) -> None:
    """Forward, and backward where there is a gradient."""
    kwargs = case.kwargs(dtype)
    inputs = [t for n in op.differentiable for t in tensors_in(kwargs.get(n))]
    inputs = [t.requires_grad_() for t in inputs if t.dtype.is_floating_point]
    outputs = [t for t in op.run(kwargs, "triton") if t.requires_grad]
    if outputs:
        seeds = [torch.zeros_like(t) for t in outputs]
        torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)


def calls() -> Iterator[tuple[Op, Case, torch.dtype]]:
    """All of the bench, then each small case that would launch a kernel that no call has yet."""
    reached: set[_launch.Kernel] = set()
    for tag in ("bench", "test"):
        for op in OPS.values():
            for case in op.cases:
                for dtype in case.dtypes if tag in case.tags else ():
                    if DTYPES and str(dtype).removeprefix("torch.") not in DTYPES:
                        continue
                    with _launch.recording(False, 90) as record:
                        call(op, case, dtype)
                    kernels = {launch.kernel for launch in record.launches}
                    if tag == "bench" or not kernels <= reached:
                        reached |= kernels
                        yield op, case, dtype


def compiled(kernels: set[_launch.Kernel]) -> Iterator[dict[str, Any]]:
    """What was made of each of them."""
    for kernel in kernels:
        for aligned in (True, False):
            function = kernel.variant(aligned)
            for cache in function.device_caches.values():
                for built in cache[0].values():
                    name = f"{function.module}:{kernel.name}"
                    yield {"kernel": name, **resources(built.asm["cubin"])}


def main() -> None:
    folder = Path(sys.argv[1])
    if os.environ.get("TRITON_LIBCUDA_PATH") != str(folder):
        restart(folder)
    play_a_gpu()
    ops.load()
    for op in OPS.values():
        op.overloads["triton", "cpu"] = op._kinds["triton"]
    counter = ctypes.c_long.in_dll(ctypes.CDLL(LIBRARY), "launched")
    kernels: set[_launch.Kernel] = set()
    for op, case, dtype in calls():
        before = counter.value
        with _launch.recording(capability=90) as record:
            call(op, case, dtype)
        launched = counter.value - before
        assert launched == len(record.launches), f"{op.name} {case.id}: {launched} launches"
        kernels |= {launch.kernel for launch in record.launches}
    for line in compiled(kernels):
        print(json.dumps(line | {"triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
