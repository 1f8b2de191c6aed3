"""Where the golden tensors of SiT are."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(golden: Path) -> Path:
    return golden / "sit"
