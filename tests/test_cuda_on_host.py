"""CUDA kernels on the CPU: planted faults are all caught and told in words, kernels without fault
compute right, and those of the ops pass the tests of the registry.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import cuda_on_host
import pytest

HERE = Path(__file__).parent / "cuda_on_host"
PLACES = {
    found[1]: f"tests/cuda_on_host/{source.name}:{number}"
    for source in HERE.glob("planted*.cu")
    for number, line in enumerate(source.read_text().splitlines(), 1)
    if (found := re.search(r"// planted: (\w+)", line))
}
ASCENDING, DESCENDING = 0, 1
FAULTS = [
    ("barrier_divergence", "barrier divergence: 40 of 64 threads wait, thread 40 has ended"),
    ("two_barriers", r"barrier divergence: thread 0 waits at another barrier, .*planted\.cu:\d+"),
    ("inactive_lanes", "shuffle with an inactive lane: lane 16 is in its mask but has ended"),
    ("lane_outside_mask", "from an inactive lane: lane 8 reads lane 16, which is not in the mask"),
    ("lanes_apart", r"ballot with an inactive lane: lane 1 .* but is at the ballot of"),
    ("race", r"race on shared memory: read of byte \d+ .*, which thread \d+ wrote at"),
    ("race_of_writers", r"race on shared memory: write of byte 0 .*, which thread 0 wrote at"),
    ("race_after_reading", r"race on shared memory: write of byte \d+ .*, which thread \d+ read"),
    ("race_within_a_warp", r"race on shared memory: read of byte \d+"),
    ("race_with_an_atomic", r"race on shared memory: (read|atomic) of byte 0"),
    ("outside_global", "out of bounds of global memory: write of 4 bytes"),
    ("vector_outside_global", "out of bounds of global memory: read of 16 bytes"),
    ("far_outside_global", "out of bounds of global memory: (read of 4 bytes|there is none at)"),
    ("behind_an_array", "out of bounds of shared memory: write of 4 bytes at byte 256"),
    ("outside_shared", "out of bounds of shared memory: write of 4 bytes at byte -4000"),
    ("more_shared_than_launched", "shared memory: 40000 bytes wanted, the launch gave 4096"),
    ("uninitialised", "uninitialised shared memory: read of 4 bytes at byte 28"),
    ("misaligned_vector", "misaligned access: read of 16 bytes"),
    ("misaligned_pointer", "misaligned access: write of 4 bytes"),
    ("local_of_another", "read of a local variable of another thread"),
    ("look_back", r"deadlock: 1 resident blocks wait .* the 4 that find no room"),
    ("never", "deadlock: 5 resident blocks wait for each other"),
    ("copy_without_wait", "race on shared memory: read .* a copy is under way"),
    ("copy_without_barrier", "race on shared memory: read of byte 28 .*, which thread 7 wrote at"),
    ("copy_never_committed", "race on shared memory: read .* a copy is under way"),
    ("misaligned_copy", "misaligned access: read of 16 bytes"),
    ("bulk_without_wait", "uninitialised shared memory: read"),
    ("bulk_without_barrier", "race on shared memory: write of byte .*, which thread 3 read at"),
    ("wrong_phase", "uninitialised shared memory: read"),
    ("gate_never_opens", "deadlock: 4 resident blocks wait for each other"),
    ("odd_bulk", "misaligned access: a bulk copy of 100 bytes"),
    ("store_without_wait", "nobody has waited for a copy that was asked for at {place}"),
    ("store_without_fence", r"store_bulk of what thread \d+ wrote at .*, no fence_bulk"),
    ("cluster_out_of_step", r"shared memory: read of .*"),
    ("cluster_that_left", "read of the shared memory of a block that has ended"),
    ("sums_not_fenced", "on registers that were touched since the last fence_products"),
    ("left_not_fenced", "on registers that were touched since the last fence_products"),
    ("sums_without_wait", "read of registers of a product that is under way .*, asked for at"),
    ("sums_of_a_later_group", "read of registers of a product that is under way"),
    ("product_never_waited", "nobody has waited for a product that was asked for at {place}"),
    ("overwritten_under_way", r"race on shared memory: write .* a product .* reads: warp \d has"),
    ("overwritten_without_barrier", r"race on .*: write .* a product .* reads: warp \d has not"),
    ("operand_not_fenced", r"multiply_add_group of what thread \d+ wrote at .*, no fence_bulk"),
    ("operand_still_coming", "race on shared memory: read .* a copy is under way"),
    ("misaligned_image", "left operand of a product begins 256 bytes behind a multiple of 1024"),
    ("tile_with_gaps", "uninitialised shared memory: read of 16 bytes at byte 128"),
    ("wrong_descriptor", "the right operand of a product does not lie in pieces that change"),
    ("missing_warp", "multiply_add_group with a missing warp: warp 3 of its group has ended"),
    ("warps_apart", "warps apart: others of the group ask for another product, at {place}"),
]
ELSEWHERE = {
    "race_with_an_atomic": r"tests/cuda_on_host/planted\.cu:\d+",
    "store_without_wait": "no line of a kernel",
    "product_never_waited": "no line of a kernel",
}
"""Two lines are to blame and who comes first decides; or it is the end of the kernel."""


@cache
def program(*arguments: str, checked: bool) -> subprocess.CompletedProcess[str]:
    path = cuda_on_host.build("cuda_on_host_program")
    environment = (
        cuda_on_host.checked_environment() if checked else cuda_on_host.plain_environment()
    )
    return subprocess.run([path, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("kernel", "words"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_planted_fault_is_caught_and_told(kernel: str, words: str) -> None:
    schedule = (DESCENDING, 1) if kernel == "look_back" else (ASCENDING, 0)
    done = program("planted", kernel, *map(str, schedule), checked=True)
    assert done.returncode == cuda_on_host.FAULT, done.stdout + done.stderr
    place = ELSEWHERE.get(kernel, PLACES[kernel])
    assert re.search(words.format(place=PLACES[kernel]), done.stderr), done.stderr
    where = rf"kernel tried::{kernel}, block \d+, thread \d+, {place}$"
    assert re.search(where, done.stderr, re.MULTILINE), done.stderr


def test_every_planted_fault_is_tried() -> None:
    done = program("list", checked=False)
    assert done.stdout.split() == [name for name, _ in FAULTS]


def test_a_look_back_that_needs_an_order_passes_where_it_gets_it() -> None:
    done = program("planted", "look_back", str(ASCENDING), "1", checked=False)
    assert (done.returncode, done.stdout.strip()) == (0, "not caught")


def test_kernels_without_fault_compute_right_in_every_schedule() -> None:
    done = program("sound", checked=True)
    assert done.returncode == 0, done.stdout + done.stderr


def cuobjdump() -> Path | None:
    """It comes with the triton package."""
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return tool if tool is not None and tool.exists() else None


@pytest.mark.parametrize("part", ["sound", "sound_copies", "sound_groups", "sound_products"])
def test_the_same_kernels_compile_for_gpus(part: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    root = HERE.parents[1]
    command = [
        *(nvcc, "-std=c++20", f"-I{root / 'csrc'}", f"-I{root / 'tests'}"),
        *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"),
        *("-c", str(HERE / f"{part}.cu"), "-o", str(tmp_path / "object.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|serialized", done.stderr), done.stderr
    if (tool := cuobjdump()) is not None:
        command = [tool, "-sass", "-arch", "sm_90a", tmp_path / "object.o"]
        sass = subprocess.run(command, capture_output=True, text=True).stdout
        assert ("HGMMA" in sass) == (part == "sound_groups")


@pytest.mark.usefixtures("native")
def test_the_kernels_of_the_ops_pass_the_tests_of_the_registry() -> None:
    done = cuda_on_host.run_tests()
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout


HOPPER = [
    source.stem
    for source in sorted((HERE.parents[1] / "csrc" / "cuda").glob("*.cu"))
    if "group_products()" in source.read_text()
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", HOPPER)
def test_the_kernels_of_groups_pass_them_too(op: str) -> None:
    done = cuda_on_host.run_tests("--op", op, "--hopper", "-k", "cuda_on_host and truth")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
