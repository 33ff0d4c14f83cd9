"""This module runs chosen tests with pytest in a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
PYTEST += ["-p", "tests.mutation.plugin"]


def run_pytest(
    tree: Path, arguments: list[str], timeout: float | None = None, **env: str
) -> tuple[int | None, str]:
    """Return the exit status, or None after the timeout, and the output."""
    # A session of its own, so that what the tests started ends with them.
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [*PYTEST, *arguments], cwd=tree, stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, 9)
            process.wait()
        out.seek(0)
        return status, out.read()


@dataclass(frozen=True)
class Run:
    """This class holds tests by id, or functions with all parameters that pytest's options allow.

    Attributes:
        tests: Run in this order.
        options: Of pytest.
        limit: In seconds.
    """

    tests: list[str]
    options: list[str]
    limit: float

    def go(self, tree: Path, limit: float, *more: str) -> tuple[int | None, str]:
        """Return the exit status, or None after the limit, and the output; stop at the first failure."""
        options = [*self.options, *(more or ("-x",))]
        files = sorted({test.split("::")[0] for test in self.tests})
        with tempfile.NamedTemporaryFile("w", suffix=".tests", encoding="utf-8") as chosen:
            chosen.write("\n".join(self.tests))
            chosen.flush()
            return run_pytest(tree, [*options, *files], limit, CHOSEN=chosen.name)


def failures(printed: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
