"""Loads the shared object once, and remembers why it could not."""

from __future__ import annotations

import ctypes
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
