"""What is written down twice about a release agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import clipgrad

ROOT = Path(__file__).resolve().parents[1]


def found(pattern: str, file: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_newest_version_is_the_same_everywhere() -> None:
    releases = found(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", "CHANGELOG.md")
    dates = found(r"^## \[\d\S*\] - (\S+)$", "CHANGELOG.md")
    assert releases[0] == clipgrad.__version__
    assert found(r"^version: (\S+)$", "CITATION.cff") == [releases[0]]
    assert found(r'^date-released: "(\S+)"$', "CITATION.cff") == [dates[0]]


def test_the_workflow_tests_each_python_that_is_promised() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    classifiers = re.findall(
        r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE
    )
    (matrix,) = found(r"^ +python: \[(.*)\]$", ".github/workflows/ci.yml")
    assert re.findall(r"[\d.]+", matrix) == classifiers
    assert project["requires-python"] == f">={classifiers[0]}"
