"""How many multiply-adds and exponentials a GPU does per second: chains of them in registers, which
nothing but their own units holds up.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from bench.gpu.timing import has_gpu, in_turns

BLOCK, STEPS, BLOCKS = 1024, 1024, 132 * 16
"""Eight chains for each thread of four warps, and programs enough to fill every multiprocessor."""
UNROLLED = tl.constexpr(16)
SMALL = 2.0**-10
FACTOR, ADDEND = tl.constexpr(1 + SMALL), tl.constexpr(SMALL)
TOLERANCE = 3e-4
"""A quarter and less of what one step more or less changes, in whichever chain."""


@triton.jit
def chain_kernel(  # type: ignore[no-untyped-def]  # the compiler would look these types up
    x_ptr, out_ptr, steps, EXPONENTIALS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Either x ← (1 + 2⁻¹⁰) x + 2⁻¹⁰ or x ← x + 2⁻ˣ, so many times: both grow with every step, and
    so tell how many there were. The addition hides behind the exponential, which takes longer.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    for _ in range(steps // UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = x + tl.exp2(-x) if EXPONENTIALS else tl.fma(x, FACTOR, ADDEND)
    tl.store(out_ptr + place, x)


def measure(seconds: float) -> dict[str, float]:
    """Flop/s of multiply-adds, "fma", and exponentials/s, "exp".

    Raises:
        AssertionError: a chain did not end where it must.
    """
    device, blocks, steps = ("cuda", BLOCKS, STEPS) if has_gpu() else ("cpu", 1, 32)
    x = torch.linspace(0.1, 0.9, blocks * BLOCK, device=device)
    rates = {}
    for name, exponentials, each in (("fma", False, 2), ("exp", True, 1)):
        out = torch.empty_like(x)
        call = partial(
            chain_kernel[(blocks,)], x, out, steps, EXPONENTIALS=exponentials, BLOCK=BLOCK
        )
        took = in_turns({name: [call]}, seconds / 2)[name]
        error = (out.double() - ended(x.double(), steps, exponentials)).abs().max().item()
        assert error <= TOLERANCE, f"the chain of {name} is off by {error:.2g}"
        rates[name] = each * steps * x.numel() / took.ms * 1e3
    return rates


def ended(x: torch.Tensor, steps: int, exponentials: bool) -> torch.Tensor:
    """Where the chain ends."""
    for _ in range(steps):
        x = x + torch.exp2(-x) if exponentials else x * FACTOR.value + ADDEND.value
    return x
