"""What only a GPU shows, op by op: how often it is waited for, how much is launched, and that CUDA
graphs hold every call of a fixed budget; names no op.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from trial import DEVICE, MAIN, arguments, assert_same_bits, every_case, fresh, run

from bench.gpu.timing import launched
from tokenkernels import _op as registry
from tokenkernels._case import Make
from tokenkernels._op import OPS, Case, Op, tensors_in

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
    pytest.mark.parametrize("backend", MAIN),
]
Call = Callable[[], Any]
if torch.cuda.is_available():  # it warns of itself once, and not while calls are watched
    torch.cuda.set_sync_debug_mode("default")


@every_case
def test_it_waits_for_the_gpu_no_more_often_than_it_says(op: Op, case: Case, backend: str) -> None:
    run(op, arguments(op, case), backend)  # compiles
    kwargs = arguments(op, case)
    assert op.waits(kwargs) <= 1
    if op.waits(kwargs):
        assert waits(partial(run, op, kwargs, backend)) <= 1
    else:
        with no_waiting():
            run(op, kwargs, backend)


@every_case
def test_gradients_never_wait_for_the_gpu(op: Op, case: Case, backend: str) -> None:
    inputs, call = backward_of(op, arguments(op, case), backend)
    if not inputs:
        pytest.skip("no gradient")
    want = call()
    with no_waiting():
        got = call()
    assert_same_bits(got, want)


@every_case
def test_the_profiler_counts_no_more_launches_than_promised(
    op: Op, case: Case, backend: str
) -> None:
    """Of the schema ops themselves: the public function may cast integers before."""
    if op.launches is None:
        pytest.skip("promises nothing")
    kwargs = arguments(op, case)
    with registry.recording() as calls:
        run(op, kwargs, backend)
    names = counted([partial(overload, *args) for _, overload, args in calls])
    most, most_backward = op.launches(kwargs)
    copied = [name for name in names if "DtoH" in name]
    assert len(copied) <= op.waits(kwargs)
    assert len(names) - len(copied) <= most, names
    inputs, call = backward_of(op, kwargs, backend)
    if inputs:
        with noted(backend) as ops_called:
            call()
        names = counted(ops_called)
        assert len(names) <= most_backward, names


@every_case
def test_a_graph_replays_the_call_on_other_inputs(op: Op, case: Case, backend: str) -> None:
    if op.waits(arguments(op, case)):
        pytest.skip("values decide how many rows there are")
    first, second = fresh(arguments(op, case)), fresh(redrawn(op, case))
    static = fresh(first)
    run(op, static, backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(op, static, backend)
    for kwargs in (second, first, second):
        copy(kwargs, static)
        graph.replay()
        assert_same_bits([t.clone() for t in outputs], run(op, fresh(kwargs), backend))


@every_case
def test_a_graph_replays_gradients_on_other_inputs(op: Op, case: Case, backend: str) -> None:
    if op.waits(arguments(op, case)) or not op.differentiable:
        pytest.skip("no gradient, or values decide how many rows there are")
    first, second = fresh(arguments(op, case)), fresh(redrawn(op, case))
    static = fresh(first)
    inputs, _ = backward_of(op, static, backend)
    if not inputs:
        pytest.skip("no gradient")

    def gradients(kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return backward_of(op, kwargs, backend)[1]()

    gradients(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = gradients(static)
    for kwargs in (second, first):
        copy(kwargs, static)
        graph.replay()
        assert_same_bits([t.clone() for t in outputs], gradients(fresh(kwargs)))


def redrawn(op: Op, case: Case) -> dict[str, Any]:
    """Other numbers for the same call; those of the case where its shapes hang on what is drawn."""
    usual = arguments(op, case)
    other = case.make(Make(f"{case.id} again", torch.float32, DEVICE))
    return other if laid_out(usual) == laid_out(other) else usual


def laid_out(kwargs: dict[str, Any]) -> str:
    return repr(
        tree_map(
            lambda v: (v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v, kwargs
        )
    )


def copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    with torch.no_grad():
        for to, value in zip(tensors_in(target), tensors_in(source), strict=True):
            to.copy_(value)


def backward_of(
    op: Op, kwargs: dict[str, Any], backend: str
) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """What gradients are taken of, and a call that takes them of all outputs."""
    names = op.differentiable
    inputs = [t for n in names for t in tensors_in(kwargs.get(n)) if t.dtype.is_floating_point]
    if not inputs:
        return [], lambda: []
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = [t for t in run(op, kwargs, backend) if t.requires_grad]
    seeds = [torch.ones_like(t) for t in outputs]

    def call() -> list[torch.Tensor]:
        found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
        return [g for g in found if g is not None]

    return inputs, call


@contextmanager
def no_waiting() -> Iterator[None]:
    """A call that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(call: Call) -> int:
    """How often a call waits for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


@contextmanager
def noted(backend: str) -> Iterator[list[Call]]:
    """Collects the schema ops that gradients call."""
    calls: list[Call] = []
    kept = {op: op._kinds[backend] for op in OPS.values() if backend in op._kinds}

    def note(overload: Any, *args: Any) -> Any:
        calls.append(partial(overload, *args))
        return overload(*args)

    try:
        for op, overload in kept.items():
            op._kinds[backend] = partial(note, overload)
        yield calls
    finally:
        for op, overload in kept.items():
            op._kinds[backend] = overload


def counted(calls: list[Call]) -> list[str]:
    """Kernels, copies and memsets of the calls, each made before to compile it."""
    names = []
    with torch.no_grad():
        for call in calls:
            call()
            seen = launched(call)
            if not seen:
                seen = launched(call)
            names += seen
    if calls and not names:
        pytest.skip("the profiler sees nothing here")
    return names
