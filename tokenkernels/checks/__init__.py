"""What ops refuse, for torch tensors and NumPy arrays alike; imports neither. Every message: op,
argument, allowed, got.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NoReturn

NAMES = (
    "float64", "float32", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
DTYPES: dict[Any, str] = {}
"""torch's dtype object → name."""
ARRAY_DTYPES: dict[Any, str] = {}
"""NumPy's dtype object → name."""
NUMPY = "numpy"
"""The backend that checks are told where the NumPy front calls."""
FLOATS = ("float32", "float16", "bfloat16")
DEFAULT_BACKEND: str | None = None


def fail(
    op: str, name: str, allowed: str, got: Any, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `error` in the one form that every refusal has."""
    raise error(f"{op}: {name}: allowed {allowed}, got {got}")


def dtype(op: str, name: str, x: Any, allowed: tuple[str, ...]) -> str:
    """The name of x's dtype, which must be one of `allowed`."""
    found = getattr(x, "dtype", None)
    known = DTYPES.get(found) or ARRAY_DTYPES.get(found)
    if known not in allowed:
        fail(op, name, "a tensor of " + ", ".join(allowed), known or _describe(x), TypeError)
    return known


def floating(op: str, name: str, x: Any, backend: str | None = None) -> str:
    """The name of x's floating dtype; float64 is for the reference only, and the arrays of one
    front are not for the other.
    """
    found = getattr(x, "dtype", None)
    known = (ARRAY_DTYPES if backend == NUMPY else DTYPES).get(found)
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
    kind = "a tensor"
    if not known and (found in DTYPES or found in ARRAY_DTYPES):
        kind = "a NumPy array" if backend == NUMPY else "a torch tensor"
    fail(op, name, f"{kind} of float32, float16, bfloat16", known or _describe(x), TypeError)


def same_dtype(op: str, name: str, x: Any, like: Any, like_name: str) -> None:
    """x has the dtype of `like`."""
    if getattr(x, "dtype", None) != like.dtype:
        if _name(x) == _name(like):
            fail(op, name, f"{type(like).__name__} as {like_name}", _describe(x), TypeError)
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


def same_kind(op: str, name: str, x: Any, like: Any) -> None:
    """x is a tensor, or an array, as `like` is."""
    if type(getattr(x, "device", None)) is not type(like.device):
        fail(op, name, type(like).__name__, _describe(x), TypeError)


def same_device(op: str, name: str, x: Any, like: Any, like_name: str) -> None:
    """x lives where `like` does."""
    if x.device != like.device:
        if type(x.device) is not type(like.device):
            fail(op, name, f"{type(like).__name__} as {like_name}", _describe(x), TypeError)
        fail(op, name, f"the device of {like_name} ({like.device})", x.device)


def integer(op: str, name: str, value: Any, low: int, high: int = 2**62) -> None:
    """value is a whole number of low … high."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        fail(op, name, "an int", _describe(value), TypeError)
    if value < low or value > high:  # type: ignore[operator]
        fail(op, name, f"{low} … {high}", f"{value!r:.60}")


def number(op: str, name: str, value: Any) -> None:
    """value is a plain number that a float holds."""
    if isinstance(value, float):
        return
    if isinstance(value, (int, Real)) and not isinstance(value, bool):
        if isinstance(value, int) and not -1e308 <= value <= 1e308:
            fail(op, name, "a number that a float holds", "a longer int")
        return
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or hasattr(value, "ndim"):
        fail(op, name, "a number", _describe(value), TypeError)


def flag(op: str, name: str, value: Any) -> None:
    """value is True or False."""
    if not isinstance(value, bool):
        fail(op, name, "True, False", _describe(value), TypeError)


def choice(op: str, name: str, value: Any, *allowed: Any) -> None:
    """value is one of `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        got = repr(value) if isinstance(value, str) else _describe(value)
        fail(op, name, ", ".join(map(repr, allowed)), got)


def numbers_of_numpy(op: str, name: str, x: Any) -> None:
    """x is a NumPy array whose elements are bytes to move: neither objects nor nothing."""
    if not hasattr(x, "__array_finalize__") or x.dtype.hasobject or x.itemsize == 0:
        got = type(x).__name__
        if hasattr(x, "dtype"):
            got += f" of {x.dtype}"
        fail(op, name, "NumPy arrays of numbers", got, TypeError)


def _name(x: Any) -> str:
    found = getattr(x, "dtype", None)
    return DTYPES.get(found) or ARRAY_DTYPES.get(found) or _describe(x)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{type(x).__name__} of shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r:.60}"
