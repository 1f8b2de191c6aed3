"""What the build must look like: flags, symbols, needed libraries; skipped where there is none."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cmake"
FLAGS = {
    "baseline": set(),
    "avx2": {"-mavx2", "-mfma", "-mf16c"},
    "avx512": {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"},
    "avx512bf16": {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"},
}
SPECIAL = {"avx512bf16"}
"""Sets that carry some kernels only, and borrow the others."""
LIBRARIES = {
    "_torch": {"libtorch.so", "libtorch_cpu.so", "libc10.so"},
    "_numpy": set(),
}
SYSTEM = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux[\w-]*\.so\.\d+"


def output(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not here")


@cache
def commands() -> list[dict[str, str]]:
    """How the core was compiled: one entry per source and instruction set."""
    database = BUILD / "compile_commands.json"
    if not database.exists():
        pytest.skip("no release build in this checkout")
    entries = json.loads(database.read_text())
    return [entry for entry in entries if "TK_ISA=" in entry["command"]]


def instruction_set(entry: dict[str, str]) -> str:
    return re.search(r"-DTK_ISA=(\w+)", entry["command"])[1]


def shared_object(stem: str) -> Path:
    """The object in place, unless it is one that carries sanitizers."""
    found = sorted((ROOT / "tokenkernels").glob(f"{stem}.*so"))
    if not found:
        pytest.skip(f"{stem} is not built")
    if "libasan" in output("readelf", "-d", found[0]):
        pytest.skip("a build with sanitizers")
    return found[0]


def test_every_source_is_compiled_once_per_instruction_set() -> None:
    built: dict[str, set[str]] = {}
    for entry in commands():
        built.setdefault(Path(entry["file"]).name, set()).add(instruction_set(entry))
    everywhere = {instruction_set(entry) for entry in commands()} - SPECIAL
    assert all(sets - SPECIAL == everywhere for sets in built.values()), built
    sources = {path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - {"isa.cpp"}
    assert set(built) == sources, "a source that is not built, or one that is gone"


def test_flags() -> None:
    """Optimised, hidden, for one instruction set and not for the machine that builds."""
    for entry in commands():
        flags = entry["command"].split()
        assert {"-O3", "-std=c++20", "-fvisibility=hidden", "-fno-exceptions"} <= set(flags)
        wanted = FLAGS[instruction_set(entry)]
        assert wanted <= set(flags)
        if not wanted:
            assert not [flag for flag in flags if flag.startswith("-m")]
        assert not {"-march=native", "-ffast-math", "-Ofast"} & set(flags)


def test_the_core_defines_no_weak_symbol() -> None:
    """The linker keeps one copy of a weak symbol for everyone: an AVX-512 one breaks older
    machines.
    """
    objects = [Path(e["directory"]) / e["output"] for e in commands()]
    missing = [path for path in objects if not path.exists()]
    assert not missing, missing
    for line in output("nm", "-A", "-C", "--defined-only", *objects).splitlines():
        kind = line.split()[1]
        assert kind not in "WwVvu", line


@pytest.mark.parametrize("stem", LIBRARIES)
def test_exports(stem: str) -> None:
    """Only the entry points: nothing that another library could be given instead of its own."""
    lines = output("nm", "-D", "--defined-only", shared_object(stem)).splitlines()
    names = {line.split()[-1] for line in lines}
    entry = r"tokenkernels_\w+" if stem == "_torch" else "PyInit__numpy"
    strangers = {name for name in names if not re.fullmatch(entry, name)}
    assert names and not strangers, strangers


@pytest.mark.parametrize("stem", LIBRARIES)
def test_needed_libraries(stem: str) -> None:
    dynamic = output("readelf", "-d", shared_object(stem))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert {library for library in needed if not re.fullmatch(SYSTEM, library)} == LIBRARIES[stem]
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_the_torch_object_uses_the_stable_abi_only() -> None:
    """Neither Python nor C++ symbols of torch: one object for every Python and every torch from
    2.10 on.
    """
    lines = output("nm", "-D", "-C", "--undefined-only", shared_object("_torch")).splitlines()
    wanted = [re.sub(r"^\s*\w\s+", "", line) for line in lines]
    strangers = [s for s in wanted if re.match(r"_?Py[A-Z_]|(at|c10|torch|caffe2)::", s)]
    assert not strangers
