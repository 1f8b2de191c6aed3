"""References and peers keep to the device of their inputs: tried on one that holds no values."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench.peers import peers_of
from tokenkernels import ops
from tokenkernels._case import Case
from tokenkernels._op import OPS, Op

ahead_of_time = pytest.importorskip("ahead_of_time", exc_type=ImportError)

ops.load()
CASES = [(op, case) for op in OPS.values() for case in op.cases]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op.name}-{c.id}" for op, c in CASES])
def test_everything_stays_on_the_device_of_the_inputs(op: Op, case: Case) -> None:
    try:
        kwargs = case.make(ahead_of_time.Shapes(case.id, case.dtypes[0]))
    except RuntimeError as error:
        pytest.skip(f"its inputs are made from values: {error}")
    op.overloads["reference", "meta"] = op.reference
    _no_mix(lambda: op.run(kwargs, "reference"))
    if "bench" in case.tags:
        for peer in peers_of(op.name).values():
            _no_mix(lambda peer=peer: peer.fn(**kwargs))


def _no_mix(call: Any) -> None:
    """What needs values ends there; what mixes devices says so."""
    try:
        call()
    except Exception as error:  # the words decide
        assert not re.search(r"same device|expected .* device", str(error)), error
