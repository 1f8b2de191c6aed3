"""A pytest plugin that writes down what became of every test at once, and takes up again where a
process died: `-p bench.gpu.recorder --record FILE --share 1/4`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import timing

WORDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="FILE: a line of JSON per test; those in it are left out")
    parser.addoption("--share", default="1/1", help="of the cases of an op every n-th, from i on")
    parser.addoption("--without-general", action="store_true", help="only tests that have an op")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "recorder of tests")


class Recorder:
    """Notes when a test begins, so that one which ends the process is known, and how it ended."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = Path(config.getoption("record"))
        self.share, self.shares = map(int, config.getoption("share").split("/"))
        self.general = not config.getoption("without_general")
        self.known = {test["id"] for test in read(self.path)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [i for i in items if self.general or "op" in _parameters(i)]
        cases: dict[Any, int] = {}
        for item in items:
            cases.setdefault(_case(item), len(cases))
        mine = self.share - 1
        items[:] = [item for item in items if cases[_case(item)] % self.shares == mine]
        self._write(id="", collected=len(items))
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(id=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            problem = "" if report.passed else _problem(report)
            self._write(
                id=report.nodeid, outcome=report.outcome, seconds=report.duration, problem=problem
            )
            if timing.is_fatal(problem):
                os._exit(3)  # whatever runs after it in this process would fail of it too

    def _write(self, **content: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(content | {"when": time.time()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The last that is known of every test; its number under the empty id."""
    tests: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            test = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line of a process that was killed
        tests[test["id"]] = test
    return list(tests.values())


def _case(item: pytest.Item) -> Any:
    return getattr(_parameters(item).get("case"), "id", None)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _problem(report: pytest.TestReport) -> str:
    """The words of the exception, or of the skip."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2][:WORDS]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:WORDS]
