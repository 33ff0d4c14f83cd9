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


def run(page: str) -> dict[str, Any]:
    """The names that are left after all blocks of a page; the accountant is the one that takes no seconds."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        quick = block.replace("delta=1e-4\n", 'delta=1e-4, accountant="rdp"\n')
        exec(compile(quick, page, "exec"), names)
    return names


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


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("images.md", marks=[pytest.mark.slow, pytest.mark.nightly]),
        "memory.md",
        "mixed-precision.md",
        "performance.md",
    ],
)
def test_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(page)
    if page == "performance.md":
        assert "linear" in capsys.readouterr().out
    steps = {"images.md": 5, "memory.md": 3}.get(page)
    assert steps is None or names["optimizer"].ledger.steps == steps


@pytest.mark.slow
@pytest.mark.nightly
# PEFT asks transformers for a name that it is about to drop.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
def test_language_models_run() -> None:
    """A plain loop over texts of different lengths, then one over adapters alone."""
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    names = run("language-models.md")
    assert names["optimizer"].ledger.steps == 10
    assert 7 < names["optimizer"].epsilon() <= 8
    assert all("lora" in name for name, p in names["tuned"].named_parameters() if p.requires_grad)


def test_migrating_runs() -> None:
    """The parts of clipgrad; those of the other libraries are not installed."""
    own = [block for block in blocks("migrating.md") if "clipgrad" in block]
    assert len(own) == 3
    names: dict[str, Any] = {
        "dataset": TensorDataset(torch.randn(300, 3), torch.randn(300, 1)),
        "loss": lambda p, x, y: nn.functional.mse_loss(x @ p["w"], y),
        "params": {"w": torch.zeros(3, 1)},
        "noise_multiplier": 1.0,
    }
    for loop in own[:2]:
        model = nn.Linear(3, 1)
        names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        names["criterion"] = nn.MSELoss()
        exec(loop.replace("epochs=10", 'accountant="rdp", steps=3'), names)
        assert names["optimizer"].ledger.steps == 3
    exec(own[2], names)
    assert names["result"].grads["w"].shape == (3, 1)
