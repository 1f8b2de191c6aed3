"""tokenkernels.numpy gives, bit for bit, what the native torch functions give; and imports no
torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import tokenkernels
from tokenkernels import _native
from tokenkernels._op import OPS, Case, Op, tensors_in

if _native.WHY_NOT:
    pytest.skip(_native.WHY_NOT, allow_module_level=True)

import tokenkernels.numpy as tkn

ml_dtypes = pytest.importorskip("ml_dtypes")

cases = [
    (op, case)
    for op in OPS.values()
    for case in op.cases
    if "test" in case.tags and op.function is not None and hasattr(tkn, op.function.__name__)
]
every_case = pytest.mark.parametrize(
    ("op", "case"), cases, ids=[f"{op.name}-{case.id}" for op, case in cases]
)


def to_numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def to_torch(value: Any) -> torch.Tensor:
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def arrays_in(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    return (
        [a for item in value for a in arrays_in(item)] if isinstance(value, (list, tuple)) else []
    )


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_same_bits_as_torch(op: Op, case: Case, dtype: torch.dtype) -> None:
    """Also where memory arrives filled with NaN."""
    if dtype not in case.dtypes:
        pytest.skip("a case of other dtypes")
    want = tensors_in(op.function(**case.kwargs(dtype), backend="native"))
    function = getattr(tkn, op.function.__name__)
    for poison in (False, True):
        tkn._core.poison(poison)
        try:
            got = arrays_in(function(**tree_map(to_numpy, case.kwargs(dtype))))
        finally:
            tkn._core.poison(False)
        assert_same(got, want)


def assert_same(got: list[np.ndarray], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for number, (g, w) in enumerate(zip(map(to_torch, got), want, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype, f"output {number}"
        assert torch.equal(g.nan_to_num(7), w.nan_to_num(7)), f"output {number}"


def misaligned(value: Any) -> Any:
    """The same values, one byte off."""
    if not isinstance(value, np.ndarray):
        return value
    moved = np.ndarray(value.shape, value.dtype, bytearray(value.nbytes + 1), 1)
    moved[...] = value
    return moved


@every_case
def test_same_bits_from_misaligned_arrays(op: Op, case: Case) -> None:
    kwargs = tree_map(to_numpy, case.kwargs(case.dtypes[0]))
    if "inplace" in case.tags and kwargs.get("rope"):
        pytest.skip("refused: keys are turned where they lie")
    function = getattr(tkn, op.function.__name__)
    got = arrays_in(function(**tree_map(misaligned, kwargs)))
    want = arrays_in(function(**kwargs))
    assert len(got) == len(want)
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.tobytes() == w.tobytes(), f"output {number}"


@every_case
def test_the_torch_front_refuses_arrays(op: Op, case: Case) -> None:
    kwargs = case.kwargs(case.dtypes[0])
    for name, value in kwargs.items():
        if not tensors_in(value):
            continue
        for array in (to_numpy, lambda _: np.zeros((1,) * 5)):
            with pytest.raises(TypeError, match=rf"^{op.function.__name__}: \w.*: allowed .*, got"):
                op.function(**kwargs | {name: tree_map(array, value)})


def test_every_public_function_is_there() -> None:
    public = {op.function.__name__ for op in OPS.values() if op.function is not None}
    assert {name for name in public if not hasattr(tkn, name)} == set()


@pytest.mark.parametrize(
    ("op", "number"), [(op, n) for op in OPS.values() for n in range(len(op.refused))]
)
def test_bad_arguments_are_refused_in_the_same_words(op: Op, number: int) -> None:
    change, error, pattern = op.refused[number]
    kwargs = op.cases[0].kwargs(torch.float32)
    changed = tree_map(to_numpy, kwargs | change(kwargs))
    with pytest.raises(error, match=pattern.split(": allowed")[0]):
        getattr(tkn, op.function.__name__)(**changed)


X = np.random.default_rng(0).random((2, 8, 4), np.float32)
SCORES = X[:, :, 1].copy()


def field(values: np.ndarray) -> np.ndarray:
    """The same values, their strides no whole number of elements."""
    record = np.zeros(values.shape, [("value", values.dtype), ("flag", np.uint8)])
    record["value"] = values
    return record["value"]


def test_gather_topk_takes_any_integer_as_k() -> None:
    assert np.array_equal(
        tkn.gather_topk(X, SCORES, np.int64(3)).tokens, tkn.gather_topk(X, SCORES, 3).tokens
    )
    packed = tkn.gather_topk(X, SCORES, [np.int64(1), np.int32(3)])
    assert packed.offsets.tolist() == [0, 1, 4]


@pytest.mark.parametrize("x", [None, 5, "x", X.astype(object), np.zeros((2, 8), "V0")])
def test_gather_topk_refuses_what_is_no_array_of_numbers(x: Any) -> None:
    with pytest.raises(TypeError, match="gather_topk: x: allowed"):
        tkn.gather_topk(x, SCORES, 2)


def test_fields_of_structured_arrays() -> None:
    size = SCORES + 1
    want, got = (tkn.merge_runs(X, 0.9, size=one) for one in (size, field(size)))
    assert all(map(np.array_equal, want, got))
    layers = [(X[:, None], X[:, None])]
    index, old = np.array([1, 4, 6]), np.array([2, 5, 9])
    lengths, frequencies = np.array([7, 8]), np.array([1.0, 0.1], np.float32)
    want = tkn.compact_kv(layers, index, lengths=lengths, rope=(frequencies, old, index))
    got = tkn.compact_kv(
        [(field(X)[:, None], X[:, None])],
        field(index),
        lengths=field(lengths),
        rope=(field(frequencies), field(old), field(index)),
    )
    assert all(map(np.array_equal, want.layers[0], got.layers[0]))
    assert np.array_equal(want.lengths, got.lengths)


def test_score_attention_copies_what_is_not_aligned() -> None:
    def shifted(a: Any) -> Any:
        moved = np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape)
        assert moved.flags.c_contiguous and not moved.flags.aligned
        return moved

    query, key = X[:, None, :3], X[:, None]
    arrays = {
        "query_positions": np.tile(np.array([2, 5, 6]), (len(X), 1)),
        "key_lengths": np.full(len(X), 6),
        "lse": np.full(query.shape[:3], 1.5, np.float32),
        "row_weights": np.full((len(X), 3), 0.25, np.float32),
    }
    want = tkn.score_attention(query, key, causal=True, **arrays)
    moved = {name: shifted(a) for name, a in arrays.items()}
    got = tkn.score_attention(shifted(query), shifted(key), causal=True, **moved)
    assert np.array_equal(want, got)


def test_an_empty_cache_is_compacted_in_place() -> None:
    empty = np.zeros((0, 2, 5, 4), np.float32)
    tkn.compact_kv([(empty, empty.copy())], np.array([0, 1]), inplace=True)


def test_arrays_of_the_other_front_are_refused() -> None:
    with pytest.raises(TypeError, match="x: allowed a NumPy array"):
        tkn.merge_runs(torch.from_numpy(X), 0.5)
    with pytest.raises(TypeError, match="x: allowed a torch tensor"):
        tokenkernels.merge_runs(X, 0.5)


LARGE = np.random.default_rng(1).random((8, 400, 256), np.float32)


def test_threads_share_the_helpers_and_a_child_starts_its_own() -> None:
    want = tkn.merge_runs(LARGE, 0.7).tokens

    def same(_: int) -> bool:
        return all(np.array_equal(tkn.merge_runs(LARGE, 0.7).tokens, want) for _ in range(20))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(same, range(4)))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if same(0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_torch_is_imported() -> None:
    code = "import sys, tokenkernels.numpy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
