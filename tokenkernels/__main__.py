"""`python -m tokenkernels`: `doctor` says what is there and why not; `bench` runs the benchmarks
of a checkout.
"""

from __future__ import annotations

import argparse
import platform
import runpy
import sys
from pathlib import Path

import torch

from . import __version__, _native, ops
from ._op import BACKENDS, DEFAULT_BACKEND, OPS, Op


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenkernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is there, and why not")
    commands.add_parser("bench", help="time every op against what people use today", add_help=False)
    chosen, rest = parser.parse_known_args()
    return doctor() if chosen.command == "doctor" else bench(rest)


def doctor() -> int:
    """Prints versions, what the build contains, and every op's backends on every device."""
    ops.load()
    print(
        f"tokenkernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if _native.WHY_NOT:
        print(f"native: no: {_native.WHY_NOT}")
    else:
        print(f"native: yes, CPU instruction set {_native.instruction_set()}; CUDA code: {_cuda()}")
        print(f"        compiled for {_native.compiled_for() or 'no GPU'}")
    print(f"numpy:  {_numpy()}")
    if foreign := _foreign():
        print(f"\nwarning: no native CUDA: {foreign}; build it with {_wanted()}")
    for device in ("cpu", "cuda"):
        absent = " (no GPU here)" * (device == "cuda" and not torch.cuda.is_available())
        print(f"\n{device}{absent}")
        print(f"  {'op':<20} {'runs':<10} {'native':<7} {'triton':<7} why not")
        for op in OPS.values():
            if op.function is not None:
                print("  " + _line(op, device).rstrip())
    return 0


def _line(op: Op, device: str) -> str:
    """The backend that a call gets, whether native and Triton could, and why one cannot."""
    reasons = {backend: op.why_not(backend, device) for backend in BACKENDS}
    runs = op._choose(DEFAULT_BACKEND, device) or "nothing"
    can = ["no" if reasons[backend] else "yes" for backend in ("native", "triton")]
    why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason)
    return f"{op.name:<20} {runs:<10} {can[0]:<7} {can[1]:<7} {why}"


def _foreign() -> str | None:
    """Why native CUDA code that is there does not run on this GPU."""
    return _native.why_not_gpu() if _has_cuda() else None


def _wanted() -> str:
    """The CMake option that adds the GPUs here."""
    numbers = [f"{major}{minor}" + "a" * (major == 9) for major, minor in _native.gpus()]
    return f'CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES={";".join(numbers)}"'


def _has_cuda() -> bool:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("tokenkernels::fill", "CUDA")
    return bool(registered)


def _cuda() -> str:
    if not _has_cuda():
        return "none (built without nvcc)"
    if not torch.cuda.is_available():
        return "built in, no GPU here to run it"
    try:
        x = torch.zeros(3, device="cuda")
        good = bool((torch.ops.tokenkernels.fill(x, 2.0) == 2).all())
        return "runs on this GPU" if good else "gives wrong results on this GPU"
    except RuntimeError as error:
        return f"does not run on this GPU: {error}"


def _numpy() -> str:
    try:
        from . import _numpy as core
    except ImportError as error:
        return f"no: {error}"
    return f"yes, CPU instruction set {core.instruction_set()}"


def bench(arguments: list[str]) -> int:
    """Hands over to the bench folder, which lives in the checkout and not in the package."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "__main__.py").exists():
        print(
            "bench: needs a checkout of the repository (the package has no bench folder)",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(checkout))
    sys.argv = ["bench", *arguments]
    runpy.run_module("bench", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
