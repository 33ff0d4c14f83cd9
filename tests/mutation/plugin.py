"""This pytest plugin runs chosen tests only, or finds which lines each test reaches.

``CHOSEN`` names a file of test ids, or functions, to be run in that order; ``REACHED`` names where the lines go.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOMS = ("engine", "rules", "clipping", "noise")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "CHOSEN" not in os.environ:
        return
    import clipgrad

    if not Path(clipgrad.__file__).is_relative_to(Path.cwd()):
        raise pytest.UsageError(f"the tests would run {clipgrad.__file__}, not this copy")
    ids = Path(os.environ["CHOSEN"]).read_text(encoding="utf-8").split("\n")
    order = {name: index for index, name in enumerate(ids)}
    found = [(order.get(item.nodeid, order.get(item.nodeid.split("[")[0])), item) for item in items]
    items[:] = [item for place, item in sorted(found, key=lambda f: f[0] or 0) if place is not None]


class Reached:
    """This class collects lines, seconds and failures by test."""

    def __init__(self, out: str) -> None:
        import coverage  # needed to make the map only

        self.out = out
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        include = [os.path.abspath(f"clipgrad/{room}/*") for room in ROOMS]
        self.coverage: Any = coverage.Coverage(data_file=None, config_file=False, include=include)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        self.coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # a skipped test finds nothing either
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            os.path.relpath(file): data.contexts_by_lineno(file) for file in data.measured_files()
        }
        seconds = {name: s for name, s in self.seconds.items() if name not in self.failed}
        found = {"seconds": seconds, "failed": sorted(self.failed), "lines": lines}
        Path(self.out).write_text(json.dumps(found), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if "REACHED" in os.environ:
        config.pluginmanager.register(Reached(os.environ["REACHED"]))
