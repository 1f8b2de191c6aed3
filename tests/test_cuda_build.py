"""What nvcc makes of the CUDA kernels, on sm_80 and sm_90a: no more registers, shared memory or
stack than a committed table says, memory read 16 bytes at a time, products by the tensor cores.
"""

from __future__ import annotations

import re

import cuda_resources as resources
import pytest
from cuda_resources import Key, Use, complaints

WIDE = r"LDG\.E(\.\w+)*\.128(\.\w+)*|LDGSTS\.E(\.\w+)*\.128(\.\w+)*|UBLKCP(\.\w+)*"
"""What brings at least 16 bytes in one instruction: loads, copies into shared memory, bulk ones."""

NARROW = {
    r"fill: .*": "writes only",
    r"group_products_kernel<int>": "is never launched",
    r"merge_adjacent: counts_kernel": "writes a few counts only",
    r"accumulate_codes: (begin|count|sort)_kernel": "reads 8-byte codes and counts of its own",
    r"gather_topk: select_kernel<.*": "reads scores of any stride, one by one",
    r"score_attention: finish_kernel": "joins and averages numbers, one by one",
    r"aggregate_soft_backward: aggregate_total_kernel<.*": "adds up what images give, one by one",
    r"slim_tokens_backward: finish_kernel<.*": "adds up splits of parameters, one by one",
    r"merge_\w+: merge_\w+_kernel<\w+, (false|1)>": "rows that no 16 bytes "
    "divide; its like for other rows stands beside it",
}
"""Kernels that move no rows, or move them as they lie: name → why they load nothing wide."""

EMPTY = {"MOV", "LDC", "EXIT", "BRA", "NOP"}
"""What is left of a kernel that only another GPU runs."""

PRODUCTS: dict[str, dict[str, str]] = {
    r"aggregate_(logits|soft): .*": {"sm_80": "HMMA", "sm_90a": "HMMA"},
    r"(aggregate_soft_backward: aggregate_slots|aggregate_tokens(_again)?)_kernel<.*": {
        "sm_80": "HMMA",
        "sm_90a": "HMMA",
    },
    r"assign_nearest: search_kernel<.*, false>": {"sm_80": "HMMA.16816", "sm_90a": "HMMA.16816"},
    r"assign_nearest: search_kernel<.*, true>": {"sm_80": "EXIT", "sm_90a": "HGMMA"},
    r"assign_residual: chain_kernel<.*": {"sm_80": "HMMA.16816", "sm_90a": "HMMA.16816"},
    r"score_attention: (measure|score)_kernel<.*": {"sm_80": "HMMA", "sm_90a": "HMMA"},
    r"slim_tokens: (weigh|gather)_kernel<.*": {"sm_80": "HMMA", "sm_90a": "HMMA"},
    r"slim_tokens_backward: (spread|lower|resist|collect)_kernel<.*": {
        "sm_80": "HMMA",
        "sm_90a": "HMMA",
    },
}
"""Kernels that multiply on tensor cores: name → architecture → the instruction that must be in."""

SPILLS: dict[str, str] = {}
"""Kernels whose registers may go through memory: name → why."""

OLD = {Key("op: kernel<float>", "sm_80"): Use(100, 1000, 0)}
(KERNEL,) = OLD


@pytest.fixture
def compiled() -> None:
    if why := resources.missing():
        pytest.skip(why)


def test_no_kernel_takes_more_than_the_table_says(compiled: None) -> None:
    release, before = resources.table()
    found = complaints(before, resources.uses(), release == resources.release())
    assert not found, "\n".join(found)


def test_the_notes_show_what_the_table_says() -> None:
    """And say of every kernel how it is launched."""
    _, uses = resources.table()
    lines = (resources.ROOT / "bench" / "NOTES.md").read_text().splitlines()
    for (kernel, _), use in uses.items():
        row = next((line.split(" | ") for line in lines if line.startswith(f"| {kernel} |")), [])
        assert str(use.registers) in row[1:3], f"{kernel}: {resources.RENEW}"


def test_a_spill_in_the_table_has_its_reason() -> None:
    _, before = resources.table()
    for key, use in before.items():
        listed = any(re.fullmatch(pattern, key.kernel) for pattern in SPILLS)
        assert listed or not use.stack, f"{key.kernel}, {key.arch}: {use}"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Use(111, 1000, 0), r"op: kernel<float>, sm_80: registers 100 -> 111"),
        (Use(100, 1101, 0), r"op: kernel<float>, sm_80: shared 1000 -> 1101"),
        (Use(90, 900, 8), r"op: kernel<float>, sm_80: spills, stack 0 -> 8 bytes"),
    ],
)
def test_a_planted_growth_is_told(now: Use, words: str) -> None:
    assert complaints(OLD, {KERNEL: now}, True) == [words]
    assert complaints(OLD, {KERNEL: now}, False) == [words] * ("spills" in words)


@pytest.mark.parametrize("now", [Use(110, 1100, 0), Use(80, 0, 0)])
def test_less_and_a_tenth_more_pass(now: Use) -> None:
    assert complaints(OLD, {KERNEL: now}, True) == []


def test_kernels_that_come_and_go_are_told_with_the_command_that_renews_the_table() -> None:
    other = {Key("op: other", "sm_80"): Use(10, 0, 4)}
    gone, came, spills = complaints(OLD, other, True)
    assert gone == f"op: kernel<float>, sm_80: gone; {resources.RENEW}"
    assert came == f"op: other, sm_80: not in the table; {resources.RENEW}"
    assert spills == "op: other, sm_80: spills, stack 0 -> 4 bytes"


@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
def test_rows_are_loaded_16_bytes_at_a_time(compiled: None, arch: str) -> None:
    for kernel, found in resources.instructions(arch).items():
        if set(found) <= EMPTY:
            continue
        wide = any(re.fullmatch(WIDE, instruction) for instruction in found)
        excused = any(re.fullmatch(pattern, kernel) for pattern in NARROW)
        assert wide != excused, f"{kernel}, {arch}: " + (
            "loads wide, and NARROW says it does not" if wide else f"loads nothing wide: {found}"
        )


@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
def test_products_are_those_of_tensor_cores(compiled: None, arch: str) -> None:
    for pattern, wanted in PRODUCTS.items():
        found = [k for k in resources.instructions(arch) if re.fullmatch(pattern, k)]
        assert found, f"no kernel is called {pattern}"
        for kernel in found:
            names = resources.instructions(arch)[kernel]
            assert any(re.match(wanted[arch], name) for name in names), f"{kernel}, {arch}"


def test_what_is_excused_or_multiplies_is_there(compiled: None) -> None:
    kernels = {key.kernel for key in resources.uses()}
    for pattern in [*NARROW, *PRODUCTS, *SPILLS]:
        assert any(re.fullmatch(pattern, kernel) for kernel in kernels), pattern
