"""The evidence of the bench: the one limit, the committed predictions, the page in a browser."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import torch
from tokenmodels.sit import VARIANTS, SiT

from bench import plots, predictions, report, roofline, tables
from bench.gpu import report as gpu_report
from bench.work import Work

ROOT = Path(__file__).parents[1]
RUN = ROOT / "bench" / "results" / "cpu-epyc-zen5.json"
ROOF: roofline.Roof = {
    "cold": {"copy": {"1000": 100.0, "100000": 50.0}, "read": {"1000": 200.0}},
    "warm": {"copy": {"1000": 400.0}, "read": {"1000": 800.0}},
    "gemm": {"float32": 10.0, "bfloat16": 90.0},
    "fma": 20.0,
    "launch_us": 2e6,
}


@pytest.mark.parametrize(
    ("work", "cache", "seconds", "bound"),
    [
        (Work(moved=1000, written=500), "cold", 10.0, "memory"),
        (Work(moved=1000, written=500), "warm", 2.5, "memory"),
        (Work(moved=1000), "cold", 5.0, "memory"),
        (Work(moved=1000, written=100), "cold", 2.0 + 4.0, "memory"),
        (Work(moved=100000, written=50000), "cold", 2000.0, "memory"),
        (Work(flops=400), "cold", 20.0, "arithmetic"),
        (Work(flops=900, dtype="bfloat16"), "cold", 10.0, "arithmetic"),
        (Work(compares=100), "cold", 10.0, "compares"),
        (Work(moved=1000, launches=3), "cold", 6.0, "launches"),
        (Work(exponentials=1e9), "cold", 0.0, "memory"),
    ],
)
def test_the_limit_is_the_longest_part(work: Work, cache: str, seconds: float, bound: str) -> None:
    found = roofline.limit(ROOF, work, cache=cache)
    assert found.seconds == pytest.approx(seconds) and found.bound == bound


def test_float32_on_a_gpu_may_be_three_products_of_halves() -> None:
    gpu = ROOF | {"gemm": {"float32": 10.0, "tf32": 45.0, "bfloat16": 90.0}}
    assert roofline.rate(gpu, "float32") == 30.0 and roofline.rate(gpu, "bfloat16") == 90.0


def test_a_product_timed_beside_a_call_raises_its_roof_only() -> None:
    faster = roofline.raised(ROOF, "bfloat16", 2.0 * roofline.PRODUCT**3 / 500)
    assert roofline.rate(faster, "bfloat16") == pytest.approx(500)
    assert roofline.rate(faster, "float32") == 20 and roofline.rate(ROOF, "bfloat16") == 90


def test_the_roofs_of_this_machine_keep_cold_and_warm_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "SIZES", (roofline.MIB // 4, roofline.MIB))
    monkeypatch.setattr(roofline, "FORGOTTEN", roofline.MIB)
    roof = roofline.measure(0.1)
    sizes = [str(size) for size in roofline.SIZES]
    for cache in ("cold", "warm"):
        assert list(roof[cache]["copy"]) == list(roof[cache]["read"]) == sizes
    rates = [*roof["gemm"].values(), roof["fma"], roof["launch_us"]]
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("cold", [False, True])
def test_cold_inputs_rotate_among_all_that_caches_forget(
    cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, int] = {}
    clone = torch.clone

    def seeing(part: torch.Tensor) -> torch.Tensor:
        seen[part.data_ptr()] = part.nbytes
        return clone(part)

    monkeypatch.setattr(torch, "clone", seeing)
    size = roofline.MIB // 8
    roofline._bandwidth(torch.ones(roofline.MIB // 4), size, 0.5, cold=cold)
    assert set(seen.values()) == {size // 2}
    assert sum(seen.values()) == (roofline.MIB if cold else size // 2)


@pytest.mark.parametrize(
    ("module", "renew"),
    [
        ("bench.predict", "python -m bench.kernels; python -m bench.predict"),
        ("bench.predict_networks", "python -m bench.predict_networks"),
        ("bench.cuda_kernels", "python -m bench.cuda_kernels --launches; python -m bench.predict"),
    ],
)
def test_what_was_computed_and_committed_is_up_to_date(module: str, renew: str) -> None:
    pytest.importorskip("triton")
    if module == "bench.cuda_kernels":
        cuda_on_host.build(cuda_on_host.KIND)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "up to date", f"{done.stdout}{done.stderr}\nrenew: {renew}"


def test_every_cell_is_predicted_for_both_backends() -> None:
    from bench import bench_ops

    cells = {str(cell) for cell in bench_ops.cells()}
    for backend in ("native", "triton"):
        assert {row.cell for row in predictions.known() if row.backend == backend} == cells


def test_no_prediction_is_below_its_own_floor() -> None:
    for row in predictions.known():
        floor = row.bytes / 4.3e12 + row.launches * 3e-6
        assert row.predicted_us >= 0.999e6 * floor, row.cell


@pytest.fixture
def networks() -> Any:
    """The module that predicts them, which needs Triton."""
    pytest.importorskip("triton")
    return importlib.import_module("bench.predict_networks")


def test_networks_meet_their_outcomes(
    networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(networks.networks())
    timed = found[3]
    common = {"model": timed.model, "batch": timed.batch, "build": networks.BUILD}
    rows = [
        common | {"dtype": "bfloat16", "ms": 2 * timed.slimmed_ms, "realised": "50%"},
        common | {"dtype": "float32", "ms": 9.0, "realised": "10%"},
        common | {"dtype": "bfloat16", "ms": 7.0, "realised": ""},
    ]
    (tmp_path / "h200").mkdir()
    line = json.dumps({"section": "models", "cell": "", "records": rows})
    (tmp_path / "h200" / "gpu.jsonl").write_text(line + "\n")
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    outcomes = [line[-2:] for line in networks.table(found).rows]
    assert outcomes[3] == [tables.number(2 * timed.slimmed_ms), "50%"]
    assert not any(any(line) for line in outcomes[:3] + outcomes[4:])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_of_a_network_multiply_what_it_multiplies(
    networks: Any, name: str, dense: bool
) -> None:
    config = replace(VARIANTS[name], dense=dense)
    for batch in (1, 3):
        kernels = list(networks.kernels_of(config, batch))
        assert sum(kernel.macs for kernel in kernels) == batch * config.macs()
        weights = sum(p.numel() for p in SiT(config).parameters())
        assert sum(kernel.values for kernel in kernels) > weights


def timed(row: predictions.Prediction, us: float) -> list[dict[str, Any]]:
    ours = {"contender": row.backend, "role": "ours", "failed": "", "ms": us / 1e3}
    ours |= {"warm_ms": us / 2e3, "limit_ms": us / 2e3, "warm_limit_ms": us / 4e3, "how": "graph"}
    ours |= {"roof_percent": 50.0, "warm_roof_percent": 50.0, "eager_ms": 0.02, "launches": 1}
    ours |= {"extra_bytes": 0, "bytes": row.bytes, "flops": row.flops, "times_fastest_peer": 2.0}
    peer = ours | {"contender": "eager", "role": "peer", "ms": us / 500}
    return [ours, peer]


def test_outcomes_stand_beside_predictions(tmp_path: Path) -> None:
    rows = [row for row in predictions.known() if not row.gradient]
    roof = {"section": "machine", "cell": "roofs", "hash": "", "roof": ROOF}
    slower = {"native": 1.5, "triton": 3.0}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.cell, []).extend(timed(row, slower[row.backend] * row.predicted_us))
    common = {"section": "bench", "hash": ""}
    lines = [roof, *(common | {"cell": cell, "rows": found[cell]} for cell in found)]
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    gpu_report.write(tmp_path)
    cells = gpu_report.store.load([tmp_path / "gpu.jsonl"])
    (table,) = gpu_report.ops(cells)
    place = table.columns.index("µs / predicted")
    assert len(table.rows) == len(rows) == 2 * len(found)
    ratios = {(line[table.columns.index("backend")], line[place]) for line in table.rows}
    assert ratios == {("native", "1.50"), ("triton", "3.00")}
    page = (tmp_path / "gpu.html").read_text()
    assert 'class="roofline"' in page and 'class="peers"' in page and "× 2.00" in page


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = page(tmp_path).read_text()
    assert not re.search(r"(?:src|href)=|@import|url\(|<script|<link", text)
    run = json.loads(RUN.read_text())
    ops = {row["op"] for row in run["ops"]}
    assert text.count('class="peers"') == len(ops)
    ours = {(r["op"], r["case"], r["dtype"]) for r in run["ops"] if r["bytes"] and r["ms"]}
    for op, case, dtype in ours:
        assert f"<title>{op} · {html.escape(case)} · {dtype}: " in text


def page(folder: Path) -> Path:
    report.write(json.loads(RUN.read_text()), folder)
    return folder / "report.html"


LOOK = """<script>
const boxes = svg => [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
const seen = [...document.querySelectorAll('svg')].map(svg => {
  const frame = svg.getBoundingClientRect(), texts = boxes(svg);
  return {kind: svg.getAttribute('class'), width: frame.width, height: frame.height,
    dots: svg.querySelectorAll('.dot, .bar').length,
    outside: texts.filter(t => t.left < frame.left - 1 || t.right > frame.right + 1).length,
    over: texts.filter((a, i) => texts.some((b, j) => j < i && meet(a, b))).length};
});
document.title = JSON.stringify(seen);
</script>"""
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1200,2400",
    "--enable-logging=stderr",
]


def browsed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no browser")
    command = [browser, *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def test_a_browser_draws_every_plot(tmp_path: Path) -> None:
    path = page(tmp_path)
    path.write_text(path.read_text() + LOOK)
    done = browsed(tmp_path, "--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title
    seen = json.loads(html.unescape(title[1]))
    assert {plot["kind"] for plot in seen} == {"roofline", "theory", "peers"}
    for plot in seen:
        assert plot["width"] > 1000 and plot["height"] > 80 and plot["dots"], plot
        assert not plot["outside"] and not plot["over"], plot


def test_a_browser_paints_dots_and_bars(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path, shot = page(tmp_path), tmp_path / "page.png"
    browsed(tmp_path, f"--screenshot={shot}", path.as_uri())
    colours = image.open(shot).convert("RGB").getcolors(1 << 24)
    painted = {"#{:02x}{:02x}{:02x}".format(*colour): count for count, colour in colours}
    for colour in (plots.GOOD, plots.BLUE):
        assert painted.get(colour, 0) > 1000, colour
