"""The wheel that a user gets: the files in it, and that it works where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_rooms import FILES, ROOT, name

PACKAGES = ("tokenkernels/", "python/tokenmodels/")
COPIED = """cmake_minimum_required(VERSION 3.25)
project(copied LANGUAGES NONE)
file(GLOB objects "{}/*.so")
file(COPY ${{objects}} DESTINATION ${{TOKENKERNELS_OUTPUT}})
"""
"""In place of the build graph: the objects as they are, for what setup.py does with them."""
USED = """
import sys, tokenkernels, tokenmodels, tokenmodels.sit
for package in (tokenkernels, tokenmodels):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for function in tokenkernels.__all__:
    getattr(tokenkernels, function)
from tokenkernels import _native
print(_native.WHY_NOT)
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of the files that git knows, so that no earlier build is in it."""
    tree = tmp_path_factory.mktemp("tree")
    for path in FILES:
        if path.parent == ROOT or name(path).startswith(PACKAGES):
            copy = tree / name(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    (tree / "CMakeLists.txt").write_text(COPIED.format(ROOT / "tokenkernels"))
    return tree


@pytest.mark.parametrize("native", ["OFF", "ON"])
def test_wheel(native: str, copies: Path, tmp_path: Path) -> None:
    objects = [f"tokenkernels/{path.name}" for path in (ROOT / "tokenkernels").glob("*.so")]
    if native == "ON" and not (objects and shutil.which("c++")):
        pytest.skip("nothing is built that could be in the wheel")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    build = {"TOKENKERNELS_NATIVE": native, "TOKENKERNELS_BUILD": str(tmp_path / "build")}
    python("-m", "pip", "wheel", ".", *options, "-w", str(tmp_path), cwd=copies, **build)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        found = {file for file in opened.namelist() if ".dist-info/" not in file}
    sources = {name(path).removeprefix("python/") for path in FILES if path.suffix == ".py"}
    shipped = {file for file in sources if file.startswith(("tokenkernels/", "tokenmodels/"))}
    expected = shipped | {"tokenkernels/py.typed"} | set(objects if native == "ON" else [])
    assert found == expected
    target = tmp_path / "target"
    python("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=tmp_path)
    why_not = python("-c", USED, str(target), cwd=tmp_path, PYTHONPATH=str(target))
    assert why_not.strip() == "None" if native == "ON" else "is not built" in why_not
