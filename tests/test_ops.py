"""Every op × case × dtype × backend against its reference in float64; names no op."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from trial import (
    BACKENDS,
    DEVICE,
    MAIN,
    arguments,
    assert_same_bits,
    batch_size,
    batched_case,
    every_case,
    fresh,
    rows_of,
    run,
    wide,
)

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
    op.check(got, want, op.run(arguments(op, case, dtype), "reference"), arguments(op, case, dtype))


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
        for h, t, w in zip(head, tail, whole, strict=True):
            if w.dtype.is_floating_point:
                joined = torch.cat([h, t], _batch_dim(w, h, t))
                assert_same_bits([joined], [w])


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
    try:
        got = run(op, arguments(op, case), backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(got, want)


@every_case
@pytest.mark.parametrize("backend", MAIN)
def test_gradient(op: Op, case: Case, backend: str) -> None:
    if not op.differentiable:
        pytest.skip("no gradient")

    def gradients(kwargs: dict[str, Any], kind: str) -> list[torch.Tensor]:
        inputs = [
            t
            for n in op.differentiable
            for t in tensors_in(kwargs.get(n))
            if t.dtype.is_floating_point
        ]
        for tensor in inputs:
            tensor.requires_grad_()
        outputs = [
            t
            for t in (run(op, kwargs, kind) if kind != "reference" else op.run(kwargs, kind))
            if t.requires_grad
        ]
        make = torch.Generator().manual_seed(7)
        seeds = [torch.randn(t.shape, generator=make).to(t.device).to(t.dtype) for t in outputs]
        found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]

    got = gradients(arguments(op, case), backend)
    want = gradients(wide(arguments(op, case)), "reference")
    low = gradients(arguments(op, case), "reference")
    op.check_gradients(got, want, low, arguments(op, case))


bad_entries = [(op, number) for op in OPS.values() for number in range(len(op.bad))]


@pytest.mark.parametrize(
    ("op", "number"), bad_entries, ids=[f"{op.name}-{n}" for op, n in bad_entries]
)
@pytest.mark.parametrize("backend", [None, "reference", "native"])
def test_errors(op: Op, number: int, backend: str | None) -> None:
    change, error, pattern = op.bad[number]
    kwargs = arguments(op, op.cases[0])
    if backend == "reference" and "reference" in pattern:
        pytest.skip("the reference takes this one")
    if backend == "native" and op.why_not("native", DEVICE):
        pytest.skip(op.why_not("native", DEVICE))
    with pytest.raises(error, match=pattern):
        op.run(kwargs | change(kwargs), backend)


@pytest.mark.parametrize("backend", ["cpu", ["native"]], ids=["unknown", "list"])
def test_unknown_backend_is_refused(backend: Any) -> None:
    allowed = re.escape(f"backend: allowed native, triton, reference, got {backend!r}")
    for op in OPS.values():
        if op.cases:
            with pytest.raises(ValueError, match=allowed):
                op.run(arguments(op, op.cases[0]), backend)


JUNK = [
    None,
    -1,
    0,
    1,
    7,
    2**40,
    2**63,
    -(2**63),
    10**400,
    np.int64(3),
    1.5,
    float("nan"),
    "x",
    "",
    [],
    [1],
    [-1, 2, 3],
    (),
    {},
    b"",
    object(),
    True,
]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
]


def _junk(draw: random.Random, like: Any) -> Any:
    """Something that an argument is not meant to be, often close to what it is."""
    if isinstance(like, torch.Tensor) and draw.random() < 0.7:
        kind = draw.randrange(4)
        if kind == 0:
            return like.to(draw.choice(DTYPES))
        if kind == 1:
            return (
                like[draw.randrange(like.shape[0] + 1) :]
                if like.ndim and like.shape[0]
                else like.reshape(-1)
            )
        if kind == 2:
            empty = like[..., :0] if like.ndim else like[None]
            return draw.choice([like.expand(2, *like.shape), like.flatten(), empty])
        return like * draw.choice([-1, 0, 1000]) if like.dtype != torch.bool else ~like
    if isinstance(like, (list, tuple)) and like and draw.random() < 0.5:
        changed = list(like)
        changed[draw.randrange(len(changed))] = _junk(draw, changed[0])
        return type(like)(changed) if type(like) in (list, tuple) else changed
    if draw.random() < 0.3:
        shape = [draw.randrange(4) for _ in range(draw.randrange(5))]
        return torch.ones(shape).to(draw.choice(DTYPES))
    return draw.choice(JUNK)


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.function and op.cases], ids=lambda op: op.name
)
def test_ten_thousand_bad_calls_end_in_words(op: Op) -> None:
    draw = random.Random(op.name)
    cases = [case for case in op.cases if "test" in case.tags]
    prepared = [arguments(op, case) for case in cases]
    for _ in range(10_000):
        number = draw.randrange(len(cases))
        kwargs = (
            fresh(prepared[number]) if "inplace" in cases[number].tags else dict(prepared[number])
        )
        for name in draw.sample(sorted(kwargs), min(len(kwargs), draw.randint(1, 2))):
            kwargs[name] = _junk(draw, kwargs[name])
        try:
            op.run(kwargs)
        except (ValueError, TypeError) as error:
            assert str(error)
