"""The library for C++: what is installed, and that programs find it, link it and run, without torch
or Python; skipped where nothing is built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import BUILD, ROOT, SYSTEM, output

HEADERS = ["codes.h", "numeric.h", "pool.h", "tokenkernels.h"]
CALLS_CUDA = """#include <tokenkernels/tokenkernels.h>
#include <cstdio>
int main() {
  tk::MergeBackward nothing{};
  const char* error = tk::merge_backward_cuda(nothing, nullptr);
  std::puts(error == nullptr ? "nothing to do" : error);
}
"""
USES_CUDA = """cmake_minimum_required(VERSION 3.25)
project(calls_cuda LANGUAGES CXX)
find_package(tokenkernels REQUIRED)
add_executable(calls_cuda calls_cuda.cpp)
target_link_libraries(calls_cuda PRIVATE tokenkernels::cuda)
"""


def cmake(*arguments: str | Path) -> str:
    """CMake and Ninja as they come with the interpreter, else those of the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("cmake", path=path)
    if program is None or not shutil.which("ninja", path=path) or not shutil.which("c++"):
        pytest.skip("no cmake, ninja or c++")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library of this checkout is installed."""
    if not (BUILD / "csrc" / "libtokenkernels.a").exists():
        pytest.skip("no release build in this checkout")
    where = tmp_path_factory.mktemp("prefix")
    cmake("--install", BUILD, "--component", "cpp", "--prefix", where)
    return where


def built(source: Path, prefix: Path, build: Path) -> Path:
    """The folder in which a project was built that looks for the library in `prefix`."""
    cmake("-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", build)
    return build


def test_what_is_installed(prefix: Path) -> None:
    files = {path.relative_to(prefix) for path in prefix.rglob("*") if path.is_file()}
    headers = sorted(path.name for path in files if path.suffix == ".h")
    assert headers == HEADERS
    assert {path.suffix for path in files} == {".h", ".a", ".cmake"}
    for path in files:
        if path.suffix == ".cmake":
            text = (prefix / path).read_text()
            assert str(ROOT) not in text and str(prefix) not in text, path


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_stands_alone(header: str, prefix: Path) -> None:
    flags = ("-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++")
    file = prefix / "include" / "tokenkernels" / header
    output("c++", *flags, "-include", file, "/dev/null")


def test_the_example_finds_the_library_and_is_right(prefix: Path, tmp_path: Path) -> None:
    program = built(ROOT / "examples" / "cpp", prefix, tmp_path / "build") / "keep_and_quantise"
    told = output(program)
    assert "gather_topk: 64 of 576" in told and told.endswith("both are right\n")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", program))
    assert all(re.fullmatch(SYSTEM, library) for library in needed), needed


def test_the_launchers_of_cuda_kernels_link(prefix: Path, tmp_path: Path) -> None:
    if not list(prefix.rglob("libtokenkernels_cuda.a")):
        pytest.skip("built without CUDA")
    (tmp_path / "CMakeLists.txt").write_text(USES_CUDA)
    (tmp_path / "calls_cuda.cpp").write_text(CALLS_CUDA)
    program = built(tmp_path, prefix, tmp_path / "build") / "calls_cuda"
    assert output(program) == "nothing to do\n"


def test_the_library_is_configured_without_python(tmp_path: Path) -> None:
    options = ("-DTOKENKERNELS_BINDINGS=OFF", "-DTOKENKERNELS_CUDA=OFF", "-G", "Ninja")
    cmake("-S", ROOT, "-B", tmp_path, *options, "-DPython_EXECUTABLE=/nowhere/python")
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert commands
    for command in commands:
        assert not re.search(r"torch|pybind11|[Pp]ython", command["command"]), command["command"]
