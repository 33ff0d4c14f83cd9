"""Checkpoints: whole or not at all, and a training that is killed loses neither data nor budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clipgrad
from clipgrad import checkpoint, load_checkpoint, save_checkpoint
from tests.killed_training import POINTS, plan_of

STEPS = 8


def run(folder: Path, *kill: Any) -> int:
    """One life of the training; its exit code."""
    command = [sys.executable, "-m", "tests.killed_training", str(folder), str(STEPS)]
    return subprocess.run([*command, *map(str, kill)], check=False).returncode


@pytest.mark.nightly
def test_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Five lives end at five points, a sixth finishes: the log is what is promised."""
    for life, point in enumerate(POINTS):
        assert run(tmp_path, point, life + 2) == -9, point
    assert run(tmp_path) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    print(*log, sep="\n")

    # No step is lost and none is counted twice.
    assert [entry["steps"] for entry in log if "saved" in entry] == list(range(1, STEPS + 1))
    starts = [entry["steps"] for entry in log if "started" in entry]
    assert starts == [0, 1, 2, 3, 4, 5]
    (end,) = [entry for entry in log if "finished" in entry]
    assert end["epsilon"] == pytest.approx(plan_of(STEPS).epsilon(), rel=1e-9)

    # Noise that died with a process is never drawn again.
    noises = [entry["noise"] for entry in log if "noise" in entry]
    assert len(noises) == STEPS + 4  # four of the five lives ended after the noise was drawn
    assert len(set(noises)) == len(noises)
    assert not list(tmp_path.glob(".*.part"))


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "run.pt", nn.Linear(2, 1)
    save_checkpoint(path, {"model": model})
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)

    def failing(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", failing)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"model": model})
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]
    assert load_checkpoint(path, {"model": model})
    assert torch.equal(model.weight, before)


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    assert not load_checkpoint(tmp_path / "none.pt", {"model": nn.Linear(2, 1)})


def test_other_parts_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", nn.Linear(2, 1)
    save_checkpoint(path, {"model": model, "inner": torch.optim.SGD(model.parameters())})
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(ValueError, match=r"parts must be those that were saved.*'inner', 'model'"):
        load_checkpoint(path, {"model": model})
    assert torch.equal(model.weight, before + 1)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(2, 1).state_dict(), path)
    with pytest.raises(ValueError, match="no checkpoint of save_checkpoint"):
        load_checkpoint(path, {})


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"format": "clipgrad.checkpoint/1", "parts": {"model": Evil()}}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_checkpoint(path, {"model": nn.Linear(2, 1)})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_a_plan_that_would_forget_steps_leaves_the_model_alone(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    plan = clipgrad.PrivacyPlan(
        num_samples=64,
        expected_batch_size=8,
        steps=4,
        delta=1e-3,
        noise_multiplier=1.0,
        accountant="rdp",
    )
    model = nn.Linear(4, 1)
    optimizer = clipgrad.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda m, x: m(x).square().mean(),
        plan=plan,
    )
    loader = clipgrad.poisson_loader(data, plan=plan)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    for step, (x,) in enumerate(loader):
        optimizer.backward(x)
        optimizer.step()
        if step == 1:
            save_checkpoint(tmp_path / "run.pt", parts)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="forgets some of the 4"):
        load_checkpoint(tmp_path / "run.pt", parts)
    assert all(map(torch.equal, before, model.parameters()))
