"""Compiles the Triton kernels of many cells on all cores before any is timed: each is called once.

`python -m bench.gpu.warm NUMBER COUNT CELL...` calls every COUNT-th of the cells.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def all_cores(names: list[str], seconds: float) -> None:
    """Kernels arrive in Triton's cache on disk, those of the first cells first."""
    count = max(1, min(12, (os.cpu_count() or 2) - 2, len(names)))
    until = time.monotonic() + seconds
    command = [sys.executable, "-m", "bench.gpu.warm"]
    running = [
        subprocess.Popen([*command, str(i), str(count), *names], cwd=ROOT) for i in range(count)
    ]
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        process.kill()
        process.wait()


def main(number: str, count: str, *names: str) -> None:
    from bench.contenders import contenders, fresh, prepared
    from bench.gpu import cells, timing

    known = {str(cell): cell for cell in cells.ordered(dry=False)}
    for name in names[int(number) :: int(count)]:
        cell = known[name]
        try:
            with cell.mode():
                ours = next(c for c in contenders(cell) if c.name == "triton")
                prepared(cell, fresh(cell, cell.kwargs()), ours.function)()
            timing.synchronize()
        except Exception as error:  # the cell itself will tell
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
            if timing.is_fatal(str(error)):
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
