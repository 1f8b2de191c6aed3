"""What all tests share: the registry, complete; and where the golden tensors are, for those who
have them.
"""

import os
from pathlib import Path

import pytest
import torch

from tokenkernels import _native, ops

if not torch.cuda.is_available():  # read when the first kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

ops.load()
torch.set_num_threads(2)

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--op")
    if wanted:
        items[:] = [i for i in items if _op_of(i) in (None, wanted)]


def _op_of(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    return getattr(parameters and parameters.params.get("op"), "name", None)
