"""Op, the registry, and the choice of a backend: every fact about an op is declared once and read
from here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import library
from torch.utils._pytree import tree_map

from . import _native, checks
from ._case import Bad, BadValues, Case, Make, close, no_worse

__all__ = ["OPS", "Case", "Make", "Op", "autocast", "close", "tensors_in"]

LIB = library.Library("tokenkernels", "DEF")
# CUDA only: doctor asks it whether the GPU code of this build runs.
LIB.define("fill(Tensor x, float value) -> Tensor")
OPS: dict[str, Op] = {}
BACKENDS = ("native", "triton", "reference")
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
DEFAULT_BACKEND = os.environ.get("TOKENKERNELS_BACKEND") or None
if DEFAULT_BACKEND not in (None, *BACKENDS):
    raise ValueError(
        f"TOKENKERNELS_BACKEND: allowed {', '.join(BACKENDS)}, got {DEFAULT_BACKEND!r}"
    )

checks.DEFAULT_BACKEND = DEFAULT_BACKEND
checks.DTYPES.update({getattr(torch, name): name for name in checks.NAMES if hasattr(torch, name)})

_recorder: list[tuple[Any, Any, tuple[Any, ...]]] | None = None


def _zero_cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    return 0, 0


@dataclass(eq=False)
class Op:
    """One operation: building the object defines its overloads, their shapes and their gradient.

    `schema` is a torch schema without namespace. `reference` and `fake` take its arguments;
    `function` is the public function that `cases` call by keyword (without one, cases hold the
    schema's arguments in order). `cost` gives the bytes and flops that a call must at least move
    and do, `length` its longest sum (and
    `gradient_length` that of its gradients; four times as long by default), `supports` a reason per
    backend that cannot run it. `backward(run, ctx, *grads)` calls other ops through `run(OP,
    *args)`, which keeps to the overload that ran forward.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cases: list[Case]
    function: Callable[..., Any] | None = None
    bad: list[Bad] = field(default_factory=list)
    bad_values: list[BadValues] = field(default_factory=list)
    cost: Callable[[dict[str, Any]], tuple[float, float]] = _zero_cost
    length: Callable[[dict[str, Any]], float] = lambda kwargs: 1
    gradient_length: Callable[[dict[str, Any]], float] | None = None
    differentiable: tuple[str, ...] = ()
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., Any] | None = None
    compare: Callable[..., None] | None = None
    formula: Callable[..., Any] | None = None
    """The op as models write it, rounded at every step: no bfloat16 kernel may be further off. For
    ops whose kernels round operands for the matrix units, as the reference does not.
    """
    supports: dict[str, str | Callable[[dict[str, Any]], str | None]] = field(default_factory=dict)
    batch: tuple[str, ...] = ()
    """The arguments whose first dimension counts independent images: test_ops slices them."""
    casts: bool = True
    """Whether autocast reaches this op; False where rows move as bytes."""
    launches: Callable[[dict[str, Any]], tuple[int, int]] | None = None
    """The most launches a call takes on a GPU, forward and backward; a memset or a copy counts."""
    waits: Callable[[dict[str, Any]], int] = lambda kwargs: 0
    """How often a call waits for a GPU: once where values on it decide how many rows there are."""
    sizes: tuple[str, ...] = ()
    """The integer arguments that decide a shape: test_ops_torch varies them."""

    def __post_init__(self) -> None:
        self.name = self.schema.split("(", 1)[0]
        arguments = self.schema[len(self.name) :]
        self.overloads: dict[tuple[str | None, str], Any] = {}
        self._kinds: dict[str, Any] = {}
        self._define("native", self.name, arguments)
        self._define("reference", f"{self.name}.reference", arguments)
        LIB.impl(f"{self.name}.reference", self.reference, "CompositeExplicitAutograd")
        if importlib.util.find_spec(f"tokenkernels.triton.{self.name}"):
            self._define("triton", f"{self.name}.triton", arguments)
            LIB.impl(f"{self.name}.triton", self._triton, "CompositeExplicitAutograd")
        for backend in (None, "native", "reference"):
            if (backend or DEFAULT_BACKEND) == "triton":
                continue  # and whatever a GPU runs: only once asked for, the answer loads either
            if chosen := self._choose(backend or DEFAULT_BACKEND, "cpu"):
                self.overloads[backend, "cpu"] = self._kinds[chosen]
        OPS[self.name] = self

    @property
    def refused(self) -> list[Bad]:
        """All calls that raise on a CPU."""
        return self.bad + [(one.change, ValueError, one.words) for one in self.bad_values]

    def _define(self, kind: str, name: str, arguments: str) -> None:
        LIB.define(name + arguments)
        qualified = f"tokenkernels::{name}"
        library.register_fake(qualified, self.fake, lib=LIB)
        if self.backward is not None:
            library.register_autograd(
                qualified,
                partial(_differentiate_once, self, partial(_run, kind)),
                setup_context=self.setup_context,
                lib=LIB,
            )
        packet = getattr(torch.ops.tokenkernels, self.name)
        self._kinds[kind] = getattr(packet, "default" if kind == "native" else kind)

    def extend(self, kind: str, device: str) -> None:
        """One more overload, for tests: `<op>.<kind>`, whose kernel somebody else registers."""
        self._define(kind, f"{self.name}.{kind}", self.schema[len(self.name) :])
        self.overloads[kind, device] = self._kinds[kind]

    def _triton(self, *args: Any) -> Any:
        module = importlib.import_module(f"tokenkernels.triton.{self.name}")
        return getattr(module, self.name)(*args)

    def _choose(self, backend: str | None, device: str) -> str | None:
        """The backend asked for, or the first of all that runs here."""
        if backend is None and device not in DEVICES:
            return None
        order = (backend,) if backend else BACKENDS if device != "cpu" else ("native", "reference")
        return next((kind for kind in order if self.why_not(kind, device) is None), None)

    def why_not(
        self, backend: str, device: str, kwargs: dict[str, Any] | None = None
    ) -> str | None:
        """None where `backend` can run this op on `device` (with these arguments), else the reason
        in words.
        """
        if backend == "native":
            if _native.WHY_NOT:
                return _native.WHY_NOT
            key = DEVICES.get(device, "")
            if not key or not torch._C._dispatch_has_kernel_for_dispatch_key(
                f"tokenkernels::{self.name}", key
            ):
                return f"the shared object has no {self.name} for {device}"
            if device == "cuda" and (foreign := _native.why_not_gpu()):
                return foreign
        elif backend not in self._kinds:
            return f"there is no {backend} kernel of {self.name}"
        if backend == "triton":
            if missing := _no_triton(device):
                return missing
            self.overloads.setdefault(("triton", device), self._kinds["triton"])
        reason = self.supports.get(backend)
        if callable(reason):
            return reason(kwargs) if kwargs is not None else None
        return reason

    def __call__(self, backend: str | None, device: str, /, *args: Any) -> Any:
        """Runs the schema op on `device`, by the best backend there or the one asked for."""
        named = backend is None or isinstance(backend, str)
        overload = self.overloads.get((backend, device)) if named else None
        if overload is None:
            overload = self._late(backend, device)
        if torch.compiler.is_compiling():
            return overload(*args)
        if _recorder is not None:
            _recorder.append((self, overload, args))
        try:
            return overload(*args)
        except RuntimeError as error:
            if str(error).startswith(f"{self.name}: "):
                raise ValueError(str(error).split("\n")[0]) from None
            raise

    def _late(self, backend: str | None, device: str) -> Any:
        """The overload of a backend that is looked for when it is first asked for, or a refusal."""
        chosen = None
        if backend is None or backend in BACKENDS:
            chosen = _chosen(self.name, backend or DEFAULT_BACKEND, device)
        if chosen is None:
            raise self._refusal(backend, device)
        self.overloads[backend, device] = self._kinds[chosen]
        return self._kinds[chosen]

    def _refusal(self, backend: str | None, device: str) -> Exception:
        if backend is not None and backend not in BACKENDS:
            return ValueError(
                f"{self.name}: backend: allowed {', '.join(BACKENDS)}, got {backend!r}"
            )
        if backend is None:
            return RuntimeError(
                f'{self.name}: nothing runs on device {device!r}; backend="reference" does'
            )
        return RuntimeError(
            f"{self.name}: backend {backend!r} cannot run: {self.why_not(backend, device)}"
        )

    def run(self, kwargs: dict[str, Any], backend: str | None = None) -> list[torch.Tensor]:
        """Calls the op with the arguments of a case and lays its results flat."""
        if self.function is not None:
            return tensors_in(self.function(**kwargs, backend=backend))
        device = next(t.device.type for t in tensors_in(list(kwargs.values())))
        return tensors_in(self(backend, device, *kwargs.values()))

    def measured_by_formula(self, kwargs: dict[str, Any]) -> bool:
        """Whether `low` of the checks is what `formula` gives, not the reference."""
        first = next(iter(tensors_in(kwargs)), None)
        return self.formula is not None and first is not None and first.dtype == torch.bfloat16

    def low(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """What the checks measure rounding by: a run in the dtype of the arguments."""
        if self.measured_by_formula(kwargs):
            assert self.formula is not None
            return tensors_in(self.formula(**kwargs))
        return self.run(kwargs, "reference")

    def check(
        self,
        got: list[torch.Tensor],
        want: list[torch.Tensor],
        low: list[torch.Tensor],
        kwargs: dict[str, Any],
    ) -> None:
        """Raises AssertionError where `got` is not as close to `want` (reference in float64) as
        this op must be.
        """
        if self.measured_by_formula(kwargs):
            no_worse(got, want, low)
        if self.compare is not None:
            self.compare(got, want, low, kwargs)
        else:
            close(got, want, low, self.length(kwargs))

    def check_gradients(
        self,
        got: list[torch.Tensor],
        want: list[torch.Tensor],
        low: list[torch.Tensor],
        kwargs: dict[str, Any],
    ) -> None:
        """The same for gradients, which pass through twice the sums of the forward, of products."""
        if self.measured_by_formula(kwargs):
            no_worse(got, want, low)
        length = self.gradient_length or (lambda kwargs: 4 * self.length(kwargs))
        close(got, want, low, length(kwargs))


def _chosen(name: str, backend: str | None, device: str) -> str | None:
    return OPS[name]._choose(backend, device)


# What torch.compiler.assume_constant_result does, which would load the compiler: a trace does not
# look into how a backend is chosen.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_triton(device: str) -> str | None:
    """Why no Triton kernel runs on `device`; on a CPU its interpreter does, for tests."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cuda":
        return None
    launch = importlib.import_module("tokenkernels.triton._launch")
    return None if launch.INTERPRETED else "Triton needs a GPU (or TRITON_INTERPRET=1)"


def _run(kind: str, op: Op, *args: Any) -> Any:
    return op._kinds[kind](*args)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: no second derivative")


def _differentiate_once(op: Op, run: Callable[..., Any], ctx: Any, *grads: Any) -> Any:
    """The gradients of `op`; where a graph of them is wanted, it ends in an error, not in zeros."""
    assert op.backward is not None
    if not torch.is_grad_enabled():
        return op.backward(run, ctx, *grads)

    def end(gradient: Any) -> Any:
        if not isinstance(gradient, torch.Tensor):
            return gradient
        return _NoSecondDerivative.apply(op.name, gradient.detach().requires_grad_())

    with torch.no_grad():
        results = op.backward(run, ctx, *grads)
    return tree_map(end, results)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nest of tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def autocast(*values: Any) -> tuple[Any, ...]:
    """The values as autocast wants them: floating tensors in its dtype where it is on for the
    device of the first; what is no tensor stays, for the check to refuse.
    """
    if not values or not isinstance(values[0], torch.Tensor):
        return values
    kind = values[0].device.type
    if kind not in DEVICES or not torch.is_autocast_enabled(kind):
        return values
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        v.to(dtype) if isinstance(v, torch.Tensor) and v.dtype.is_floating_point else v
        for v in values
    )


@contextmanager
def recording() -> Iterator[list[tuple[Any, Any, tuple[Any, ...]]]]:
    """Collects (op, overload, arguments) of every schema op called inside: what opcheck wants to
    see.
    """
    global _recorder
    before = _recorder
    calls: list[tuple[Any, Any, tuple[Any, ...]]] = []
    _recorder = calls
    try:
        yield calls
    finally:
        _recorder = before
