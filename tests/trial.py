"""How the registry is tried: cases by dtype and backend, in every instruction set the processor
has.
"""

from __future__ import annotations

from typing import Any

import cuda_on_host
import pytest
import torch
from torch.utils._pytree import tree_map

from tokenkernels import _native, ops
from tokenkernels._op import OPS, Case, Op, tensors_in

ops.load()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTRUCTION_SETS = (
    []
    if _native.WHY_NOT
    else [s for s in ("avx512bf16", "avx512", "avx2", "baseline") if _native.set_instruction_set(s)]
)
if INSTRUCTION_SETS:
    _native.set_instruction_set(INSTRUCTION_SETS[0])
BEST = INSTRUCTION_SETS[:1]
HERE = ["native"] * any(op.why_not("native", DEVICE) is None for op in OPS.values())
NATIVE = HERE if DEVICE == "cuda" else [f"native-{s}" for s in INSTRUCTION_SETS]
if cuda_on_host.loaded:
    BACKENDS, MAIN, THREADED = [cuda_on_host.KIND], [cuda_on_host.KIND], []
else:
    TRITON = ["triton"] * any(op.why_not("triton", DEVICE) is None for op in OPS.values())
    BACKENDS = NATIVE + TRITON
    MAIN = [b for b in BACKENDS if b in ("native", "triton", *(f"native-{s}" for s in BEST))]
    THREADED = MAIN

test_cases = [(op, case) for op in OPS.values() for case in op.cases if "test" in case.tags]
every_case = pytest.mark.parametrize(
    ("op", "case"), test_cases, ids=[f"{op.name}-{case.id}" for op, case in test_cases]
)
every_op = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.cases], ids=lambda op: op.name
)
batched_cases = [(op, case) for op, case in test_cases if op.batch and "coupled" not in case.tags]
batched_case = pytest.mark.parametrize(
    ("op", "case"), batched_cases, ids=[f"{op.name}-{case.id}" for op, case in batched_cases]
)


def arguments(op: Op, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return case.kwargs(dtype, DEVICE)


def wide(kwargs: Any) -> Any:
    return tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.dtype.is_floating_point else t,
        kwargs,
    )


def fresh(kwargs: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, kwargs)


def run(op: Op, kwargs: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """One call by the backend named, or a skip with the reason."""
    kind, _, instruction_set = backend.partition("-")
    reason = op.why_not(kind, DEVICE, kwargs)
    if reason:
        pytest.skip(reason)
    if instruction_set:
        _native.set_instruction_set(instruction_set)
    try:
        return op.run(kwargs, kind)
    finally:
        if instruction_set:
            _native.set_instruction_set(INSTRUCTION_SETS[0])


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype, (
            f"output {number}: {g.shape} {g.dtype}, {w.shape} {w.dtype}"
        )
        same = g == w
        if g.dtype.is_floating_point:
            same |= g.isnan() & w.isnan()
        assert same.all(), f"output {number}: other bits at {(~same).nonzero()[:4].tolist()}"


def batch_size(op: Op, kwargs: dict[str, Any]) -> int:
    return next(t for t in tensors_in([kwargs.get(name) for name in op.batch])).shape[0]


def repeated(op: Op, kwargs: dict[str, Any], times: int) -> dict[str, Any]:
    """The same images several times in one batch."""
    return {
        n: tree_map(lambda t: torch.cat([t] * times) if isinstance(t, torch.Tensor) else t, v)
        if n in op.batch
        else v
        for n, v in kwargs.items()
    }


def rows_of(op: Op, kwargs: dict[str, Any], rows: slice) -> dict[str, Any]:
    size = batch_size(op, kwargs)

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows]
        if (
            isinstance(value, (list, tuple))
            and value
            and isinstance(value[0], (torch.Tensor, list, tuple))
        ):
            return type(value)(take(item) for item in value)
        return value

    sliced = {name: take(value) if name in op.batch else value for name, value in kwargs.items()}
    return {
        n: v[rows] if isinstance(v, list) and len(v) == size and isinstance(v[0], int) else v
        for n, v in sliced.items()
    }
