"""Every example in a docstring of a public function, and in the README, gives what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import tokenkernels

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", tokenkernels.__all__)
def test_docstring(name: str) -> None:
    function = getattr(tokenkernels, name)
    examples = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    results = [runner.run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0, "no example"
    assert all(result.failed == 0 for result in results)


def test_readme(native: None) -> None:
    result = doctest.testfile(str(README), module_relative=False, optionflags=OPTIONS)
    assert result.attempted > 0 and result.failed == 0
