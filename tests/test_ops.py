"""Every op × case × dtype × backend against its reference in float64; names no op."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from trial import (
    BACKENDS,
    DEVICE,
    MAIN,
    THREADED,
    arguments,
    assert_same_bits,
    batch_size,
    batched_case,
    every_case,
    every_op,
    fresh,
    repeated,
    rows_of,
    run,
    wide,
)

from tokenkernels import _native
from tokenkernels._op import OPS, Case, Op, tensors_in


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_truth(op: Op, case: Case, dtype: torch.dtype, backend: str) -> None:
    if dtype not in case.dtypes:
        pytest.skip("a case of other dtypes")
    got = run(op, arguments(op, case, dtype), backend)
    want = op.run(wide(arguments(op, case, dtype)), "reference")
    op.check(got, want, op.low(arguments(op, case, dtype)), arguments(op, case, dtype))


@every_case
@pytest.mark.parametrize("backend", MAIN)
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(
    op: Op, case: Case, backend: str
) -> None:
    kwargs = arguments(op, case)
    first = run(op, kwargs, backend)
    if "inplace" not in case.tags:
        assert_same_bits(tensors_in(kwargs), tensors_in(arguments(op, case)))
        assert_same_bits(run(op, kwargs, backend), first)
    assert_same_bits(run(op, arguments(op, case), backend), first)


@batched_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", MAIN)
def test_an_image_does_not_depend_on_its_batch(
    op: Op, case: Case, dtype: torch.dtype, backend: str
) -> None:
    if dtype not in case.dtypes:
        pytest.skip("a case of other dtypes")
    whole = run(op, arguments(op, case, dtype), backend)
    size = batch_size(op, arguments(op, case, dtype))
    for cut in {1, size - 1} - {0, size}:
        head = run(op, rows_of(op, arguments(op, case, dtype), slice(0, cut)), backend)
        tail = run(op, rows_of(op, arguments(op, case, dtype), slice(cut, size)), backend)
        rows = [int(h[-1]) for h, t, w in zip(head, tail, whole, strict=True) if _counts(h, t, w)]
        for h, t, w in zip(head, tail, whole, strict=True):
            if _counts(h, t, w):
                assert_same_bits([torch.cat([h, t[1:] + h[-1]])], [w])
                continue
            dim = _batch_dim(w, h, t)
            behind = not w.dtype.is_floating_point and not torch.equal(torch.cat([h, t], dim), w)
            assert_same_bits([torch.cat([h, t + rows[0] if rows and behind else t], dim)], [w])


def _counts(head: torch.Tensor, tail: torch.Tensor, whole: torch.Tensor) -> bool:
    """Offsets of the images in packed rows: one more entry than there are images."""
    return whole.ndim == 1 and len(whole) == len(head) + len(tail) - 1


def _batch_dim(whole: torch.Tensor, head: torch.Tensor, tail: torch.Tensor) -> int:
    sums = [d for d in range(whole.ndim) if head.shape[d] + tail.shape[d] == whole.shape[d]]
    return sums[0] if sums else 0


@batched_case
@pytest.mark.parametrize("backend", MAIN)
def test_an_empty_batch_gives_empty_results(op: Op, case: Case, backend: str) -> None:
    kwargs = rows_of(op, arguments(op, case), slice(0, 0))
    assert_same_bits(run(op, kwargs, backend), op.run(kwargs, "reference"))


def _inside_a_larger_buffer(x: Any) -> Any:
    """The same values with other strides: rows stay contiguous, and are no longer aligned."""
    if not isinstance(x, torch.Tensor) or x.ndim < 2:
        return x
    shape = [s + 1 for s in x.shape[:-1]] + [x.shape[-1] + 3]
    buffer = (
        torch.full(shape, torch.nan if x.dtype.is_floating_point else 1, dtype=torch.float32)
        .to(x.dtype)
        .to(x.device)
    )
    view = buffer[(*tuple(slice(0, s) for s in x.shape[:-1]), slice(1, 1 + x.shape[-1]))]
    return view.copy_(x)


def _last_dimension_apart(x: Any) -> Any:
    return x.mT.contiguous().mT if isinstance(x, torch.Tensor) and x.ndim >= 2 else x


@every_case
@pytest.mark.parametrize(
    "strides", [_inside_a_larger_buffer, _last_dimension_apart], ids=["rows", "columns"]
)
@pytest.mark.parametrize("backend", MAIN)
def test_strides_do_not_matter(op: Op, case: Case, strides: Any, backend: str) -> None:
    if "inplace" in case.tags and strides is _last_dimension_apart:
        pytest.skip("in place, the last dimension must be contiguous")
    assert_same_bits(
        run(op, tree_map(strides, arguments(op, case)), backend),
        run(op, arguments(op, case), backend),
    )


@every_case
@pytest.mark.parametrize("backend", MAIN)
def test_memory_that_arrives_poisoned_does_not_show(op: Op, case: Case, backend: str) -> None:
    want = run(op, arguments(op, case), backend)
    torch.use_deterministic_algorithms(True)
    _native.poison(True)
    try:
        got = run(op, arguments(op, case), backend)
    finally:
        _native.poison(False)
        torch.use_deterministic_algorithms(False)
    assert_same_bits(got, want)


def _gradients(op: Op, kwargs: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """Of all outputs, given seeds that are always the same, with respect to all that has one."""
    inputs = [
        t for n in op.differentiable for t in tensors_in(kwargs.get(n)) if t.dtype.is_floating_point
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    found = op.run(kwargs, backend) if backend == "reference" else run(op, kwargs, backend)
    outputs = [t for t in found if t.requires_grad]
    make = torch.Generator().manual_seed(7)
    seeds = [torch.randn(t.shape, generator=make).to(t.device).to(t.dtype) for t in outputs]
    grads = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]


@every_case
@pytest.mark.parametrize("backend", MAIN)
def test_gradient(op: Op, case: Case, backend: str) -> None:
    if not op.differentiable:
        pytest.skip("no gradient")
    got = _gradients(op, arguments(op, case), backend)
    want = _gradients(op, wide(arguments(op, case)), "reference")
    low = _gradients(op, arguments(op, case), "reference")
    op.check_gradients(got, want, low, arguments(op, case))


def _with_threads(op: Op, draw: Callable[[], dict[str, Any]], backend: str) -> None:
    """Results and gradients are the same bits with one thread, two and three."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has no threads of the host")
    before, found = torch.get_num_threads(), []
    drawn = [(draw(), draw()) for _ in range(3)]  # by torch, whose own sums depend on the threads
    try:
        for threads, (once, again) in enumerate(drawn, 1):
            torch.set_num_threads(threads)
            results = run(op, once, backend)
            found.append(results + (_gradients(op, again, backend) if op.differentiable else []))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@every_case
