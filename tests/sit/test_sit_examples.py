"""Every example in a docstring of the models gives what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest
import tokenmodels.sit
import torch

MODULES = [
    f"tokenmodels.{name}"
    for name in (
        *(
            "_average",
            "_blocks",
            "_files",
            "_frozen",
            "_log",
            "_optional",
            "_options",
            "_processes",
            "_seeds",
        ),
        *("_data.mixing", "_data.order", "_data.transforms"),
        *("sit.checkpoint", "sit.config", "sit.distillation", "sit.distilled", "sit.evaluate"),
        *("sit.export", "sit.model", "sit.recipe", "sit.recovery", "sit.slimming", "sit.stem"),
        *("sit.timing", "sit.train"),
    )
]
WITH_TIMM = [
    f"tokenmodels.sit.{name}" for name in ("distilled_vit", "hosts", "slim", "timm_models")
]


@pytest.mark.parametrize("name", MODULES + WITH_TIMM)
def test_docstrings(name: str) -> None:
    if name in WITH_TIMM:
        pytest.importorskip("timm")
    module = importlib.import_module(name)
    public = {one: getattr(tokenmodels.sit, one) for one in tokenmodels.sit.__all__}
    found = doctest.DocTestFinder().find(module, globs=vars(module) | public | {"torch": torch})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    results = [runner.run(one) for one in found]
    assert sum(result.attempted for result in results) > 0, "no example"
    assert all(result.failed == 0 for result in results)
