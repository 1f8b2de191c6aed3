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
from ._op import BACKENDS, OPS, Op


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
    print(f"numpy:  {_numpy()}")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        print(f"\n{device}: op, the backend it runs on, and why not on the others")
        for op in OPS.values():
            if op.function is not None:
                print("  " + _line(op, device))
    return 0


def _line(op: Op, device: str) -> str:
    reasons = {backend: op.why_not(backend, device) for backend in BACKENDS}
    runs = next((b for b, why in reasons.items() if why is None), "nothing")
    others = "; ".join(f"{b}: {why}" for b, why in reasons.items() if why)
    return f"{op.name:<20} {runs:<10} {others}"


def _cuda() -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("tokenkernels::fill", "CUDA"):
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
