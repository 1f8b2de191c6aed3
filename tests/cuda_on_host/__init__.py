"""CUDA kernels on the CPU, for tests: builds the object, registers its kernels as one more overload
of their ops, and starts the child processes in which they run.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from alone import alone

from tokenkernels import ops
from tokenkernels._op import OPS

KIND = "cuda_on_host"
ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cmake"
FAULT = 86
"""What a process ends with in which a kernel did something wrong."""

OWN = tuple(
    f"tests/ops/test_{name}.py" for name in ("aggregate_edges", "assign_exact", "slim_gradients")
)
"""Tests of single ops, besides those of the registry, that know this overload."""

loaded: list[str] = []
"""The ops whose CUDA kernels run here, once `load` was called."""


@cache
def build(target: str) -> Path:
    """The object or program of that name, made anew where a source has changed."""
    if not (BUILD / "build.ninja").exists():
        pytest.skip("no native build in this checkout")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the context switch of the executor is written for x86-64")
    command = ["cmake", "--build", str(BUILD), "--target", target]
    with alone(BUILD):
        done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / KIND / target


def load() -> None:
    """Registers `<op>.cuda_on_host` for every op that has a CUDA kernel."""
    path = build(KIND).with_suffix(".so")
    ops.load()
    torch.ops.load_library(str(path))
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
    for op in OPS.values():
        if f"tokenkernels::{op.name}.{KIND}" in registered:
            op.extend(KIND, "cpu")
            loaded.append(op.name)


def schedule(words: str) -> None:
    """Blocks start in this order and so many at a time ("descending,1", "shuffled,all"), instead of
    in all of nine ways in turn, launch by launch.
    """
    order, _, window = words.partition(",")
    path = build(KIND).with_suffix(".so")
    orders = ("ascending", "descending", "shuffled")
    count = 0 if window in ("", "all") else int(window)
    ctypes.CDLL(str(path)).tokenkernels_schedule(orders.index(order), count)


class Noted(NamedTuple):
    """One launch: the kernel as the compiler names it, or "memset", and its grid."""

    kernel: str
    blocks: int
    threads: int
    cluster: int
    shared: int


def noted(call: Callable[[], Any], multiprocessors: int) -> list[Noted]:
    """What a call would launch on a GPU so large; nothing runs, so its results mean nothing, and
    one that reads them may break off.
    """
    object_ = ctypes.CDLL(str(build(KIND).with_suffix(".so")))
    object_.tokenkernels_launches_noted.restype = ctypes.c_char_p
    object_.tokenkernels_play(ctypes.c_int64(multiprocessors))
    try:
        with suppress(RuntimeError, ValueError, IndexError):
            call()
        lines = object_.tokenkernels_launches_noted().decode().splitlines()
    finally:
        object_.tokenkernels_play(ctypes.c_int64(0))
    split = [line.split("\t") for line in lines]
    return [Noted(name, *map(int, numbers)) for name, *numbers in split]


def claim_hopper() -> None:
    """Launchers find a GPU whose groups of warps multiply (csrc/cuda/launch_wgmma.cuh)."""
    ctypes.CDLL(str(build(KIND).with_suffix(".so"))).tokenkernels_claim_group_products(1)


def plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}


def checked_environment() -> dict[str, str]:
    """One without GPUs, in which the address sanitizer knows where every allocation ends."""
    names = ("libasan.so", "libstdc++.so")
    command = [os.environ.get("CXX", "c++")]
    found = [
        subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    ]
    paths = [done.stdout.strip() for done in found]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("this compiler has no address sanitizer")
    return plain_environment() | {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
    }


def run_tests(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The tests of the registry, and of exactness, on this overload, in a process of their own."""
    command = [
        *(sys.executable, "-m", "pytest", "tests/test_ops.py", *OWN),
        *("--cuda-on-host", "--capture=sys", "-q", "-k", KIND, *arguments),
    ]
    build(KIND)
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=checked_environment()
    )
