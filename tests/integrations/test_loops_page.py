"""Test that the code of docs/loops.md runs, and that accelerate's state holds the ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dp_tools import data, mlp, private, sgd

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def run(names: dict[str, Any], *which: int) -> dict[str, Any]:
    for number in which:
        exec(compile(blocks()[number], str(PAGE), "exec"), names)
    return names


def test_the_plain_and_the_attached_loop_run() -> None:
    assert len(blocks()) == 4
    names = run({}, 0)
    first = names["optimizer"]
    names = run(names, 2)
    assert first.ledger.steps == names["optimizer"].ledger.steps == 3
    assert first.epsilon() == names["optimizer"].epsilon()


def test_the_rest_of_the_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run({"path": tmp_path / "run.pt"}, 0, 1)
    assert names["optimizer"].ledger.steps == 62
    assert names["scheduler"].get_last_lr()[0] < 1e-9
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == [31, 62]
    run(run({"path": tmp_path / "run.pt"}, 0), 1)  # the run is over, so nothing is left of it
    assert not capsys.readouterr().out


def test_zero_grad_may_be_left_out() -> None:
    """The page says so: the steps are those of a loop that calls it."""
    found = []
    for clears in (True, False):
        model = mlp()
        optimizer = private(model, inner=sgd(model, 0.1))
        for _ in range(3):
            optimizer.backward(data())
            optimizer.step()
            if clears:
                optimizer.zero_grad()
        found.append(list(model.parameters()))
    assert all(map(torch.equal, *found))


def test_the_recipe_for_accelerate_saves_and_restores(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    names = run({"folder": tmp_path}, 0, 3)
    assert names["optimizer"].ledger.steps == 3
    fresh = blocks()[3].split("for batch in loader")[0]
    restored: dict[str, Any] = run({}, 0)
    exec(compile(fresh, str(PAGE), "exec"), restored)
    restored["accelerator"].load_state(tmp_path)
    assert restored["optimizer"].ledger.steps == 3
    assert list(restored["loader"]) == []  # all of its batches are used
    for one, other in zip(restored["model"].parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(one, other)
