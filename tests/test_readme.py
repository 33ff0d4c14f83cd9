"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks() -> list[str]:
    """The README's blocks of Python, in order; the first is the training loop."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, checkpoint, functional = python_blocks()
    torch.manual_seed(0)
    images, labels = torch.randn(600, 8, 8), torch.randint(0, 10, (600,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    names: dict[str, Any] = {
        "dataset": torch.utils.data.TensorDataset(images, labels),
        "model": model,
        "images": images,
        "labels": labels,
        "params": {"w": torch.zeros(64, 10)},
        "loss": lambda p, x, y: F.cross_entropy(x.flatten(1) @ p["w"], y),
    }
    before = [p.clone() for p in model.parameters()]
    exec(loop.replace("steps=1000", "steps=4"), names)
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert 2.9 < names["optimizer"].epsilon() <= 3.0
    exec(checkpoint, names)
    assert (tmp_path / "run.pt").exists()
    exec(functional, names | {"images": images, "labels": labels})
