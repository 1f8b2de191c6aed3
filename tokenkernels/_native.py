"""Loads the shared object once, and remembers why it could not."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).parent / "_torch.so"


def _load() -> str | None:
    if not PATH.exists():
        return f"{PATH.name} is not built (no C++ compiler, or TOKENKERNELS_NATIVE=OFF)"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{PATH.name} does not load: {error}"
    return None


WHY_NOT: str | None = _load()
"""None where the shared object is loaded, else the reason in words."""


def instruction_set() -> str:
    """The CPU instruction set whose kernels run: "avx512bf16", "avx512", "avx2" or "baseline"."""
    function = ctypes.CDLL(str(PATH)).tokenkernels_instruction_set
    function.restype = ctypes.c_char_p
    return function().decode()


def set_instruction_set(name: str) -> bool:
    """Chooses another instruction set, for tests; False where the processor lacks it."""
    return bool(ctypes.CDLL(str(PATH)).tokenkernels_set_instruction_set(name.encode()))


def poison(on: bool) -> None:
    """Fills what kernels borrow with NaN before they get it, for tests."""
    if WHY_NOT:
        return
    ctypes.CDLL(str(PATH)).tokenkernels_poison(int(on))


def architectures() -> list[str]:
    """The GPUs that the CUDA code is compiled for, as CMake calls them: "90a-real" is machine code
    for that GPU only, "80-virtual" what a driver compiles for any later one, "80" both.
    """
    function = ctypes.CDLL(str(PATH)).tokenkernels_cuda_architectures
    function.restype = ctypes.c_char_p
    return [name for name in function().decode().split(",") if name]


def compiled_for() -> str:
    """The same in the words of nvcc: sm_90a is machine code, compute_80 what a driver compiles."""
    names = []
    for architecture in architectures():
        number, _, kind = architecture.partition("-")
        names += [f"sm_{number}"] * (kind != "virtual") + [f"compute_{number}"] * (kind != "real")
    return ", ".join(names)


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of that compute capability runs what was compiled for `architecture`."""
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    assert found, architecture
    major, minor = int(found[1]), int(found[2])
    if found[3] == "a":
        return capability == (major, minor)
    same_family = capability[0] == major and capability[1] >= minor
    if found[3] == "f" or found[4] == "-real":
        return same_family
    return same_family or capability >= (major, minor)


def gpus() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs here, each once."""
    if not torch.cuda.is_available():
        return []
    every = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(index) for index in every})


@cache
def why_not_gpu() -> str | None:
    """Why the CUDA code does not run on the GPUs here: it has to run on all of them."""
    for gpu in gpus():
        if not any(covers(architecture, gpu) for architecture in architectures()):
            return f"compiled for {compiled_for()}, the GPU here is an sm_{gpu[0]}{gpu[1]}"
    return None
