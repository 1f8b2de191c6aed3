"""Which backend a call gets: native CUDA before Triton before the reference, native only where the
shared object carries code for the GPU; and what doctor says of it. No GPU is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tokenkernels import __main__ as command
from tokenkernels import _native, _op
from tokenkernels._op import OPS, Op

Pretend = Callable[..., None]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op with all backends, which has not been asked for anything on a GPU."""
    op = OPS["gather_topk"]
    monkeypatch.setattr(op, "overloads", dict(op.overloads))
    return op


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """A machine with these GPUs, and an object with or without CUDA kernels."""

    def pretend(*gpus: tuple[int, int], compiled: list[str], triton: bool = True) -> None:
        asked = torch._C._dispatch_has_kernel_for_dispatch_key

        def registered(name: str, key: str) -> bool:
            return bool(compiled) if key == "CUDA" else asked(name, key)

        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", registered)
        monkeypatch.setattr(_native, "WHY_NOT", None)
        monkeypatch.setattr(_native, "architectures", lambda: compiled)
        monkeypatch.setattr(_native, "gpus", lambda: list(gpus))
        monkeypatch.setattr(_native, "instruction_set", lambda: "baseline")
        monkeypatch.setattr(_op, "_no_triton", lambda device: None if triton else "no Triton")
        _native.why_not_gpu.cache_clear()

    yield pretend
    _native.why_not_gpu.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "runs_on", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100-real", [(10, 0), (10, 3)], [(12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_what_a_gpu_runs(
    architecture: str, runs_on: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(_native.covers(architecture, gpu) for gpu in runs_on)
    assert not any(_native.covers(architecture, gpu) for gpu in does_not)


def test_the_object_says_what_it_is_compiled_for(native: None) -> None:
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("tokenkernels::fill", "CUDA")
    assert bool(_native.architectures()) == has_cuda
    assert re.fullmatch(r"((sm|compute)_\d+[af]?(, )?)*", _native.compiled_for())


@pytest.mark.parametrize(
    ("gpus", "compiled", "triton", "expected"),
    [
        ([(9, 0)], ["90a-real"], True, "native"),
        ([(8, 6)], ["80-real", "90a-real"], True, "native"),
        ([(9, 0)], [], True, "triton"),
        ([(8, 0)], ["90a-real"], True, "triton"),
        ([(8, 0), (9, 0)], ["90a-real"], True, "triton"),
        ([(8, 0)], ["90a-real"], False, "reference"),
        ([(9, 0)], [], False, "reference"),
    ],
)
def test_native_before_triton_before_reference(
    op: Op,
    pretend: Pretend,
    gpus: list[tuple[int, int]],
    compiled: list[str],
    triton: bool,
    expected: str,
) -> None:
    pretend(*gpus, compiled=compiled, triton=triton)
    assert op._choose(None, "cuda") == expected
    assert op._late(None, "cuda") is op._kinds[expected]
    assert op.overloads[None, "cuda"] is op._kinds[expected]


def test_nothing_on_a_gpu_is_chosen_before_it_is_asked_for() -> None:
    """Asking what GPUs there are loads CUDA, which forbids to fork: an import does not."""
    asked = {device for op in OPS.values() for _, device in op.overloads} - {"meta"}
    assert torch.cuda.is_available() or asked == {"cpu"}


def test_what_does_not_run_is_refused_with_the_reason(op: Op, pretend: Pretend) -> None:
    pretend((8, 0), compiled=["90a-real"])
    with pytest.raises(RuntimeError, match="compiled for sm_90a, the GPU here is an sm_80"):
        op._late("native", "cuda")
    assert op._late("triton", "cuda") is op._kinds["triton"]
    with pytest.raises(RuntimeError, match="nothing runs on device 'elsewhere'"):
        op._late(None, "elsewhere")
    assert op._late("reference", "elsewhere") is op._kinds["reference"]


def test_a_trace_does_not_look_into_the_choice(native: None, op: Op) -> None:
    """The first call of an op may be a compiled one."""
    scores = torch.arange(8.0).reshape(1, 8)

    def call(tokens: torch.Tensor) -> Any:
        return op.function(tokens, scores, 3).tokens  # type: ignore[misc]

    tokens = torch.randn(1, 8, 4)
    want = call(tokens)
    del op.overloads[None, "cpu"]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens), want)
    assert op.overloads[None, "cpu"] is op._kinds[_op.DEFAULT_BACKEND or "native"]


def test_doctor_shows_native_and_triton_side_by_side(
    pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend((9, 0), compiled=["80-real", "90a-real"])
    assert command.doctor() == 0
    told = capsys.readouterr().out
    assert "compiled for sm_80, sm_90a" in told and "warning" not in told
    on_cuda = told.partition("\ncuda")[2]
    assert "\n  gather_topk          native     yes     yes\n" in on_cuda


def test_doctor_warns_of_a_gpu_that_was_not_compiled_for(
    pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend((8, 6), (9, 0), compiled=["90a-real"])
    command.doctor()
    told = capsys.readouterr().out
    assert "warning: no native CUDA: compiled for sm_90a, the GPU here is an sm_86" in told
    assert '"-DCMAKE_CUDA_ARCHITECTURES=86;90a"' in told
    on_cuda = told.partition("\ncuda")[2]
    assert (
        "\n  gather_topk          triton     no      yes     native: compiled for sm_90a" in on_cuda
    )
