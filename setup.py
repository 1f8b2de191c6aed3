"""Builds the native parts with CMake and packages two import roots; without a compiler the package
installs all the same.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Hands the whole build to CMake: configure, build, nothing else."""

    def run(self) -> None:
        if os.environ.get("TOKENKERNELS_NATIVE", "ON").upper() == "OFF" or not shutil.which("c++"):
            print("tokenkernels: no native build (no C++ compiler, or TOKENKERNELS_NATIVE=OFF)")
            return
        build = Path(os.environ.get("TOKENKERNELS_BUILD", ROOT / "build" / "cmake")).resolve()
        output = (
            build / "objects" if self.inplace else Path(self.build_lib).resolve() / "tokenkernels"
        )
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DTOKENKERNELS_OUTPUT={output}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        }
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        if self.inplace:
            for built in output.glob("*.so"):
                _replace(built, ROOT / "tokenkernels" / built.name)

    def get_outputs(self) -> list[str]:
        return []


def _replace(built: Path, target: Path) -> None:
    """Puts a whole object in place at once: others may be loading it."""
    shutil.copy2(built, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


setup(
    packages=[*find_packages(include=["tokenkernels*"]), *find_packages("python")],
    package_dir={"tokenkernels": "tokenkernels", "tokenmodels": "python/tokenmodels"},
    ext_modules=[Extension("tokenkernels._torch", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
