"""Writes into NOTES.md what nvcc made of the CUDA kernels, by the table that tests compare with;
knows how they are launched. `python -m bench.cuda_kernels`, without a GPU or nvcc.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import report
from bench.kernels import PAGE, together
from bench.tables import Table, number

import cuda_resources as resources  # isort: skip  (bench.kernels has put tests/ into the path)

BLOCK = re.compile(r"(?<=<!-- cuda kernels -->\n).*(?=<!-- end of cuda kernels -->)", re.DOTALL)
ARCH = "sm_90a"


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
    r"aggregate_logits: .*<float>": Launched(256, 52224),
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

Launches = Callable[[dict[str, Any]], tuple[int, int]]


def _gather_topk(kwargs: dict[str, Any]) -> tuple[int, int]:
    fused, by_threshold = bool(kwargs.get("fuse")), kwargs.get("k") is None
    two = fused or by_threshold or kwargs["scores"].shape[1] > 8192
    return 1 + two, 1 + fused


def _score_attention(kwargs: dict[str, Any]) -> tuple[int, int]:
    shared_out = kwargs.get("heads") != "none" and kwargs["query"].shape[2] > 64
    return 1 + (kwargs.get("lse") is None) + (shared_out or kwargs.get("pool", 1) > 63), 0


def _aggregate_logits(kwargs: dict[str, Any]) -> tuple[int, int]:
    return 1 + (kwargs["value"].shape[1] > 1024), 1


def _aggregate_soft(kwargs: dict[str, Any]) -> tuple[int, int]:
    return 1 + (kwargs["key"].shape[1] > 256), 3


CALLS: dict[str, Launches] = {
    "accumulate_codes": lambda kwargs: (4, 0),
    "aggregate_logits": _aggregate_logits,
    "aggregate_soft": _aggregate_soft,
    "assign_nearest": lambda kwargs: (2 if kwargs["x"].shape[-1] <= 2 else 3, 0),
    "assign_residual": lambda kwargs: (2, 0),
    "compact_kv": lambda kwargs: (1, 0),
    "compact_kv_": lambda kwargs: (1, 0),
    "compact_kv_paged": lambda kwargs: (1, 0),
    "gather_topk": _gather_topk,
    "merge_adjacent": lambda kwargs: (2, 1),
    "merge_backward": lambda kwargs: (1, 0),
    "merge_runs": lambda kwargs: (2, 1),
    "score_attention": _score_attention,
    "slim_tokens": lambda kwargs: (2, 5),
}
"""Launches of a call, forward and backward; a memset counts."""

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

MULTIPLIES = {
    "aggregate_logits": "aggregate_logits_kernel",
    "aggregate_soft": "aggregate_soft_kernel",
    "assign_nearest": "search_kernel",
    "assign_residual": "chain_kernel",
    "score_attention": "score_kernel<.*0>",
    "slim_tokens": "weigh_kernel",
}
"""Which kernel of such an op that is."""


def blocks_together(op: str, dtype: str) -> int:
    """Of the kernel that multiplies, as many as a multiprocessor holds at least."""
    _, uses = resources.table()
    kind = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}[dtype]
    held = {
        kernel: together(built(kernel, use))
        for (kernel, arch), use in uses.items()
        if arch == ARCH and re.match(f"{op}: {MULTIPLIES[op]}", kernel)
    }
    return min({k: n for k, n in held.items() if kind in k}.values() or held.values())


def built(kernel: str, use: resources.Use) -> dict[str, int]:
    how = launched(kernel)
    return {"registers": use.registers, "warps": how.threads // 32, "shared": how.shared}


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
        blocks = together(built(kernel, use))
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
    argparse.ArgumentParser(prog="python -m bench.cuda_kernels", description=__doc__).parse_args()
    _, uses = resources.table()
    text = report.as_markdown(kernels_table(uses)) + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
