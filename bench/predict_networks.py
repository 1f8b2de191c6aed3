"""What an H200 should take for SiT and its teachers, written down before anyone measures it.

`python -m bench.predict_networks` renews `bench/results/predictions-h200-sit.json` and the table in
NOTES.md, without a GPU. The networks are ours, folded, compiled, in bfloat16 and replayed as one
CUDA graph. Per block that is eight kernels: two sums with the norms behind them, four products,
attention, the GELU. Beside them three per slimming, one per convolution and per GELU between two,
one that adds positions, three for the logits. Each takes the longest of its launch, its bytes and
its products, by the rates that `bench.predict` supposes and the share of the tensor cores' that
single warps reach.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent / "python"))

from tokenmodels.sit import VARIANTS, SiTConfig

from bench import report
from bench.gpu.models import BATCHES, MOST
from bench.kernels import PAGE
from bench.predict import H200, REACHED
from bench.roofline import limit
from bench.tables import Table, number
from bench.work import Work

FOLDER = Path(__file__).parent / "results"
FILE = FOLDER / "predictions-h200-sit.json"
BLOCK = re.compile(r"(?<=<!-- networks -->\n).*(?=<!-- end of networks -->)", re.DOTALL)
MODEL = 1
"""Raised with every change of what is predicted, so that an outcome names what it was held to."""
DTYPE, BUILD = "bfloat16", "ours, compiled, one graph"
BYTES = 2
CONVOLVED = 0.5
"""Of what other products reach, convolutions of few channels do."""


class Kernel(NamedTuple):
    """One launch: values moved, multiply-accumulates, the share of the tensor cores' rate."""

    values: int
    macs: int = 0
    reached: float = REACHED[False]


@dataclass(frozen=True)
class Network:
    """Of one slimmed network at one batch size; `share` is that of the saving in theory."""

    model: str
    batch: int
    launches: int
    dense_ms: float
    slimmed_ms: float
    faster: float
    in_theory: float
    share: float


def networks() -> Iterator[Network]:
    """Every released network at every batch size that is measured."""
    for name, config in VARIANTS.items():
        dense = replace(config, dense=True)
        theory = dense.macs() / config.macs()
        for batch in sorted(BATCHES):
            if dense.macs() * batch > MOST:
                continue
            before, after = milliseconds(dense, batch), milliseconds(config, batch)
            launches = sum(1 for _ in kernels_of(config, batch))
            found = before, after, before / after, theory, before / after / theory
            yield Network(name, batch, launches, *(round(value, 4) for value in found))


def milliseconds(config: SiTConfig, batch: int) -> float:
    """The model."""
    return 1e3 * sum(limit(H200, _work(kernel)).seconds for kernel in kernels_of(config, batch))


def _work(kernel: Kernel) -> Work:
    flops = 2 * kernel.macs / kernel.reached
    return Work(BYTES * kernel.values, flops=flops, dtype=DTYPE, launches=1)


def kernels_of(config: SiTConfig, batch: int) -> Iterator[Kernel]:
    """Every launch of one forward of so many images."""
    yield from _stem(config, batch)
    patches, dim, outputs = config.patches, config.embed_dim, config.num_classes
    for block, left in enumerate(config.tokens_after):
        yield from _block(config, batch, patches + config.prefix)
        if block in config.slim_after:
            yield from _slimming(config, batch, patches, left)
        patches = left
    yield Kernel(2 * batch * dim)
    yield Kernel(batch * dim + dim * outputs + batch * outputs, batch * dim * outputs)
    yield Kernel(2 * batch * outputs)


def _stem(config: SiTConfig, batch: int) -> Iterator[Kernel]:
    size, channels = config.image_size, config.in_channels
    height, width = size if isinstance(size, tuple) else (size, size)
    for number_, (wider, stride) in enumerate(config.stem_layers):
        read = batch * height * width * channels
        height, width = -(-height // stride), -(-width // stride)
        written = batch * height * width * wider
        if number_:
            yield Kernel(2 * read)
        yield Kernel(read + written, 9 * written * channels, CONVOLVED * REACHED[False])
        channels = wider
    yield Kernel(2 * batch * (config.patches + config.prefix) * channels)


def _block(config: SiTConfig, batch: int, tokens: int) -> Iterator[Kernel]:
    rows, dim = batch * tokens, config.embed_dim
    hidden = int(dim * config.mlp_ratio)
    for _ in ("attention", "MLP"):
        yield Kernel(4 * rows * dim)  # two terms read, their sum and its norm written
    for read, written in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)):
        yield Kernel(rows * (read + written) + read * written, rows * read * written)
    yield Kernel(4 * rows * dim, 2 * rows * tokens * dim)
    yield Kernel(2 * rows * hidden)


def _slimming(config: SiTConfig, batch: int, patches: int, left: int) -> Iterator[Kernel]:
    """Weights of tokens, their sums, what is written behind the class token."""
    rows, dim, keys = batch * patches, config.embed_dim, config.embed_dim // 2
    yield Kernel(rows * (dim + left), rows * keys * (dim + left))
    yield Kernel(rows * (dim + left) + batch * left * dim, rows * left * dim)
    yield Kernel(2 * batch * (left + config.prefix) * dim)


def measured() -> dict[tuple[str, int], tuple[float, str]]:
    """(network, batch size) → milliseconds and share, from committed runs on an H200."""
    found: dict[tuple[str, int], tuple[float, str]] = {}
    for path in sorted(FOLDER.glob("*h200*/gpu.jsonl")):
        for line in path.read_text().splitlines():
            for row in json.loads(line).get("records") or []:
                if (row.get("build"), row.get("dtype")) == (BUILD, DTYPE) and row["realised"]:
                    found[row["model"], row["batch"]] = row["ms"], row["realised"]
    return found


def table(found: list[Network]) -> Table:
    """Prediction and outcome, a line per network and batch size."""
    columns = ["network", "batch", "launches", "dense ms", "slimmed ms", "images/s"]
    columns += ["faster, in theory", "share", "measured ms", "measured share"]
    took, rows = measured(), []
    for row in found:
        ms, share = took.get((row.model, row.batch), (None, ""))
        shown = [row.model, str(row.batch), str(row.launches), number(row.dense_ms)]
        shown += [number(row.slimmed_ms), number(1e3 * row.batch / row.slimmed_ms)]
        shown += [f"{number(row.faster)} of {number(row.in_theory)}", f"{row.share:.0%}"]
        rows.append([*shown, number(ms), share])
    return Table("Networks", columns, rows)


def as_json(found: list[Network]) -> str:
    """One line per prediction, so that two models can be compared."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in found)
    head: dict[str, Any] = {"model": MODEL, "dtype": DTYPE, "build": BUILD, "roof": H200}
    head |= {"reached": REACHED[False], "convolved": CONVOLVED}
    told = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
    return f'{{\n{told} "networks": [\n{lines}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict_networks", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only tell what is out of date")
    options, found = parser.parse_args(), list(networks())
    page = BLOCK.sub(lambda _: report.as_markdown(table(found)) + "\n", PAGE.read_text())
    wanted = {FILE: as_json(found), PAGE: page}
    if options.check:
        told = [path.name for path, text in wanted.items() if path.read_text() != text]
        print(", ".join(told) or "up to date")
        return
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
