"""Every op × case × dtype × backend of the registry against its reference in float64; names no op."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from tokenkernels import _native
from tokenkernels import _op as registry
from tokenkernels._op import OPS, Case, Op, tensors_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTRUCTION_SETS = (
    []
    if _native.WHY_NOT
    else [s for s in ("avx512", "avx2", "baseline") if _native.set_instruction_set(s)]
)
if INSTRUCTION_SETS:
    _native.set_instruction_set(INSTRUCTION_SETS[0])
BEST = INSTRUCTION_SETS[:1]
NATIVE = ["native"] if DEVICE == "cuda" else [f"native-{s}" for s in INSTRUCTION_SETS]
BACKENDS = NATIVE + ["triton"] * any(op.why_not("triton", DEVICE) is None for op in OPS.values())
MAIN = [b for b in BACKENDS if b in ("native", "triton", *(f"native-{s}" for s in BEST))]

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
    size = _batch_size(op, arguments(op, case, dtype))
    for cut in {1, size - 1} - {0, size}:
        head = run(op, _rows(op, arguments(op, case, dtype), slice(0, cut)), backend)
        tail = run(op, _rows(op, arguments(op, case, dtype), slice(cut, size)), backend)
        for number, (h, t, w) in enumerate(zip(head, tail, whole, strict=True)):
            if w.dtype.is_floating_point:
                joined = torch.cat([h, t], _batch_dim(w, h, t))
                assert_same_bits([joined], [w]), number


def _batch_dim(whole: torch.Tensor, head: torch.Tensor, tail: torch.Tensor) -> int:
    sums = [d for d in range(whole.ndim) if head.shape[d] + tail.shape[d] == whole.shape[d]]
    return sums[0] if sums else 0


def _batch_size(op: Op, kwargs: dict[str, Any]) -> int:
    return next(t for t in tensors_in([kwargs.get(name) for name in op.batch])).shape[0]


def _rows(op: Op, kwargs: dict[str, Any], rows: slice) -> dict[str, Any]:
    size = _batch_size(op, kwargs)

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


@batched_case
@pytest.mark.parametrize("backend", MAIN)
def test_an_empty_batch_gives_empty_results(op: Op, case: Case, backend: str) -> None:
    kwargs = _rows(op, arguments(op, case), slice(0, 0))
    want = op.run(kwargs, "reference")
    assert_same_bits(
        [t for t in run(op, kwargs, backend) if t.numel() == 0], [t for t in want if t.numel() == 0]
    )


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
    view = buffer[tuple(slice(0, s) for s in x.shape[:-1]) + (slice(1, 1 + x.shape[-1]),)]
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
@pytest.mark.parametrize("backend", ["reference", *MAIN])
def test_registration(op: Op, case: Case, backend: str) -> None:
    """opcheck of every schema op that a call reaches, with gradients asked for where there are
    any.
    """
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
        torch.library.opcheck(overload, args, test_utils=tests if DEVICE == "cpu" else tests[:3])


class _Whole(torch.nn.Module):
    def __init__(self, op: Op, kwargs: dict[str, Any], backend: str) -> None:
        super().__init__()
        self.op, self.backend = op, backend
        self.constants = {n: v for n, v in kwargs.items() if not tensors_in(v)}

    def forward(self, tensors: dict[str, Any]) -> list[torch.Tensor]:
        return tensors_in(self.op.function(**tensors, **self.constants, backend=self.backend))


@every_case
def test_compile_in_one_graph(op: Op, case: Case) -> None:
    """The public function is compiled without a break, the compiled one is called, and gives what
    eager gives.
    """
    if op.function is None or "uncompilable" in case.tags:
        pytest.skip(
            "no public function to compile" if op.function is None else "needs a value on the host"
        )
    kwargs = arguments(op, case)
    backend = MAIN[0].partition("-")[0]
    module = _Whole(op, kwargs, backend)
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    want = run(op, arguments(op, case), MAIN[0])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(fresh(tensors)), want)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_bits(compiled(fresh(tensors)), want)


@every_op
def test_another_size_does_not_recompile(op: Op) -> None:
    """Sizes are symbols: after the second one seen, a third compiles nothing."""
    if op.function is None or not op.batch:
        pytest.skip("no batch to vary")
    kwargs = arguments(op, op.cases[0])
    size = _batch_size(op, kwargs)
    module = _Whole(op, kwargs, MAIN[0].partition("-")[0])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    compiled(tensors)
    repeated = {
        n: tree_map(lambda t: torch.cat([t, t]), v) if n in op.batch else v
        for n, v in tensors.items()
    }
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(repeated if size > 1 else tensors)


@every_op
def test_export(op: Op) -> None:
    if op.function is None:
        pytest.skip("no public function to export")
    kwargs = arguments(op, op.cases[0])
    tensors = {n: v for n, v in kwargs.items() if tensors_in(v)}
    module = _Whole(op, kwargs, MAIN[0].partition("-")[0])
    program = torch.export.export(module, (tensors,))
    assert_same_bits(program.module()(tensors), module(tensors))


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
    registry.close(got, want, low, 4 * op.length(arguments(op, case)))


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


def test_unknown_backend_is_refused() -> None:
    for op in OPS.values():
        if op.cases:
            with pytest.raises(
                ValueError, match="backend: allowed native, triton, reference, got 'cpu'"
            ):
                op.run(arguments(op, op.cases[0]), "cpu")


JUNK = [
    None,
    -1,
    0,
    1,
    7,
    2**40,
    -(2**63),
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
            return like.expand(2, *like.shape) if draw.random() < 0.5 else like.flatten()
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
