"""The machine that a run was made on: what a figure is worth nothing without."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.settings import MALLOC
from tokenkernels import _native

PACKAGES = ("torch", "triton", "numpy", "faiss-cpu", "vector-quantize-pytorch", "scikit-learn")
ROOT = Path(__file__).parent.parent


def facts() -> dict[str, Any]:
    """Processor, memory, versions, commit, settings."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(
            int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo")) or 0) / 2**20, 1
        ),
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
