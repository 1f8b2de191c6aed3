"""The law of the house as tests: what each room may import, include and say, and how a file begins
and ends.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tokenkernels
from tokenkernels._op import OPS

ROOT = Path(__file__).parents[1]
LIMIT = 400


def _tracked() -> list[Path]:
    """What git knows or would take; in a tree without git, everything outside build folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
        names = [str(p) for p in found if not {"build", ".venv", ".git"} & set(p.parts)]
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


FILES = _tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]
CPP = [path for path in FILES if path.suffix in (".h", ".cpp", ".cu", ".cuh")]


def room(pattern: str) -> list[Path]:
    return [path for path in FILES if path.match(str(ROOT / pattern))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# C++: what each room includes, and the words it must not contain.

OWN_HEADERS = r'"(tokenkernels|numeric|codes|pool|token_rows|compact_call)\.h"'
PLAIN = r"<c(stdint|stddef|string|math|float)>"
HOST_MEANING = r'"cuda_on_host/launch_\w+\.h"'


@dataclass(frozen=True)
class Room:
    """`includes`: one pattern that every include matches; `banned`: pattern → why; `but`: files to
    which that does not apply.
    """

    files: str
    includes: str
    banned: dict[str, str]
    but: str = ""


NO_FRAMEWORK = {r"\b(at|c10|torch|aten)::|\bPyObject\b": "a framework"}
ROOMS = [
    Room(
        "csrc/*.h",
        rf"{OWN_HEADERS}|{PLAIN}",
        NO_FRAMEWORK | {r"\bcuda[A-Z]\w+|\b__(half|nv_bfloat16)\b": "a CUDA type"},
    ),
    Room(
        "csrc/cpu/*",
        rf'{OWN_HEADERS}|"token_rows\.h"|"cpu/\w+\.h"|{PLAIN}|<immintrin\.h>',
        NO_FRAMEWORK
        | {
            r"\b(malloc|calloc|realloc|free|alloca)\s*\(": "allocation",
            r"\bnew\b(?! )|\bnew [A-Z\w]+[\[({]": "allocation",
            r"\bpthread|\bstd::(thread|async|mutex|atomic)|#pragma omp|\bthread_local\b": "threads",
            r"\bthrow\b|\bcatch\b": "exceptions",
            r"\bstd::(?!mem|str)": "a standard template, which the linker may give to others",
        },
    ),
    Room(
        "csrc/cuda/*",
        rf'{OWN_HEADERS}|"cuda/\w+\.cuh"|{PLAIN}|<cuda_(fp16|bf16|runtime)\.h>|{HOST_MEANING}',
        NO_FRAMEWORK
        | {
            r"\bcub::|\bthrust::": "CUB or Thrust",
            r"\bcudaMalloc|\bcudaFree|\bmalloc\s*\(": "host allocation",
            r"\bcuda\w*Synchronize\b": "synchronisation",
        },
    ),
    Room(  # what the CPU runs too
        "csrc/cuda/*",
        rf'{OWN_HEADERS}|"cuda/(launch|(?!launch_)\w+)\.cuh"|{PLAIN}',
        {
            r"<<<|\bcuda[A-Z]\w*": "a launch or a call of the runtime",
            r"\basm\b": "assembly",
            r"\b__(shared|constant|managed)__": "memory that no Arena gave",
            r"\b__(sync|shfl|ballot|any|all|match|reduce|activemask)\w*": "a barrier or a shuffle",
            r"\b__(threadfence|nanosleep|trap)\w*|\batomic[A-Z]\w*\(": "an atomic or a fence",
            r"\b__(ldg|ldc[gsv]|ldlu|st(cg|cs|wb|wt))\b": "a load or a store of the compiler",
            r"\b(thread|block)(Idx|Dim)\b|\b(gridDim|warpSize)\b": "a coordinate",
            r"\b(u?(char|short|int|long|longlong)|float|double)[1-4]\b": "a vector type of CUDA",
            r"\b__(half|nv_bfloat16)2?\b|<cuda_\w+\.h>": "a number type of CUDA",
            r"\b__CUDA|\bTK_CUDA_ON_HOST\b": "code that only one of the two compilers sees",
            r"\bwhile\b[^;{]*\bload_(acquire|relaxed)": "a spin that is no wait_until",
            r"\bprintf\b|\bassert\b": "printf or assert",
        },
        but="csrc/cuda/launch*.cuh",
    ),
    Room(
        "csrc/torch/*",
        rf'{OWN_HEADERS}|"token_rows\.h"|"torch/\w+\.h"'
        r"|<torch/(csrc/stable|headeronly)/[\w/]+\.h>|<torch/csrc/inductor/aoti_torch/c/shim\.h>|<\w+>",
        {r"\bat::|\bc10::|\baten::|\bpybind11\b|\bPyObject\b": "ATen, c10 or Python"},
    ),
    Room("examples/cpp/*", r"<tokenkernels/tokenkernels\.h>|<\w+>", NO_FRAMEWORK),
    Room(
        "csrc/numpy/*",
        rf'{OWN_HEADERS}|"token_rows\.h"|"numpy/\w+\.h"|<pybind11/\w+\.h>|<\w+>|<(pthread|sched)\.h>',
        {r"\b(at|c10|torch)::": "torch"},
    ),
]


def _code(path: Path) -> str:
    """A C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("law", ROOMS, ids=lambda law: f"{law.files} {law.but}".strip())
def test_cpp_rooms(law: Room) -> None:
    for path in set(room(law.files)) - set(room(law.but)):
        code = _code(path)
        for included in re.findall(r"#include\s+(\S+)", code):
            assert re.fullmatch(law.includes, included), f"{name(path)} includes {included}"
        for pattern, why in law.banned.items():
            found = re.search(pattern, code)
            assert not found, f"{name(path)} has {found and found[0]!r}: {why}"


# Python: what each room imports.


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports, relative ones in full; each with the names taken from it."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def check(files: list[Path], allowed: str, top_level: bool = False) -> None:
    """Everything imported beyond the standard library matches `allowed`."""
    for path in files:
        for module in imports(path, top_level):
            if module.split(".")[0] not in sys.stdlib_module_names:
                assert re.fullmatch(allowed, module), f"{name(path)} imports {module}"


def test_ops_import_torch_and_the_registry() -> None:
    """And their checks, cases, helpers that a family shares: never another op, Triton or NumPy."""
    own = r"tokenkernels\.(_op|_case|cases|checks)\..*|tokenkernels\.ops\._\w+\..*"
    check(room("tokenkernels/ops/*.py"), rf"torch(\..*)?|{own}")


def test_cases_import_torch_and_what_draws_inputs() -> None:
    own = r"tokenkernels\._case\..*|tokenkernels\.cases\._\w+\..*"
    check(room("tokenkernels/cases/*.py"), rf"torch(\..*)?|{own}")


def test_checks_import_no_framework() -> None:
    check(room("tokenkernels/checks/*.py"), r"tokenkernels\.checks\..*")


def test_triton_kernels_import_triton() -> None:
    """And helpers of their room that begin with an underscore; the registry knows them, not they
    it.
    """
    own = r"tokenkernels\.triton\._\w+(\..*)?"
    check(room("tokenkernels/triton/*.py"), rf"torch(\..*)?|triton(\..*)?|{own}")


def test_the_numpy_functions_import_no_torch() -> None:
    own = r"tokenkernels\.(_numpy|checks)(\..*)?"
    check(room("tokenkernels/numpy.py"), rf"numpy(\..*)?|ml_dtypes|{own}")


def test_importing_the_numpy_functions_loads_no_torch() -> None:
    code = "import sys, tokenkernels.numpy; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    missing = "No module named 'tokenkernels._numpy'" in done.stderr or "_numpy" in done.stderr
    if done.returncode and missing:
        pytest.skip("the NumPy module is not built")
    assert done.returncode == 0, done.stderr


def test_the_kernel_library_knows_no_model() -> None:
    for path in room("tokenkernels/**/*.py") + room("tokenkernels/*.py"):
        assert not any(m.split(".")[0] == "tokenmodels" for m in imports(path)), name(path)


def test_models_use_public_names() -> None:
    """At the top only torch and the kernels; what is optional is imported where it is used."""
    files = [path for path in PYTHON if (ROOT / "python" / "tokenmodels") in path.parents]
    for path in files:
        for module in imports(path):
            if module.startswith("tokenkernels"):
                private = [part for part in module.split(".") if part.startswith("_")]
                assert not private, f"{name(path)} imports {module}"
    here = r"python\.tokenmodels(\..*)?|tokenmodels(\..*)?"
    check(files, rf"torch(\..*)?|tokenkernels(\..*)?|{here}", top_level=True)


def test_one_file_reads_the_environment() -> None:
    shipped = [p for p in PYTHON if name(p).startswith(("tokenkernels/", "python/"))]
    readers = [name(p) for p in shipped if re.search(r"\bos\.environ\b|\bgetenv\b", p.read_text())]
    assert readers == ["tokenkernels/_op.py"]


@pytest.mark.parametrize(
    "path",
    [
        *("tests/test_ops.py", "tests/test_ops_torch.py", "tests/test_junk.py", "tests/junk.py"),
        *("tests/trial.py", "tests/conftest.py"),
        *("bench/bench_ops.py", "bench/contenders.py", "bench/small_calls.py", "bench/__main__.py"),
    ],
)
def test_whoever_serves_all_ops_names_none(path: str) -> None:
    text = (ROOT / path).read_text()
    named = [op for op in OPS if re.search(rf"\b{op}\b", text)]
    assert not named, f"{path} names {named}"


# Every file.


@pytest.mark.parametrize("path", PYTHON + CPP, ids=name)
def test_a_file_is_short_and_begins_with_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LIMIT, f"{text.count(chr(10))} lines: split it by idea"
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        comment = re.match(r"(?:// ?[^\n]*\n)+", text)
        first = re.sub(r"^// ?", "", comment[0], flags=re.MULTILINE) if comment else ""
    assert re.match(r"\S.*[.!?…)`](\s|$)", first, re.DOTALL), "no sentence that says what it is"


FORBIDDEN = {
    "unfinished": r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b",
    "a skip or an expected failure without a condition": r"pytest\.mark\.(skip\b|xf" r"ail)",
    "a path of one machine": r"(?<![\w.])/(work|farm|root|home|tmp/[a-z]+)/",
    "how it came to be": r"(?i)\b((previous|this) ses" r"sion|as the is" r"sue (asks|says))\b",
}


def test_nothing_is_said_that_does_not_belong() -> None:
    texts = [p for p in FILES if p.suffix in (".py", ".md", ".toml", ".txt") or p in CPP]
    for path in texts:
        for why, pattern in FORBIDDEN.items():
            found = re.search(pattern, path.read_text())
            assert not found, f"{name(path)} has {found and found[0]!r}: {why}"


@pytest.mark.parametrize("folder", ["tokenkernels/cases", "tokenkernels/checks", "bench/peers"])
def test_one_op_has_one_name_in_every_room(folder: str) -> None:
    """A file of ops/ that holds the public function of its name has its like in other rooms."""
    for op in OPS.values():
        if (ROOT / "tokenkernels" / "ops" / f"{op.name}.py").exists() and op.function is not None:
            assert (ROOT / folder / f"{op.name}.py").exists(), f"{folder}/{op.name}.py"


@pytest.mark.parametrize("function", tokenkernels.__all__)
def test_a_public_function_is_documented_and_ends_with_backend(function: str) -> None:
    public = getattr(tokenkernels, function)
    parameters = list(inspect.signature(public).parameters.values())
    assert (
        parameters[-1].name == "backend" and parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY
    )
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters)
    text = inspect.getdoc(public) or ""
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert part in text, f"no {part}"
