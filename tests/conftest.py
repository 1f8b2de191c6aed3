"""What all tests share: the registry, complete; and where the golden tensors are, for those who
have them.
"""

import importlib.util
import os
from pathlib import Path

import cuda_on_host
import pytest
import torch
from torch import library

from tokenkernels import _native, ops

if torch.cuda.is_available():  # without it, no product where deterministic algorithms are asked for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:  # read when the first kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

ops.load()
torch.set_num_threads(2)


def _admit_torchvision() -> library.Library | None:
    """A torchvision made for CUDA asks, when imported, for two operators that its own object would
    have defined, had torch been able to load it.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda is not None:
        return None
    if "+cu" not in Path(str(spec.origin)).with_name("version.py").read_text():
        return None
    operators = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


TORCHVISION = _admit_torchvision()
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors; tests that read it are skipped where it is not."""
    if not GOLDEN.exists():
        pytest.skip("golden tensors are not here")
    return GOLDEN


@pytest.fixture(scope="session")
def native() -> None:
    """Tests of the shared object are skipped where it is not built."""
    if _native.WHY_NOT:
        pytest.skip(_native.WHY_NOT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", help="of the registry's tests only those of this op")
    parser.addoption(
        "--triton",
        choices=("short", "all"),
        default="all" if torch.cuda.is_available() else "short",
        help="short: of Triton, interpreted, what is computed in every dtype, gradients, and one "
        "case of each op for all else",
    )
    parser.addoption(
        "--cuda-on-host",
        action="store_true",
        help="of the backends only CUDA kernels that run on the CPU",
    )
    parser.addoption(
        "--schedule", help="of those, blocks in this order, so many at once: descending,1"
    )
    parser.addoption(
        "--hopper", action="store_true", help="of those, on a GPU whose groups of warps multiply"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cuda-on-host"):
        cuda_on_host.load()
        if config.getoption("--schedule"):
            cuda_on_host.schedule(config.getoption("--schedule"))
        if config.getoption("--hopper"):
            cuda_on_host.claim_hopper()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, short = config.getoption("--op"), config.getoption("--triton") == "short"
    tried: dict[tuple[str, str], str] = {}
    items[:] = [
        item
        for item in items
        if not (wanted and _parameter(item, "op", wanted) != wanted)
        and not (short and _parameter(item, "backend", "") == "triton" and _is_long(item, tried))
        and not (cuda_on_host.loaded and _parameter(item, "op", "") not in cuda_on_host.loaded)
    ]


def _is_long(item: pytest.Item, tried: dict[tuple[str, str], str]) -> bool:
    """The interpreter takes a hundred times as long as a GPU: beyond values, gradients and errors
    the first case of a public op shows a property, in one dtype; of others, which are the gradients
    of those, only registration is tried. Threads do not concern it, and cases tagged "long" are
    left to GPUs.
    """
    name = item.name.partition("[")[0]
    if "long" in getattr(item.callspec.params.get("case"), "tags", ()):  # type: ignore[attr-defined]
        return True
    if name.startswith(("test_truth", "test_errors")) or name == "test_gradient":
        return False
    op = item.callspec.params["op"]  # type: ignore[attr-defined]
    if name.startswith("test_threads") or (op.function is None and name != "test_registration"):
        return True
    shown = _parameter(item, "case", "") + _parameter(item, "dtype", "")
    return tried.setdefault((name, op.name), shown) != shown


def _parameter(item: pytest.Item, name: str, default: str) -> str:
    value = getattr(getattr(item, "callspec", None), "params", {}).get(name, default)
    return str(getattr(value, "name", value))
