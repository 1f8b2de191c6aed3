"""What has to be set before a process may time anything; imports nothing that would already have
started threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc gives freed blocks back to the system by default: every large output would be paid for in
page faults.
"""
COMPILED = {
    "TORCHINDUCTOR_CACHE_DIR": str(Path(__file__).parent / "out" / "compiled"),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
"""What torch.compile made of the peers is kept for the next run; it starts no workers, which would
disturb what is timed.
"""
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def restart(threads: int | None = None) -> None:
    """Starts this process again, with the environment that it needs, unless it has that already."""
    wanted = MALLOC | COMPILED | dict.fromkeys(POOLS, str(threads or default_threads()))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def default_threads() -> int:
    """As many as the environment says, else one per core that this process may use."""
    return int(os.environ.get(POOLS[0]) or len(os.sched_getaffinity(0)))


def keep_freed_memory() -> None:
    """What `MALLOC` does, for a process that runs already."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory() -> None:
    """Hands back to the system what was freed: large cells must not add up."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
