"""Test that the code of docs/loops.md runs, and that accelerate's state holds the ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def run(names: dict[str, Any], *which: int) -> dict[str, Any]:
    for number in which:
        exec(compile(blocks()[number], str(PAGE), "exec"), names)
    return names


def test_the_plain_and_the_attached_loop_run() -> None:
    assert len(blocks()) == 3
    names = run({}, 0)
    first = names["optimizer"]
    names = run(names, 1)
    assert first.ledger.steps == names["optimizer"].ledger.steps == 3
    assert first.epsilon() == names["optimizer"].epsilon()


def test_the_recipe_for_accelerate_saves_and_restores(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    names = run({"folder": tmp_path}, 0, 2)
    assert names["optimizer"].ledger.steps == 3
    fresh = blocks()[2].split("for batch in loader")[0]
    restored: dict[str, Any] = run({}, 0)
    exec(compile(fresh, str(PAGE), "exec"), restored)
    restored["accelerator"].load_state(tmp_path)
    assert restored["optimizer"].ledger.steps == 3
    assert list(restored["loader"]) == []  # all of its batches are used
    for one, other in zip(restored["model"].parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(one, other)
