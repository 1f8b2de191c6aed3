"""What the compiler makes of every CUDA kernel for sm_80 and sm_90a, and the committed table of it,
which `python tests/cuda_resources.py --write` renews (after `make build`).

Registers, static shared memory and stack (spilled registers are in it) of each kernel, in bytes; on
sm_90a the driver keeps the first 1024 bytes of shared memory for itself. What a launch borrows
besides is not here. The object in place is read where it carries an architecture; kernels are
compiled for the others, into `build/cubins`, and again only where a source has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from alone import alone

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
OBJECT = ROOT / "tokenkernels" / "_torch.so"
CUBINS = ROOT / "build" / "cubins"
TABLE = Path(__file__).with_suffix(".json")
RENEW = "python tests/cuda_resources.py --write; python -m bench.cuda_kernels"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", f"-I{SOURCES}", "-cubin")
GROWTH = 1.1


class Key(NamedTuple):
    kernel: str
    arch: str


class Use(NamedTuple):
    registers: int
    shared: int
    stack: int


Uses = dict[Key, Use]


@cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; what the toolkit here lacks comes with the triton package."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin or "").parent / "backends/nvidia/bin" / name if triton else None
    return shutil.which(name) or (str(carried) if carried and carried.exists() else None)


def missing() -> str | None:
    """Why nothing can be read here, in words."""
    absent = [name for name in ("nvcc", "cuobjdump", "c++filt") if tool(name) is None]
    return f"no {' and no '.join(absent)}" if absent else None


def output(name: str, *arguments: str | Path, given: str = "") -> str:
    command = [tool(name) or name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=given)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def release() -> str:
    """Of nvcc: "13.0"."""
    found = re.search(r"release (\d+\.\d+)", output("nvcc", "--version"))
    assert found
    return found[1]


def _included(path: Path) -> Iterator[Path]:
    """A source and the headers of ours that it includes."""
    seen, left = set(), [path]
    while left:
        if (file := left.pop()) not in seen and file.exists():
            seen.add(file)
            names = re.findall(r'#include "([^"]+)"', file.read_text())
            left += [SOURCES / name for name in names]
    yield from sorted(seen)


def _cubin(source: Path, arch: str) -> Path:
    """The kernels of a file, compiled for one architecture unless that was done before."""
    content = hashlib.sha256(repr((output("nvcc", "--version"), FLAGS)).encode())
    for file in _included(source):
        content.update(file.read_bytes())
    path = CUBINS / f"{source.stem}.{arch}.{content.hexdigest()[:16]}.cubin"
    if not path.exists():
        for old in CUBINS.glob(f"{source.stem}.{arch}.*"):
            old.unlink()
        made = path.with_suffix(".new")
        output("nvcc", *FLAGS, f"-arch={arch}", "-o", made, source)
        made.replace(path)
    return path


@cache
def files(arch: str) -> list[Path]:
    """Where the kernels for `arch` are: the object in place, or cubins."""
    if OBJECT.exists() and output("cuobjdump", "-lelf", "-arch", arch, OBJECT).strip():
        return [OBJECT]
    sources = sorted((SOURCES / "cuda").glob("*.cu"), key=lambda file: -file.stat().st_size)
    with alone(CUBINS), ThreadPoolExecutor(2) as workers:
        return list(workers.map(lambda source: _cubin(source, arch), sources))


def readable(mangled: list[str]) -> list[str]:
    """`accumulate_codes: sum_kernel<BFloat16, true>`: the file of a kernel and its name."""
    plain = output("c++filt", "-p", given="\n".join(mangled)).splitlines()
    found = []
    for symbol, name in zip(mangled, plain, strict=True):
        place = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", symbol)
        name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
        found.append(f"{place[1]}: {name}" if place else name)
    return found


@cache
def uses() -> Uses:
    """What every kernel takes."""
    found: Uses = {}
    for arch in ARCHITECTURES:
        for path in files(arch):
            text = output("cuobjdump", "--dump-resource-usage", "-arch", arch, path)
            pairs = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
            for name, (_, numbers) in zip(readable([p[0] for p in pairs]), pairs, strict=True):
                used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
                stack = used["STACK"] + used["LOCAL"]
                found[Key(name, arch)] = Use(used["REG"], used["SHARED"], stack)
    return found


@cache
def instructions(arch: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in a kernel, with all that it says of itself."""
    found = {}
    with ThreadPoolExecutor(2) as workers:
        texts = workers.map(
            lambda path: output("cuobjdump", "-sass", "-arch", arch, path), files(arch)
        )
        for text in texts:
            _, *parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
            for name, code in zip(readable(parts[::2]), parts[1::2], strict=True):
                words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code)
                found[name] = Counter(words)
    return found


def table() -> tuple[str, Uses]:
    """The release of nvcc that the committed table is of, and the table."""
    read = json.loads(TABLE.read_text())
    rows = read["kernels"]
    return read["nvcc"], {
        Key(row["kernel"], row["arch"]): Use(*(row[name] for name in Use._fields)) for row in rows
    }


def complaints(before: Uses, now: Uses, same_release: bool) -> list[str]:
    """What is worse than the table says, kernel by kernel. Another release of nvcc allots registers
    in its own way: of it only spills are told.
    """
    found = [f"{key.kernel}, {key.arch}: gone; {RENEW}" for key in sorted(before.keys() - now)]
    for key, use in sorted(now.items()):
        said = f"{key.kernel}, {key.arch}"
        if (old := before.get(key)) is None:
            found.append(f"{said}: not in the table; {RENEW}")
            old = Use(use.registers, use.shared, 0)
        if use.stack > old.stack:
            found.append(f"{said}: spills, stack {old.stack} -> {use.stack} bytes")
        for what in ("registers", "shared") if same_release else ():
            was, is_now = getattr(old, what), getattr(use, what)
            if is_now > GROWTH * was:
                found.append(f"{said}: {what} {was} -> {is_now}")
    return found


def write(found: Uses) -> None:
    rows = [json.dumps(key._asdict() | use._asdict()) for key, use in sorted(found.items())]
    lines = ",\n".join(f"  {row}" for row in rows)
    TABLE.write_text(f'{{"nvcc": "{release()}",\n "kernels": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into the table")
    chosen = parser.parse_args()
    if why := missing():
        parser.error(why)
    newest = max(file.stat().st_mtime for file in SOURCES.rglob("*") if file.is_file())
    if OBJECT.exists() and OBJECT.stat().st_mtime < newest:
        parser.error("a source is newer than the object in place: `make build` first")
    _, before = table() if TABLE.exists() else ("", {})
    print("\n".join(complaints(before, uses(), same_release=True)) or "as the table says")
    if chosen.write:
        write(uses())


if __name__ == "__main__":
    main()
