"""Writes into NOTES.md what nvcc made of the CUDA kernels, by the table that tests compare with;
knows how they are launched. `python -m bench.cuda_kernels`, without a GPU or nvcc.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import report
from bench.kernels import MULTIPROCESSORS, PAGE, Call, recorded, together
from bench.tables import Table, number
from tokenkernels._case import Make
from tokenkernels._op import tensors_in

import cuda_on_host  # isort: skip
import cuda_resources as resources  # isort: skip  (bench.kernels has put tests/ into the path)

BLOCK = re.compile(r"(?<=<!-- cuda kernels -->\n).*(?=<!-- end of cuda kernels -->)", re.DOTALL)
ARCH = "sm_90a"
CHECKED = 32 << 20
"""Bytes of the largest inputs whose launches are compared with the committed ones."""
LAUNCHES = Path(__file__).with_name("cuda_launches.json")


class Launched(NamedTuple):
    """How a kernel is launched: what its registers do not say."""

    threads: int
    shared: int = 0
    """Bytes that a block borrows where it is commonest."""
    loads: int = 0
    """Those of 16 bytes that a thread has under way while it moves rows."""


KERNELS = {
    r"accumulate_codes: sum_kernel<.*true>": Launched(256, loads=4),
    r"accumulate_codes: sum_kernel<.*": Launched(256),
    r"accumulate_codes: .*": Launched(256, 48),
    r"aggregate_join_kernel<.*": Launched(256),
    r"aggregate_logits: .*<float, 64>": Launched(256, 35840),
    r"aggregate_logits: .*<float, .*": Launched(256, 52224),
    r"aggregate_logits: .*, 64>": Launched(256, 37888),
    r"aggregate_logits: .*": Launched(256, 87040),
    r"aggregate_soft: .*": Launched(256, 93184),
    r"aggregate_soft_backward: aggregate_slots_kernel<.*": Launched(256, 73728),
    r"aggregate_soft_backward: aggregate_total_kernel<.*": Launched(256),
    r"aggregate_tokens_again_kernel<.*": Launched(256, 139264),
    r"aggregate_tokens_kernel<float, .*": Launched(256, 107520),
    r"aggregate_tokens_kernel<.*": Launched(256, 73728),
    r"assign_\w+: prepare_kernel": Launched(256, 2816),
    r"assign_nearest: exact_kernel": Launched(128, 16768),
    r"assign_nearest: search_kernel<BFloat16, 2, false>": Launched(256, 192768),
    r"assign_nearest: search_kernel<.*, false>": Launched(256, 68752),
    r"assign_nearest: search_kernel<BFloat16, 2, true>": Launched(256, 227040),
    r"assign_nearest: search_kernel<.*, true>": Launched(256, 228576),
    r"assign_residual: chain_kernel<BFloat16, 2>": Launched(256, 195856),
    r"assign_residual: chain_kernel<.*": Launched(256, 81168),
    r"compact_kv: compact_kernel<.*true, \d+>": Launched(256, 20544, 4),
    r"compact_kv: compact_kernel<.*false, \d+>": Launched(256, 16448, 4),
    r"fill: .*": Launched(256),
    r"gather_topk: gather_topk_kernel": Launched(256, 10704, 4),
    r"gather_topk: select_kernel<Alone>": Launched(1024, 9392),
    r"gather_topk: select_kernel<Together>": Launched(1024, 11488),
    r"gather_topk: rows_kernel": Launched(256, 8256, 4),
    r"gather_topk_backward: scatter_kernel": Launched(256, 4096, 4),
    r"gather_topk_backward: weigh_kernel": Launched(256, 512, 4),
    r"gather_topk_backward: spread_kernel": Launched(256, 8192, 4),
    r"group_products_kernel<int>": Launched(32),  # never: only its attributes are asked for
    r"merge_adjacent: counts_kernel": Launched(256),
    r"merge_adjacent: .*true>": Launched(128, 160, 4),
    r"merge_adjacent: .*": Launched(128, 160),
    r"merge_backward: .*, 1>": Launched(256),
    r"merge_backward: .*": Launched(256, loads=2),
    r"merge_runs: .*true>": Launched(256, 384, 5),
    r"merge_runs: .*": Launched(256, 384),
    r"score_attention: finish_kernel": Launched(256, 1344),
    r"score_attention: measure_kernel<.*": Launched(128, 70656, 8),
    r"score_attention: score_kernel<.*0>": Launched(128, 74864, 8),
    r"score_attention: score_kernel<.*1>": Launched(128, 73024, 8),
    r"score_attention: score_kernel<.*2>": Launched(128, 220272, 24),
    r"slim_tokens: weigh_kernel<BFloat16>": Launched(256, 71680),
    r"slim_tokens: weigh_kernel<Half>": Launched(256, 90112),
    r"slim_tokens: weigh_kernel<float>": Launched(256, 83968),
    r"slim_tokens: gather_kernel<float>": Launched(256, 53248),
    r"slim_tokens: gather_kernel<.*": Launched(256, 40960),
    r"slim_tokens_backward: spread_kernel<float>": Launched(256, 84992),
    r"slim_tokens_backward: spread_kernel<.*": Launched(256, 72704),
    r"slim_tokens_backward: lower_kernel<.*": Launched(256, 48128),
    r"slim_tokens_backward: resist_kernel<.*": Launched(256, 41984),
    r"slim_tokens_backward: collect_kernel<.*": Launched(256, 57344),
    r"slim_tokens_backward: finish_kernel<.*": Launched(256, 2048),
}
"""The first pattern that a name matches counts."""

TENSOR_CORES: dict[str, tuple[int, int]] = {
    "aggregate_logits": (6, 1),
    "aggregate_soft": (6, 1),
    "assign_nearest": (3, 1),
    "assign_residual": (3, 3),
    "score_attention": (6, 1),
    "slim_tokens": (6, 1),
}
"""Ops that multiply there, and how many products of 16 bits stand for one of float32 (three of tf32
are six) and of 16.
"""

TILES = 20 << 10
"""Bytes of shared memory: whoever of these borrows more multiplies, what goes before and behind it
borrows less.
"""

Grids = dict[str, list[cuda_on_host.Noted]]
"""What a cell launches; of a gradient what goes backward."""


class Blank(Make):
    """Draws integers with their values, and memory as it comes for everything else."""

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    rand = randn


def grids() -> Grids:
    """As they were committed."""
    found = json.loads(LAUNCHES.read_text())
    return {cell: [cuda_on_host.Noted(*one) for one in noted] for cell, noted in found.items()}


def noted(multiprocessors: int, most: float = math.inf) -> Grids:
    """The launches of every cell of the bench on a Hopper of this size, asked of the launchers
    themselves, which run on the CPU in tests; without those gradients whose sizes values decide,
    and without inputs of more than `most` bytes.
    """
    cuda_on_host.load()
    cuda_on_host.claim_hopper()
    found: Grids = {}
    for call in recorded():
        if sum(t.nbytes for t in tensors_in(call.kwargs)) > most:
            continue
        kwargs = call.case.make(Blank(call.case.id, call.dtype))
        run = partial(call.op.run, kwargs, cuda_on_host.KIND)
        forward = cuda_on_host.noted(run, multiprocessors)
        if not call.gradient:
            found[str(call)] = forward
        elif call.launches:
            both = partial(_forward_and_backward, call, kwargs, run)
            found[str(call)] = cuda_on_host.noted(both, multiprocessors)[len(forward) :]
    return found


def _forward_and_backward(call: Call, kwargs: dict[str, Any], run: Callable[[], Any]) -> None:
    leaves = [t for name in call.op.differentiable for t in tensors_in(kwargs.get(name))]
    leaves = [t.requires_grad_() for t in leaves if t.dtype.is_floating_point]
    outputs = [t for t in run() if t.requires_grad]
    torch.autograd.grad(outputs, leaves, list(map(torch.empty_like, outputs)), allow_unused=True)


def blocks_together(op: str, noted: cuda_on_host.Noted, uses: resources.Uses) -> int:
    """How many of its blocks a multiprocessor holds; of kernels that names do not tell apart, by
    the one of most registers.
    """
    name = re.sub(r"\b\w+::", "", noted.kernel)
    start = re.sub(r", k\w+>", "", name)
    named = {
        kernel: use.registers
        for (kernel, arch), use in uses.items()
        if arch == ARCH and kernel.split(": ")[-1].startswith(start)
    }
    own = {k: n for k, n in named.items() if k.startswith(op.removesuffix("_"))} or named
    return together(
        {"registers": max(own.values()), "warps": noted.threads // 32, "shared": noted.shared}
    )


def launched(kernel: str) -> Launched:
    """How a kernel is launched; a new one has to be entered above."""
    for pattern, how in KERNELS.items():
        if re.fullmatch(pattern, kernel):
            return how
    raise KeyError(f"{kernel}: say in KERNELS how it is launched")


def kernels_table(uses: resources.Uses) -> Table:
    columns = ["kernel", "registers sm_80", f"registers {ARCH}", "threads", "shared KB"]
    table = Table("Kernels", [*columns, "blocks per SM", "KB under way per SM"], [])
    for (kernel, arch), use in sorted(uses.items()):
        if arch != ARCH:
            continue
        how = launched(kernel)
        built = {"registers": use.registers, "warps": how.threads // 32, "shared": how.shared}
        blocks = together(built)
        table.rows.append(
            [
                kernel,
                str(uses[resources.Key(kernel, "sm_80")].registers),
                str(use.registers),
                str(how.threads),
                number(how.shared / 1024),
                str(blocks),
                number(16 * how.loads * how.threads * blocks / 1024) if how.loads else "",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_kernels", description=__doc__)
    parser.add_argument(
        "--launches", action="store_true", help="renew the launches too (after `make build`)"
    )
    parser.add_argument("--check", action="store_true", help="only tell which launches are new")
    options = parser.parse_args()
    if options.check:
        known, now = grids(), noted(MULTIPROCESSORS, CHECKED)
        print("\n".join(cell for cell in now if known.get(cell) != now[cell]) or "up to date")
        return
    if options.launches:
        found = noted(MULTIPROCESSORS)
        lines = ",\n".join(f"{json.dumps(cell)}: {json.dumps(found[cell])}" for cell in found)
        LAUNCHES.write_text(f"{{\n{lines}\n}}\n")
    _, uses = resources.table()
    text = report.as_markdown(kernels_table(uses)) + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
