"""Calls that are wrong in some way, drawn at random from good ones; names no op.

As a script it makes such calls itself, in a process that may die of them: `junk.py schema COUNT
FILE` calls the schema ops, `junk.py numpy COUNT FILE` the functions on arrays. FILE always holds
the op and the number of the call under way, from which `bad_schema_call` and `bad_numpy_call` draw
the same arguments again.
"""

from __future__ import annotations

import functools
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from trial import DEVICE, arguments, fresh

from tokenkernels import _op as registry
from tokenkernels._op import OPS, Op, tensors_in

ANYTHING = [
    None, -1, 0, 1, 7, 2**40, 2**63, -(2**63), 10**400, np.int64(3), 1.5, float("nan"), "x", "",
    [], [1], [-1, 2, 3], (), {}, b"", object(), True,
]  # fmt: skip
INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 2, 7, 700, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
NUMBERS = [0.0, -1.0, 0.5, 1e300, 1e-300, float("inf"), -float("inf"), float("nan")]
WORDS = ["", "x", "index", "score", "sum", "mean"]
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.bool, torch.uint8,
]  # fmt: skip
ARRAY_DTYPES = ["f4", "f2", "f8", "i8", "i4", "u1", "?", "c8", ">f4", "S3", "O"]

Draw = random.Random


def other_tensor(draw: Draw, like: Any = None) -> torch.Tensor:
    """A small tensor of any shape and dtype, which `like` has no part in."""
    shape = [draw.randrange(4) for _ in range(draw.randrange(5))]
    return torch.ones(shape).to(draw.choice(DTYPES))


def worse_tensor(draw: Draw, like: torch.Tensor) -> torch.Tensor:
    """Another dtype, size, rank or sign than that of a tensor that fits."""
    kind = draw.randrange(4)
    if kind == 0:
        return like.to(draw.choice(DTYPES))
    if kind == 1:
        whole = like.ndim and like.shape[0]
        return like[draw.randrange(like.shape[0] + 1) :] if whole else like.reshape(-1)
    if kind == 2:
        empty = like[..., :0] if like.ndim else like[None]
        return draw.choice([like.expand(2, *like.shape), like.flatten(), empty])
    return like * draw.choice([-1, 0, 1000]) if like.dtype != torch.bool else ~like


def strange_tensor(draw: Draw, like: torch.Tensor) -> torch.Tensor:
    """The same, and strides or values that only the binding or the kernel meets."""
    kind = draw.randrange(6)
    if kind == 0 and like.ndim:
        dims = list(range(like.ndim))
        draw.shuffle(dims)
        return like.permute(dims)
    if kind == 1 and like.ndim:
        axis = draw.randrange(like.ndim)
        return like.narrow(axis, 0, draw.randrange(like.shape[axis] + 1))
    if kind == 2 and like.numel():
        changed = like.clone(memory_format=torch.contiguous_format)
        values = NUMBERS if like.dtype.is_floating_point else INTEGERS
        value = torch.tensor(draw.choice(values)).to(like.dtype)
        changed.view(-1)[draw.randrange(like.numel())] = value
        return changed
    if kind == 3:
        return other_tensor(draw)
    return worse_tensor(draw, like)


def worse_array(draw: Draw, like: np.ndarray) -> np.ndarray:
    """The same of an array, whose strides may also be negative, or no multiple of an element."""
    kind = draw.randrange(7)
    if kind == 0:
        return like.astype(draw.choice(ARRAY_DTYPES))
    if kind == 1:
        return like[draw.randrange(like.shape[0] + 1) :] if like.ndim else like.reshape(-1)
    if kind == 2:
        return draw.choice([like[None], like.ravel(), like[..., :0] if like.ndim else like[None]])
    if kind == 3:
        return like * like.dtype.type(draw.choice([0, 1, 100])) if like.dtype != bool else ~like
    if kind == 4:
        return np.broadcast_to(like[:1] if like.ndim else like, like.shape)
    if kind == 5 and like.ndim:
        return draw.choice([like[::-1], np.asfortranarray(like), like[..., ::2], like[..., ::-1]])
    raw = np.frombuffer(b"\0" + like.tobytes(), like.dtype, offset=1, count=like.size)
    return raw.reshape(like.shape)


def other_array(draw: Draw, like: Any = None) -> np.ndarray:
    shape = [draw.randrange(4) for _ in range(draw.randrange(5))]
    return np.ones(shape).astype(draw.choice(ARRAY_DTYPES))


def junk(draw: Draw, like: Any, worse: Callable[..., Any], other: Callable[..., Any]) -> Any:
    """Something that an argument is not meant to be, often close to what it is."""
    if isinstance(like, (torch.Tensor, np.ndarray)) and draw.random() < 0.7:
        return worse(draw, like)
    if isinstance(like, (list, tuple)) and like and draw.random() < 0.5:
        changed = list(like)
        changed[draw.randrange(len(changed))] = junk(draw, changed[0], worse, other)
        return type(like)(changed)
    return other(draw) if draw.random() < 0.3 else draw.choice(ANYTHING)


