"""Every op of the registry as torch sees it: registration, compilation, export, gradients; names
no op.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import library
from torch.utils._pytree import tree_map
from trial import (
    DEVICE,
    MAIN,
    arguments,
    assert_same_bits,
    batch_size,
    every_case,
    every_op,
    fresh,
    repeated,
    run,
    wide,
)

from tokenkernels import _op as registry
from tokenkernels._op import Case, Op, tensors_in

on_each = pytest.mark.parametrize("backend", MAIN)


def kind(backend: str) -> str:
    """The backend, whatever the instruction set."""
    return backend.partition("-")[0]


@every_case
@pytest.mark.parametrize("backend", ["reference", *MAIN])
def test_registration(op: Op, case: Case, backend: str) -> None:
    """opcheck of every schema op that a call reaches, with gradients asked for where there are
    any.
    """
    if "no-opcheck" in case.tags:
        pytest.skip("opcheck takes NaN, or another rounding, for a difference")
    kwargs = arguments(op, case)
    for name in op.differentiable:
        for tensor in tensors_in(kwargs.get(name)):
            tensor.requires_grad_(tensor.dtype.is_floating_point)
    with registry.recording() as calls:
        run(op, kwargs, backend)
    assert calls
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for _, overload, args in calls:
        library.opcheck(overload, args, test_utils=tests if DEVICE == "cpu" else tests[:3])


class _Whole(torch.nn.Module):
    def __init__(self, op: Op, kwargs: dict[str, Any], backend: str) -> None:
        super().__init__()
        self.op, self.backend = op, backend
        self.constants = {n: v for n, v in kwargs.items() if not tensors_in(v)}

    def forward(self, tensors: dict[str, Any]) -> list[torch.Tensor]:
        return tensors_in(self.op.function(**tensors, **self.constants, backend=self.backend))


@every_case
@on_each
def test_compile_in_one_graph(op: Op, case: Case, backend: str) -> None:
    """The public function is compiled without a break, the compiled one is called, and gives what
    eager gives.
    """
    if op.function is None or "uncompilable" in case.tags:
        pytest.skip(
            "no public function to compile" if op.function is None else "needs a value on the host"
        )
    kwargs = arguments(op, case)
    module = _Whole(op, kwargs, kind(backend))
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    want = run(op, arguments(op, case), backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(fresh(tensors)), want)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_bits(compiled(fresh(tensors)), want)


@every_op
@on_each
def test_another_size_does_not_recompile(op: Op, backend: str) -> None:
    """Sizes are symbols: after the second one seen, a third compiles nothing."""
    if op.function is None or not op.batch:
        pytest.skip("no batch to vary")
    kwargs = arguments(op, op.cases[0])
    size = batch_size(op, kwargs)
    module = _Whole(op, kwargs, kind(backend))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    compiled(tensors)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(repeated(op, tensors, 2) if size > 1 else tensors)


@every_op
@on_each
def test_another_count_does_not_recompile(op: Op, backend: str) -> None:
    """A count that decides a shape is a symbol too."""
    trials = [
        (name, kwargs)
        for case in op.cases
        if "test" in case.tags
        for kwargs in [arguments(op, case)]
        for name in op.sizes
        if type(kwargs.get(name)) is int and kwargs[name] >= 4
    ][:1]
    if not trials:
        pytest.skip("no count to vary")
    name, kwargs = trials[0]
    count = kwargs.pop(name)
    module = _Whole(op, kwargs, kind(backend))
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (count, count - 1):
        assert_same_bits(compiled(tensors | {name: given}), module(tensors | {name: given}))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(tensors | {name: count - 2})


@every_op
@on_each
def test_autocast_casts_before_it_checks(op: Op, backend: str) -> None:
    """Under autocast float32 gives the dtypes that bfloat16 gives, and so does a mix of both."""
    if op.function is None or not op.casts:
        pytest.skip("no public function" if op.function is None else "moves any dtype as it is")
    high, low = (arguments(op, op.cases[0], kind) for kind in (torch.float32, torch.bfloat16))
    first = next(iter(low))
    with torch.autocast(DEVICE, torch.bfloat16):
        want, *others = (
            [t.dtype for t in run(op, kwargs, backend)]
            for kwargs in (low, high, high | {first: low[first]})
        )
    assert others == [want, want]


@every_op
@on_each
def test_a_second_derivative_is_refused(op: Op, backend: str) -> None:
    if not op.differentiable:
        pytest.skip("no gradient")
    kwargs = arguments(op, op.cases[0])
    inputs = [
        t.requires_grad_()
        for n in op.differentiable
        for t in tensors_in(kwargs.get(n))
        if t.dtype.is_floating_point
    ]
    total = sum(t.sum() for t in run(op, kwargs, backend) if t.requires_grad)
    found = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=f"{op.name}: no second derivative"):
        sum(g.square().sum() for g in found if g is not None).backward()


@every_op
@on_each
def test_export(op: Op, backend: str) -> None:
    if op.function is None:
        pytest.skip("no public function to export")
    kwargs = arguments(op, op.cases[0])
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    module = _Whole(op, kwargs, kind(backend))
    program = torch.export.export(module, (tensors,))
    assert_same_bits(program.module()(tensors), module(tensors))


@every_case
def test_gradient_of_the_reference(op: Op, case: Case) -> None:
    if not op.differentiable or "no-gradcheck" in case.tags:
        pytest.skip("no gradient, or a step in it")
    kwargs = wide(arguments(op, case))
    slots = [
        t for n in op.differentiable for t in tensors_in(kwargs.get(n)) if t.dtype.is_floating_point
    ]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        swap = {id(s): v for s, v in zip(slots, values, strict=True)}
        outputs = op.run(tree_map(lambda t: swap.get(id(t), t), kwargs), "reference")
        return tuple(t for t in outputs if t.requires_grad)

    values = tuple(s.detach().clone().requires_grad_() for s in slots)
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
