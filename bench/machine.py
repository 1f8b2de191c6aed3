"""The machine that a run was made on, and the settings that make two runs comparable."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from tokenkernels import _native

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
PACKAGES = ("torch", "triton", "numpy", "faiss-cpu", "vector-quantize-pytorch", "scikit-learn")
ROOT = Path(__file__).parent.parent


def environment(threads: int) -> dict[str, str]:
    """What has to stand in the environment before a process starts that times something.

    glibc gives freed blocks back to the system by default, and every large output is then paid for in page faults.
    """
    return MALLOC | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))


def settle(threads: int | None = None) -> int:
    """Does the same for a process that runs already, as far as that goes; returns the number of threads."""
    threads = threads or torch.get_num_threads()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    os.environ.update(environment(threads))
    torch.set_num_threads(threads)
    return threads


def facts() -> dict[str, Any]:
    """Processor, memory, versions, commit: what a figure is worth nothing without."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo")) or 0) / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": _native.WHY_NOT or _native.instruction_set(),
        "python": platform.python_version(),
        "compiler": _output("c++", "--version").split("\n")[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"),
        "threads": torch.get_num_threads(),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
    }


def _first(pattern: str, path: Path) -> str | None:
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