def strange(draw: Draw, like: Any) -> Any:
    """A value of the type that the schema names, which therefore arrives in the binding."""
    if isinstance(like, torch.Tensor):
        return None if draw.random() < 0.01 else strange_tensor(draw, like)
    if isinstance(like, bool):
        return not like
    if isinstance(like, (int, float, str)):
        return draw.choice({int: INTEGERS, float: NUMBERS, str: WORDS}[type(like)])
    if isinstance(like, (list, tuple)):
        kind = draw.randrange(5)
        if kind == 0 or not like:
            return draw.choice([[], [other_tensor(draw)], [draw.choice(INTEGERS)]])
        if kind == 1:
            return list(like) * draw.choice([0, 2, 20])
        place = draw.randrange(len(like))
        return [strange(draw, v) if i == place else v for i, v in enumerate(like)]
    return other_tensor(draw)


def good_calls(op: Op) -> list[dict[str, Any]]:
    """The small test cases, or the smallest."""

    def size(kwargs: dict[str, Any]) -> int:
        return sum(t.numel() for t in tensors_in(list(kwargs.values())))

    calls = [arguments(op, case) for case in op.cases if "test" in case.tags]
    calls.sort(key=size)
    return [kwargs for kwargs in calls if size(kwargs) < 10_000] or calls[:1]


def worse_call(
    draw: Draw, calls: list[dict[str, Any]], change: Callable[[Draw, Any], Any]
) -> dict[str, Any]:
    """One of the calls, with one or two arguments changed; its tensors are nobody else's."""
    call = dict(draw.choice(calls))
    if call.get("inplace"):
        call = fresh(call)
    for name in draw.sample(sorted(call), min(len(call), draw.randint(1, 2))):
        call[name] = change(draw, call[name])
    return call


def bad_call(draw: Draw, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """A bad call of a public function."""
    return worse_call(draw, calls, lambda d, v: junk(d, v, worse_tensor, other_tensor))


@functools.cache
def schema_calls() -> dict[str, list[tuple[Any, ...]]]:
    """What reaches the schema ops, by their names, when all cases are called."""
    with registry.recording() as calls:
        for op in OPS.values():
            for kwargs in good_calls(op):
                op.run(kwargs)
    arrived: dict[str, list[tuple[Any, ...]]] = {}
    for op, _, args in calls:
        arrived.setdefault(op.name, []).append(args)
    return arrived


def bad_schema_call(name: str, number: int) -> tuple[Any, tuple[Any, ...]]:
    """The overload and the arguments of the bad call that has this number."""
    draw = random.Random(f"{name} {number}")
    args = list(draw.choice(schema_calls()[name]))
    for place in draw.sample(range(len(args)), min(len(args), draw.randint(1, 3))):
        args[place] = strange(draw, args[place])
    packet = getattr(torch.ops.tokenkernels, name)
    return (packet.default if number % 8 else packet), fresh(tuple(args))


@functools.cache
def array_calls(name: str) -> list[dict[str, Any]]:
    def array(value: Any) -> Any:
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return [tree_map(array, call) for call in good_calls(OPS[name])]


def bad_numpy_call(name: str, number: int) -> tuple[Any, dict[str, Any]]:
    """The function on arrays and the arguments of the bad call that has this number."""
    import tokenkernels.numpy as tkn

    draw = random.Random(f"{name} {number}")
    call = worse_call(draw, array_calls(name), lambda d, v: junk(d, v, worse_array, other_array))
    if call.get("inplace") is True:
        call = tree_map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, call)
    return getattr(tkn, OPS[name].function.__name__), call


def described(value: Any) -> Any:
    """Arguments as they are told: tensors by dtype, shape and strides."""

    def tell(x: Any) -> Any:
        strides = x.stride() if isinstance(x, torch.Tensor) else getattr(x, "strides", None)
        return f"{x.dtype}{tuple(x.shape)}{strides}" if hasattr(x, "dtype") else x

    return tree_map(tell, value)


def numbered(names: list[str], count: int, file: Path) -> Iterator[tuple[str, int]]:
    """Every op and number, written to the file before it is tried."""
    with file.open("r+b", buffering=0) as under_way:
        for name in names:
            for number in range(count):
                os.pwrite(under_way.fileno(), f"{name} {number}".ljust(80).encode(), 0)
                yield name, number


def bound_memory() -> None:
    """Sizes that no machine has are refused by the system, not tried; not under AddressSanitizer,
    which needs all addresses.
    """
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))


def main(kind: str, count: str, file: str) -> None:
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    if kind == "schema":
        names = [name for name in schema_calls() if OPS[name].why_not("native", DEVICE) is None]
        bound_memory()
        for name, number in numbered(names, int(count), Path(file)):
            overload, args = bad_schema_call(name, number)
            try:
                overload(*args)
            except Exception:
                continue
    else:
        functions = {op.function: op.name for op in OPS.values() if op.function is not None}
        bound_memory()
        for name, number in numbered([*functions.values()], int(count), Path(file)):
            function, call = bad_numpy_call(name, number)
            try:
                function(**call)
            except (ValueError, TypeError) as error:
                assert str(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
