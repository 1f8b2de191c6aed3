"""What ops refuse, for torch tensors and NumPy arrays alike; imports neither. Every message: op,
argument, allowed, got.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NoReturn

NAMES = (
    "float64", "float32", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
DTYPES: dict[Any, str] = {}
"""dtype object → name; each front (torch, NumPy) enters its own."""
FLOATS = ("float32", "float16", "bfloat16")
DEFAULT_BACKEND: str | None = None


def fail(
    op: str, name: str, allowed: str, got: Any, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `error` in the one form that every refusal has."""
    raise error(f"{op}: {name}: allowed {allowed}, got {got}")


def dtype(op: str, name: str, x: Any, allowed: tuple[str, ...]) -> str:
    """The name of x's dtype, which must be one of `allowed`."""
    known = DTYPES.get(getattr(x, "dtype", None))
    if known not in allowed:
        fail(op, name, "a tensor of " + ", ".join(allowed), known or _describe(x), TypeError)
    return known


def floating(op: str, name: str, x: Any, backend: str | None = None) -> str:
    """The name of x's floating dtype; float64 is for the reference only."""
    known = DTYPES.get(getattr(x, "dtype", None))
    if known in FLOATS:
        return known
    if known == "float64":
        if (backend or DEFAULT_BACKEND) == "reference":
            return known
        fail(
            op,
            name,
            'float32, float16, bfloat16 (float64 only with backend="reference")',
            known,
            TypeError,
        )
    fail(op, name, "a tensor of float32, float16, bfloat16", known or _describe(x), TypeError)


def same_dtype(op: str, name: str, x: Any, like: Any, like_name: str) -> None:
    """x has the dtype of `like`."""
    if getattr(x, "dtype", None) != like.dtype:
        fail(op, name, f"the dtype of {like_name} ({_name(like)})", _name(x), TypeError)


def rank(op: str, name: str, x: Any, *allowed: int) -> None:
    """x has one of these numbers of dimensions."""
    if getattr(x, "ndim", None) not in allowed:
        fail(op, name, f"{' or '.join(map(str, allowed))} dimensions", _describe(x))


def shape(op: str, name: str, x: Any, *expected: int | None) -> None:
    """x has exactly this shape; None stands for any size."""
    got = getattr(x, "shape", ())
    if len(got) != len(expected) or any(
        e is not None and e != g for e, g in zip(expected, got, strict=True)
    ):
        sizes = ", ".join("*" if e is None else str(e) for e in expected)
        fail(op, name, f"shape ({sizes})", _describe(x))


def same_device(op: str, name: str, x: Any, like: Any, like_name: str) -> None:
    """x lives where `like` does."""
    if x.device != like.device:
        fail(op, name, f"the device of {like_name} ({like.device})", x.device)


def integer(op: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """value is a whole number of low … high (no upper end where high is None)."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        fail(op, name, "an int", _describe(value), TypeError)
    if value < low or (high is not None and value > high):  # type: ignore[operator]
        fail(op, name, f"{low} … {'' if high is None else high}", value)


def number(op: str, name: str, value: Any) -> None:
    """value is a plain number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or hasattr(value, "ndim"):
        fail(op, name, "a number", _describe(value), TypeError)


def flag(op: str, name: str, value: Any) -> None:
    """value is True or False."""
    if not isinstance(value, bool):
        fail(op, name, "True, False", _describe(value), TypeError)


def choice(op: str, name: str, value: Any, *allowed: Any) -> None:
    """value is one of `allowed`."""
    if value not in allowed:
        fail(op, name, ", ".join(map(repr, allowed)), repr(value))


def _name(x: Any) -> str:
    return DTYPES.get(getattr(x, "dtype", None)) or _describe(x)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r:.60}"