@pytest.mark.parametrize("backend", THREADED)
def test_threads_do_not_matter(op: Op, case: Case, backend: str) -> None:
    _with_threads(op, lambda: arguments(op, case), backend)


@every_op
@pytest.mark.parametrize("backend", THREADED)
def test_threads_do_not_matter_where_there_is_work_for_all(op: Op, backend: str) -> None:
    """The first case for many images; where there are none, the first case of the benchmark."""
    timed = [case for case in op.cases if "bench" in case.tags][:1]
    if op.batch:
        _with_threads(op, lambda: repeated(op, arguments(op, op.cases[0]), 256), backend)
    elif timed:
        _with_threads(op, lambda: arguments(op, timed[0]), backend)
    else:
        pytest.skip("tried as the gradient of another op")


bad_entries = [(op, number) for op in OPS.values() for number in range(len(op.refused))]


@pytest.mark.parametrize(
    ("op", "number"), bad_entries, ids=[f"{op.name}-{n}" for op, n in bad_entries]
)
@pytest.mark.parametrize("backend", [None, "reference", "native", "triton"])
def test_errors(op: Op, number: int, backend: str | None) -> None:
    change, error, pattern = op.refused[number]
    kwargs = arguments(op, op.cases[0])
    on_gpu = backend == "triton" or (DEVICE == "cuda" and backend != "reference")
    if on_gpu and number >= len(op.bad):
        pytest.skip("looking at values would wait for the GPU")
    if backend == "reference" and "reference" in pattern:
        pytest.skip("the reference takes this one")
    if backend in ("native", "triton") and (reason := op.why_not(backend, DEVICE)):
        pytest.skip(reason)
    with pytest.raises(error, match=pattern):
        op.run(kwargs | change(kwargs), backend)


bad_values = [(op, number) for op in OPS.values() for number in range(len(op.bad_values))]


@pytest.mark.parametrize(
    ("op", "number"), bad_values, ids=[f"{op.name}-{n}" for op, n in bad_values]
)
@pytest.mark.parametrize("backend", [b for b in MAIN if b in ("native", "triton")])
def test_errors_in_values_are_passed_over_where_nobody_looks(
    op: Op, number: int, backend: str
) -> None:
    """What is right beside them is as it would be without."""
    bad, kwargs = op.bad_values[number], arguments(op, op.cases[0])
    change = bad.change(kwargs)
    got = run(op, fresh(kwargs) | change, backend)
    if bad.instead is not None:
        good = fresh(kwargs) | bad.instead(kwargs)
        assert_same_bits(got, run(op, good, backend))
        return
    options = {name: value for name, value in change.items() if not tensors_in(value)}
    want = run(op, fresh(kwargs) | options, backend)
    for image in range(batch_size(op, kwargs) if set(change) <= {*op.batch, *options} else 0):
        here = slice(image, image + 1)
        rows = rows_of(op, kwargs, here), rows_of(op, kwargs | change, here)
        if all(map(torch.equal, *map(tensors_in, rows))):
            assert_same_bits([t[here] for t in got], [t[here] for t in want])


@pytest.mark.parametrize("backend", ["cpu", ["native"]], ids=["unknown", "list"])
def test_unknown_backend_is_refused(backend: Any) -> None:
    allowed = re.escape(f"backend: allowed native, triton, reference, got {backend!r}")
    for op in OPS.values():
        if op.cases:
            with pytest.raises(ValueError, match=allowed):
                op.run(arguments(op, op.cases[0]), backend)
