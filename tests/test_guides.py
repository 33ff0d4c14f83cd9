"""The code of the guides runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.nightly
@pytest.mark.slow
def test_choosing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks("choosing.md"):
        exec(compile(block.replace("60_000", "6_000"), "choosing.md", "exec"), names)
    shown = capsys.readouterr().out
    # The claim of the page: noise on the mean falls with the batch size.
    rows = re.findall(r"^(\d+) (\d+) ([\d.e-]+)$", shown, re.MULTILINE)
    noise = [float(row[2]) for row in rows]
    assert len(noise) == 3
    assert noise == sorted(noise, reverse=True)
    assert "linear" in shown


def test_migrating_runs() -> None:
    """The parts of clipgrad; those of the other libraries are not installed."""
    own = [block for block in blocks("migrating.md") if "clipgrad" in block]
    assert len(own) == 2
    dataset = TensorDataset(torch.randn(300, 3), torch.randn(300, 1))
    model = nn.Linear(3, 1)
    names: dict[str, Any] = {
        "dataset": dataset,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.MSELoss(),
        "loss": lambda p, x, y: nn.functional.mse_loss(x @ p["w"], y),
        "params": {"w": torch.zeros(3, 1)},
        "noise_multiplier": 1.0,
    }
    exec(own[0].replace("epochs=10", "steps=3"), names)
    assert names["optimizer"].ledger.steps == 3
    exec(own[1], names)
    assert names["result"].grads["w"].shape == (3, 1)
